"""Kernels of the hyper-connection ops: two launches for an exit and the next entry, one for an exit alone.

    `_mix`      reads f and X (or X alone) once: X' = post f + combᵀ X, stored, and while it is in registers its
                products with fn and its squares, for one part of the columns; parts meet in scratch
    `_finish`   adds the parts; some programs make post and comb of a few rows each (Sinkhorn, a matrix to a thread),
                the others one row of y each (gate, combine, norm), so that the chain of 20 iterations delays nobody

With few rows the columns are split over 64 or 128 programs, with many the rows are, and X' is the only large thing
written between the launches; `_finish` begins with the rows written last, which L2 still holds. fn is split into two
bf16 parts (2^-18 is left), X' is bf16 anyway, so the tensor core's products are exact; its sums are taken out every 32
or 64 columns, because it truncates them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import kernels
from ..registry import Arguments
from ._arithmetic import dot, scaled_sum, to_bf16
from ._pdl_triton import INTERPRETED, LINE, prefetch, wait
from ._sinkhorn_triton import four_columns, plus_dot, sinkhorn

WIDTH: tl.constexpr = tl.constexpr(32)
"""fp32 per row and part in scratch: the sum of squares at 7, the products with fn from 8 on."""


class Config(NamedTuple):
    """rows: per program of `_mix`; columns: per step; parts: of all columns. sinkhorn_rows: per program of `_finish`
    that makes post and comb."""

    rows: int
    columns: int
    parts: int
    warps: int
    stages: int
    sinkhorn_rows: int


def config(rows: int, hidden: int, sms: int) -> Config:
    """The configuration for `rows` rows of width `hidden`; it depends on rows only through powers of two."""
    few = rows <= 64
    tile = 16 if few else 64
    columns = min(64 if few else 32, max(16, triton.next_power_of_2(hidden)))
    tiles = triton.next_power_of_2(triton.cdiv(max(rows, 1), tile))
    parts = min(*(triton.next_power_of_2(triton.cdiv(*ab)) for ab in ((2 * sms, tiles), (hidden, columns))))
    # Of up to 8,192 columns each of few rows' programs takes one step, as `_mix` does best.
    parts = min(128 if few else 64, parts)
    if few:
        return Config(tile, columns, parts, 4, 1, 1)
    return Config(tile, columns, parts, 8, 3, min(32, 256 // parts))


def contiguous(a: Arguments, *names: str) -> str | None:
    """Which of these tensors is not contiguous, as a refusal, or None."""
    for name in names:
        tensor = getattr(a, name)
        if not tensor.is_contiguous():
            return f"{name} {list(tensor.shape)} has strides {list(tensor.stride())} and needs to be contiguous."
    return None


def enter(
    op: str, a: Arguments, block: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(X', y, post', comb') of X' = mhc_post(f, x, post, comb) for block (f, post, comb), or of X' = x for None.

    a.fn has 24 rows, or 4 for the head, whose post' and comb' are empty. `op` owns the scratch.
    """
    x = a.x
    rows, _, hidden = x.shape
    mixes, head = a.fn.shape[0], a.fn.shape[0] == 4
    iters, norm_weight, norm_eps = (1, None, 0.0) if head else (a.iters, a.norm_weight, a.norm_eps)
    out = torch.empty_like(x) if block is not None else x
    y = torch.empty((rows, hidden), dtype=torch.bfloat16, device=x.device)
    post = torch.empty((0 if head else rows, 4), dtype=torch.float32, device=x.device)
    comb = torch.empty((0 if head else rows, 4, 4), dtype=torch.float32, device=x.device)
    c = config(rows, hidden, kernels.sms(x.device))
    (parts,) = kernels.scratch(op, x.device, ((rows, c.parts, WIDTH.value), torch.float32))
    f, f_post, f_comb = block if block is not None else (x, x, x)
    tiles = 0 if head else triton.cdiv(rows, c.sinkhorn_rows)
    grid = (c.parts, triton.cdiv(rows, c.rows))
    early = kernels.leaves_room(grid[0] * grid[1], tiles + rows, x.device)
    kernels.launch(
        _mix, grid, *(f, x, f_post, f_comb, a.fn, out, parts, rows, early),
        H=hidden, N=mixes, NP=16 if head else 32, EXIT=block is not None, R=c.rows, B=c.columns,
        PART=triton.cdiv(triton.cdiv(hidden, c.columns), c.parts) * c.columns, STAGES=c.stages, num_warps=c.warps,
    )  # fmt: skip
    kernels.launch(
        _finish, (tiles + rows,),
        *(out, parts, a.scale, a.base, norm_weight if norm_weight is not None else x, y, post, comb),
        *(rows, tiles, a.rms_eps, a.hc_eps, norm_eps),
        H=hidden, HP=triton.next_power_of_2(hidden), PARTS=c.parts, R=1 if head else c.sinkhorn_rows, ITERS=iters,
        NORM=norm_weight is not None, num_warps=4,
    )  # fmt: skip
    return out, y, post, comb


