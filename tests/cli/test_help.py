"""Help says the same everywhere, and needs nothing heavy."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

VERBS = (
    "",
    "scan",
    "purify",
    "demo",
    "scan dataset",
    "scan model",
    "purify cgd",
    "purify pad-ft",
    "purify ft",
    "purify abl",
    "purify par",
    "purify clean-clip",
    "purify fine-tuning",
    "purify ubt",
    "purify abl-clip",
    "purify cbpt",
    "purify rvpt",
    "keep",
    "attack",
    "evaluate",
    "report",
    "bench",
    "bench run",
    "bench status",
    "bench table",
    "methods",
    "schema",
    "doctor",
)
HEAVY = (
    "torch",
    "datasets",
    "transformers",
    "pyarrow",
    "msgspec",
    "numpy",
    "matplotlib",
    "PIL",
    "jinja2",
    "accelerate",
)


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str, here: Callable[..., Any], snapshot: SnapshotAssertion) -> None:
    result = here(*verb.split(), "--help")
    assert result.code == 0
    assert result.err == ""
    assert result.out == snapshot


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import json, sys\nfrom unpoison.cli import main\nmain(['--help'])\n"
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name or name.startswith('unpoison.cli.'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "cyclopts" in loaded
    assert not set(HEAVY) & set(loaded)
    assert [name for name in loaded if name.startswith("unpoison.cli.")] == ["unpoison.cli.help"]


def test_help_fits_a_narrow_terminal(here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = here("scan", "dataset", "--help").out.splitlines()
    assert max(map(len, lines)) <= 60
