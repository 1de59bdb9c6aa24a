"""Hyper-connection entry of a block: four residual streams to one block input."""

from __future__ import annotations

import torch

from ...registry import Op
from .._math import rms_norm, sinkhorn


@Op
def mhc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    iters: int = 20,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix the streams x bf16 [T, 4, H] into one, and give the weights that mix the block's output back.

    fn fp32 [24, 4H], scale fp32 [3], base fp32 [24], norm_weight [H] of the block's RMS norm.

        v = flatten(x);  m = (v fnᵀ) rsqrt(mean(v²) + rms_eps);  pre, post, comb = _math.sinkhorn(m, scale, base)
        y = Σ_j pre_j x_j  → bf16, then rmsnorm(y) → bf16 if norm_weight is given

    Returns (y bf16 [T, H], post fp32 [T, 4], comb fp32 [T, 4, 4]).
    Source: the mHC equations of DeepSeek-V4; SGLang `models/deepseek_v4.py` `hc_pre`.
    """
    v = x.flatten(1).float()
    mixes = (v @ fn.float().T) * torch.rsqrt(v.square().mean(-1, keepdim=True) + rms_eps)
    pre, post, comb = sinkhorn(mixes, scale, base, iters, hc_eps)
    y = (pre.unsqueeze(-1) * x.float()).sum(1).bfloat16()
    if norm_weight is not None:
        y = rms_norm(y, norm_weight, norm_eps).bfloat16()
    return y, post, comb
