"""The model's calls of `l2_prefetch`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec, nbytes
from ..fp8_linear.spec import shapes


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    shape = shapes(c, tp)
    shape["wo_a"] = (shape["wo_b"][1], c["num_attention_heads"] * c["head_dim"] // c["o_groups"])
    for first, second in (("wqkv_a", "wq_b"), ("wo_a", "wo_b"), ("shared.w13", "shared.w2")):
        yield first, {"first": make.fp8(*shape[first]), "second": make.fp8(*shape[second])}


SPEC = Spec(
    calls=_calls,
    traffic=lambda a: (nbytes(a["first"], a["second"]), 0),
    served=True,
    exact=True,
    prefill="nothing",
)
