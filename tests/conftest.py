"""Shape checks for every test run, and the research data where they are at hand."""

import importlib.util
import os
import pkgutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: more threads only wait for each other

import pytest
from jaxtyping import install_import_hook

# Not the command line: its annotations name what it imports only once a verb runs, and it holds no arrays.
PARTS = [part.name for part in pkgutil.iter_modules([str(Path(__file__).resolve().parents[1] / "src" / "unpoison")])]
install_import_hook([f"unpoison.{name}" for name in PARTS if name not in ("cli", "__main__")], "beartype.beartype")

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("UNPOISON_SHARED", ROOT.parent / "shared"))
REAL_DATA = pytest.StashKey[Counter]()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of research data; tests that need it skip where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"research data are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def small_clip() -> ModuleType:
    """The script that makes it."""
    spec = importlib.util.spec_from_file_location("small_clip", Path(__file__).parent / "defenses" / "small_clip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small_folder(small_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with a CLIP of two layers; nobody may write to it."""
    return small_clip.make_folder(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads here as in the processes of a test, so that sums round alike."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REAL_DATA] = Counter()
    config.pluginmanager.register(RealDataCount(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker("real_data")


class RealDataCount:
    """Counts the tests on real data; under CI, where the data are at hand, none of them may skip."""

    def __init__(self, config: pytest.Config) -> None:
        self.counts = config.stash[REAL_DATA]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "real_data" in report.keywords and (report.when == "call" or report.skipped):
            self.counts[report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"tests on real data: {dict(self.counts)}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        whole = not session.config.args or session.config.args == session.config.getini("testpaths")
        controller = not hasattr(session.config, "workerinput")
        strict = bool(os.environ.get("CI")) and (SHARED / "data").is_dir() and controller
        if strict and whole and (self.counts["skipped"] or not self.counts["passed"]):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
