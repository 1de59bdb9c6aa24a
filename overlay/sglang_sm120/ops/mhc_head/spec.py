"""The model's call of `mhc_head`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec
from .._mhc_spec import entered, mixing


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    yield "head", {"x": make.bf16(rows, 4, c["hidden_size"]), **mixing(make, c, 1)}


SPEC = Spec(
    calls=_calls,
    traffic=entered,
    served=True,
    prefill="Triton",
)
