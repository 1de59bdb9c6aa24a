"""Which functions of other projects a module of ours calls, and what these accept.

Read from their source: without a GPU some of these modules cannot be imported, and no kernel of them runs.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import EllipsisType, ModuleType

FOREIGN = ("sglang", "deep_gemm")


def functions(module: ModuleType) -> dict[str, ast.FunctionDef]:
    """The functions of a module of ours, parsed."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


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


def definition(dotted: str) -> ast.FunctionDef | ast.ClassDef | EllipsisType:
    """The function's or class's definition; ... where the module only gives the name to something else."""
    module, _, name = dotted.rpartition(".")
    for node in ast.walk(source(module)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ...
    raise AssertionError(f"{module} defines no {name}")


def signature(function: ast.FunctionDef | ast.ClassDef) -> inspect.Signature:
    """Names, kinds and which of them have defaults; of a class, which is a NamedTuple, its fields."""
    kinds = inspect.Parameter
    if isinstance(function, ast.ClassDef):
        fields = [node for node in function.body if isinstance(node, ast.AnnAssign)]
        return inspect.Signature([
            kinds(field.target.id, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if field.value is None else None)
            for field in fields if isinstance(field.target, ast.Name)
        ])  # fmt: skip
    a = function.args
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


def bind(dotted: str, call: ast.Call) -> dict[str, str]:
    """What the call gives to each parameter, as source; nothing where the definition is not in the module.

    A starred argument at the end fills the parameters that have no default.

    Raises:
        TypeError: the function does not take the call's arguments.
    """
    function = definition(dotted)
    if function is ...:
        return {}
    accepted, given = signature(function), list(call.args)
    if given and isinstance(given[-1], ast.Starred):
        rest = given.pop()
        kinds = inspect.Parameter
        plain = [p for p in accepted.parameters.values() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
        given += [rest] * (sum(p.default is kinds.empty for p in plain) - len(given))
    elif any(isinstance(arg, ast.Starred) for arg in given):
        raise TypeError(f"{dotted}: arguments that cannot be counted")
    bound = accepted.bind(*given, **{keyword.arg: keyword.value for keyword in call.keywords if keyword.arg})
    return {name: ast.unparse(value) for name, value in bound.arguments.items()}
