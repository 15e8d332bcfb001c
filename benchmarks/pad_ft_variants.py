"""What benchmarks/pad_ft.py compares: settings of PAD-FT, the classics and CGD, by the names of its cells."""

from typing import Any

from unpoison.defenses.cgd import CGDConfig
from unpoison.defenses.clipping import ClippingConfig
from unpoison.defenses.pad_ft import PADFTConfig

SIZES = (10, 25, 50, 100, 250, 500, 1000)


def clips(**more: Any) -> ClippingConfig:
    return ClippingConfig(**more)


PAD_FT = {
    "pad-ft": PADFTConfig(),
    "pad-ft-paper": PADFTConfig.as_published(),
}
VARIANTS = {
    **{f"clip-{rule}": PADFTConfig(clip=clips(rule=rule)) for rule in ("none", "quantile", "learned", "margin")},
    **{f"quantile-{q}": PADFTConfig(clip=clips(quantile=q), unlearn=0.0) for q in (0.9, 0.95, 0.98, 0.99, 0.999)},
    "no-unlearning": PADFTConfig(unlearn=0.0),
    **{f"unlearn-{weight}": PADFTConfig(unlearn=weight) for weight in (0.2, 0.4, 0.7)},
    **{f"n-{n}": PADFTConfig(per_class=n) for n in SIZES},
    **{
        f"steps-{steps}-batch-{size}": PADFTConfig(clip=clips(rule="suspects", suspect_steps=steps, suspect_batch=size))
        for steps, size in ((80, 200), (40, 200), (80, 100), (60, 128))
    },
    "suspect-weight-0.25": PADFTConfig(clip=clips(rule="suspects", suspect_weight=0.25)),
    "suspect-epsilon-1e-8": PADFTConfig(clip=clips(rule="suspects", suspect_epsilon=1e-8)),
    "odd-left-out": PADFTConfig(odd_labels="leave-out"),
    "reset-head": PADFTConfig(reset_head=True),
    "share-0.5": PADFTConfig(scores_share=0.5),
    "own-rule": PADFTConfig(scores_share=0.0),
    "views-4": PADFTConfig(views=4),
    "rate-0.01": PADFTConfig(learning_rate=0.01, smaller_rates=()),
}

CLASSIC_NAMES = ("ft", "ft-sam", "fine-pruning", "nad", "anp", "i-bau", "abl")
LONG_UNLEARNING = {"training_epochs": 12, "steps": 100, "check_every": 10}  # what ABL had first
CLASSIC_VARIANTS = {
    "i-bau-rate-0.0001": ("i-bau", {"radius": 2.5, "ascent_rate": 0.5, "learning_rate": 1e-4}),
    "i-bau-radius-1-rate-1e-4": ("i-bau", {"radius": 1.0, "learning_rate": 1e-4}),
    "abl-split": ("abl", LONG_UNLEARNING),
    "abl-epochs-10": ("abl", {"isolation": "own", "isolation_epochs": 10, **LONG_UNLEARNING}),
    "abl-training-16-steps-20": ("abl", {"training_epochs": 16, "steps": 20, "check_every": 5}),
    **{f"{kind}-rate-{rate}": (kind, {"learning_rate": rate, "smaller_rates": ()})
       for kind in ("ft", "ft-sam", "fine-pruning", "nad") for rate in (0.01, 0.03, 0.1)},
    **{f"anp-rate-{rate}-epsilon-{epsilon}": ("anp", {"learning_rate": rate, "epsilon": epsilon})
       for rate, epsilon in ((0.02, 0.2), (0.05, 0.4), (0.1, 0.4), (0.2, 0.4))},
    **{f"i-bau-radius-{radius}-rate-{rate}": ("i-bau", {"radius": radius, "learning_rate": rate})
       for radius in (1.0,) for rate in (3e-4, 1e-3, 3e-3)},
}  # fmt: skip
CGD_VARIANTS = {
    "cgd-authors-kl": CGDConfig(alpha=5e-4, teacher="all"),
    "cgd-all-classes": CGDConfig(teacher="all"),
    "cgd-alpha-0.05": CGDConfig(alpha=0.05),
}
