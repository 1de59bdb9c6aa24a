"""The model's call of `mhc_post_pre`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec
from .._mhc_spec import entry, leaving, left


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    yield "block", {**leaving(make, c, rows), **entry(make, c)}


SPEC = Spec(
    calls=_calls,
    traffic=left,
    aim=lambda a, rows, context: {1: ("time_us", 10.0), 4096: ("copy_share", 0.6)}.get(rows),
    served=True,
    prefill="TileLang",
)
