"""Device helpers for cache pages: 64-bit addresses of slots and dequantisation in registers.

The byte layouts are those of `formats.kv_page` and `formats.indexer_page`. A KV vector is read as four tiles of 256,
128 and 64 FP8 channels and 64 bf16 channels, because Triton tiles are powers of two; the seven scales of a vector
come as one 64-bit word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import kv_page

NOPE: tl.constexpr = tl.constexpr(kv_page.NOPE)
ROPE: tl.constexpr = tl.constexpr(kv_page.ROPE)
GROUP: tl.constexpr = tl.constexpr(kv_page.GROUP)
ROW: tl.constexpr = tl.constexpr(kv_page.ROW)
FOOTER: tl.constexpr = tl.constexpr(kv_page.FOOTER)
ALIGNMENT = 16
"""Bytes that one thread loads at once: page strides and pool addresses must be multiples."""


def pool_refusal(name: str, pages: torch.Tensor, least: int) -> str | None:
    """Why the kernels cannot read this pool, or None. `least` is the bytes a page needs."""
    if pages.dtype != torch.uint8 or pages.dim() != 2 or (pages.shape[1] > 1 and pages.stride(1) != 1):
        return f"{name} is {pages.dtype} {list(pages.shape)} and needs uint8 [pages, bytes] with adjacent bytes."
    if pages.shape[1] < least:
        return f"{name} has {pages.shape[1]} bytes per page and needs at least {least}."
    if pages.stride(0) % ALIGNMENT or pages.data_ptr() % ALIGNMENT:
        return f"{name} has page stride {pages.stride(0)} and needs pages aligned to {ALIGNMENT} bytes."
    return None


@triton.jit
def kv_slots(slot, live, pages, page_stride, page_size):
    """Pointers to the vectors and the footers of int32 slots [N]; slots that are not live point at the first."""
    slot = tl.where(live, slot, 0)
    page = (slot // page_size).to(tl.int64)
    row = slot % page_size
    start = tl.multiple_of(page * page_stride, 16)
    return pages + start + row * ROW, pages + start + page_size * ROW + row * FOOTER


@triton.jit
def kv_scales(footer, live):
    """The seven E8M0 bytes of each vector as one uint64 [N], 0 where not live."""
    return tl.load(footer.to(tl.pointer_type(tl.uint64)), mask=live, other=0)


@triton.jit
def kv_bytes(vector, live, FIRST: tl.constexpr, GROUPS: tl.constexpr):
    """E4M3 bytes [N, GROUPS, 64] from group FIRST on."""
    group = FIRST + tl.arange(0, GROUPS)
    channel = tl.arange(0, GROUP)
    at = vector[:, None, None] + group[None, :, None] * GROUP + channel[None, None, :]
    return tl.load(at, mask=live[:, None, None], other=0)


@triton.jit
def kv_rope(vector, live):
    """The bf16 channels [N, 64]."""
    channel = tl.arange(0, ROPE)
    at = (vector + NOPE).to(tl.pointer_type(tl.bfloat16))
    return tl.load(at[:, None] + channel[None, :], mask=live[:, None], other=0.0)


@triton.jit
def kv_scale_bytes(scales, FIRST: tl.constexpr, GROUPS: tl.constexpr):
    """Exponent bytes int32 [N, GROUPS] from group FIRST on."""
    shift = (FIRST + tl.arange(0, GROUPS)) * 8
    return ((scales[:, None] >> shift[None, :].to(tl.uint64)) & 0xFF).to(tl.int32)


@triton.jit
def kv_f16(raw, scales, FIRST: tl.constexpr):
    """Bytes [N, 1, 64] of one group to fp16 values [N, 64].

    Exact for scales 2^-15 ... 2^7, that is for vectors whose groups reach 0.014 ... 57344; below, values round to
    multiples of 2^-24, which is 3e-4 of the smallest possible group.
    """
    exponent = tl.minimum(tl.maximum(kv_scale_bytes(scales, FIRST, 1) - 127, -24), 15)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True).to(tl.float16)
    values = raw.to(tl.float8e4nv, bitcast=True).to(tl.float16) * scale[:, :, None]
    return tl.reshape(values, [raw.shape[0], GROUP])
