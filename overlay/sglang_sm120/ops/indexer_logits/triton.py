"""Indexer scores: one row's heads against blocks of keys on tensor cores, keys as the rows of the dot.

E4M3 is exact in fp16, so the dot is exact but for its fp32 sums. With FP8 operands (`Config.fp8`) the tensor cores take
the bytes as they are, twice as many an instruction and none of them converted. A product of two E4M3 has 8 significant
bits, so it is exact there too; how many bits the sum of 32 products and the accumulator keep is the card's affair.
Ada's and Hopper's FP8 instructions are reported to keep 13 bits below the largest term and to drop the rest
(SageAttention2; DeepSeek-V3's report, 3.5.2), 2^-13 of it with each term, where the tolerance is 1e-5 of the scores;
B200's are reported to keep 25 (DeepGEMM's issue 176). Of SM120 nothing is known here. So fp16 is the default, and FP8
for a table that is written by hand: `prove` tells its precision on a card, `make tune` does not try it. Triton's
`max_num_imprecise_acc`, by which Hopper's wgmma adds up in fp32, does nothing to SM120's mma, and under SM120 lowering
a Hopper card multiplies in fp16: it can tell neither the precision nor the time.

With keys as rows, relu, head weights and the sum over heads stay within a warp's registers and a few shuffles, and the
key's scale is applied once per key, after that sum.
A row's 64 heads alone give 124 operations per byte of key, so rows do not share keys except through the L2 cache.
Programs of a row walk its blocks in strides, so that the grid depends on the table's width and the work on lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import kernels, tuned
from ...formats import indexer_page
from ...registry import Arguments
from .._pages_triton import pool_refusal
from .._pdl_triton import wait
from . import indexer_logits

DIM: tl.constexpr = tl.constexpr(indexer_page.DIM)
SCALE: tl.constexpr = tl.constexpr(indexer_page.SCALE)


@triton.jit
def _page_ids(table, block, length, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Page id of each entry of a block, int32 [BLOCK], 0 beyond length."""
    entry = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(table + entry // PAGE, mask=entry < length, other=0)


@triton.jit
def _keys(pages, page_stride, page, block, length, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """E4M3 bytes [BLOCK, 128] and fp32 scales [BLOCK] of a block's entries, zeros beyond length."""
    entry = block * BLOCK + tl.arange(0, BLOCK)
    live = entry < length
    start = pages + tl.multiple_of(page.to(tl.int64) * page_stride, 16)
    channel = tl.arange(0, DIM)
    at = start + entry % PAGE * DIM
    values = tl.load(at[:, None] + channel[None, :], mask=live[:, None], other=0)
    at = start + PAGE * DIM + entry % PAGE * SCALE
    return values, tl.load(at.to(tl.pointer_type(tl.float32)), mask=live, other=0.0)


@triton.jit
def _operand(raw, FP8: tl.constexpr):
    """E4M3 bytes as what the tensor cores multiply."""
    values = raw.to(tl.float8e4nv, bitcast=True)
    return values if FP8 else values.to(tl.float16)


@triton.jit(
    do_not_specialize=["table_row", "logits_row", "width", "least", "programs"],
    do_not_specialize_on_alignment=["table", "lengths", "logits"],
)
def _score(
    q, q_row, q_head, weights, weights_row, pages, page_stride, table, table_row, lengths, logits, logits_row, width,
    least, programs, HEADS: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    FILL: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """q E4M3 bytes [T, HEADS, 128], weights fp32 [T, HEADS] -> logits fp32 [T, width] below lengths.

    Programs: T x programs, those of a row adjacent. Rows of up to `least` entries are left out. With FILL, what lies at
    and beyond lengths becomes -inf. With FP8 the tensor cores multiply E4M3, else fp16.
    """
    wait()
    row = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs
    length = tl.minimum(tl.load(lengths + row).to(tl.int32), width)
    length = tl.where(length > least, length, 0)
    blocks = tl.cdiv(length, BLOCK)
    table += row * table_row
    logits += row * logits_row
    if first < blocks:
        head = tl.arange(0, PADDED)
        at = q + row * q_row + head[:, None] * q_head + tl.arange(0, DIM)[None, :]
        query = _operand(tl.load(at, mask=head[:, None] < HEADS, other=0), FP8)
        weight = tl.load(weights + row * weights_row + head, mask=head < HEADS, other=0.0)
        page = _page_ids(table, first, length, PAGE, BLOCK)
        values, scale = _keys(pages, page_stride, page, first, length, PAGE, BLOCK)
        page = _page_ids(table, first + programs, length, PAGE, BLOCK)
        for block in tl.range(first, blocks, programs, num_stages=1):
            keys = _operand(values, FP8)
            factor = scale
            # In flight while this block is worked on: the next block's keys and the page ids of the one after.
            values, scale = _keys(pages, page_stride, page, block + programs, length, PAGE, BLOCK)
            page = _page_ids(table, block + 2 * programs, length, PAGE, BLOCK)
            # On Hopper no two of its instructions share an imprecise accumulator.
            scores = tl.dot(keys, tl.trans(query), max_num_imprecise_acc=32 if FP8 else 0)
            scores = tl.sum(tl.maximum(scores, 0.0) * weight[None, :], 1) * factor
            entry = block * BLOCK + tl.arange(0, BLOCK)
            if FILL:
                tl.store(logits + entry, tl.where(entry < length, scores, float("-inf")), mask=entry < width)
            else:
                tl.store(logits + entry, scores, mask=entry < length)
    if FILL:
        for block in tl.range(blocks + first, tl.cdiv(width, BLOCK), programs):
            entry = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(logits + entry, tl.full([BLOCK], float("-inf"), tl.float32), mask=entry < width)


class Config(NamedTuple):
    """Entries that a program scores at once, programs per SM, warps, and whether FP8 is multiplied, not fp16."""

    block: int = 128
    programs_per_sm: int = 4
    warps: int = 4
    fp8: bool = False


def _tuned_refusal(shape: tuned.Shape, rows: int, c: Config) -> str | None:
    return tuned.beyond(c, block=(16, 32, 64, 128, 256), programs_per_sm=range(1, 33), warps=(1, 2, 4, 8, 16))


TUNED = tuned.Family("indexer_logits", ("width", "heads"), Config, _tuned_refusal)
"""The width is rounded up to a power of two."""


def score(a: Arguments, part: slice, logits: torch.Tensor, least: int | None = None) -> None:
    """Write the scores of `part` of the rows to logits; with `least` only below lengths, and none of shorter rows."""
    q, weights, page_table, lengths = a.q[part], a.weights[part], a.page_table[part], a.lengths[part]
    rows, heads, _ = q.shape
    width = logits.shape[1]
    c = TUNED.choose(q.device, (tuned.bucket(width), heads), rows, Config())
    blocks = -(-width // c.block)
    spread = kernels.sms(q.device) * c.programs_per_sm // max(rows, 1)
    programs = max(1, min(blocks, spread))
    kernels.launch(
        _score, (rows * programs if width else 0,), q.view(torch.uint8), q.stride(0), q.stride(1), weights,
        weights.stride(0), a.pages, a.pages.stride(0), page_table, page_table.stride(0), lengths, logits,
        logits.stride(0), width, 0 if least is None else least, programs,
        HEADS=heads, PADDED=max(16, triton.next_power_of_2(heads)), PAGE=a.page_size, BLOCK=c.block,
        FILL=least is None, FP8=c.fp8, num_warps=c.warps,
    )  # fmt: skip


def refusal(a: Arguments) -> str | None:
    """Why these arguments cannot be scored here, or None."""
    if a.q.dtype != torch.float8_e4m3fn or a.q.dim() != 3 or a.q.shape[2] != indexer_page.DIM or a.q.stride(2) != 1:
        return f"q is {a.q.dtype} {list(a.q.shape)} and needs float8_e4m3fn [rows, heads, {indexer_page.DIM}]."
    if a.weights.dtype != torch.float32 or (a.weights.shape[1] > 1 and a.weights.stride(1) != 1):
        return f"weights are {a.weights.dtype} and need float32 with adjacent heads."
    if a.page_table.dtype != torch.int32 or (a.page_table.shape[1] > 1 and a.page_table.stride(1) != 1):
        return f"page_table is {a.page_table.dtype} and needs int32 with adjacent columns."
    return pool_refusal("pages", a.pages, indexer_page.page_bytes(a.page_size))


@indexer_logits.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=refusal)
def indexer_logits_triton(a: Arguments) -> torch.Tensor:
    """Contract in `indexer_logits`."""
    logits = torch.empty((a.q.shape[0], a.page_table.shape[1] * a.page_size), dtype=torch.float32, device=a.q.device)
    score(a, slice(None), logits)
    return logits
