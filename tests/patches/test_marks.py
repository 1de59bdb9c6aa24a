"""Marks and targets of the test suite: what a mark or a make target is meant to reach, it reaches."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from boxes import CHECKOUT

TESTS = CHECKOUT / "tests"
OF_PYTEST = {"filterwarnings", "parametrize", "skip", "skipif", "usefixtures", "xfail"}
FOLDER = {"needs_no_gpu": "gpu"}
"""Where a declared mark means something, which is where its conftest.py is."""


class Mark(NamedTuple):
    """One use of `pytest.mark.NAME`; reaches: whether pytest applies it to a test."""

    name: str
    line: int
    reaches: bool


def marks(source: str) -> list[Mark]:
    """Every use in a module, in the order of its lines."""
    tree = ast.parse(source)
    reached = {id(mark) for place in _places(tree) for mark in _uses(place)}
    found = [Mark(mark.attr, mark.lineno, id(mark) in reached) for mark in _uses(tree)]
    return sorted(found, key=lambda mark: mark.line)


def _places(tree: ast.Module) -> Iterator[ast.AST]:
    """Where pytest looks for marks: tests, `pytestmark`, parameters and what a conftest adds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test"):
            yield from node.decorator_list
        if isinstance(node, ast.Call):
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "marks")
            if isinstance(node.func, ast.Attribute) and node.func.attr == "add_marker":
                yield from node.args
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["pytestmark"]:
            yield node.value


def _uses(tree: ast.AST) -> list[ast.Attribute]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [node for node in found if ast.unparse(node.value) == "pytest.mark"]


def _sources() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("*.py")) if path != Path(__file__)}


def test_every_mark_is_on_a_test() -> None:
    found = {path.relative_to(TESTS): marks(source) for path, source in _sources().items()}
    assert sum(map(len, found.values())) > 100
    assert [(str(path), mark) for path, uses in found.items() for mark in uses if not mark.reaches] == []


def test_every_mark_is_declared_and_every_declared_one_used() -> None:
    used = {(mark.name, path) for path, source in _sources().items() for mark in marks(source)}
    ours = {name for name, _ in used} - OF_PYTEST
    declared = {
        name
        for path, source in _sources().items()
        for name in re.findall(r'addinivalue_line\("markers", "(\w+)', source)
        if path == TESTS / FOLDER[name] / "conftest.py"
    }
    assert ours == declared == set(FOLDER)
    outside = [str(path) for name, path in used if name in FOLDER and path.parent != TESTS / FOLDER[name]]
    assert outside == []
    assert "--strict-markers" in (CHECKOUT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("source", "reaches"),
    [
        ("@pytest.mark.skip\ndef test_a(): ...", True),
        ("class TestA:\n    @pytest.mark.skip(reason='x')\n    def test_a(self): ...", True),
        ("pytestmark = [pytest.mark.skip]", True),
        ("a = pytest.param(1, marks=pytest.mark.skip)", True),
        ("item.add_marker(pytest.mark.skip)", True),
        ("pytestmarks = pytest.mark.skip", False),
        ("@pytest.mark.skip\n@pytest.fixture\ndef a(): ...", False),
        ("def test_a():\n    pytestmark = pytest.mark.skip", False),
        ("pytest.mark.skip", False),
    ],
)
def test_a_mark_without_a_test_is_found(source: str, reaches: bool) -> None:
    assert [(mark.name, mark.reaches) for mark in marks(source)] == [("skip", reaches)]


def test_make_test_runs_every_folder_of_tests() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    recipe = makefile.partition("\ntest: setup\n")[2].partition("\n\n")[0]
    named = set(re.findall(r"\btests/(\w+)", recipe))
    assert named == {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    # Of a selection by names or marks that fits nothing any more, nobody would hear.
    assert not re.search(r"pytest\b.*\s-[km]\b", makefile)
