"""The checkable form of a patch's Drop-When: `Drop-Check: FILE[:SYMBOL] has|lacks REGEX[; …]`, all of which must hold.

SYMBOL is a function, a class or `Class.method` of FILE, whose text alone is searched then. A condition that holds says
that the patch looks needless, no more: whoever drops it reads its Drop-When.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from names import node_of

FIELD = "Drop-Check"
FORM = re.compile(r"(sglang/[\w/.-]+\.py)(?::([\w.]+))? (has|lacks) (\S.*)")


@dataclass(frozen=True)
class Condition:
    """Whether the text of a file, or of a symbol in it, has (or lacks) a match of `pattern`."""

    file: str
    symbol: Optional[str]
    wanted: bool
    pattern: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.symbol}" if self.symbol else self.file

    def holds(self, folder: Path) -> Optional[bool]:
        """For the SGLang whose sources are in `folder`; None when the file or the symbol is not there."""
        path = folder / self.file
        if not path.is_file():
            return None
        text = path.read_text(encoding="utf-8")
        if self.symbol:
            node = node_of(ast.parse(text), self.symbol)
            if node is None:
                return None
            text = "\n".join(text.split("\n")[node.lineno - 1 : node.end_lineno])
        return bool(re.search(self.pattern, text)) == self.wanted


def parse(text: str) -> List[Condition]:
    """The conditions of a field's value, none of an empty one; raises ValueError that names what has another form."""
    conditions = []
    for part in filter(None, map(str.strip, text.split(";"))):
        found = FORM.fullmatch(part)
        try:
            re.compile(found.group(4) if found else "")
        except re.error as error:
            raise ValueError(f"{part!r} has no regular expression ({error})") from None
        if not found:
            raise ValueError(f"{part!r} is not FILE[:SYMBOL] has|lacks REGEX")
        conditions.append(Condition(found.group(1), found.group(2), found.group(3) == "has", found.group(4)))
    return conditions
