"""The explicit lists of attacks, detectors and defenses: the only list of names.

Imports nothing heavy: configs and functions are named by import path, ``module:attribute``, and resolved by
:func:`resolve` when they are needed. A new method is one entry here, a new attack one in
:mod:`unpoison.catalog_attacks`.
"""

from __future__ import annotations

import importlib
from typing import Any

from unpoison.catalog_attacks import ATTACKS
from unpoison.catalog_entry import NEEDS, Entry
from unpoison.errors import UnknownMethodError

__all__ = ["ATTACKS", "DEFENSES", "DETECTORS", "NEEDS", "Entry", "find", "resolve"]

DETECTORS = (
    Entry(
        name="cgd",
        kind="detector",
        idea="Ranks samples by CLIP's disbelief in the label and by how early a fresh network learns it.",
        paper='Xu et al., "CLIP-guided backdoor defense through entropy-based poisoned dataset separation", 2025',
        link="https://arxiv.org/abs/2507.05113",
        needs=("poisoned training set", "reference CLIP", "class names"),
        config="unpoison.defenses.cgd:CGDConfig",
        function="unpoison.api:scan_dataset",
    ),
    Entry(
        name="activation-clustering",
        kind="detector",
        idea="Splits each label's features into two clusters; a small one far away is suspect.",
        paper='Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018',
        link="https://arxiv.org/abs/1811.03728",
        needs=("poisoned training set",),
        config="unpoison.api_detectors:DetectorConfig",
        function="unpoison.api_detectors:scan_with_detector",
    ),
    Entry(
        name="spectral-signatures",
        kind="detector",
        idea="Ranks samples along the direction in which their label's features vary most.",
        paper='Tran et al., "Spectral Signatures in Backdoor Attacks", 2018',
        link="https://arxiv.org/abs/1811.00636",
        needs=("poisoned training set",),
        config="unpoison.api_detectors:DetectorConfig",
        function="unpoison.api_detectors:scan_with_detector",
    ),
    Entry(
        name="strip",
        kind="detector",
        idea="Lays other images over each one: a triggered image keeps its label.",
        paper='Gao et al., "STRIP", 2019',
        link="https://arxiv.org/abs/1902.06531",
        needs=("poisoned training set",),
        config="unpoison.api_detectors:DetectorConfig",
        function="unpoison.api_detectors:scan_with_detector",
    ),
    Entry(
        name="ibd-psc",
        kind="detector",
        idea="Scales the network's last weights: a triggered image keeps its label.",
        paper='Hou et al., "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling Consistency", 2024',
        link="https://arxiv.org/abs/2405.09786",
        needs=("poisoned training set",),
        config="unpoison.api_detectors:DetectorConfig",
        function="unpoison.api_detectors:scan_with_detector",
    ),
    Entry(
        name="dao",
        kind="detector",
        idea="Ranks images by how far they lie from their neighbours, against these and by local dimension.",
        paper='Huang et al., "Detecting Backdoor Samples in Contrastive Language Image Pretraining", 2025',
        link="https://arxiv.org/abs/2502.01385",
        needs=("suspicious pairs", "suspicious CLIP"),
        config="unpoison.api_pairs:PairDetectorConfig",
        function="unpoison.api_pairs:scan_pairs",
    ),
    Entry(
        name="slof",
        kind="detector",
        idea="Ranks images by how far they lie from their neighbours, against these.",
        paper='Huang et al., "Detecting Backdoor Samples in Contrastive Language Image Pretraining", 2025',
        link="https://arxiv.org/abs/2502.01385",
        needs=("suspicious pairs", "suspicious CLIP"),
        config="unpoison.api_pairs:PairDetectorConfig",
        function="unpoison.api_pairs:scan_pairs",
    ),
    Entry(
        name="k-distance",
        kind="detector",
        idea="Ranks images by the distance to their k-th neighbour.",
        paper='Huang et al., "Detecting Backdoor Samples in Contrastive Language Image Pretraining", 2025',
        link="https://arxiv.org/abs/2502.01385",
        needs=("suspicious pairs", "suspicious CLIP"),
        config="unpoison.api_pairs:PairDetectorConfig",
        function="unpoison.api_pairs:scan_pairs",
    ),
    Entry(
        name="similarity",
        kind="detector",
        idea="Ranks pairs by how little a reference CLIP finds the caption to fit the image.",
        paper='Liang et al., "Unlearning Backdoor Threats", 2024 (its first step)',
        link="https://arxiv.org/abs/2403.16257",
        needs=("suspicious pairs", "reference CLIP"),
        config="unpoison.api_pairs:PairDetectorConfig",
        function="unpoison.api_pairs:scan_pairs",
    ),
    Entry(
        name="density",
        kind="detector",
        idea="Ranks the least similar tenth of the pairs by how dense the suspect's embeddings are there.",
        paper='Liang et al., "Unlearning Backdoor Threats", 2024 (the density is ours)',
        link="https://arxiv.org/abs/2403.16257",
        needs=("suspicious pairs", "suspicious CLIP", "reference CLIP"),
        config="unpoison.api_pairs:PairDetectorConfig",
        function="unpoison.api_pairs:scan_pairs",
    ),
    Entry(
        name="exposure",
        kind="detector",
        idea="Finds pairs that do not match, are drawn together and say the same, and from these all alike.",
        paper='Liang et al., "Unlearning Backdoor Threats", 2024 (its stages; how they are filled is ours)',
        link="https://arxiv.org/abs/2409.19526",
        needs=("suspicious pairs", "suspicious CLIP", "reference CLIP"),
        config="unpoison.api_pairs:PairDetectorConfig",
        function="unpoison.api_pairs:scan_pairs",
    ),
    Entry(
        name="gain",
        kind="detector",
        idea="Overfits a copy on the least similar pairs and ranks all by how much more similar they become.",
        paper='Liang et al., "Unlearning Backdoor Threats", 2024 (its first stage)',
        link="https://arxiv.org/abs/2409.19526",
        needs=("suspicious pairs", "suspicious CLIP", "reference CLIP"),
        config="unpoison.api_pairs:PairDetectorConfig",
        function="unpoison.api_pairs:scan_pairs",
    ),
    Entry(
        name="mean",
        kind="detector",
        idea="Ranks pairs by the mean of their ranks under dao, similarity and density.",
        paper="Huang et al., 2025, and Liang et al., 2024; the ensemble is ours",
        link="https://arxiv.org/abs/2502.01385",
        needs=("suspicious pairs", "suspicious CLIP", "reference CLIP"),
        config="unpoison.api_pairs:PairDetectorConfig",
        function="unpoison.api_pairs:scan_pairs",
    ),
)

