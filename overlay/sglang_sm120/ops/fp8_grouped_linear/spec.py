"""The model's call of `fp8_grouped_linear`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec
from .._linear_spec import others, traffic


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    groups, n = c["o_groups"] // tp, c["o_lora_rank"]
    k = c["num_attention_heads"] * c["head_dim"] // c["o_groups"]
    arguments = {"o": make.bf16(rows, groups, k), "w": make.fp8(groups, n, k)}
    yield "wo_a", {**arguments, "scale": make.e8m0(groups, n // 128, k // 128).float()}


SPEC = Spec(
    calls=_calls,
    traffic=traffic,
    tunables={"linear": others},
    served=True,
    lent=True,
    prefill="cuBLAS on wo_a in bf16",
)