def exit_block(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """X' alone."""
    (rows, _, hidden), out = x.shape, torch.empty_like(x)
    columns = min(2048 if rows > 64 else 512, triton.next_power_of_2(hidden))
    kernels.launch(
        _exit, (rows, triton.cdiv(hidden, columns)), f, x, post, comb, out,
        H=hidden, B=columns, num_warps=max(1, min(4, columns // 256)),
    )  # fmt: skip
    return out


@triton.jit
def _four(at, live):
    """The four neighbouring fp32 at `at` [R], as [R] each."""
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + 1, mask=live, other=0.0),
        tl.load(at + 2, mask=live, other=0.0),
        tl.load(at + 3, mask=live, other=0.0),
    )


@triton.jit
def _stream(post, f, c0, x0, c1, x1, c2, x2, c3, x3):
    """One stream of X': post f + Σ_j c_j x_j of fp32 values, the product rounded before it is added.

    The reference rounds there too; otherwise some X' would differ in their last bit, and with them the next mixes.
    """
    mixed = scaled_sum(c3, x3, scaled_sum(c2, x2, scaled_sum(c1, x1, scaled_sum(c0, x0, 0.0))))
    if INTERPRETED:
        return to_bf16(post * f + mixed)
    # Not pure: Triton would compute all of it twice, for the store and in the dot's layout.
    return tl.inline_asm_elementwise(
        """
        {
        .reg .f32 a, b;
        mul.rn.f32 a, $1, $3;
        mul.rn.f32 b, $2, $4;
        add.rn.f32 a, a, $5;
        add.rn.f32 b, b, $6;
        cvt.rn.bf16x2.f32 $0, b, a;
        }
        """,
        "=r,f,f,f,f,f,f",
        [post, f, mixed],
        dtype=tl.bfloat16,
        is_pure=False,
        pack=2,
    )


@triton.jit
def _two_bf16(w):
    """fp32 w as a sum of two bf16, to 2^-18."""
    if INTERPRETED:
        high = to_bf16(w)
        return high, to_bf16(w - high.to(tl.float32))
    # Not pure: Triton would split in the dot's layout, where every warp holds all of w.
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        .reg .f32 a, b, c;
        cvt.rn.bf16x2.f32 $0, $3, $2;
        shl.b32 t, $0, 16;
        mov.b32 c, t;
        sub.rn.f32 a, $2, c;
        and.b32 t, $0, 0xFFFF0000;
        mov.b32 c, t;
        sub.rn.f32 b, $3, c;
        cvt.rn.bf16x2.f32 $1, b, a;
        }
        """,
        "=&r,=&r,f,f",
        [w],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=False,
        pack=2,
    )


@triton.jit
def _stacked(w):
    """The two bf16 of each fp32 row of w [NP, B] one below the other: bf16 [2 NP, B]."""
    high, low = _two_bf16(w)
    return tl.reshape(tl.permute(tl.join(high, low), 0, 2, 1), 2 * w.shape[0], w.shape[1])


@triton.jit
def _products(v, w, squares, acc, STACKED: tl.constexpr):
    """squares [R, B] + v² and acc + w vᵀ, for bf16 v [R, B]: acc [2 NP, R] for `_stacked` w, or [NP, R] for fp32 w."""
    value = v.to(tl.float32)
    # Added outside the dots: chained ones would be given to the warps by rows alone.
    if STACKED:
        acc = scaled_sum(dot(w, tl.trans(v)), 1.0, acc)
    else:
        high, low = _two_bf16(w)
        v = tl.trans(v)
        acc = scaled_sum(dot(low, v), 1.0, acc)
        acc = scaled_sum(dot(high, v), 1.0, acc)
    return scaled_sum(value, value, squares), acc


@triton.jit
def _fn_tile(fn, start, n, h, H: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    """fn [N, 4 H] at rows n and columns start + h of each stream; a last part may begin beyond H."""
    inside = (n < N)[:, None] & (start < H)
    if H % B != 0:
        inside &= (start + h < H)[None, :]
    at = fn + n[:, None] * (4 * H) + (start + h)[None, :]
    w0 = tl.load(at, mask=inside, other=0.0)
    w1 = tl.load(at + H, mask=inside, other=0.0)
    w2 = tl.load(at + 2 * H, mask=inside, other=0.0)
    w3 = tl.load(at + 3 * H, mask=inside, other=0.0)
    return w0, w1, w2, w3


@triton.jit(do_not_specialize=["rows", "early"])
def _mix(
    f, x, post, comb, fn, out, parts, rows, early, H: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    EXIT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (p, i): columns p PART … of all four streams, rows i R …: out, and in parts [rows, PARTS, 32] the sum of
    squares at 7, then the products with fn [N, 4 H]. early: whether the next kernel may start beside it."""
    m = tl.program_id(1) * R + tl.arange(0, R)
    live = m < rows
    row = tl.where(live, m, 0).to(tl.int64)
    part = tl.program_id(0)
    n = tl.arange(0, NP)
    h = tl.arange(0, B)
    low = part * PART
    # One step: fn first, which comes from farther away and which no kernel writes. Stacked, it meets each v in one dot;
    # with two Triton 3.8 takes v through shared memory for the second. More rows would need too many registers.
    STACKED: tl.constexpr = PART == B
    if STACKED:
        w0, w1, w2, w3 = _fn_tile(fn, low, n, h, H, N, B)
        w0, w1, w2, w3 = _stacked(w0), _stacked(w1), _stacked(w2), _stacked(w3)
    wait(early)
    if EXIT:
        p0, p1, p2, p3 = _four(post + row * 4, live)
        c00, c01, c02, c03 = _four(comb + row * 16, live)
        c10, c11, c12, c13 = _four(comb + row * 16 + 4, live)
        c20, c21, c22, c23 = _four(comb + row * 16 + 8, live)
        c30, c31, c32, c33 = _four(comb + row * 16 + 12, live)
    acc = tl.zeros([2 * NP if STACKED else NP, R], tl.float32)
    squares = tl.zeros([R, B], tl.float32)
    for start in tl.range(low, tl.minimum(low + PART, H), B, num_stages=STAGES):
        inside = live[:, None]
        if H % B != 0:
            inside &= (start + h < H)[None, :]
        at = row[:, None] * (4 * H) + (start + h)[None, :]
        v0 = tl.load(x + at, mask=inside, other=0.0)
        v1 = tl.load(x + at + H, mask=inside, other=0.0)
        v2 = tl.load(x + at + 2 * H, mask=inside, other=0.0)
        v3 = tl.load(x + at + 3 * H, mask=inside, other=0.0)
        if not STACKED:
            w0, w1, w2, w3 = _fn_tile(fn, start, n, h, H, N, B)
        if EXIT:
            g_at = f + row[:, None] * H + (start + h)[None, :]
            g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
            x0, x1, x2, x3 = v0.to(tl.float32), v1.to(tl.float32), v2.to(tl.float32), v3.to(tl.float32)
            v0 = _stream(p0[:, None], g, c00[:, None], x0, c10[:, None], x1, c20[:, None], x2, c30[:, None], x3)
            tl.store(out + at, v0, mask=inside)
        squares, acc = _products(v0, w0, squares, acc, STACKED)
        if EXIT:
            v1 = _stream(p1[:, None], g, c01[:, None], x0, c11[:, None], x1, c21[:, None], x2, c31[:, None], x3)
            tl.store(out + at + H, v1, mask=inside)
        squares, acc = _products(v1, w1, squares, acc, STACKED)
        if EXIT:
            v2 = _stream(p2[:, None], g, c02[:, None], x0, c12[:, None], x1, c22[:, None], x2, c32[:, None], x3)
            tl.store(out + at + 2 * H, v2, mask=inside)
        squares, acc = _products(v2, w2, squares, acc, STACKED)
        if EXIT:
            v3 = _stream(p3[:, None], g, c03[:, None], x0, c13[:, None], x1, c23[:, None], x2, c33[:, None], x3)
            tl.store(out + at + 3 * H, v3, mask=inside)
        squares, acc = _products(v3, w3, squares, acc, STACKED)
    if STACKED:
        high, low = tl.split(tl.permute(tl.reshape(acc, NP, 2, R), 0, 2, 1))
        acc = high + low
    to = parts + (row * tl.num_programs(0) + part) * WIDTH
    tl.store(to[:, None] + 8 + n[None, :], tl.trans(acc), mask=live[:, None] & (n < N)[None, :])
    tl.store(to + 7, tl.sum(squares, 1), mask=live)


