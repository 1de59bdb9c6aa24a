"""Sparse MLA in one pass over the listed slots: gather, dequantise once for 16 heads, two tensor-core dots.

One program takes one row x 16 heads x a range of blocks of 32 candidates. The bytes of the next block and the slots of
the one after are in flight while a block is worked on; its keys are expanded to fp16 (exact, see `kv_f16`) into one
shared-memory copy that both dots read. The query stays in shared memory too (49 KiB in all: two programs on an SM
of SM120), and each of 4 warps owns a quarter of the value channels, so that the 16 x 512 fp32 sums fit registers.
(32 heads in 8 warps share the gather but read more shared memory, for every warp reads the whole query.)
Weights enter the second dot as fp16: that moves the bf16 result by 7e-4 of its RMS, bf16 weights would by 2e-3.
With few rows the blocks are split over programs, whose partial sums a second launch merges in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels
from ...formats import kv_page
from ...registry import Arguments
from .._arithmetic import to_bf16
from .._pages_triton import kv_bytes, kv_f16, kv_rope, kv_scales, kv_slots, pool_refusal
from .._pdl_triton import wait
from . import sparse_mla

BLOCK = 32
TILE = 16
WARPS = 4
PROGRAMS_PER_SM = 2
MAX_SPLITS = 64
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
DIM: tl.constexpr = tl.constexpr(kv_page.DIM)
ROPE: tl.constexpr = tl.constexpr(kv_page.ROPE)
# Channels are worked on in five tiles: three of 128 and one of 64 FP8 channels, then the 64 bf16 ones.
TILES: tl.constexpr = tl.constexpr(5)
GROUPS: tl.constexpr = tl.constexpr(kv_page.NOPE // kv_page.GROUP)


@triton.jit
def _load(vectors, real, START: tl.constexpr, WIDTH: tl.constexpr):
    """Channels START ... START + WIDTH of bf16 vectors [N], [N, WIDTH]; zeros where not real."""
    channel = START + tl.arange(0, WIDTH)
    return tl.load(vectors[:, None] + channel[None, :], mask=real[:, None], other=0.0)


@triton.jit
def _store(vectors, real, values, START: tl.constexpr, WIDTH: tl.constexpr):
    channel = START + tl.arange(0, WIDTH)
    if vectors.dtype.element_ty == tl.bfloat16:
        values = to_bf16(values)
    tl.store(vectors[:, None] + channel[None, :], values, mask=real[:, None])


@triton.jit
def _slots(block, last, window, extra, BLOCK: tl.constexpr):
    """Slots int32 [BLOCK] of a block, -1 where there is none. window and extra are (slots of the row, count)."""
    offset = block * BLOCK + tl.arange(0, BLOCK)
    slots, count = window
    if extra is not None:
        skipped = tl.cdiv(count, BLOCK)
        beyond = block >= skipped
        slots = tl.where(beyond, extra[0], slots)
        count = tl.where(beyond, extra[1], count)
        offset = tl.where(beyond, offset - skipped * BLOCK, offset)
    return tl.load(slots + offset, mask=(offset < count) & (block < last), other=-1)


@triton.jit
def _gather(slot, is_extra, window, extra):
    """The bytes of slots [N] as loaded: seven groups of E4M3, a tile of bf16, the scales.

    Groups rather than tiles, for which Triton 3.8 takes two layouts, and with them slots and scales twice.

    window and extra are (pages, page stride, page size).
    """
    pages, stride, size = window
    if extra is not None:
        pages = tl.where(is_extra, extra[0], pages)
        stride = tl.where(is_extra, extra[1], stride)
        size = tl.where(is_extra, extra[2], size)
    live = slot >= 0
    vector, footer = kv_slots(slot, live, pages, stride, size)
    groups = ()
    for i in tl.static_range(GROUPS):
        groups += (kv_bytes(vector, live, i, 1),)
    return groups, kv_rope(vector, live), kv_scales(footer, live)


@triton.jit(
    do_not_specialize=["window_row", "window_width", "extra_row", "extra_width", "splits"],
    do_not_specialize_on_alignment=["window_slots", "window_lengths", "extra_slots", "extra_lengths", "positions"],
)
def _attend(
    q, q_row, q_head, window_pages, window_page_stride, window_slots, window_row, window_width, window_lengths,
    extra_pages, extra_page_stride, extra_slots, extra_row, extra_width, extra_lengths, sink, freqs, positions, out,
    parts, stats, scale, q_eps, splits, HEADS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW_PAGE: tl.constexpr, EXTRA_PAGE: tl.constexpr, SPLIT: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """q bf16 [T, HEADS, 512] -> out bf16 [T, HEADS, 512], or with SPLIT parts fp32 [T, splits, HEADS, 512] and stats
    fp32 [T, splits, HEADS, 2]: a part's weighted sum, its largest score (base 2) and its sum of weights.

    TURN: out's last 64 channels are turned back by freqs fp32 [S, 32, 2]. NORM: q is normalised and turned before.

    Programs: rows x splits x ceil(HEADS / TILE), the last fastest, so that neighbours read the same keys.
    """
    wait()
    tiles: tl.constexpr = (HEADS + TILE - 1) // TILE
    program = tl.program_id(0)
    head = (program % tiles) * TILE + tl.arange(0, TILE)
    split = (program // tiles) % splits
    row = (program // tiles // splits).to(tl.int64)
    real = head < HEADS

    count = tl.minimum(tl.load(window_lengths + row).to(tl.int32), window_width)
    window = (window_pages, window_page_stride, WINDOW_PAGE)
    window_list = (window_slots + row * window_row, count)
    own_blocks = tl.cdiv(count, BLOCK)
    last = own_blocks
    extra = None
    extra_list = None
    if EXTRA_PAGE > 0:
        count = tl.minimum(tl.load(extra_lengths + row).to(tl.int32), extra_width)
        extra = (extra_pages, extra_page_stride, EXTRA_PAGE)
        extra_list = (extra_slots + row * extra_row, count)
        last += tl.cdiv(count, BLOCK)
    first = 0
    if SPLIT:
        each = tl.cdiv(last, splits)
        first = split * each
        last = tl.minimum(first + each, last)

    slot = _slots(first, last, window_list, extra_list, BLOCK)
    raw, rope, scales = _gather(slot, first >= own_blocks, window, extra)
    ahead = _slots(first + 1, last, window_list, extra_list, BLOCK)
    query = q + row * q_row + head * q_head
    queries = ()
    sums = ()
    for i in tl.static_range(TILES):
        queries += (_load(query, real, 128 * i if i < 4 else 448, 128 if i < 3 else 64),)
        sums += (tl.zeros([TILE, 128 if i < 3 else 64], tl.float32),)
    queries = _queries(queries, query, real, freqs, positions, row, q_eps, NORM)
    top = tl.full([TILE], float("-inf"), tl.float32)
    totals = tl.zeros([TILE, BLOCK], tl.float32)

    for block in tl.range(first, last, num_stages=1):
        keys = ()
        for i in tl.static_range(TILES - 2):
            pair = tl.join(kv_f16(raw[2 * i], scales, 2 * i), kv_f16(raw[2 * i + 1], scales, 2 * i + 1))
            keys += (tl.reshape(tl.permute(pair, 0, 2, 1), BLOCK, 128),)
        keys += (kv_f16(raw[GROUPS - 1], scales, GROUPS - 1),)
        keys += (rope.to(tl.float16),)
        live = slot >= 0
        # Carried over the iteration: the loads overlap the dots, and Triton sees 16-bit operands (ldmatrix, one copy
        # for both dots) where it would otherwise lay the dots out for 8-bit loads.
        raw, rope, scales = _gather(ahead, block + 1 >= own_blocks, window, extra)
        slot = ahead
        ahead = _slots(block + 2, last, window_list, extra_list, BLOCK)

        scores = tl.zeros([TILE, BLOCK], tl.float32)
        for i in tl.static_range(TILES):
            scores = tl.dot(queries[i], tl.trans(keys[i]), scores)
        scores = tl.where(live[None, :], scores * (scale * LOG2E), float("-inf"))
        above = tl.maximum(top, tl.max(scores, 1))
        # A head that has met only absent slots has no largest score yet: keep exp2(-inf - -inf) out.
        pivot = tl.where(above == float("-inf"), 0.0, above)
        # Summed as rounded, so that what rounding takes from a weight does not go missing from their mean; and summed
        # per thread, so that only the largest score crosses warps in here.
        weights = tl.exp2(scores - pivot[:, None]).to(tl.float16)
        shrink = tl.exp2(top - pivot)
        totals = totals * shrink[:, None] + weights.to(tl.float32)
        grown = ()
        for i in tl.static_range(TILES):
            grown += (tl.dot(weights, keys[i], sums[i] * shrink[:, None]),)
        sums = grown
        top = above

    total = tl.sum(totals, 1)
    if SPLIT:
        at = (row * splits + split) * HEADS + head
        tl.store(stats + at * 2, top, mask=real)
        tl.store(stats + at * 2 + 1, total, mask=real)
        # An empty part is known by its -inf; nobody reads its sums.
        real = real & (first < last)
        to = parts + at * DIM
        factor = tl.full([TILE], 1.0, tl.float32)
    else:
        factor = _normaliser(top, total, tl.load(sink + head, mask=real, other=0.0).to(tl.float32))
        to = out + (row * HEADS + head) * DIM
    for i in tl.static_range(TILES):
        values = sums[i] * factor[:, None]
        if TURN and not SPLIT and i == 4:
            pair = tl.arange(0, ROPE // 2)
            cos, sin = _turn(freqs, positions, row, pair, pair >= 0)
            values = tl.reshape(_turned_back(tl.reshape(values, TILE, ROPE // 2, 2), cos[None], sin[None]), TILE, ROPE)
        _store(to, real, values, 128 * i if i < 4 else 448, 128 if i < 3 else 64)


@triton.jit
def _queries(loaded, query, real, freqs, positions, row, eps, NORM: tl.constexpr):
    """The five tiles of bf16 queries as fp16, normalised by head and turned if NORM.

    The other channel of each pair is loaded again: splitting pairs would take shared memory, which is used up.
    """
    queries = ()
    if NORM:
        channel = tl.arange(0, ROPE)
        cos, sin = _turn(freqs, positions, row, channel // 2, channel >= 0)
        sin = tl.where(channel % 2 == 0, -sin, sin)
        partner = DIM - ROPE + (channel ^ 1)
        other = tl.load(query[:, None] + partner[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        squares = tl.zeros([loaded[0].shape[0]], tl.float32)
        for i in tl.static_range(TILES):
            value = loaded[i].to(tl.float32)
            squares += tl.sum(value * value, 1)
        factor = tl.rsqrt(squares / DIM + eps)
        for i in tl.static_range(TILES):
            value = loaded[i].to(tl.float32)
            if i == TILES - 1:
                value = value * cos[None, :] + other * sin[None, :]
            queries += (to_bf16(value * factor[:, None]).to(tl.float16),)
    else:
        for i in tl.static_range(TILES):
            queries += (loaded[i].to(tl.float16),)
    return queries


@triton.jit
def _turn(freqs, positions, row, pair, inside):
    """(cos, sin) of a row's position for each pair of channels; where not inside, those of no turn."""
    at = freqs + tl.load(positions + row).to(tl.int64) * ROPE + 2 * pair
    return tl.load(at, mask=inside, other=1.0), tl.load(at + 1, mask=inside, other=0.0)


