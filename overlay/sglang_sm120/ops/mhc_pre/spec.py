"""The model's call of `mhc_pre`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec
from .._mhc_spec import entered, entry


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    yield "block", {"x": make.bf16(rows, 4, c["hidden_size"]), **entry(make, c)}


SPEC = Spec(
    calls=_calls,
    traffic=entered,
    served=True,
    prefill="torch, TileLang and Triton",
)
