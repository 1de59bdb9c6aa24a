"""Expert choice by score."""

from __future__ import annotations

import torch

from ...registry import Op
from .._math import sqrt_softplus


@Op
def router_topk(
    router_logits: torch.Tensor, correction_bias: torch.Tensor, k: int, renormalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts with the largest score + bias, score = sqrt(softplus(logit)), weighted by their scores.

    router_logits fp32 [T, E], correction_bias fp32 [E]. Ties go to the lower expert. Weights are divided by
    their sum if renormalize. Returns (weights fp32 [T, k], ids int32 [T, k]), best expert first.
    """
    scores = sqrt_softplus(router_logits)
    order = torch.sort(scores + correction_bias.float(), dim=-1, descending=True, stable=True).indices
    ids = order[:, :k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32)
