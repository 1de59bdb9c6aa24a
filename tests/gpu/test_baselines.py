"""The benchmark's baselines call what the installed SGLang, DeepGEMM and FlashMLA define, with arguments these take.

Read from their source: without a GPU some of these modules cannot be imported, and no kernel of them runs.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import EllipsisType

import pytest

import baselines

pytestmark = pytest.mark.needs_no_gpu
FOREIGN = ("sglang", "deep_gemm")
TREE = ast.parse(Path(baselines.__file__).read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}


def imported(function: ast.AST) -> dict[str, str]:
    """Local name: module and name, dotted, of what a function imports of other projects."""
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FOREIGN:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name: alias.name for alias in node.names if alias.name in FOREIGN}
    return found


def calls(function: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call of what the function imports, or of an attribute of an imported module."""
    names = imported(function)
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in names:
            yield names[node.func.id], node
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            if node.func.value.id in names:
                yield f"{names[node.func.value.id]}.{node.func.attr}", node


@cache
def source(module: str) -> ast.Module:
    """The parsed source of an installed module, found without importing it."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None and spec.origin is not None, f"{top} is not installed"
    place = Path(spec.origin).parent.joinpath(*parts)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def definition(dotted: str) -> ast.FunctionDef | EllipsisType:
    """The function's definition; ... where the module only gives the name to something else."""
    module, _, name = dotted.rpartition(".")
    for node in ast.walk(source(module)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ...
    raise AssertionError(f"{module} defines no {name}")


def signature(function: ast.FunctionDef) -> inspect.Signature:
    """Names, kinds and which of them have defaults."""
    a, kinds = function.args, inspect.Parameter
    positional = [(arg.arg, kinds.POSITIONAL_OR_KEYWORD) for arg in (*a.posonlyargs, *a.args)]
    required = len(positional) - len(a.defaults)
    found = [
        kinds(name, kind, default=kinds.empty if index < required else None)
        for index, (name, kind) in enumerate(positional)
    ]
    if a.vararg:
        found.append(kinds(a.vararg.arg, kinds.VAR_POSITIONAL))
    for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        found.append(kinds(arg.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if a.kwarg:
        found.append(kinds(a.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def bind(dotted: str, call: ast.Call) -> None:
    """Raises TypeError where the function does not take the call's arguments."""
    function = definition(dotted)
    if function is ...:
        return
    assert not any(isinstance(arg, ast.Starred) for arg in call.args), f"{dotted}: arguments that cannot be counted"
    signature(function).bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords if keyword.arg})


FOREIGN_USERS = [name for name, function in FUNCTIONS.items() if imported(function)]


def test_the_functions_are_found() -> None:
    called = {dotted for name in FOREIGN_USERS for dotted, _ in calls(FUNCTIONS[name])}
    assert len(FOREIGN_USERS) >= 15 and len(called) >= 18
    assert {"deep_gemm.fp8_gemm_nt", "sglang.kernels.ops.layernorm.mhc.mhc_fused_post_pre"} <= called


@pytest.mark.parametrize("name", FOREIGN_USERS)
def test_what_a_baseline_calls_exists_and_takes_its_arguments(name: str) -> None:
    function = FUNCTIONS[name]
    for dotted in imported(function).values():
        if "." in dotted:
            definition(dotted)
    for dotted, call in calls(function):
        bind(dotted, call)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("fused_hc_head(x, fn, scale, base, 1e-6)", "missing a required argument: 'hc_eps'"),
        ("fused_hc_head(x, fn, scale, base, 1e-6, 1e-6, splits=2)", "unexpected keyword argument 'splits'"),
    ],
)
def test_a_call_that_does_not_fit_is_found(call: str, problem: str) -> None:
    parsed = ast.parse(call, mode="eval").body
    assert isinstance(parsed, ast.Call)
    with pytest.raises(TypeError, match=problem):
        bind("sglang.kernels.ops.layernorm.mhc_head.fused_hc_head", parsed)


def test_a_name_that_is_gone_is_found() -> None:
    with pytest.raises(AssertionError, match="defines no hc_gone"):
        definition("sglang.kernels.ops.layernorm.mhc.hc_gone")