@triton.jit
def _finish_weights(
    program, parts, scale, base, post, comb, rows, rms_eps, hc_eps, H: tl.constexpr, PARTS: tl.constexpr,
    R: tl.constexpr, ITERS: tl.constexpr,
):  # fmt: skip
    """post and comb of rows program R …"""
    m = program * R + tl.arange(0, R)
    live = m < rows
    row = tl.where(live, m, 0).to(tl.int64)
    part = tl.arange(0, PARTS)
    four = tl.arange(0, 4)
    sixteen = tl.arange(0, 16)
    s1, s2 = tl.load(scale + 1), tl.load(scale + 2)
    b1, b2 = tl.load(base + 4 + four)[None, :], tl.load(base + 8 + sixteen)[None, :]
    at = parts + (row[None, :] * PARTS + part[:, None]) * WIDTH
    total = tl.sum(tl.load(at[:, :, None] + tl.arange(0, WIDTH)[None, None, :]), 0)
    # Column 7 is the sum of squares, 8 to 11 belong to y, 12 to 15 to post, the others to comb.
    rest, mix2 = tl.split(tl.permute(tl.reshape(total, R, 2, 16), 0, 2, 1))
    low, high = tl.split(tl.permute(tl.reshape(rest, R, 2, 8), 0, 2, 1))
    _, low = tl.split(tl.permute(tl.reshape(low, R, 2, 4), 0, 2, 1))
    _, mix1 = tl.split(tl.permute(tl.reshape(high, R, 2, 4), 0, 2, 1))
    _, _, _, squares = four_columns(low)
    r = tl.rsqrt(squares / (4 * H) + rms_eps)
    sinkhorn(mix2 * r[:, None] * s2 + b2, comb + row * 16, live, hc_eps, ITERS)
    gate = tl.sigmoid(mix1 * r[:, None] * s1 + b1)
    tl.store(post + row[:, None] * 4 + four[None, :], 2.0 * gate, mask=live[:, None])


