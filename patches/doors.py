"""What may cross between SGLang and the overlay: one door in, and one part of the overlay that looks out."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Dict, List, Set, Tuple

import distribution
from names import bound, imports, module_file, module_name

PACKAGE = distribution.NAME
HOOKS = f"{PACKAGE}.hooks"
# The group of entry points that SGLang's plugin loader reads.
PLUGINS = "sglang.srt.plugins"
# What knows SGLang's classes: the step and the contract's spec; and in an op's folder, its CUDA kernel as a provider.
OUTLOOKS = (f"{PACKAGE}.step", f"{PACKAGE}.plugin")
KERNEL = re.compile(re.escape(f"{PACKAGE}.ops.") + r"\w+\.sglang")
IMPORT = re.compile(r"^[ ]*(?:from\s+(\S+)\s+import\s+(\([^)]*\)|.+)|import\s+(.+))$", re.MULTILINE)


def problems(root: Path, added: Dict[str, List[str]]) -> List[str]:
    """What is wrong in the checkout `root`, whose patches add these lines (patch -> lines).

    Patches import hooks and SGLang's own alone; SGLang's plugin loader is given hooks; hooks offers what one of these
    asks for, and has it from where it says; no module of the overlay imports SGLang but OUTLOOKS and KERNEL.
    """
    overlay = root / distribution.PACKAGES[PACKAGE]
    lazy, own = _offered(overlay)
    offered = set(lazy) | own
    found: List[str] = []
    used: Set[str] = set()
    for patch, lines in added.items():
        for module, names, plain in IMPORT.findall("\n".join(lines)):
            if (module or plain).split(".")[0] == "sglang":
                continue
            if module != HOOKS:
                found.append(f"{patch}: imports {module or plain}, needed {HOOKS} alone")
                continue
            without_comments = re.sub(r"#.*", "", names).strip("() \n")
            imported = {name.split(" as ")[0].strip() for name in without_comments.split(",") if name.strip()}
            used |= imported
            found += [f"{patch}: {HOOKS} has no {name}" for name in sorted(imported - offered)]
    for entry, target in distribution.entry_points(root / "pyproject.toml").get(PLUGINS, {}).items():
        module, _, name = target.partition(":")
        if module != HOOKS:
            found.append(f"entry point {entry} of {PLUGINS}: names {module}, needed {HOOKS} alone")
        elif name not in offered:
            found.append(f"entry point {entry} of {PLUGINS}: {HOOKS} has no {name}")
        used.add(name)
    found += [f"{HOOKS} offers {name}, which neither a patch nor an entry point asks for"
              for name in sorted(offered - used)]
    for name, module in sorted(lazy.items()):
        file = module_file(overlay, f"{PACKAGE}.{module}")
        if file is None or name not in bound(ast.parse(file.read_bytes()).body):
            found.append(f"{HOOKS} says that {PACKAGE}.{module} defines {name}, which it does not")
    return found + _outside(overlay)


def _outside(overlay: Path) -> List[str]:
    found = []
    for file in sorted((overlay / PACKAGE).rglob("*.py")):
        module = module_name(overlay, file)
        looks_out = any(module == place or module.startswith(f"{place}.") for place in OUTLOOKS)
        if not looks_out and not KERNEL.fullmatch(module):
            found += [f"{module} imports {source}: what knows SGLang belongs into {OUTLOOKS[0]}"
                      for source in sorted({source for source, _ in imports(ast.parse(file.read_bytes()), "sglang")})]
    return found


def _offered(overlay: Path) -> Tuple[Dict[str, str], Set[str]]:
    """What hooks names in `_DEFINED_IN`, and what it defines or imports of the overlay, without an underscore."""
    file = module_file(overlay, HOOKS)
    lazy: Dict[str, str] = {}
    own: Set[str] = set()
    for node in ast.parse(file.read_bytes()).body if file else []:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGE)):
            own |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_DEFINED_IN":
            lazy = ast.literal_eval(node.value)
    return lazy, {name for name in own if not name.startswith("_")}
