"""What a plan reads of the overlay's tuned tables: whose prefill was the fastest on a card, and its chunk (`prove`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sglang_sm120
from sglang_sm120.limits import tuned_table

from .errors import LaunchError

FOLDER = Path(sglang_sm120.__file__).parent / "tuned"
PREFILLS: Mapping[str, Mapping[str, str]] = {
    "sglang": {},
    "overlay": {"SGLANG_SM120_PREFILL": "overlay"},
    "mxfp8": {"SGLANG_SM120_PREFILL": "overlay", "SGLANG_SM120_PROVIDER": "mxfp8"},
}
"""By whose prefill: the variables that choose it. SGLang's own is what serves without any."""
CHUNKS = (2048, 4096, 8192)
"""Tokens of a chunk that a plan may prefer."""
VARIABLES = tuple({name: None for chosen in PREFILLS.values() for name in chosen})
"""All of them."""


def read(name: str) -> dict[str, Any]:
    """A table as it is written; empty where there is none.

    Raises:
        LaunchError: it is no JSON object.
    """
    path = FOLDER / name
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LaunchError(f"{path} is no JSON object: delete it, or write it again with `make tune` or `prove`.")
    return found


class Prefill(NamedTuple):
    """What a card's table says of prefill: variables that choose it, and tokens of a chunk; None where it says none."""

    variables: Mapping[str, str] = {}
    chunk: int | None = None


def prefill(card: str) -> Prefill:
    """The prefill that a card's table names; nothing without such a table.

    Raises:
        LaunchError: it names one, or a chunk, that is not known.
    """
    name = tuned_table(card)
    found = read(name).get("prefill")
    by = found.get("by") if isinstance(found, dict) else "sglang"
    if not isinstance(by, str) or by not in PREFILLS:
        raise LaunchError(f"{FOLDER / name} names the prefill {by!r}, needed one of {', '.join(PREFILLS)}: correct it.")
    chunk = found.get("chunk") if isinstance(found, dict) else None
    if chunk is not None and chunk not in CHUNKS:
        known = ", ".join(map(str, CHUNKS))
        raise LaunchError(f"{FOLDER / name} names a chunk of {chunk!r} tokens, needed one of {known}: correct it.")
    return Prefill(PREFILLS[by], chunk)