@triton.jit
def _add(a, b):
    return scaled_sum(a, 1.0, b)


@triton.jit
def _rounded(value):
    """value as the nearest bf16, still fp32; pairs take one conversion, single values a slow one each."""
    if INTERPRETED:
        return to_bf16(value).to(tl.float32)
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        cvt.rn.bf16x2.f32 t, $3, $2;
        shl.b32 $0, t, 16;
        and.b32 $1, t, 0xFFFF0000;
        }
        """,
        "=f,=f,f,f",
        [value],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _entry(m, n, i: tl.constexpr):
    """m[i] of m [N], n = 0 … N - 1: shuffles inside a warp, where a change of layout would be a barrier."""
    return tl.sum(tl.where(n == i, m, 0.0), 0)


@triton.jit
def _finish_row(
    row, x, parts, scale, base, norm_weight, y, rms_eps, hc_eps, norm_eps, H: tl.constexpr, HP: tl.constexpr,
    PARTS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """y of one row."""
    h = tl.arange(0, HP)
    inside = h < H
    n = tl.arange(0, 8)
    s = tl.load(scale)
    b0, b1, b2, b3 = tl.load(base), tl.load(base + 1), tl.load(base + 2), tl.load(base + 3)
    if NORM:
        weight = tl.load(norm_weight + h, mask=inside, other=0.0)
    x += row * (4 * H)
    x0 = tl.load(x + h, mask=inside, other=0.0)
    x1 = tl.load(x + H + h, mask=inside, other=0.0)
    x2 = tl.load(x + 2 * H + h, mask=inside, other=0.0)
    x3 = tl.load(x + 3 * H + h, mask=inside, other=0.0)
    # Otherwise the assembler asks for x only after it has waited for the parts.
    tl.debug_barrier()
    at = parts + row * (PARTS * WIDTH) + tl.arange(0, PARTS) * WIDTH + 4
    total = tl.sum(tl.load(at[:, None] + n[None, :]), 0)
    r = s * tl.rsqrt(_entry(total, n, 3) / (4 * H) + rms_eps)
    p0 = tl.sigmoid(_entry(total, n, 4) * r + b0) + hc_eps
    p1 = tl.sigmoid(_entry(total, n, 5) * r + b1) + hc_eps
    p2 = tl.sigmoid(_entry(total, n, 6) * r + b2) + hc_eps
    p3 = tl.sigmoid(_entry(total, n, 7) * r + b3) + hc_eps
    f0, f1, f2, f3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    out = plus_dot(0.0, f0, f1, f2, f3, p0, p1, p2, p3)
    if NORM:
        value = _rounded(out)
        squares = tl.reduce(scaled_sum(value, value, 0.0), 0, _add)
        rms = tl.rsqrt(squares / H + norm_eps)
        out = scaled_sum(scaled_sum(value, rms, 0.0), weight.to(tl.float32), 0.0)
    tl.store(y + row * H + h, to_bf16(out), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles", "rms_eps", "hc_eps", "norm_eps"])
def _finish(
    x, parts, scale, base, norm_weight, y, post, comb, rows, tiles, rms_eps, hc_eps, norm_eps, H: tl.constexpr,
    HP: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, ITERS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Programs 0 … tiles - 1 make post and comb of R rows each, the others y of one row each."""
    prefetch(scale)
    prefetch(base)
    if NORM:
        STEP: tl.constexpr = LINE * 8 // norm_weight.dtype.element_ty.primitive_bitwidth
        line = tl.arange(0, (HP + STEP - 1) // STEP) * STEP
        prefetch(norm_weight + tl.minimum(line, H - 1))
    wait()
    program = tl.program_id(0)
    if program < tiles:
        _finish_weights(program, parts, scale, base, post, comb, rows, rms_eps, hc_eps, H, PARTS, R, ITERS)
    else:
        row = (rows - 1 - (program - tiles)).to(tl.int64)
        _finish_row(row, x, parts, scale, base, norm_weight, y, rms_eps, hc_eps, norm_eps, H, HP, PARTS, NORM)


@triton.jit
def _exit(f, x, post, comb, out, H: tl.constexpr, B: tl.constexpr):
    """Program (t, i): columns i B … of the four streams of row t."""
    wait()
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * B + tl.arange(0, B)
    inside = h < H
    at = row * (4 * H) + h
    g = tl.load(f + row * H + h, mask=inside, other=0.0).to(tl.float32)
    x0 = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(x + at + H, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + at + 2 * H, mask=inside, other=0.0).to(tl.float32)
    x3 = tl.load(x + at + 3 * H, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(4):
        c = comb + row * 16 + k
        value = _stream(
            tl.load(post + row * 4 + k), g, tl.load(c), x0, tl.load(c + 4), x1, tl.load(c + 8), x2, tl.load(c + 12), x3
        )
        tl.store(out + at + k * H, value, mask=inside)
