"""Who imports whom in the launcher and in the overlay: no circle, with imports inside of functions and for types."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from golden_plans import HERE

PACKAGES = {
    "launcher": HERE.parents[1] / "launch/sglang_sm120_launch", "overlay": HERE.parents[1] / "overlay/sglang_sm120",
}  # fmt: skip


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its name."""
    names = {path: path.relative_to(package.parent).with_suffix("").parts for path in package.rglob("*.py")}
    return {".".join(name[:-1] if name[-1] == "__init__" else name): path for path, name in names.items()}


def imported(name: str, path: Path, known: dict[str, Path], nodes: Iterator[ast.AST]) -> set[str]:
    """Which of the known modules these statements of a module import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".") if node.level else []
            parents = parts[: len(parts) - node.level + (path.name == "__init__.py")]
            origin = ".".join([*parents, *filter(None, [node.module])])
            submodules = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {one if one in known else origin for one in submodules}
    return found & known.keys() - {name}


def graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of its package that it imports, wherever the statement stands."""
    known = modules(package)
    return {name: imported(name, path, known, ast.walk(ast.parse(path.read_text()))) for name, path in known.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle(package: str):
    found = graph(PACKAGES[package])
    assert sum(map(len, found.values())) > len(found), "hardly an import was found: the graph is not read"
    try:
        TopologicalSorter(found).prepare()
    except CycleError as circle:
        pytest.fail(f"a circle of imports: {' <- '.join(circle.args[1])}")


def test_the_launcher_imports_its_own_modules_at_the_top():
    """But for `cli`, which names the chosen command's by a string."""
    known = modules(PACKAGES["launcher"])
    for name, path in known.items():
        tree = ast.parse(path.read_text())
        assert imported(name, path, known, ast.walk(tree)) == imported(name, path, known, iter(tree.body)), name


@pytest.mark.parametrize("inside", ("", "def later():\n    ", "if TYPE_CHECKING:\n    "), ids=("top", "lazy", "types"))
@pytest.mark.parametrize("words", ("from . import b", "from .b import x", "from p.b import x", "import p.b"))
def test_a_circle_is_found(words: str, inside: str, tmp_path: Path):
    files = {"__init__": "", "a": f"{inside}{words}", "b": "from p.q import x", "q/__init__": "from ..a import y"}
    (tmp_path / "p/q").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / f"p/{name}.py").write_text(text)
    with pytest.raises(CycleError):
        TopologicalSorter(graph(tmp_path / "p")).prepare()
