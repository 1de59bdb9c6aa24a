"""Hyper-connection mixing weights: gates and a doubly stochastic matrix per token."""

from __future__ import annotations

import torch

from ...registry import Op


@Op
def sinkhorn(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, iters: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split mixes into pre, post and a Sinkhorn-normalised comb.

    mixes fp32 [T, 24] = 4 | 4 | 16, scale fp32 [3], base fp32 [24]; iters >= 1 counts column normalisations.

        pre  = sigmoid(m0 s0 + b0) + eps        [T, 4]
        post = 2 sigmoid(m1 s1 + b1)            [T, 4]
        comb = m2 s2 + b2 as [T, 4, 4]: row softmax, + eps, columns / (sum + eps),
               then iters - 1 times rows / (sum + eps), columns / (sum + eps)

    Returns (pre [T, 4], post [T, 4], comb [T, 4, 4]) fp32; comb's first index is the source stream.
    Source: the mHC equations of DeepSeek-V4; SGLang `layers/mhc.py` computes the same.
    """
    m, b = mixes.float(), base.float()
    pre = torch.sigmoid(m[:, :4] * scale[0] + b[:4]) + eps
    post = 2 * torch.sigmoid(m[:, 4:8] * scale[1] + b[4:8])
    comb = (m[:, 8:] * scale[2] + b[8:]).view(-1, 4, 4).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return pre, post, comb
