"""Shape checks for every test run, and the research data where they are at hand."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("unpoison", "beartype.beartype")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of research data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("UNPOISON_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"research data are not at {folder}")
    return folder
