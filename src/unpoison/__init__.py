"""unpoison finds and removes backdoors: in labelled image sets, in classifiers, and in CLIP models."""

__version__ = "0.1.0"
