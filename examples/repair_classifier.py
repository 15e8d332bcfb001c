"""Repair a classifier with its own training set, and save it in the format that it came in.

python examples/repair_classifier.py victim/ photos/ repaired/
"""

import sys
from pathlib import Path

from unpoison import load_classifier, load_clip, open_images, purify_with_cgd, save_classifier


def main(model: str, source: str, output: str) -> None:
    classifier = load_classifier(model)
    images = open_images(source, class_names=classifier.class_names)
    outcome = purify_with_cgd(classifier, images, clip=load_clip("tiny"))
    print(outcome.purification.reason)
    if not outcome.purification.accepted:
        sys.exit("The repaired model was not accepted; nothing was written.")
    save_classifier(outcome.classifier, Path(output))  # pyright: ignore[reportArgumentType]
    outcome.purification.save(Path(output) / "purification.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
