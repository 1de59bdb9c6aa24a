"""The model's call of `router_topk`, and what the tools know of it."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...spec import Calls, Inputs, Spec, nbytes


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    experts, hidden = c["n_routed_experts"], c["hidden_size"]
    # Small integers, so that every order of summing gives the same logits and no near tie is decided by it. Of the
    # model's size: 24 is the variance of each factor.
    x = make.integers(-8, 9, rows, hidden).to(torch.bfloat16)
    w = make.integers(-8, 9, experts, hidden).to(torch.bfloat16) * 2.0 ** -round(math.log2(24 * hidden**0.5))
    yield "gate", {
        "x": x, "w": w, "correction_bias": make.normal(experts), "k": c["num_experts_per_tok"],
        "renormalize": c["norm_topk_prob"],
    }  # fmt: skip


def _traffic(a: dict[str, Any]) -> tuple[int, int]:
    return nbytes(*a.values()) + 8 * a["x"].shape[0] * a["k"], 2 * a["x"].shape[0] * a["w"].numel()


SPEC = Spec(
    calls=_calls,
    traffic=_traffic,
    served=True,
    prefill="cuBLAS, then Triton",
)
