"""Exact top-k by searching for the threshold among order-preserving integer keys in registers, in one or two launches.

A program loads a tile of a row once and searches for its k-th largest key (`search`). One prefix sum over (greater,
equal) packed in an int32 then gives every chosen entry its place in ascending order.
Rows longer than a tile are a tournament: tiles hand their k best on in order, and a second launch chooses among those,
few rows in several programs each, which share the work of finding places.
Rows of at most k entries are listed without reading a score; rows of one tile end in the first launch.
Where there are more rows than half of the SMs, long ones are streamed instead (`streamed`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import kernels, tuned
from ...registry import Arguments
from .._pdl_triton import wait
from . import streamed, topk_slots
from .search import LOWEST, compared, fill, key_of, kth_largest, list_entries, page_of, places, put

LARGEST_TILE = 16384
"""Keys of one program: 16 registers of each of 1,024 threads."""
MOST_HANDED_ON = 2 * LARGEST_TILE
"""Keys of a program of the second launch: SGLang's page tables have a page more than a million tokens need, and the 17
tiles of that hand on more than 16 of the largest k do."""
WARPS = {1024: 4, 2048: 4, 4096: 8, 8192: 16, 16384: 32}
SCRATCH_BYTES = 32 << 20
"""For what the tiles of long rows hand on; more rows than fit go one block of rows after the other."""
LEAST_PART = 512
MOST_PARTS = 8
"""Programs that share a tile: each searches all of it, since finding places costs more, and places its part."""
MOST_PROGRAMS = 64
"""Up to which tiles are shared, so that each program has an SM of its own."""


@triton.jit(
    do_not_specialize=["logits_row", "width", "table_row", "out_row", "out_width", "tiles", "early"],
    do_not_specialize_on_alignment=["lengths", "table", "out"],
)
def _choose(
    logits, logits_row, width, lengths, table, table_row, out, out_row, out_width, best_keys, best_entries, tiles,
    early, K: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """logits fp32 [T, width] -> out int32 [T, >= K] for rows of up to TILE entries; for longer ones best_keys and
    best_entries int32 [T, tiles, K], the K best of each tile in order.

    Programs: T x tiles x PARTS, the last fastest. Each finds its tile's threshold, then the places of its own part.
    early: whether the next kernel may start beside this one.
    No row starts where Triton knows it to be aligned, so that loads take the one layout that the scattered stores can
    have: converting pointers between two layouts costs more than wider loads save.
    """
    wait(early)
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS % tiles
    row = (tl.program_id(0) // PARTS // tiles).to(tl.int64)
    length = tl.minimum(tl.load(lengths + row).to(tl.int32), width)
    start = tile * TILE
    OWN: tl.constexpr = TILE // PARTS
    table += row * table_row
    out += row * out_row
    if (tile == 0) & (part == 0):
        list_entries(table, out, tl.where(length <= K, length, 0), PAGE)
        fill(out, out_width, tl.minimum(length, K))
    if (length > K) & (start < length):
        entry = start + part * OWN + tl.arange(0, OWN)
        live = entry < length
        logits += row * logits_row
        keys = _row_keys(logits, entry, live)
        chosen, place = live, entry - start
        if length - start > K:
            if PARTS == 1:
                threshold, greater = kth_largest(keys, live, K, K)
                chosen, place = places(keys, 0, threshold, K - greater)
            else:
                index = tl.arange(0, TILE)
                all_live = start + index < length
                all_keys = _row_keys(logits, start + index, all_live)
                threshold, greater = kth_largest(all_keys, all_live, K, K)
                before = tl.sum(tl.where(index < part * OWN, compared(all_keys, threshold), 0), 0)
                chosen, place = places(keys, before, threshold, K - greater)
        if length <= TILE:
            put(out, place, entry, page_of(table, entry, chosen, PAGE), chosen, PAGE)
        else:
            best = (row * tiles + tile) * K
            tl.store(best_keys + best + place, keys, mask=chosen)
            tl.store(best_entries + best + place, entry, mask=chosen)


@triton.jit
def _row_keys(logits, entry, live):
    return tl.where(live, key_of(tl.load(logits + entry, mask=live, other=0.0)), LOWEST)


@triton.jit(
    do_not_specialize=["width", "table_row", "out_row", "out_width", "tiles"],
    do_not_specialize_on_alignment=["lengths", "table", "out"],
)
def _choose_again(
    width, lengths, table, table_row, out, out_row, out_width, best_keys, best_entries, tiles, K: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, AGAIN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What `_choose` left in best_keys and best_entries -> out. AGAIN is at least tiles * K.

    Programs: T x PARTS, as in `_choose`.
    """
    wait()
    part = tl.program_id(0) % PARTS
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    length = tl.minimum(tl.load(lengths + row).to(tl.int32), width)
    if (length > K) & (length > TILE):
        best_keys += row * tiles * K
        best_entries += row * tiles * K
        OWN: tl.constexpr = AGAIN // PARTS
        own = part * OWN + tl.arange(0, OWN)
        # Each full tile handed on K, the last one at most as many as it had.
        live = (own // K * TILE + own % K) < length
        keys = tl.load(best_keys + own, mask=live, other=LOWEST)
        entry = tl.load(best_entries + own, mask=live, other=0)
        # Of all, not of the chosen alone: so it is here when they are known.
        page = page_of(table + row * table_row, entry, live, PAGE)
        before = 0
        if PARTS == 1:
            threshold, greater = kth_largest(keys, live, K, K)
        else:
            index = tl.arange(0, AGAIN)
            all_live = (index // K * TILE + index % K) < length
            all_keys = tl.load(best_keys + index, mask=all_live, other=LOWEST)
            threshold, greater = kth_largest(all_keys, all_live, K, K)
            before = tl.sum(tl.where(index < part * OWN, compared(all_keys, threshold), 0), 0)
        chosen, place = places(keys, before, threshold, K - greater)
        put(out + row * out_row, place, entry, page, chosen, PAGE)


class Config(NamedTuple):
    """Entries per program of `_choose`, and the warps of `_choose` and `_choose_again`.

    stream: one launch of `streamed.stream` with these warps instead, whose programs walk rows by `tile` entries.
    """

    tile: int
    warps: int
    warps_again: int = 0
    stream: bool = False


def tile_size(width: int, k: int) -> int:
    """Entries per program: small tiles, as long as the second launch has few enough to choose from."""
    if width <= 4096:
        return max(triton.next_power_of_2(width), 1024)
    tile = max(2048 if width <= 8192 else 4096, triton.next_power_of_2(2 * k))
    while tile < LARGEST_TILE and _handed_on(width, k, tile) > LARGEST_TILE // 2:
        tile *= 2
    return min(tile, LARGEST_TILE)


def _parts(searches: int, size: int) -> int:
    """Programs that share each of `searches` searches of `size` entries: a power of two."""
    if size > LARGEST_TILE:
        # Beside so many keys a program has no registers for the places and pages of more than a part.
        return MOST_PARTS
    return max(1, min(size // LEAST_PART, MOST_PARTS, MOST_PROGRAMS // triton.next_power_of_2(max(searches, 1))))


def _handed_on(width: int, k: int, tile: int) -> int:
    """Entries that a row's tiles hand on, as `_choose_again` pads them."""
    return max(1024, triton.next_power_of_2(-(-width // tile) * k))


def config(rows: int, width: int, k: int, sms: int) -> Config:
    """How `rows` rows of `width` entries are searched on `sms` SMs.

    Long ones are streamed if there are more, up to a power of two, than half of the SMs.
    """
    if 2 * tuned.bucket(rows) > sms and tuned.bucket(width) > 4096 and k <= streamed.LARGEST_K:
        return Config(*streamed.launch_of(rows, k, sms), stream=True)
    tile = tile_size(width, k)
    return Config(tile, WARPS[tile], WARPS[min(_handed_on(width, k, tile), LARGEST_TILE)])


def _tuned_refusal(shape: tuned.Shape, rows: int, c: Config) -> str | None:
    width, k = shape
    warps = (1, 2, 4, 8, 16, 32)
    if c.stream:
        why = tuned.beyond(c, tile=streamed.TILES, warps=streamed.WARPS, warps_again=(0,))
        return why or streamed.refusal(k, c.tile, c.warps)
    if why := tuned.beyond(c, tile=tuple(WARPS), warps=warps, warps_again=warps):
        return why
    if c.tile < width and (c.tile < k or _handed_on(width, k, c.tile) > MOST_HANDED_ON):
        return f"tile is {c.tile} and needs k of one and at most {MOST_HANDED_ON} of all to be handed on"
    return None


TUNED = tuned.Family("topk_slots", ("width", "k"), Config, _tuned_refusal)
"""The width is rounded up to a power of two."""


def choose(a: Arguments, part: slice, logits: torch.Tensor, out: torch.Tensor) -> None:
    """Launch the selection for `part` of the rows, whose scores and results these are."""
    lengths, page_table, k = a.lengths[part], a.page_table[part], a.k
    rows, width = logits.shape
    # At least 8, for the interpreter, whose one would never share a row.
    sms = max(8, kernels.sms(logits.device))
    c = config(rows, width, k, sms)
    c = TUNED.choose(logits.device, (tuned.bucket(width), k), rows, c)
    if c.stream:
        streamed.choose(a, part, logits, out, c.tile, c.warps)
        return
    tile = c.tile
    tiles = max(1, -(-width // tile))
    again = _handed_on(width, k, tile)
    parts = _parts(rows * tiles, tile) if tiles > 1 else 1
    parts_again = _parts(rows, again)
    step = max(1, SCRATCH_BYTES // (8 * tiles * k)) if tiles > 1 else max(1, rows)
    best_keys = best_entries = out
    if tiles > 1:
        shape = (min(rows, step), tiles, k)
        best_keys, best_entries = kernels.scratch(
            "topk_slots", logits.device, (shape, torch.int32), (shape, torch.int32)
        )
    for first in range(0, max(1, rows), step):
        here = slice(first, first + step)
        slots = out[here]
        given = (lengths[here], page_table[here], page_table.stride(0), slots, slots.stride(0), slots.shape[1])
        given += (best_keys, best_entries, tiles)
        programs, again_programs = slots.shape[0] * tiles * parts, slots.shape[0] * parts_again
        early = kernels.leaves_room(programs, again_programs, logits.device) if tiles > 1 else 0
        kernels.launch(
            _choose, (programs,), logits[here], logits.stride(0), width, *given, early,
            K=k, PAGE=a.page_size, TILE=tile, PARTS=parts, num_warps=c.warps,
        )  # fmt: skip
        if tiles > 1:
            kernels.launch(
                _choose_again, (again_programs,), width, *given,
                K=k, PAGE=a.page_size, TILE=tile, AGAIN=again, PARTS=parts_again, num_warps=c.warps_again,
            )  # fmt: skip


def refusal(width: int, k: int) -> str | None:
    """Why k of width entries cannot be chosen here, or None."""
    if not 1 <= k <= MOST_HANDED_ON:
        return f"k is {k} and needs 1 to {MOST_HANDED_ON}."
    if -(-width // LARGEST_TILE) * k > MOST_HANDED_ON:
        most = LARGEST_TILE * (MOST_HANDED_ON // k)
        return f"there are {width} entries per row and k is {k}; at most {most} are supported with it."
    return None


def _accepts(a: Arguments) -> str | None:
    if a.logits.dtype != torch.float32 or (a.logits.shape[1] > 1 and a.logits.stride(1) != 1):
        return f"logits are {a.logits.dtype} and need float32 with adjacent columns."
    if a.page_table.dtype != torch.int32 or (a.page_table.shape[1] > 1 and a.page_table.stride(1) != 1):
        return f"page_table is {a.page_table.dtype} and needs int32 with adjacent columns."
    return refusal(a.logits.shape[1], a.k)


@topk_slots.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def topk_slots_triton(a: Arguments) -> torch.Tensor:
    """Contract in `topk_slots`."""
    out = output(a, a.logits.shape[0], a.logits.device)
    choose(a, slice(None), a.logits, out)
    return out


def output(a: Arguments, rows: int, device: torch.device) -> torch.Tensor:
    """The caller's tensor for the slots, or a new one."""
    return torch.empty((rows, a.k), dtype=torch.int32, device=device) if a.out is None else a.out
