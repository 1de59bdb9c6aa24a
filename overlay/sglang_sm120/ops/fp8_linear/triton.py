"""Triton provider of `fp8_linear`: see `ops._linear_triton`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from .._linear_triton import linear, refusal
from . import fp8_linear


def accepts(a: Arguments) -> str | None:
    if a.norm_weight is not None and not a.norm_weight.is_contiguous():
        return f"norm_weight has stride {a.norm_weight.stride()} and needs to be contiguous."
    return refusal(a.w, a.scale)


@fp8_linear.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=accepts)
def fp8_linear_triton(a: Arguments) -> torch.Tensor:
    """One group of `linear`; leading dimensions become rows."""
    norm = None if a.norm_weight is None else (a.norm_weight, a.eps)
    x, w, scale = a.x.reshape(-1, 1, a.x.shape[-1]), a.w.unsqueeze(0), a.scale.unsqueeze(0)
    return linear("fp8_linear", x, w, scale, torch.bfloat16, norm).view(*a.x.shape[:-1], a.w.shape[0])
