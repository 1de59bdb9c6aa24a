"""Exact top-k of many long rows: a program of few warps reads a row once and keeps what may be among the k best.

Each program walks rows with a bound below which nothing can be chosen. Entries that reach it are appended, in order, to
the program's buffer of 4 k scores, which stays in the L2 cache. A full buffer is cut to its k best, whose least is the
next bound; with the row's end the k best are the result. So every tile costs a comparison and a prefix sum of counts,
and the search (`search`) runs once or twice, among some 2 k entries, where `triton.py` searches all of them, with a
barrier of many warps at each step. Other rows' programs on the same SM hide what a program waits for.

The first bound is guessed: the score that a sample of 1,024 entries, spread over the row, says some 2 k entries reach.
A guess that fewer than k reach, of which nothing but time depends, is found out at the row's end, and the row is read
again without one. Whatever the scores are, a buffer is cut at most once for some 2 k entries (k, where four warps read
1,024 at once), each cut with about as many instructions as reading 12,000 entries takes. An order in which most entries
beat the k best of those before them, which the sample does not show, is the worst.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels, tuned
from ...registry import Arguments
from .._pdl_triton import wait
from .search import LOWEST, compared, fill, key_of, kth_largest, list_entries, page_of, places, put, value_of

LARGEST_K = 1024
"""Whose buffer two warps can search in registers."""
TILES = (256, 512, 1024)
WARPS = (1, 2, 4)
KEYS_PER_WARP = 2048
"""Of a buffer at most: 64 registers of each thread."""
WARPS_PER_SM = 14
"""With up to 144 registers a thread."""
SCRATCH_BYTES = 32 << 20
SAMPLE: tl.constexpr = tl.constexpr(1024)
SECTOR: tl.constexpr = tl.constexpr(8)
"""Adjacent entries of the sample: 32 bytes, which come from memory together."""
CHUNK: tl.constexpr = tl.constexpr(256)
LOWEST_SCORE: tl.constexpr = tl.constexpr(-2139095041)
"""The key of -inf."""


@triton.jit
def _guess(logits, length, K: tl.constexpr):
    """A key that probably K entries or more of a row reach, and not many more; the row has at least SAMPLE entries."""
    index = tl.arange(0, SAMPLE)
    SECTORS: tl.constexpr = SAMPLE // SECTOR
    sector = index // SECTOR
    start = sector * (length // SECTORS) + sector * (length % SECTORS) // SECTORS
    keys = key_of(tl.load(logits + start // SECTOR * SECTOR + index % SECTOR))
    # Of the K best the sample has `expected`, with about its root for a deviation; four more, and four for few.
    expected = SAMPLE * K / length.to(tl.float32)
    least = (expected + 4 * tl.sqrt(expected) + 4).to(tl.int32)
    guess, _ = kth_largest(keys, keys >= LOWEST, least, least + least // 4)
    return tl.maximum(guess, LOWEST_SCORE)


@triton.jit
def _four(scores, part, limit, PART: tl.constexpr):
    """The first, second, third and fourth scores [PART / 4] of a part's groups of four; anything from `limit` on."""
    group = tl.arange(0, PART // 4)
    entry = part * PART + group[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(scores + entry, mask=entry < limit)
    even, odd = tl.split(tl.reshape(x, [PART // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _plain(x, entry, length):
    """-inf for NaN, which ranks as it, and NaN, which reaches no bound, from `length` on."""
    return tl.where(entry < length, tl.where(x != x, float("-inf"), x), float("nan"))


@triton.jit
def _reach(x0, x1, x2, x3, bound):
    """How many of the first, of the first two, three and four of a group reach the bound."""
    n1 = (x0 >= bound).to(tl.int32)
    n2 = n1 + (x1 >= bound).to(tl.int32)
    n3 = n2 + (x2 >= bound).to(tl.int32)
    return n1, n2, n3, n3 + (x3 >= bound).to(tl.int32)


@triton.jit
def _append_one(buffer, place, after, score, entry, BUFFER: tl.constexpr):
    # Where it was counted: more comparisons than there are predicates would have to be kept until here.
    counted = after > place
    at = buffer + place.to(tl.uint32)
    tl.store(at, score.to(tl.int32, bitcast=True), mask=counted)
    tl.store(at + BUFFER, entry, mask=counted)


@triton.jit
def _append(buffer, place, x0, x1, x2, x3, n1, n2, n3, n4, entry, BUFFER: tl.constexpr):
    """Write scores and entries of what `_reach` counted to places that begin at `place`."""
    _append_one(buffer, place, place + n1, x0, entry, BUFFER)
    _append_one(buffer, place + n1, place + n2, x1, entry + 1, BUFFER)
    _append_one(buffer, place + n2, place + n3, x2, entry + 2, BUFFER)
    _append_one(buffer, place + n3, place + n4, x3, entry + 3, BUFFER)


@triton.jit
def _search(buffer, count, K: tl.constexpr, BUFFER: tl.constexpr):
    """`kth_largest` of the first `count` scores of the buffer."""
    index = tl.arange(0, BUFFER)
    keys = key_of(tl.load(buffer + index).to(tl.float32, bitcast=True))
    return kth_largest(tl.where(index < count, keys, LOWEST), index < count, K, K)


@triton.jit
def _cut(buffer, count, last, pages, slots, K: tl.constexpr, PAGE: tl.constexpr, BUFFER: tl.constexpr):
    """Put the K best of `count` >= K entries to the buffer's front or, at the row's `last`, into slots.

    Returns a key above which none of the others is.
    """
    # The other threads' entries.
    tl.debug_barrier()
    threshold, greater = _search(buffer, count, K, BUFFER)
    before = 0
    # The first chunk is the short one: so none starts where Triton knows it to be aligned, and loads take the one
    # layout that the scattered stores can have.
    for first in tl.range(count % CHUNK - CHUNK, count, CHUNK):
        index = first + tl.arange(0, CHUNK)
        live = index >= 0
        score = tl.load(buffer + index, mask=live, other=0)
        entry = tl.load(buffer + BUFFER + index, mask=live, other=0)
        keys = tl.where(live, key_of(score.to(tl.float32, bitcast=True)), LOWEST)
        chosen, place = places(keys, before, threshold, K - greater)
        before += tl.sum(compared(keys, threshold), 0)
        # None may be overwritten that another thread has yet to read.
        tl.debug_barrier()
        if last:
            put(slots, place, entry, page_of(pages, entry, chosen, PAGE), chosen, PAGE)
        else:
            tl.store(buffer + place, score, mask=chosen)
            tl.store(buffer + BUFFER + place, entry, mask=chosen)
    return threshold


@triton.jit(
    do_not_specialize=["rows", "width", "table_row", "out_row", "out_width"],
    do_not_specialize_on_alignment=["lengths", "table", "out"],
)
def stream(
    logits, logits_row, width, rows, lengths, table, table_row, out, out_row, out_width, buffers, K: tl.constexpr,
    PAGE: tl.constexpr, GROUP: tl.constexpr, BUFFER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """logits fp32 [rows, width] -> out int32 [rows, >= K]; buffers int32 [programs, 2, BUFFER], scores and entries.

    GROUP divides width: entries of which all can be loaded where one can. BUFFER is at least K + TILE.
    """
    wait()
    PART: tl.constexpr = TILE // 2
    buffer = buffers + tl.program_id(0).to(tl.int64) * (2 * BUFFER)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        scores, pages, slots = logits + row * logits_row, table + row * table_row, out + row * out_row
        length = tl.minimum(tl.load(lengths + row).to(tl.int32), width)
        list_entries(pages, slots, tl.where(length <= K, length, 0), PAGE)
        fill(slots, out_width, tl.minimum(length, K))
        if length > K:
            low = tl.full([], LOWEST_SCORE, tl.int32)
            if length > BUFFER:
                low = _guess(scores, length, K)
            limit = tl.cdiv(length, GROUP) * GROUP
            tiles = tl.cdiv(length, TILE)
            tile = 0
            count = 0
            x0, x1, x2, x3 = _four(scores, 0, limit, PART)
            z0, z1, z2, z3 = _four(scores, 1, limit, PART)
            while tile < tiles:
                x = tile * TILE + 4 * tl.arange(0, PART // 4)
                z = x + PART
                if (low == LOWEST_SCORE) | (tile == tiles - 1):
                    x0, x1 = _plain(x0, x, length), _plain(x1, x + 1, length)
                    x2, x3 = _plain(x2, x + 2, length), _plain(x3, x + 3, length)
                    z0, z1 = _plain(z0, z, length), _plain(z1, z + 1, length)
                    z2, z3 = _plain(z2, z + 2, length), _plain(z3, z + 3, length)
                tile += 1
                # In flight while this tile is worked on.
                next_x0, next_x1, next_x2, next_x3 = _four(scores, 2 * tile, limit, PART)
                next_z0, next_z1, next_z2, next_z3 = _four(scores, 2 * tile + 1, limit, PART)
                bound = value_of(low)
                a1, a2, a3, a4 = _reach(x0, x1, x2, x3, bound)
                b1, b2, b3, b4 = _reach(z0, z1, z2, z3, bound)
                # Both parts' places by one sum.
                own = a4 + (b4 << 16)
                before = tl.cumsum(own, 0) - own
                total = tl.sum(own, 0)
                _append(buffer, count + (before & 0xFFFF), x0, x1, x2, x3, a1, a2, a3, a4, x, BUFFER)
                count += total & 0xFFFF
                _append(buffer, count + (before >> 16), z0, z1, z2, z3, b1, b2, b3, b4, z, BUFFER)
                count += total >> 16
                x0, x1, x2, x3 = next_x0, next_x1, next_x2, next_x3
                z0, z1, z2, z3 = next_z0, next_z1, next_z2, next_z3
                last = tile == tiles
                if (count > BUFFER - TILE) | (last & (count >= K)):
                    # Of entries that equal the least of the K best, those before are chosen.
                    low = _cut(buffer, count, last, pages, slots, K, PAGE, BUFFER) + 1
                    count = K
                elif last:
                    # Too few reached the guess.
                    low = tl.full([], LOWEST_SCORE, tl.int32)
                    tile = 0
                    count = 0
                    x0, x1, x2, x3 = _four(scores, 0, limit, PART)
                    z0, z1, z2, z3 = _four(scores, 1, limit, PART)
        row += tl.num_programs(0)


def buffer_size(k: int) -> int:
    """Entries that a program keeps."""
    return max(KEYS_PER_WARP, 4 * triton.next_power_of_2(k))


def launch_of(rows: int, k: int, sms: int) -> tuple[int, int]:
    """Entries read at once, and warps of a program.

    As few warps as the search has room in, since each repeats what is done once a tile or step; more where rows are
    too few to fill `sms` SMs.
    """
    warps = buffer_size(k) // KEYS_PER_WARP
    while warps < WARPS[-1] and tuned.bucket(rows) * 2 * warps <= WARPS_PER_SM * sms:
        warps *= 2
    return max(512, 256 * warps), warps


def refusal(k: int, tile: int, warps: int) -> str | None:
    """Why the k best cannot be found so, or None."""
    if k > LARGEST_K:
        return f"stream is True and k is {k}, and needs one of at most {LARGEST_K}"
    if warps * KEYS_PER_WARP < buffer_size(k) or not 256 * warps <= tile <= buffer_size(k) // 2:
        most, least = buffer_size(k) // 2, buffer_size(k) // KEYS_PER_WARP
        return f"tile is {tile} with {warps} warps and needs 256 for each to {most}, with at least {least} warps"
    return None


def choose(a: Arguments, part: slice, logits: torch.Tensor, out: torch.Tensor, tile: int, warps: int) -> None:
    """Launch the selection for `part` of the rows, whose scores and results these are."""
    lengths, page_table = a.lengths[part], a.page_table[part]
    rows, width = logits.shape
    size = buffer_size(a.k)
    fit = WARPS_PER_SM * kernels.sms(logits.device) // warps
    programs = max(1, min(rows, fit, SCRATCH_BYTES // (8 * size)))
    (buffers,) = kernels.scratch("topk_slots", logits.device, ((programs, 2, size), torch.int32))
    kernels.launch(
        stream, (min(rows, programs),), logits, logits.stride(0), width, rows, lengths, page_table,
        page_table.stride(0), out, out.stride(0), out.shape[1], buffers,
        K=a.k, PAGE=a.page_size, GROUP=4 if width % 4 == 0 else 1, BUFFER=size, TILE=tile, num_warps=warps,
    )  # fmt: skip
