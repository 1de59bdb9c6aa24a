"""Triton provider of `bf16_linear_fp32`: see `ops._linear_triton`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from .._linear_triton import linear, refusal
from . import bf16_linear_fp32


def _accepts(a: Arguments) -> str | None:
    if a.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype is {a.dtype} and needs torch.float32 or torch.bfloat16."
    return refusal(a.w, None)


@bf16_linear_fp32.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def bf16_linear_fp32_triton(a: Arguments) -> torch.Tensor:
    """One group of `linear` without scales."""
    return linear("bf16_linear_fp32", a.x.unsqueeze(1), a.w.unsqueeze(0), None, a.dtype).squeeze(1)
