"""Gather listed KV vectors and write them as bf16: a copy, 32 vectors per program, in 16-byte loads.

Values are expanded in fp32, where E4M3 times a power of two is exact and from where bf16 holds it exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels
from ...formats import kv_page
from .._pages_triton import e8m0_f32, kv_bytes, kv_rope, kv_scale_bytes, kv_scales, kv_slots, pool_refusal
from .._pdl_triton import wait
from . import gather_dequant_kv

BLOCK = 32
DIM: tl.constexpr = tl.constexpr(kv_page.DIM)
GROUP: tl.constexpr = tl.constexpr(kv_page.GROUP)
NOPE: tl.constexpr = tl.constexpr(kv_page.NOPE)


@triton.jit
def _expand(vector, scales, live, to, real, FIRST: tl.constexpr, GROUPS: tl.constexpr):
    """Groups FIRST ... FIRST + GROUPS of 64 channels."""
    values = kv_bytes(vector, live, FIRST, GROUPS).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    values *= e8m0_f32(kv_scale_bytes(scales, FIRST, GROUPS))[:, :, None]
    values = tl.where(live[:, None, None], values, 0.0).to(tl.bfloat16)
    channel = FIRST * GROUP + tl.arange(0, GROUPS * GROUP)
    tl.store(to[:, None] + channel[None, :], tl.reshape(values, [live.shape[0], GROUPS * GROUP]), mask=real[:, None])


@triton.jit(
    do_not_specialize=["slots_row", "width", "blocks"],
    do_not_specialize_on_alignment=["slots", "lengths"],
)
def _gather(
    pages,
    page_stride,
    slots,
    slots_row,
    lengths,
    out,
    width,
    blocks,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slots int32 [T, width] -> out bf16 [T, width, 512]. Programs: T x blocks of BLOCK slots, blocks fastest."""
    wait()
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    length = tl.minimum(tl.load(lengths + row).to(tl.int32), width)
    slot = tl.load(slots + row * slots_row + column, mask=column < length, other=-1)
    live = slot >= 0
    vector, footer = kv_slots(slot, live, pages, page_stride, PAGE)
    scales = kv_scales(footer, live)
    real = column < width
    to = out + (row * width + column) * DIM
    for i in tl.static_range(4):
        _expand(vector, scales, live, to, real, 2 * i, 2 if i < 3 else 1)
    channel = NOPE + tl.arange(0, DIM - NOPE)
    tl.store(to[:, None] + channel[None, :], kv_rope(vector, live), mask=real[:, None])


def _accepts(pages: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, page_size: int) -> str | None:
    if slots.dtype != torch.int32 or (slots.shape[1] > 1 and slots.stride(1) != 1):
        return f"slots are {slots.dtype} and need int32 with adjacent columns."
    return pool_refusal("pages", pages, page_size * (kv_page.ROW + kv_page.FOOTER))


@gather_dequant_kv.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def gather_dequant_kv_triton(
    pages: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Contract in `gather_dequant_kv`."""
    rows, width = slots.shape
    out = torch.empty((rows, width, kv_page.DIM), dtype=torch.bfloat16, device=pages.device)
    blocks = -(-width // BLOCK)
    kernels.launch(
        _gather,
        (rows * blocks,),
        pages,
        pages.stride(0),
        slots,
        slots.stride(0),
        lengths,
        out,
        width,
        blocks,
        PAGE=page_size,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return out
