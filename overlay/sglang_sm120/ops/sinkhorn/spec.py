"""The model's call of `sinkhorn`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec, nbytes


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    mixing = {"mixes": make.normal(rows, 24), "scale": make.normal(3), "base": make.normal(24)}
    yield "block", {**mixing, "iters": c["hc_sinkhorn_iters"], "eps": c["hc_eps"]}


SPEC = Spec(
    calls=_calls,
    traffic=lambda a: (nbytes(*a.values()), 0),
    prefill="TileLang",
)
