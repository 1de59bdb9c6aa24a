"""Routed experts with FP4 weights: a fused gate/up + SwiGLU kernel, a down kernel, and a sum over the slots.

Every kernel is the same loop (`grouped.product`): the packed bytes of a tile of weight rows are dequantised in
registers and multiplied by a tile of tokens with tensor cores, because at one token too that costs fewer
instructions per weight than unpacking to fp32 for an FMA. Few rows: each (row, slot) pair finds by itself who shares
its expert, and one of them does the work for all, so nothing is sorted and a weight byte is read once. Many rows:
one small kernel sorts the pairs by expert. Where rows are too few to fill the GPU, several stretches of K are laid
side by side in the tile (rows x stretches times tokens x stretches), whose diagonal is summed at the end.
Sums over slots run in slot order, through fp32 scratch except at one row.

Whether these are MXFP4 or NVFP4 the kernels know by the dtype of the scales, bytes or E4M3. MXFP4 has no factors: they
are None.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import triton

from ... import kernels, tuned
from ...formats import e8m0, mxfp4
from ...formats.experts import MULTIPLE
from ...registry import Arguments
from . import mxfp4_moe, tiles
from .grouped import SHIFTS, sort_pairs, to_planes

SORT_ABOVE = 64
"""Rows above which sorting the pairs by expert pays for a launch."""
PARTIAL_BYTES = 96 << 20
"""Scratch for the experts' outputs before they are summed; what needs more is computed in stretches of channels."""


class Config(NamedTuple):
    """Tile of a kernel: rows of weights, tokens, stretches of K side by side, words of K, and its launch."""

    rows: int
    tokens: int
    split: int
    depth: int
    warps: int
    stages: int


