"""What Python source binds and imports, read by ast and never run."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator, List, Optional, Set, Tuple

# A module, and what is imported from it; None: the module itself.
Import = Tuple[str, Optional[str]]


def module_name(root: Path, file: Path) -> str:
    """The dotted name of a source file below `root`."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_file(root: Path, module: str) -> Optional[Path]:
    """The source of a dotted name below `root`, None when there is none."""
    base = root.joinpath(*module.split("."))
    return next((file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()), None)


def statements(body: List[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements that run where `body` does: those of functions and classes are left out."""
    for node in body:
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for part in [node, *getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(part, field, []))


def defined(body: List[ast.stmt]) -> Set[str]:
    """The names that `body` defines or assigns, imports left out."""
    names: Set[str] = set()
    for node in statements(body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        targets = [*getattr(node, "targets", []), getattr(node, "target", None)]
        targets += [item.optional_vars for item in getattr(node, "items", [])]
        for target in filter(None, targets):
            names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def bound(body: List[ast.stmt]) -> Set[str]:
    """The names that `body` defines, assigns or imports; `*` for a star."""
    names = defined(body)
    for node in statements(body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return names


def used(tree: ast.AST) -> Set[str]:
    """The names that are read or bound anywhere in `tree`, attributes left out."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def bound_anywhere(tree: ast.AST) -> Set[str]:
    """The names that are bound in any scope of `tree`."""
    names: Set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)):
            names.add(node.name or "")
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= bound([node])
    return names


def imports(tree: ast.AST, package: str) -> Set[Import]:
    """What is imported of `package` anywhere in `tree`, by `import_module` with a literal name too."""
    found: Set[Import] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            found |= {(str(arg.value), None) for arg in node.args if isinstance(arg, ast.Constant)}
    return {one for one in found if one[0].split(".")[0] == package}


def node_of(tree: ast.Module, symbol: str) -> Optional[ast.stmt]:
    """The last function or class of a dotted name, `Class.method`; None when there is none."""
    body: List[ast.stmt] = tree.body
    node: Optional[ast.stmt] = None
    for name in symbol.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [part for part in statements(body) if isinstance(part, kinds) and part.name == name]
        if not found:
            return None
        node, body = found[-1], found[-1].body
    return node
