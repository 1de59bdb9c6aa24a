"""Hyper-connection exit of the model: four residual streams to the vector the LM head reads."""

from __future__ import annotations

import torch

from ...registry import Op


@Op
def mhc_head(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> torch.Tensor:
    """Weighted sum of the streams x bf16 [T, 4, H], in fp32, rounded once to bf16 [T, H].

    fn fp32 [4, 4H], scale fp32 [1], base fp32 [4].

        v = flatten(x);  m = (v fnᵀ) rsqrt(mean(v²) + rms_eps);  w = sigmoid(m scale + base) + hc_eps
        y = Σ_j w_j x_j

    The model's final RMS norm follows and is not part of the op.
    Source: the mHC equations of DeepSeek-V4; SGLang `layers/mhc_head.py`.
    """
    v = x.flatten(1).float()
    mixes = (v @ fn.float().T) * torch.rsqrt(v.square().mean(-1, keepdim=True) + rms_eps)
    weight = torch.sigmoid(mixes * scale + base) + hc_eps
    return (weight.unsqueeze(-1) * x.float()).sum(1).bfloat16()
