"""One cell of a grid: its inputs, the hash that names it, and what came of it, as one JSON file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from unpoison.benchmark.settings import (
    CLEAN,
    GIVEN,
    AttackSettings,
    DataSettings,
    Limits,
    MethodSettings,
    ModelSettings,
    Precision,
)
from unpoison.results import Drift, Interval
from unpoison.storage import JsonResult

VERSION = 1
"""Raised when the same inputs would give other figures than before."""
DEFAULTS = "method.defaults"
UNNAMED: Precision = "bf16"
"""The precision that no name counts: that of the cells which were kept before a grid said its own."""
DAMAGED = "damaged"
"""The status of a cell whose file cannot be read. No file says it, and the next run makes the cell again."""
ITS_VICTIM = "Its victim "
"""How the reason begins of a repair that was refused for its victim's sake."""
Status = Literal["done", "refused", "crashed", "timed out", "out of memory", "damaged"]


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the grid calls the parts of a cell: how tables show it."""

    data: str
    model: str
    attack: str
    rate: float
    method: str
    seed: int

    @property
    def row(self) -> tuple[str, str, str, float, str]:
        """All but the seed."""
        return self.data, self.model, self.attack, self.rate, self.method

    def __str__(self) -> str:
        attack = self.attack if self.attack == CLEAN else f"{self.attack} {100 * self.rate:g} %"
        return f"{self.data} / {self.model} / {attack} / {self.method} / seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All that determines a cell's figures. ``contents``: hashes of the sources and models that are files, and of the
    method's defaults.

    ``attack`` None: the clean control. ``method`` None: the victim as it is given.
    """

    names: Names
    data: DataSettings
    model: ModelSettings
    attack: AttackSettings | None
    method: MethodSettings | None
    least_asr: float
    precision: Precision = "no"
    contents: dict[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the name is a hash of: everything but the limits."""
        body = asdict(self)
        del body["limits"], body["precision"]
        del body["model"]["gpus"]
        body["attack"] = None if self.attack is None else self.attack.inputs()
        return {"benchmark": VERSION} | body | self.named_precision

    @property
    def named_precision(self) -> dict[str, str]:
        """The precision as names of cells and of shared steps count it."""
        return {} if self.precision == UNNAMED else {"precision": self.precision}

    @cached_property
    def key(self) -> str:
        return digest(self.inputs)

    @property
    def is_given(self) -> bool:
        return self.names.method == GIVEN

    def given(self) -> Cell:
        """The cell of the same victim before any defense: it has to be there first."""
        contents = {name: value for name, value in self.contents.items() if name != DEFAULTS}
        return replace(self, names=replace(self.names, method=GIVEN), method=None, contents=contents)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Rates of one model in percent with 95 % intervals (docs: metrics); None where nothing was attacked or asked.

    ``retrieval_asr``: of triggered images, or of texts where the trigger is in the text. ``image_to_text`` and
    ``text_to_image``: R@1. ``drift``: from the victim's embeddings.
    """

    c_acc: Interval
    asr: Interval | None = None
    asr_floor: Interval | None = None
    asr_excess: float | None = None
    ra: Interval | None = None
    retrieval_asr: Interval | None = None
    image_to_text: Interval | None = None
    text_to_image: Interval | None = None
    drift: Drift | None = None


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What a method did. ``changed_share``: percent of the model's numbers that are others than before.

    ``left_alone``: it found nothing to repair and handed the model back. ``detection``: how its split, its scores or
    its search meet the manifest (shares in percent, AUROC in [0, 1]; 0 or 100: ``target_found``, every target is among
    the suspects, and ``target_exact``, nothing else is). ``unlearnt`` there: percent of the pairs that UBT unlearns
    from or judges by. ``rebound``: the repaired model's figures after an epoch of plain fine-tuning on clean data.
    """

    accepted: bool
    reason: str
    protects: str
    changed_share: float
    left_alone: bool
    der: float | None
    config: dict[str, Any]
    detection: dict[str, float | None] = field(default_factory=dict)
    rebound: Figures | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """``seconds`` of the method itself, with the scores it needed, whether made now or found, by the clock, and of the
    ``processor`` (None: not measured); ``wall`` of this cell as it ran, ``cpu`` seconds of the same, ``memory`` the
    most resident MiB, ``threads``. ``resumed``: it went on where an interrupted run had stopped, so the times are of
    the rest alone, and no table shows them."""

    seconds: float = 0.0
    processor: float | None = None
    shared: float = 0.0
    wall: float = 0.0
    cpu: float = 0.0
    memory: float = 0.0
    threads: int = 1
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class CellResult(JsonResult):
    """What is kept of a cell. ``picture``: a test image without and with the trigger, as a PNG in base64.

    ``command`` makes the cell again. ``before`` are the victim's figures, ``after`` the repaired model's.
    """

    schema: ClassVar[str] = "bench-cell"
    key: str
    names: Names
    status: Status
    reason: str = ""
    hint: str = ""
    before: Figures | None = None
    after: Figures | None = None
    repaired: Repaired | None = None
    cost: Cost = field(default_factory=Cost)
    inputs: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    command: str = ""
    finished: str = ""
    picture: str | None = None


def digest(value: Any) -> str:
    """16 hexadecimal digits of a value that JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
