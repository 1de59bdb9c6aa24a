"""The model's call of `mhc_post`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec
from .._mhc_spec import leaving, left


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    yield "block", dict(leaving(make, c, rows))


SPEC = Spec(
    calls=_calls,
    traffic=left,
    served=True,
    prefill="TileLang",
)
