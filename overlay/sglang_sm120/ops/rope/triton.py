"""Triton provider of `rope`: 16 heads of a row per program; with few rows the next kernel starts beside it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels
from .._linear_triton import to_bf16
from .._pdl_triton import wait
from . import rope

__all__ = ["rope_triton"]

HEADS = 16


@triton.jit(do_not_specialize=["heads", "x_row", "x_head"])
def _rotate(
    x, heads, x_row, x_head, freqs, positions, PAIRS: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr
):
    """freqs fp32 [S, PAIRS, 2]. Programs: T x ceil(heads / HEADS)."""
    wait()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = (head < heads)[:, None]
    channel = tl.arange(0, 2 * PAIRS)
    at = x + row * x_row + head.to(tl.int64)[:, None] * x_head + channel[None, :]
    position = tl.load(positions + row).to(tl.int64)
    cos, sin = tl.split(tl.reshape(tl.load(freqs + position * (2 * PAIRS) + channel), PAIRS, 2))
    if INVERSE:
        sin = -sin
    real, imag = tl.split(tl.reshape(tl.load(at, mask=live, other=0.0).to(tl.float32), HEADS, PAIRS, 2))
    turned = tl.join(real * cos[None, :] - imag * sin[None, :], real * sin[None, :] + imag * cos[None, :])
    tl.store(at, to_bf16(tl.reshape(turned, HEADS, 2 * PAIRS)), mask=live)


def _accepts(
    x: torch.Tensor, freqs_cis: torch.Tensor, positions: torch.Tensor, inverse: bool = False
) -> str | None:
    if x.dtype != torch.bfloat16 or x.dim() not in (2, 3) or x.stride(-1) != 1:
        return f"x is {x.dtype} {list(x.shape)} and needs bfloat16 [rows, heads, channels], channels adjacent."
    if not freqs_cis.is_contiguous() or freqs_cis.shape[1] * 2 != x.shape[-1]:
        return f"freqs_cis is {list(freqs_cis.shape)} and needs {x.shape[-1] // 2} adjacent numbers per position."
    return None


@rope.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def rope_triton(x: torch.Tensor, freqs_cis: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> None:
    """Contract in `rope`."""
    rows, heads = x.shape[0], x.shape[1] if x.dim() == 3 else 1
    kernels.launch(
        _rotate,
        (rows, triton.cdiv(heads, HEADS)),
        x,
        heads,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        torch.view_as_real(freqs_cis),
        positions,
        PAIRS=freqs_cis.shape[1],
        INVERSE=inverse,
        HEADS=HEADS,
        num_warps=4,
    )
