"""What benchmarks/par.py compares: the methods of the table, the knobs of the frontier, the variants of the tuning."""

from dataclasses import dataclass, field, replace
from typing import Any

from unpoison.defenses.par import RECOMMENDED, RECOMMENDED_FACTOR


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to repair: a method and what it is told beyond the grid's steps and batch.

    ``rate`` is a factor on the scaled learning rate. ``suspect_share``: the weights handed back are this share of the
    suspect's and the rest the repaired ones', a point on the straight line between the two. ``made_up``: on pictures of
    the shapes world, which show none of the classes that are measured. ``aligned``: distances after the best rotation.
    """

    method: str
    config: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    suspect_share: float = 0.0
    made_up: bool = False
    aligned: bool = False


FROZEN = {"text_tower": "frozen"}
RELATIONS = {"distill": "relations"}
VIEWS = {"crop": 2, "flip": True}
ADVERSARY = {"adversary_share": 0.5}
BOUNDED = {**RECOMMENDED, "adversary_share": 0.3, "adversary_values": 0.0, "adversary_start": 0.0}
STARTED = BOUNDED | {"adversary_values": 0.05, "adversary_start": 0.1}
VARIANTS = {
    "frozen": Variant(method="par", config=FROZEN),
    "relations": Variant(method="par", config=RELATIONS),
    "latched": Variant(method="par", config={"recovery": "latched"}),
    "aligned": Variant(method="par", aligned=True),
    "aligned-1": Variant(method="par", config={"tau": 1.0}, aligned=True),
    "views": Variant(method="par", config=VIEWS),
    "frozen-relations": Variant(method="par", config=FROZEN | RELATIONS),
    "frozen-views": Variant(method="par", config=FROZEN | VIEWS),
    "frozen-relations-views": Variant(method="par", config=FROZEN | RELATIONS | VIEWS),
    "frozen-relations-latched": Variant(method="par", config=FROZEN | RELATIONS | {"recovery": "latched"}),
    "averaged": Variant(method="par", suspect_share=0.3),
    "frozen-relations-averaged": Variant(method="par", config=FROZEN | RELATIONS, suspect_share=0.3),
    **{
        f"frozen-relations-views-{rate}": Variant(method="par", config=FROZEN | RELATIONS | VIEWS, rate=rate)
        for rate in (2.0, 4.0, 8.0)
    },
    **{
        f"adversary-{rate}": Variant(method="par", config=FROZEN | RELATIONS | VIEWS | ADVERSARY, rate=rate)
        for rate in (1.0, 2.0, 4.0)
    },
    **{
        f"adversary-tau-{tau}": Variant(
            method="par", config=FROZEN | RELATIONS | VIEWS | ADVERSARY | {"tau": tau}, rate=2.0
        )
        for tau in (0.1, 0.5, 1.0)
    },
    **{
        f"adversary-tau-0.5-share-{share}": Variant(
            method="par", config=FROZEN | RELATIONS | VIEWS | {"adversary_share": share, "tau": 0.5}, rate=2.0
        )
        for share in (0.2, 0.3, 0.7)
    },
    **{
        f"adversary-epsilon-{epsilon}": Variant(
            method="par",
            config=FROZEN
            | RELATIONS
            | VIEWS
            | {
                "adversary_share": 0.4,
                "tau": 0.5,
                "adversary_epsilon": epsilon / 255,
                "adversary_step": 4 / 255,
            },
            rate=2.0,
        )
        for epsilon in (32, 64)
    },
    **{
        f"values-{share}": Variant(method="par", config=BOUNDED | {"adversary_values": share}, rate=2.0)
        for share in (0.02, 0.05, 0.1)
    },
    **{
        f"values-{share}-start-{start}": Variant(
            method="par", config=BOUNDED | {"adversary_values": share, "adversary_start": start}, rate=2.0
        )
        for share in (0.0, 0.05)
        for start in (0.1, 0.2)
    },
    "started": Variant(method="par", config=STARTED, rate=2.0),
    "started-rate-1": Variant(method="par", config=STARTED, rate=1.0),
    "started-share-0.2": Variant(method="par", config=STARTED | {"adversary_share": 0.2}, rate=2.0),
    "started-distill-2": Variant(method="par", config=STARTED | {"distill_weight": 2.0}, rate=2.0),
    "values-0.05-share-0.45": Variant(
        method="par", config=BOUNDED | {"adversary_values": 0.05, "adversary_share": 0.45}, rate=2.0
    ),
    "adversary-tau-0.5-distill-3": Variant(
        method="par", config=FROZEN | RELATIONS | VIEWS | ADVERSARY | {"tau": 0.5, "distill_weight": 3.0}, rate=2.0
    ),
    "adversary-tau-0.5-noviews": Variant(method="par", config=FROZEN | RELATIONS | ADVERSARY | {"tau": 0.5}, rate=2.0),
    **{
        f"adversary-share-{share}": Variant(
            method="par", config=FROZEN | RELATIONS | VIEWS | {"adversary_share": share}, rate=2.0
        )
        for share in (0.2, 0.35, 0.8)
    },
    **{
        f"both-adversary-{rate}": Variant(method="par", config=RELATIONS | VIEWS | ADVERSARY, rate=rate)
        for rate in (1.0, 2.0, 4.0)
    },
    **{f"views-{rate}": Variant(method="par", config=VIEWS, rate=rate) for rate in (2.0, 4.0)},
    **{f"frozen-views-{rate}": Variant(method="par", config=FROZEN | VIEWS, rate=rate) for rate in (2.0, 4.0)},
    **{f"tau-{tau}": Variant(method="par", config={"tau": tau}) for tau in (0.5, 1.0, 1.5, 2.5)},
    **{f"rate-{rate}": Variant(method="par", rate=rate) for rate in (0.5, 2.0, 4.0, 8.0, 16.0)},
    **{
        f"{method}-{rate}": Variant(method=method, rate=rate)
        for method in ("clean-clip", "fine-tuning")
        for rate in (4.0, 8.0, 16.0, 32.0)
    },
}
OURS = Variant(method="par", config=RECOMMENDED, rate=RECOMMENDED_FACTOR)
"""What :meth:`PARConfig.recommended` does; chosen by ``--set tune``."""
REPAIRS = {
    "fine-tuning": Variant(method="fine-tuning", rate=16.0),  # all three chosen by --set tune too
    "clean-clip": Variant(method="clean-clip", rate=16.0),
    "par": Variant(method="par", rate=4.0),
    "ours": OURS,
}
VARIANTS |= {
    "ours-averaged": replace(OURS, suspect_share=0.3),
    "ours-latched": replace(OURS, config=RECOMMENDED | {"recovery": "latched"}),
    "ours-aligned": replace(OURS, aligned=True),
    "ours-both-towers": replace(OURS, config=RECOMMENDED | {"text_tower": "train"}),
    "ours-no-relations": replace(OURS, config=RECOMMENDED | {"distill": "none"}),
    "ours-no-adversary": replace(OURS, config=RECOMMENDED | {"adversary_share": 0.0}),
    "par-made-up": replace(REPAIRS["par"], made_up=True),
    "ours-always": replace(OURS, config=RECOMMENDED | {"search_concepts": 0}),
    "ours-made-up": replace(OURS, made_up=True, config=RECOMMENDED | {"search_concepts": 0}),
}
METHODS: dict[str, Variant | None] = {"none": None, **REPAIRS}
KNOBS = {  # the frontier: what turns between a clean model's accuracy and the attack's end
    "par": [replace(REPAIRS["par"], config={"tau": tau}) for tau in (0.5, 1.0, 1.5, 2.0, 2.15, 2.5)],
    "clean-clip": [replace(REPAIRS["clean-clip"], rate=rate) for rate in (1.0, 4.0, 8.0, 16.0, 32.0)],
    "ours": [replace(OURS, config=RECOMMENDED | {"adversary_share": share}) for share in (0.03, 0.1, 0.2, 0.4, 0.8)],
}
