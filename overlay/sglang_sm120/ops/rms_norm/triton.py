"""Triton provider of `rms_norm`: a row per program; with few rows the next kernel starts beside it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels
from .._linear_triton import to_bf16
from .._pdl_triton import wait
from . import rms_norm

__all__ = ["rms_norm_triton"]


@triton.jit(do_not_specialize=["x_row"])
def _norm(x, x_row, weight, y, eps, N: tl.constexpr, NP: tl.constexpr):
    column = tl.arange(0, NP)
    inside = column < N
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait()
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / N + eps)
    tl.store(y + row * N + column, to_bf16(value * scale * w), mask=inside)


def _accepts(x: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        return f"x is {x.dtype} {list(x.shape)} and needs bfloat16 [rows, channels], channels adjacent."
    if not weight.is_contiguous():
        return f"weight has stride {weight.stride()} and needs to be contiguous."
    return None


@rms_norm.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Contract in `rms_norm`."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(width)
    kernels.launch(_norm, (rows,), x, x.stride(0), weight, y, eps, N=width, NP=padded, num_warps=4)
    return y
