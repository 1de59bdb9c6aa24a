"""Triton provider of `bf16_linear_fp32`: see `ops._linear_triton`."""

from __future__ import annotations

import torch

from .._linear_triton import linear, refusal
from . import bf16_linear_fp32

__all__ = ["bf16_linear_fp32_triton"]


def _accepts(w: torch.Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype is {dtype} and needs torch.float32 or torch.bfloat16."
    return refusal(w, None)


@bf16_linear_fp32.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def bf16_linear_fp32_triton(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One group of `linear` without scales."""
    return linear("bf16_linear_fp32", x.unsqueeze(1), w.unsqueeze(0), None, dtype).squeeze(1)
