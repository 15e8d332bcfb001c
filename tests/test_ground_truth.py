"""Only attacks, evaluation, benchmark and what calls them may know which samples are poisoned."""

import ast
from pathlib import Path

import pytest

import unpoison

PACKAGE = Path(unpoison.__file__).parent
MAY_KNOW = ("attacks/", "evaluation/", "benchmark/", "cli/", "catalog.py", "demo.py", "__init__.py")
MODULES = [path for path in PACKAGE.rglob("*.py") if not path.relative_to(PACKAGE).as_posix().startswith(MAY_KNOW)]
TRIGGER_MODULES = (
    "badnet", "badnet_rand", "badnet_stripes", "blended", "blended_stripes", "blended_text", "blended_triangles",
    "sig", "wanet", "badclip_patch", "clean_image", "badnet_grid", "label_consistent", "bpp", "lf", "ctrl", "dct",
    "adap_blend", "adap_patch", "nashville", "trojvqa_patch", "text_key", "mmpoison", "input_aware_generator",
    "ssba", "ssba_network", "low_gap", "feature_small", "triggers",
)  # fmt: skip
TRIGGERS = {f"unpoison.attacks.{name}" for name in TRIGGER_MODULES}


def knows(module: str) -> bool:
    """Everything in attacks deals with the manifest, except the triggers themselves."""
    return module.startswith("unpoison.attacks.") and not any(f"{module}.".startswith(f"{name}.") for name in TRIGGERS)


def leaks(tree: ast.AST, package: str = "unpoison") -> list[str]:
    """Imports of the manifest's modules, and any use of the name Poisoning."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if knows(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = {f"{module}.{alias.name}" for alias in node.names} | {module}
            found += sorted(filter(knows, names))
            found += [alias.name for alias in node.names if alias.name == "Poisoning"]
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            found += [name] if name == "Poisoning" else []
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_methods_cannot_see_the_manifest(path: Path) -> None:
    package = ".".join(("unpoison", *path.relative_to(PACKAGE).parent.parts))
    assert leaks(ast.parse(path.read_text()), package) == []


@pytest.mark.parametrize(
    "code",
    [
        "import unpoison.attacks.poison",
        "import unpoison.attacks.manifest as m",
        "from unpoison.attacks import poison",
        "from unpoison.attacks.poison import plan_poisoning",
        "from ..attacks.manifest import Poisoning",
        "from ..attacks import poison",
        "def f(p: x.Poisoning): ...",
        "def f():\n    from unpoison.attacks.write import write_copy",
    ],
)
def test_the_check_finds_every_way_in(code: str) -> None:
    assert leaks(ast.parse(code), "unpoison.defenses")


def test_the_check_lets_triggers_through() -> None:
    assert leaks(ast.parse("from unpoison.attacks.badnet import BadNet"), "unpoison.defenses") == []
    assert len(MODULES) > 5
