"""The gate: expert choice by score."""

from __future__ import annotations

import torch

from ...registry import Arguments, Op
from .._math import linear_refusal, sqrt_softplus
from ..bf16_linear_fp32 import bf16_linear_fp32


@Op
def router_topk(
    x: torch.Tensor, w: torch.Tensor, correction_bias: torch.Tensor, k: int, renormalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts with the largest score + bias, score = sqrt(softplus(x wᵀ)), weighted by their scores.

    x bf16 [T, K], w bf16 [E, K], fp32 products and sums as in `bf16_linear_fp32`; correction_bias fp32 [E]. Ties go to
    the lower expert. Weights are divided by their sum if renormalize. Returns (weights fp32 [T, k], ids int32 [T, k]),
    best expert first.
    """
    scores = sqrt_softplus(bf16_linear_fp32.reference(x, w))
    order = torch.sort(scores + correction_bias.float(), dim=-1, descending=True, stable=True).indices
    ids = order[:, :k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32)


@router_topk.checked
def _check(a: Arguments) -> str | None:
    if a.correction_bias.shape != a.w.shape[:1]:
        return f"correction_bias is {list(a.correction_bias.shape)} and needs {[a.w.shape[0]]}, one for each expert."
    return linear_refusal(a.x, a.w)