def _config(rows: int, pairs: int, experts: int, width: int, inter: int, block: int) -> tuple[Config, Config]:
    """Tiles of the gate/up and the down kernel, whose weights have a scale for `block` channels."""
    pairs_per_expert = pairs / experts
    if rows <= SORT_ABOVE:
        # One row: 32 rows of weights per warp, whose share of x then serves two tiles.
        narrow = pairs * inter > 8192
        split = 2 if rows <= 4 and (rows > 1 or narrow) else 4 if rows == 1 else 1
        while width % (MULTIPLE * split):  # a stretch begins with four scales
            split //= 2
        if rows == 1:
            depth = 128 if narrow else 64
            if _alone(rows, pairs):
                depth = math.gcd(depth, inter // 4)
            if narrow:
                return Config(64, 8 // split, split, 64, 2, 3), Config(128, 8, 1, depth, 4, 3)
            return Config(128, 8 // split, split, 64, 4, 3), Config(64, 8, 1, depth, 4, 3)
        return Config(128, 8 // split, split, 64, 4, 3), Config(128, 8, 1, 64, 4, 3)
    if pairs_per_expert <= 12:
        return Config(128, 16, 1, 64, 4, 3), Config(128, 16, 1, 64, 4, 3)
    if pairs_per_expert <= 40:
        return Config(128, 32, 1, 32, 4, 3), Config(128, 32, 1, 32, 4, 3)
    # Three stages unroll a loop of three steps, which then spills; with twice the scales four warps do.
    stages = 3 if inter > 3 * 4 * 32 else 2
    return Config(128, 64, 1, 32, 4, 3), Config(128, 64, 1, 32, 4 * mxfp4.BLOCK // block, stages)


def _tile_refusal(c: Config, block: int) -> str | None:
    tiles = (16, 32, 64, 128, 256)
    why = tuned.beyond(
        c, rows=tiles, tokens=(1, 2, 4, 8, 16, 32, 64, 128), split=(1, 2, 4, 8), depth=(32, 64, 128, 256),
        warps=(1, 2, 4, 8, 16), stages=range(1, 7),
    )  # fmt: skip
    if why:
        return why
    columns = c.tokens * c.split
    if not 8 <= columns <= 128:
        return f"tokens times split is {columns} and needs 8 to 128"
    # Words and scales of the weights, four planes of the tokens.
    shared = (c.stages - 1) * c.depth * (c.rows * 2 + c.rows * 4 // block + columns * 8)
    return f"the tiles in flight take {shared} bytes of shared memory" if shared > tuned.SHARED_LIMIT else None


def _gate_up_refusal(block: int, shape: tuned.Shape, rows: int, c: Config) -> str | None:
    _, hidden, _, _ = shape
    if c.rows // c.split % 16:
        return f"a stretch has {c.rows // c.split} rows and needs a multiple of 16, gates and ups in eights"
    if c.split > 1 and (rows > SORT_ABOVE or hidden % (MULTIPLE * c.split)):
        return f"split is {c.split} and needs to be 1 for {rows} rows of {hidden} channels"
    return _tile_refusal(c, block)


def _down_refusal(block: int, shape: tuned.Shape, rows: int, c: Config) -> str | None:
    _, hidden, inter, slots = shape
    if c.split > 1:
        return f"split is {c.split} and needs to be 1"
    if hidden % c.rows:
        return f"rows are {c.rows} and need to divide the {hidden} channels"
    if _alone(rows, slots):
        if c.tokens < slots or c.rows < c.tokens:
            return f"tokens are {c.tokens} of {c.rows} rows and need to hold the {slots} slots of the one row"
        if inter // 4 % c.depth:
            return f"depth is {c.depth} and needs to divide the {inter // 4} words of a slot"
    return _tile_refusal(c, block)


class Families(NamedTuple):
    """How the two kernels of an op are launched whose weights have a scale for `block` channels."""

    block: int
    gate_up: tuned.Family[Config]
    down: tuned.Family[Config]


def families(op: str, block: int) -> Families:
    """Those of an op, by its name."""
    shape = ("experts", "hidden", "inter", "slots")
    return Families(
        block,
        tuned.Family(f"{op}.gate_up", shape, Config, partial(_gate_up_refusal, block)),
        tuned.Family(f"{op}.down", shape, Config, partial(_down_refusal, block)),
    )


FAMILIES = families("mxfp4_moe", mxfp4.BLOCK)


def _alone(rows: int, slots: int) -> bool:
    """Whether `tiles.down_row` serves the call."""
    return rows == 1 and slots <= 8


def accepts(a: Arguments) -> str | None:
    for name in ("x", "topk_ids", "topk_weights"):
        tensor = getattr(a, name)
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} has stride {tensor.stride(-1)} in its last dimension and needs 1."
    for name in [name for name in ("w13", "s13", "g13", "w2", "s2", "g2") if name in vars(a)]:
        tensor = getattr(a, name)
        if not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()} and needs to be contiguous."
        if tensor.storage_offset() % 4:
            return f"{name} has offset {tensor.storage_offset()} and needs a multiple of 4."
    if a.x.stride(0) % 4 or a.x.storage_offset() % 4:
        return f"x has row stride {a.x.stride(0)} and offset {a.x.storage_offset()} and needs multiples of 4."
    return None


class Plan(NamedTuple):
    """How a call is computed. sort: pairs of a row and an expert are sorted by expert, x is spread into planes.
    alone: one row, whose sum over the slots needs no scratch. stretch: channels of the output made at a time.
    partial_bytes: of the slots' outputs."""

    gate_up: Config
    down: Config
    sort: bool
    alone: bool
    stretch: int
    partial_bytes: int


def _plan(
    launches: Families, device: torch.device, rows: int, slots: int, experts: int, width: int, inter: int
) -> Plan:
    pairs, sort, alone = rows * slots, rows > SORT_ABOVE, _alone(rows, slots)
    gate_up, down = _config(rows, pairs, experts, width, inter, launches.block)
    gate_up = launches.gate_up.choose(device, (experts, width, inter, slots), rows, gate_up)
    down = launches.down.choose(device, (experts, width, inter, slots), rows, down)
    stretch, partial_bytes = stretch_of(pairs, width, down.rows) if sort else (width, 4 * pairs * width)
    return Plan(gate_up, down, sort, alone, stretch, 0 if alone else partial_bytes)


def stretch_of(pairs: int, width: int, multiple: int) -> tuple[int, int]:
    """Channels of the output that are made at a time, a multiple of `multiple`, and bytes of the slots' outputs."""
    stretch = width
    while 4 * pairs * stretch > PARTIAL_BYTES and stretch % (2 * multiple) == 0:
        stretch //= 2
    # Never less for more rows, so that the largest case plans for all.
    return stretch, max(4 * pairs * stretch, min(PARTIAL_BYTES, 4 * pairs * width))


def sum_slots(a: Arguments, partial: torch.Tensor, y: torch.Tensor, first: int, stretch: int) -> None:
    """y bf16 [rows, H], `stretch` channels from `first` on, of the slots' outputs partial fp32 [pairs, stretch]."""
    rows, width = y.shape
    kernels.launch(
        tiles.sum_slots, (rows, triton.cdiv(min(stretch, width - first), 1024)),
        partial, a.topk_ids, a.topk_weights, y, a.topk_ids.stride(0), a.topk_weights.stride(0), first, stretch,
        H=width, SLOTS=a.topk_ids.shape[1], WIDTH=1024, num_warps=4,
    )  # fmt: skip


@mxfp4_moe.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=accepts)
def mxfp4_moe_triton(a: Arguments) -> torch.Tensor:
    """Contract in `mxfp4_moe`."""
    return experts_of(a, FAMILIES, e8m0.scale_bytes(a.s13), e8m0.scale_bytes(a.s2))


def experts_of(
    a: Arguments, launches: Families, s13: torch.Tensor, s2: torch.Tensor, g13: torch.Tensor | None = None,
    g2: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gates and ups of all pairs, downs, their sum: bf16 [T, H] of what the two ops' arguments have in common.

    Scales are bytes for MXFP4, with the factors g13 fp32 [E, 2] and g2 fp32 [E] E4M3 for NVFP4.
    """
    x, topk_ids = a.x, a.topk_ids
    rows, width = x.shape
    slots, experts, inter = topk_ids.shape[1], a.w13.shape[0], a.w2.shape[2] * 2
    pairs = rows * slots
    p = _plan(launches, x.device, rows, slots, experts, width, inter)
    y = torch.empty((rows, width), dtype=torch.bfloat16, device=x.device)
    w13, w2 = a.w13.view(torch.uint8), a.w2.view(torch.uint8)
    # The planes are read before the first expert's output is written.
    hidden, work, offsets, order = kernels.scratch(
        "mxfp4_moe",
        x.device,
        ((pairs, inter), torch.bfloat16),
        ((max(p.partial_bytes, 2 * rows * width if p.sort else 0),), torch.uint8),
        ((experts + 1 + SHIFTS if p.sort else 0,), torch.int32),
        ((pairs if p.sort else 0,), torch.int32),
    )
    partial, planes = work.view(torch.float32), work.view(torch.bfloat16)
    if p.sort:
        kernels.launch(
            sort_pairs, (experts,), topk_ids, offsets, order, pairs, topk_ids.stride(0),
            E=experts, SLOTS=slots, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        kernels.launch(
            to_planes, (rows, triton.cdiv(width, 4096)), x, planes,
            K=width, X_STRIDE=x.stride(0), BLOCK=1024, num_warps=4,
        )  # fmt: skip

    def groups(config: Config) -> int:
        return min(pairs, pairs // config.tokens + experts) if p.sort else pairs

    common = {"H": width, "INTER": inter, "SLOTS": slots, "ASM": x.device.type != "cpu"}
    grouping = {"E": experts, "BOUND": triton.next_power_of_2(experts)}
    grouping |= {"SORTED": p.sort, "PAIRS": _searched_pairs(rows, slots)}
    gate_up, down = p.gate_up, p.down
    per_program = gate_up.rows // gate_up.split // 2
    # Sixteen warps where that takes no spill: with 8 columns, but not for gates and ups of one stretch, and of two only
    # where their places are shifts.
    most = None
    if gate_up.split > 1:
        most = kernels.registers(gate_up.warps, 16 if gate_up.split > 2 or width & (width - 1) == 0 else 12)
    kernels.launch(
        tiles.gate_up, (triton.cdiv(inter, per_program), groups(gate_up)),
        planes if p.sort else x, topk_ids, w13, s13, g13, offsets, order, hidden, pairs, topk_ids.stride(0),
        0.0 if a.limit is None else float(a.limit),
        X_STRIDE=x.stride(0), LIMITED=a.limit is not None, R=gate_up.rows, T=gate_up.tokens, SPLIT=gate_up.split,
        DEPTH=gate_up.depth, STAGES=gate_up.stages, num_warps=gate_up.warps, maxnreg=most, **common, **grouping,
    )  # fmt: skip
    second = {"R": down.rows, "T": down.tokens, "DEPTH": down.depth, "STAGES": down.stages, "num_warps": down.warps}
    if p.alone:
        kernels.launch(
            tiles.down_row, (triton.cdiv(width, down.rows // down.tokens),),
            hidden, topk_ids, a.topk_weights, w2, s2, g2, y, **common, **second,
        )  # fmt: skip
        return y
    most = kernels.registers(down.warps, 16 if down.tokens <= 8 else 8) if down.tokens <= 16 else None
    for first in range(0, width, p.stretch):
        channels = min(p.stretch, width - first)
        kernels.launch(
            tiles.down, (triton.cdiv(channels, down.rows), groups(down)),
            hidden, topk_ids, w2, s2, g2, offsets, order, partial, pairs, topk_ids.stride(0), first, p.stretch,
            maxnreg=most, **common, **grouping, **second,
        )  # fmt: skip
        sum_slots(a, partial, y, first, p.stretch)
    return y


def _searched_pairs(rows: int, slots: int) -> int:
    """Pairs that a pair looks through for its expert's others; a few sizes, since each is compiled."""
    if rows == 1 or rows > SORT_ABOVE:
        return 0
    return triton.next_power_of_2(next(most for most in (4, 16, SORT_ABOVE) if rows <= most) * slots)
