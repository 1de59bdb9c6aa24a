"""Expert choice by token id."""

from __future__ import annotations

import torch

from ...registry import Op
from .._math import sqrt_softplus


@Op
def hash_topk(
    router_logits: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts tid2eid[token] with weights score / Σ score, score = sqrt(softplus(logit)).

    router_logits fp32 [T, E], input_ids int [T], tid2eid int32 [V, k]. Returns (weights fp32 [T, k],
    ids int32 [T, k]).
    """
    ids = tid2eid[input_ids.long()]
    scores = sqrt_softplus(router_logits).gather(1, ids.long())
    return scores / scores.sum(-1, keepdim=True), ids.to(torch.int32)
