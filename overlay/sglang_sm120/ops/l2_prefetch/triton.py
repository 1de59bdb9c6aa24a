"""Triton provider of `l2_prefetch`: a thread orders some kilobytes with one instruction, and is done.

The copies of TMA into the L2 hold neither registers nor shared memory, so that what runs beside them loses nothing but
bandwidth.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels
from ...registry import Arguments
from .._pdl_triton import INTERPRETED, wait
from . import l2_prefetch

SHARE = 2
"""At most one part in so many of the L2 is asked for: the rest is for what streams through meanwhile."""
CHUNK, THREADS = 4096, 32
ALIGNMENT = 16
"""Bytes of an order, a multiple of ALIGNMENT, and orders of a program."""


@triton.jit
def _order(block, size, CHUNK: tl.constexpr, THREADS: tl.constexpr):
    """Offsets and bytes int32 [THREADS] of the orders of program `block`, of `size` bytes; 0 bytes: none."""
    at = (block * THREADS + tl.arange(0, THREADS)) * CHUNK
    return at, tl.minimum(tl.maximum(size - at, 0), CHUNK)


@triton.jit
def _bring(pointer, size, CHUNK: tl.constexpr, THREADS: tl.constexpr):
    at, count = _order(tl.program_id(0), size, CHUNK, THREADS)
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred some; setp.ne.u32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; "
            "mov.b32 $0, 0; }",
            "=r,l,r",
            [(pointer + at).to(tl.int64), count],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["first_size", "second_size"])
def _prefetch(first_weight, second_weight, first_size, second_size, CHUNK: tl.constexpr, THREADS: tl.constexpr):
    _bring(first_weight, first_size, CHUNK, THREADS)
    _bring(second_weight, second_size, CHUNK, THREADS)
    wait()


def _accepts(a: Arguments) -> str | None:
    for name in ("first", "second"):
        tensor = getattr(a, name)
        if tensor.data_ptr() % ALIGNMENT or tensor.nbytes % ALIGNMENT:
            return f"{name} has {tensor.nbytes} bytes at {tensor.data_ptr()}, and both need multiples of {ALIGNMENT}."
    return None


def sizes(first: int, second: int, cache: int) -> tuple[int, int]:
    """Bytes of each to ask for, of so many, into an L2 of `cache` bytes."""
    most = cache // SHARE // ALIGNMENT * ALIGNMENT
    size = min(first, most)
    return size, min(second, most - size)


# Chosen nowhere by itself until it was measured.
@l2_prefetch.provider("triton", runs_on="cpu sm90+", accepts=_accepts)
def l2_prefetch_triton(a: Arguments) -> None:
    """Contract in `l2_prefetch`."""
    first, second = sizes(a.first.nbytes, a.second.nbytes, kernels.l2_bytes(a.first.device))
    kernels.launch(
        _prefetch, (triton.cdiv(max(first, second), CHUNK * THREADS),), a.first.view(torch.uint8),
        a.second.view(torch.uint8), first, second, CHUNK=CHUNK, THREADS=THREADS, num_warps=THREADS // 32,
    )  # fmt: skip