@triton.jit
def _turned_back(pairs, cos, sin):
    """Pairs (real, imaginary) [..., 2] times cos - i sin."""
    real, imaginary = tl.split(pairs)
    return tl.join(real * cos + imaginary * sin, imaginary * cos - real * sin)


@triton.jit
def _normaliser(top, total, sink):
    """What a sum of weights 2^(score - top) x values is multiplied by: 1 / (total + 2^(sink - top)), or 0."""
    bias = sink * LOG2E
    peak = tl.maximum(top, bias)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    shrink = tl.exp2(top - peak)
    whole = total * shrink + tl.exp2(bias - peak)
    return tl.where(whole > 0, shrink / whole, 0.0)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["positions"])
def _merge(
    parts, stats, sink, freqs, positions, out, splits,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """parts fp32 [T, splits, HEADS, 512], stats fp32 [T, splits, HEADS, 2] -> out bf16 [T, HEADS, 512], as `_attend`.

    Programs: (T * HEADS, 512 / WIDTH). SPLITS is a power of two, at least splits.
    """
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    bias = tl.load(sink + head).to(tl.float32)
    wait()
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = tl.arange(0, SPLITS)
    at = (row * splits + part) * HEADS + head
    top = tl.load(stats + at * 2, mask=part < splits, other=float("-inf"))
    total = tl.load(stats + at * 2 + 1, mask=part < splits, other=0.0)
    live = top > float("-inf")
    values = tl.load(parts + at[:, None] * DIM + channel[None, :], mask=live[:, None], other=0.0)
    peak = tl.max(top, 0)
    pivot = tl.where(peak == float("-inf"), 0.0, peak)
    shrink = tl.exp2(top - pivot)
    total = tl.sum(total * shrink, 0)
    merged = tl.sum(values * shrink[:, None], 0)
    merged *= _normaliser(peak, total, bias)
    if TURN:
        pair = (tl.program_id(1) * WIDTH - (DIM - ROPE)) // 2 + tl.arange(0, WIDTH // 2)
        cos, sin = _turn(freqs, positions, row, pair, pair >= 0)
        merged = tl.reshape(_turned_back(tl.reshape(merged, WIDTH // 2, 2), cos, sin), WIDTH)
    tl.store(out + (row * HEADS + head) * DIM + channel, to_bf16(merged))


def _splits(programs: int, blocks: int, slots: int) -> int:
    """Into how many programs to split `programs` rows x head tiles with up to `blocks` blocks of candidates each.

    slots: programs that run at once.
    """

    def cost(splits: int) -> float:
        """In units of one block's time: waves of programs, each with a start; then the merge and its traffic."""
        waves = -(-programs * splits // slots)
        merge = 2 + 2 * programs * splits / slots if splits > 1 else 0.0
        return waves * (-(-blocks // splits) + 1) + merge

    # No more than run at once, for which the scratch is made.
    most = min(blocks, MAX_SPLITS, slots // max(programs, 1))
    return min(range(1, max(1, most) + 1), key=cost)


def _accepts(a: Arguments) -> str | None:
    if a.q.dtype != torch.bfloat16 or a.q.dim() != 3 or a.q.shape[2] != kv_page.DIM or a.q.stride(2) != 1:
        return f"q is {a.q.dtype} {list(a.q.shape)} and needs bfloat16 [rows, heads, {kv_page.DIM}], channels adjacent."
    pools = [("window", a.window_pages, a.window_slots, a.window_page_size)]
    if a.extra_pages is not None:
        pools.append(("extra", a.extra_pages, a.extra_slots, a.extra_page_size))
    for name, pages, slots, size in pools:
        if slots.dtype != torch.int32 or (slots.shape[1] > 1 and slots.stride(1) != 1):
            return f"{name}_slots is {slots.dtype} and needs int32 with adjacent columns."
        if why := pool_refusal(f"{name}_pages", pages, size * (kv_page.ROW + kv_page.FOOTER)):
            return why
    freqs = a.freqs_cis
    if freqs is not None and not (freqs.is_contiguous() and freqs.shape[1:] == (kv_page.ROPE // 2,)):
        return f"freqs_cis is {list(freqs.shape)} and needs {kv_page.ROPE // 2} adjacent numbers per position."
    return None


@sparse_mla.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def sparse_mla_triton(a: Arguments) -> torch.Tensor:
    """Contract in `sparse_mla`."""
    q, sink = a.q, a.sink
    rows, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    window = (a.window_pages, a.window_slots, a.window_lengths)
    # Read by nobody where there is none: the kernel without extra slots takes any tensor there.
    extra = window if a.extra_pages is None else (a.extra_pages, a.extra_slots, a.extra_lengths)
    blocks = sum(-(-slots.shape[1] // BLOCK) for _, slots, _ in ((window,) if extra is window else (window, extra)))
    turn = a.freqs_cis is not None
    # Without a turn, read by nobody.
    freqs, positions = (torch.view_as_real(a.freqs_cis), a.positions) if turn else (sink, sink)
    tiles = -(-heads // TILE)
    # At least 8 SMs, for the interpreter, whose one would never split.
    at_once = max(8, kernels.sms(q.device)) * PROGRAMS_PER_SM
    splits = _splits(rows * tiles, blocks, at_once)
    parts, stats = out, sink
    if splits > 1:
        # The same for every number of rows, since the largest need is at none that stands out: 12 MiB on 188 SMs.
        parts, stats = kernels.scratch(
            "sparse_mla",
            q.device,
            ((at_once // tiles, heads, kv_page.DIM), torch.float32),
            ((at_once // tiles, heads, 2), torch.float32),
        )
    kernels.launch(
        _attend, (rows * splits * tiles,), q, q.stride(0), q.stride(1), *_given(*window), *_given(*extra), sink,
        freqs, positions, out, parts, stats, a.scale, 0.0 if a.q_eps is None else float(a.q_eps), splits,
        HEADS=heads, TILE=TILE, BLOCK=BLOCK, WINDOW_PAGE=a.window_page_size,
        EXTRA_PAGE=a.extra_page_size if extra is not window else 0, SPLIT=splits > 1, TURN=turn,
        NORM=a.q_eps is not None, num_warps=WARPS,
    )  # fmt: skip
    if splits > 1:
        width = 128 if rows < 16 else kv_page.DIM
        for many in _merged(splits, at_once // (rows * tiles)):
            kernels.launch(
                _merge, (rows * heads, kv_page.DIM // width), parts, stats, sink, freqs, positions, out, splits,
                HEADS=heads, SPLITS=many, WIDTH=width, TURN=turn, num_warps=4,
            )  # fmt: skip
    return out


def _given(pages: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    return pages, pages.stride(0), slots, slots.stride(0), slots.shape[1], lengths


def _merged(splits: int, most: int) -> list[int]:
    """SPLITS of `_merge`; in a rehearsal every one up to `most` parts, which other widths of the slots would choose."""
    if not kernels.rehearsing():
        return [triton.next_power_of_2(splits)]
    last = triton.next_power_of_2(min(most, MAX_SPLITS))
    return [1 << bit for bit in range(1, last.bit_length())]
