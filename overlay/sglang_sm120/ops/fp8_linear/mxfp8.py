"""Provider of `fp8_linear` on SM120's block-scaled FP8 tensor cores, for many rows: activations rounded to MXFP8.

Their scales, for 32 channels, are the tensor core's. A weight's, for 128 x 128, multiplies the fp32 sums of 128
products: so it may have any value, and the tensor core, which might truncate, has short sums to keep.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels
from ...formats import e8m0, fp8_block, mxfp8
from ...registry import Arguments
from .._arithmetic import e8m0_value, scaled_sum, to_bf16
from .._linear_triton import normalised
from .._mxfp8_triton import BLOCK, RUNS_ON, launch_quantise_rows, own
from .._pdl_triton import wait
from . import fp8_linear, normed
from .triton import accepts, fp8_linear_triton

DEPTH = tl.constexpr(fp8_block.BLOCK)
ONE = tl.constexpr(127)
"""The byte of scale 1."""
FEW_ROWS = 64
"""Rows up to which the weights' bytes bound the op."""


@triton.jit(do_not_specialize=["rows"])
def _linear_mxfp8(
    x_ptr, sx_ptr, w, scale, y_ptr, rows, N: tl.constexpr, K: tl.constexpr, E8M0: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y bf16 [rows, N] of x E4M3 [rows, K], sx uint8 [rows, K/32], w E4M3 [N, K], its blocks' scales fp32 or uint8."""
    wait()
    row = tl.program_id(1) * T + tl.arange(0, T)
    live = row < rows
    row = row.to(tl.int64)
    channel = tl.program_id(0) * R + tl.arange(0, R)
    inside = channel < N
    depth = tl.arange(0, DEPTH)
    shift = tl.arange(0, DEPTH // BLOCK) * 8
    x = x_ptr + row * K
    sx = (sx_ptr + row * (K // BLOCK)).to(tl.pointer_type(tl.int32))
    of_w = w + channel.to(tl.int64) * K
    one = tl.full((R, DEPTH // BLOCK), ONE, tl.uint8)
    acc = tl.zeros((T, R), tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        tokens = tl.load(x[:, None] + (start + depth)[None, :], mask=live[:, None], other=0.0)
        of_tokens = (tl.load(sx + start // DEPTH, mask=live, other=0)[:, None] >> shift[None, :]).to(tl.uint8)
        weights = tl.load(of_w[:, None] + (start + depth)[None, :], mask=inside[:, None], other=0.0)
        stored = tl.load(scale + tl.program_id(0) * (K // DEPTH) + start // DEPTH)
        factor = e8m0_value(stored) if E8M0 else stored.to(tl.float32)
        step = tl.zeros((T, R), tl.float32)
        step = tl.dot_scaled(tokens, of_tokens, "e4m3", tl.trans(weights), one, "e4m3", step)
        acc = scaled_sum(step, factor, acc)
    tl.store(y_ptr + row[:, None] * N + channel[None, :], to_bf16(acc), mask=live[:, None] & inside[None, :])


def _rounds(a: Arguments) -> bool:
    """Whether a call is computed here; the default's kernels serve the others."""
    return a.x.numel() > FEW_ROWS * a.w.shape[1] and a.w.shape[1] % fp8_block.BLOCK == 0


def emulated(a: Arguments) -> torch.Tensor:
    """What `fp8_linear_mxfp8` computes, but for the order of fp32 sums; bf16 [..., N] as `fp8_linear`."""
    if not _rounds(a):
        return fp8_linear.reference(**vars(a))
    x = mxfp8.rounded(normed(a.x, a.norm_weight, a.eps).float())
    return (x @ fp8_block.dequantise(a.w, a.scale).T).bfloat16()


@fp8_linear.provider("mxfp8", runs_on=RUNS_ON, accepts=accepts, own=own(emulated))
def fp8_linear_mxfp8(a: Arguments) -> torch.Tensor:
    """Contract in `fp8_linear`, activations rounded to MXFP8; up to FEW_ROWS rows, and where K has a part of a block,
    `fp8_linear_triton` serves."""
    if not _rounds(a):
        return fp8_linear_triton(a)
    n, k = a.w.shape
    x = a.x.reshape(-1, k)
    rows = x.shape[0]
    if a.norm_weight is not None:
        x = normalised(x.unsqueeze(1), a.norm_weight, a.eps).view(rows, k)
    elif x.stride(1) != 1:
        x = x.contiguous()
    scale, of_bytes = (a.scale, False) if a.scale.dtype == torch.float32 else (e8m0.scale_bytes(a.scale), True)
    x8, sx = kernels.scratch(
        "fp8_linear", x.device, ((rows, k), torch.float8_e4m3fn), ((rows, k // mxfp8.BLOCK), torch.uint8)
    )
    y = torch.empty((rows, n), dtype=torch.bfloat16, device=x.device)
    launch_quantise_rows(x, x8, sx, False, 0)
    tokens, warps = (64, 4) if rows <= 128 else (128, 8)
    kernels.launch(
        _linear_mxfp8, (triton.cdiv(n, fp8_block.BLOCK), triton.cdiv(rows, tokens)),
        x8, sx, a.w, scale, y, rows, N=n, K=k, E8M0=of_bytes, T=tokens, R=fp8_block.BLOCK, STAGES=3, num_warps=warps,
    )  # fmt: skip
    return y.view(*a.x.shape[:-1], n)
