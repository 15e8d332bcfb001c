"""What the repairs of CLIP models are told on the command line, and what it names, opened before any training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from unpoison.cli.options import METHOD, READING, TEST, Planned, Reading

if TYPE_CHECKING:
    from unpoison.attacks.parts import PoisoningParts
    from unpoison.data.pairs import ImageTextPairs
    from unpoison.data.sources import LabelledImages
    from unpoison.evaluation.clip import TargetedAttack
    from unpoison.results import ClipEvaluation
    from unpoison.runs import Run


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train, whichever the method."""

    steps: Annotated[
        int | None,
        Parameter(group=METHOD, show_default=False, help="Optimizer steps. [default: by the number of pairs]"),
    ] = None
    batch_size: Annotated[
        int | None,
        Parameter(group=METHOD, show_default=False, help="Pairs a step, over all processes. [default: as above]"),
    ] = None
    learning_rate: Annotated[
        float | None,
        Parameter(group=METHOD, show_default=False, help="Highest learning rate. [default: by the model's size]"),
    ] = None
    bound: Annotated[
        float | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="Largest fall of held-out accuracy, in points, that is accepted; half of what is above chance at most."
            " [default: 10]",
        ),
    ] = None
    published: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=METHOD,
            help="The paper's learning rate, batch and epochs, whatever the model's size and the number of pairs.",
        ),
    ] = False
    precision: Annotated[
        Literal["no", "bf16", "fp16"] | None,
        Parameter(group=METHOD, show_default=False, help="Mixed precision. [default: as accelerate is configured]"),
    ] = None
    config: Annotated[
        Path | None, Parameter(group=METHOD, show_default=False, help="TOML file with any keys of the method's config.")
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PairReading:
    """How to read the pairs."""

    image_column: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Column that holds the images.")
    ] = None
    caption_column: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Column that holds the captions.")
    ] = None
    split: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Split of a source that has several.")
    ] = None
    strict: Annotated[
        bool,
        Parameter(negative="", group=READING, show_default=False, help="Stop at the first row that cannot be used."),
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Testing:
    """What to measure before and after."""

    test: Annotated[
        str | None,
        Parameter(
            metavar="SOURCE",
            group=TEST,
            show_default=False,
            help="Clean labelled test images: zero-shot accuracy before and after.",
        ),
    ] = None
    manifest: Annotated[
        Path | None,
        Parameter(
            group=TEST,
            show_default=False,
            help="Poison manifest, of images or of pairs: attack success before and after.",
        ),
    ] = None
    retrieval: Annotated[
        str | None,
        Parameter(
            metavar="SOURCE", group=TEST, show_default=False, help="Test pairs: R@1, R@5, R@10 before and after."
        ),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ClipRepairOptions:
    """What every training of a CLIP can be told, beside its pairs and the method's own options."""

    training: Training = Training()
    testing: Testing = Testing()
    reading: PairReading = PairReading()
    running: Planned = Planned()


TrainedOn = Annotated[
    str,
    Parameter(
        metavar="SOURCE",
        help="The pairs that it was trained on, poison included: parquet, CSV, JSONL, shards or a folder.",
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the pairs come from: found ones, made-up ones or both."""

    pairs: Annotated[
        str | None,
        Parameter(
            metavar="SOURCE",
            show_default=False,
            help="Clean image-caption pairs: parquet, CSV, JSONL, shards or a folder.",
        ),
    ] = None
    synthetic: Annotated[
        str | None,
        Parameter(
            metavar="SOURCE",
            show_default=False,
            help="Made-up pairs, instead of others or beside them: shapes:N, or any source of pictures and captions.",
        ),
    ] = None

    def open(self, options: Planned, reading: dict[str, Any]) -> ImageTextPairs:
        """Both as one set; ``reading`` is about ``pairs``, ``limit`` about each. Raises UsageError without any."""
        from unpoison.data.pairs import join_pairs, open_pairs
        from unpoison.errors import UsageError

        few = {"limit": options.limit, "seed": options.seed}
        parts: dict[str, ImageTextPairs] = {}
        if self.pairs is not None:
            parts["pairs"] = open_pairs(self.pairs, **few, **reading)
        if self.synthetic is not None:
            parts["synthetic"] = open_pairs(self.synthetic, **few)
        if not parts:
            raise UsageError(
                "A repair needs image-caption pairs.",
                hint="Name clean ones with --pairs SOURCE, made-up ones with --synthetic SOURCE, or both.",
            )
        return join_pairs(parts) if len(parts) > 1 else next(iter(parts.values()))

    def made_up(self, opened: ImageTextPairs) -> int:
        """How many of what :meth:`open` gave are made up."""
        if self.synthetic is None:
            return 0
        return len(opened) if self.pairs is None else sum(name.startswith("synthetic/") for name in opened.ids)


@dataclass(frozen=True, kw_only=True)
class Tests:
    """What ``Testing`` names, opened before any training: a mistake in it must not cost hours."""

    images: LabelledImages | None = None
    poisoning: TargetedAttack | PoisoningParts | None = None
    retrieval: ImageTextPairs | None = None
    inputs: dict[str, Any]

    @property
    def encoded(self) -> int:
        """Images that one evaluation puts through the model."""
        images = 0 if self.images is None else len(self.images)
        pairs = 0 if self.retrieval is None else len(self.retrieval)
        attacks = 0 if self.poisoning is None else len(getattr(self.poisoning, "parts", (self.poisoning,)))
        return (images + pairs) * (1 + attacks)

    def evaluate(
        self, clip: Any, run: Run, *, name: str, suspect: Any = None, classes: Any = None
    ) -> ClipEvaluation | None:
        """One evaluation with the model's name as the user knows it; None without test images.

        ``classes``: class embeddings instead of the filled templates'.
        """
        from unpoison.evaluation.clip import evaluate_clip

        if self.images is None:
            return None
        return evaluate_clip(
            clip,
            self.images,
            classes=classes,
            poisoning=self.poisoning,
            retrieval=self.retrieval,
            suspect=suspect,
            run=run,
            name=name,
        )


def open_tests(testing: Testing, reading: Reading = Reading(), *, limit: int | None = None, seed: int = 0) -> Tests:
    """``reading`` is about the labelled images; ``limit`` about these and about the pairs, drawn by ``seed``."""
    from unpoison.cli.running import describe, open_source
    from unpoison.errors import UsageError

    for option in ("manifest", "retrieval"):
        if getattr(testing, option) is not None and testing.test is None:
            raise UsageError(f"--{option} needs test images.", hint="Give them with --test LABELLED_IMAGES.")
    if testing.test is None:
        return Tests(inputs={"test": None})
    images = open_source(testing.test, reading, limit=limit, seed=seed)
    inputs: dict[str, Any] = {"test": testing.test, "test_content": describe(images)}
    poisoning = retrieval = None
    if testing.manifest is not None:
        from hashlib import blake2b

        from unpoison.attacks.parts import load_manifest

        poisoning = load_manifest(testing.manifest)
        digest = blake2b(testing.manifest.read_bytes(), digest_size=16).hexdigest()
        inputs |= {"manifest": str(testing.manifest), "manifest_content": digest}
    if testing.retrieval is not None:
        from unpoison.data.pairs import open_pairs

        retrieval = open_pairs(testing.retrieval, limit=limit, seed=seed)
        inputs |= {"retrieval": testing.retrieval, "retrieval_content": describe(retrieval)}
    return Tests(images=images, poisoning=poisoning, retrieval=retrieval, inputs=inputs)
