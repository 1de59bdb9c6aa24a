"""Writes the launcher's table of SGLang's flags, of the installed release: `python tests/launch/flag_table.py`."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sglang_sm120_launch.flags import TABLE, imported


def table(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What `flags.from_table` reads, of SGLang's own parser."""
    flags = [
        {
            "names": action.option_strings,
            "action": type(action).__name__,
            "nargs": action.nargs,
            "type": action.type and getattr(action.type, "__name__", str(action.type)),
            "choices": sorted(action.choices) if isinstance(action.choices, set) else action.choices,
        }
        for action in parser._actions
    ]
    return {"sglang": version("sglang"), "flags": flags}


def text(found: dict[str, Any]) -> str:
    """One line a flag."""
    flags = ",\n".join(json.dumps(flag) for flag in found["flags"])
    return f'{{"sglang": {json.dumps(found["sglang"])}, "flags": [\n{flags}\n]}}\n'


if __name__ == "__main__":
    source = Path(__file__).parents[2] / "launch/sglang_sm120_launch"
    (source / TABLE.name).write_text(text(table(imported())), encoding="utf-8")
