"""What a plan reads of the overlay's tuned tables: whose prefill was the fastest on a card (`prove`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def prefill(card: str) -> Mapping[str, str]:
    """The variables of the prefill that a card's table names; none without such a table.

    Raises:
        LaunchError: it names one that is not known.
    """
    name = tuned_table(card)
    found = read(name).get("prefill")
    by = found.get("by") if isinstance(found, dict) else "sglang"
    if not isinstance(by, str) or by not in PREFILLS:
        raise LaunchError(f"{FOLDER / name} names the prefill {by!r}, needed one of {', '.join(PREFILLS)}: correct it.")
    return PREFILLS[by]