DEFENSES = (
    Entry(
        name="cgd",
        kind="defense",
        idea="Keeps training on the samples found clean and unlearns the suspect ones.",
        paper='Xu et al., "CLIP-guided backdoor defense through entropy-based poisoned dataset separation", 2025',
        link="https://arxiv.org/abs/2507.05113",
        needs=("victim model", "poisoned training set", "reference CLIP", "class names"),
        protects="the classifier's weights",
        config="unpoison.defenses.cgd:CGDConfig",
        function="unpoison.api:purify_with_cgd",
    ),
    Entry(
        name="pad-ft",
        kind="defense",
        idea="Clips activations and tunes the last layer on samples that the training set itself gives.",
        paper='Xu et al., "PAD-FT: A Lightweight Defense for Backdoor Attacks", 2024',
        link="https://arxiv.org/abs/2409.12072",
        needs=("victim model", "poisoned training set"),
        protects="the classifier's last layer, behind clipped activations",
        config="unpoison.defenses.pad_ft:PADFTConfig",
        function="unpoison.api_repairs:purify_with_pad_ft",
    ),
    Entry(
        name="ft",
        kind="defense",
        idea="Goes on training a classifier on the clean part of a split.",
        paper='Liu et al., "Fine-Pruning", 2018 (its baseline)',
        link="https://arxiv.org/abs/1805.12185",
        needs=("victim model", "poisoned training set", "reference CLIP", "class names"),
        protects="the classifier's weights",
        config="unpoison.defenses.baselines.ft:FTConfig",
        function="unpoison.api_repairs:purify_with_ft",
    ),
    Entry(
        name="ft-sam",
        kind="defense",
        idea="Fine-tunes toward flat minima, with larger steps away for larger weights.",
        paper='Zhu et al., "Enhancing Fine-Tuning based Backdoor Defense with Sharpness-Aware Minimization", 2023',
        link="https://arxiv.org/abs/2304.11823",
        needs=("victim model", "poisoned training set", "reference CLIP", "class names"),
        protects="the classifier's weights",
        config="unpoison.defenses.baselines.ft_sam:FTSAMConfig",
        function="unpoison.api_repairs:purify_with_ft_sam",
    ),
    Entry(
        name="fine-pruning",
        kind="defense",
        idea="Cuts off the features that clean samples leave idle, then fine-tunes.",
        paper='Liu et al., "Fine-Pruning", 2018',
        link="https://arxiv.org/abs/1805.12185",
        needs=("victim model", "poisoned training set", "reference CLIP", "class names"),
        protects="the classifier's weights",
        config="unpoison.defenses.baselines.fine_pruning:FinePruningConfig",
        function="unpoison.api_repairs:purify_with_fine_pruning",
    ),
    Entry(
        name="nad",
        kind="defense",
        idea="Distills attention maps from a fine-tuned copy.",
        paper='Li et al., "Neural Attention Distillation", 2021',
        link="https://arxiv.org/abs/2101.05930",
        needs=("victim model", "poisoned training set", "reference CLIP", "class names"),
        protects="the classifier's weights",
        config="unpoison.defenses.baselines.nad:NADConfig",
        function="unpoison.api_repairs:purify_with_nad",
    ),
    Entry(
        name="anp",
        kind="defense",
        idea="Prunes the neurons that small adversarial changes turn into a backdoor.",
        paper='Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", 2021',
        link="https://arxiv.org/abs/2110.14430",
        needs=("victim model", "poisoned training set", "reference CLIP", "class names"),
        protects="the classifier's weights",
        config="unpoison.defenses.baselines.anp:ANPConfig",
        function="unpoison.api_repairs:purify_with_anp",
    ),
    Entry(
        name="i-bau",
        kind="defense",
        idea="Unlearns the worst universal perturbation, with an implicit gradient.",
        paper='Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", 2022',
        link="https://arxiv.org/abs/2110.03735",
        needs=("victim model", "poisoned training set", "reference CLIP", "class names"),
        protects="the classifier's weights",
        config="unpoison.defenses.baselines.i_bau:IBAUConfig",
        function="unpoison.api_repairs:purify_with_i_bau",
    ),
    Entry(
        name="abl",
        kind="defense",
        idea="Trains a new classifier that isolates poison by its small loss and unlearns it.",
        paper='Li et al., "Anti-Backdoor Learning", 2021',
        link="https://arxiv.org/abs/2110.11571",
        needs=("victim model", "poisoned training set", "reference CLIP", "class names"),
        protects="the weights of a new classifier",
        config="unpoison.defenses.baselines.abl:ABLConfig",
        function="unpoison.api_repairs:purify_with_abl",
    ),
    Entry(
        name="par",
        kind="defense",
        idea="Pushes a CLIP's embeddings away from where they were while image-caption pairs stay matched.",
        paper='Singh et al., "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP", 2026',
        link="https://arxiv.org/abs/2412.00727",
        needs=("suspicious CLIP", "clean pairs"),
        protects="both towers' weights",
        config="unpoison.defenses.par:PARConfig",
        function="unpoison.api_clip:purify_with_par",
    ),
    Entry(
        name="ubt",
        kind="defense",
        idea="Exposes the training pairs that taught a CLIP its backdoor and unlearns their telling words.",
        paper='Liang et al., "Unlearning Backdoor Threats", 2024',
        link="https://arxiv.org/abs/2409.19526",
        needs=("suspicious CLIP", "suspicious pairs", "reference CLIP"),
        protects="the image tower's weights",
        config="unpoison.defenses.ubt:UBTConfig",
        function="unpoison.api_ubt:purify_with_ubt",
    ),
    Entry(
        name="clean-clip",
        kind="defense",
        idea="Fine-tunes a CLIP on image-caption pairs with self-supervision within each tower.",
        paper='Bansal et al., "CleanCLIP", 2023',
        link="https://arxiv.org/abs/2303.03323",
        needs=("suspicious CLIP", "clean pairs"),
        protects="both towers' weights",
        config="unpoison.defenses.baselines.clean_clip:CleanClipConfig",
        function="unpoison.api_clip:purify_with_clean_clip",
    ),
    Entry(
        name="fine-tuning",
        kind="defense",
        idea="Goes on training a CLIP on image-caption pairs.",
        paper='Bansal et al., "CleanCLIP", 2023 (its baseline)',
        link="https://arxiv.org/abs/2303.03323",
        needs=("suspicious CLIP", "clean pairs"),
        protects="both towers' weights",
        config="unpoison.defenses.baselines.fine_tuning:FineTuningConfig",
        function="unpoison.api_clip:purify_with_fine_tuning",
    ),
)


def find(name: str, entries: tuple[Entry, ...]) -> Entry:
    """The entry of this name. Raises UnknownMethodError with the closest name."""
    for entry in entries:
        if entry.name == name:
            return entry
    kind = entries[0].kind if entries else "method"
    raise UnknownMethodError(name, [entry.name for entry in entries], kind=kind)


def resolve(path: str) -> Any:
    """Import what ``module:attribute`` names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
