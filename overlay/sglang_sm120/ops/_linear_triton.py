"""Kernels of the three linear ops: y[t, g] = x[t, g] w[g]ᵀ with FP8 block weights or bf16 weights, fp32 sums.

Few rows are a question of bytes in flight, many rows one of conversions per tensor-core instruction:

    1 row           `_gemv`: a program owns whole weight rows and asks for all their bytes at once, 128 per thread;
                    nothing is staged, the sums are plain FMAs, and no second pass is needed (also a few rows of a
                    weight so small that L2 serves it again)
    2 … 16 rows     `_few_rows`: the same ownership on tensor cores: the weight is the A operand, each warp has its
                    own part of K (the batch dimension of a 3D dot) and the warps' sums meet once, at the end (9 and
                    more of a short K: the next)
    more            `_many_rows`: a tiled GEMM; x is the A operand so that few warps convert the same weight. Where
                    the tiles leave SMs idle, K is split and `_add_parts` adds the parts in a fixed order
    33 and more     `_many_rows_tma`: the same for FP8 weights, tiles brought by TMA. It needs no address registers,
                    so that 128 of K a step fit in (with pointers that spills), and one thread asks for a whole tile

FP8 values are expanded to bf16 exactly; a 128 x 128 block's scale multiplies the fp32 sums of its 128 products.
Sums leave the tensor core every 64 or 128 products because it truncates them, which fp32 results would show.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import kernels
from ..formats import e8m0, fp8_block
from ._arithmetic import dot, e8m0_value, scaled_sum, to_bf16
from ._linear_config import TUNED, Config, config
from ._pdl_triton import wait

BLOCK: tl.constexpr = tl.constexpr(fp8_block.BLOCK)
UNSCALED: tl.constexpr = tl.constexpr(0)
E8M0: tl.constexpr = tl.constexpr(1)
FP32: tl.constexpr = tl.constexpr(2)
LOAD_BYTES = 16
"""Of one thread's load."""
WHOLE_K = 4096
"""Longest row, padded, that `_gemv` multiplies in one step."""

GROUP_M: tl.constexpr = tl.constexpr(8)


def refusal(w: torch.Tensor, scale: torch.Tensor | None) -> str | None:
    """Why the kernels cannot read this weight, or None."""
    if scale is not None and w.dtype != torch.float8_e4m3fn:
        return f"weight is {w.dtype} and needs torch.float8_e4m3fn."
    if scale is None and w.dtype != torch.bfloat16:
        return f"weight is {w.dtype} and needs torch.bfloat16."
    if not w.is_contiguous():
        return f"weight {list(w.shape)} has strides {list(w.stride())} and needs to be contiguous."
    if scale is not None and not scale.is_contiguous():
        return f"scale {list(scale.shape)} has strides {list(scale.stride())} and needs to be contiguous."
    return None


class Call(NamedTuple):
    """One call, sized: x [T, G, K], weights and scales, y [T, G, N], strides of x in units, the kernels' constants."""

    config: Config
    x: torch.Tensor
    w: torch.Tensor
    scales: torch.Tensor
    y: torch.Tensor
    strides: tuple[int, int]
    constants: dict[str, int]


def linear(
    op: str,
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """x bf16 [T, G, K] of any strides, w [G, N, K], scale [G, ceil(N/128), ceil(K/128)] or None → dtype [T, G, N].

    With norm, (weight bf16 [K], eps), x [T, 1, K] is normalised first. `op` owns the scratch.
    """
    rows, (groups, n, k) = x.shape[0], w.shape
    # At least 8 SMs, for the interpreter, whose one would never split K.
    c = config(rows, groups, n, k, w.element_size(), max(8, kernels.sms(x.device)))
    c = TUNED.choose(x.device, (groups, n, k, w.element_size()), rows, c)
    if norm is not None and c.kernel != "gemv":
        x, norm = normalised(x, *norm), None
    call = _sized(c, x, w, scale, torch.empty((rows, groups, n), dtype=dtype, device=x.device))
    if c.kernel == "gemv":
        _run_gemv(call, norm)
    elif c.kernel == "few":
        _run_few_rows(call)
    else:
        _run_many_rows(call, op)
    return call.y


def _sized(c: Config, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor | None, y: torch.Tensor) -> Call:
    rows, (groups, n, k) = x.shape[0], w.shape
    form, scales = UNSCALED.value, w
    if scale is not None:
        form, scales = (FP32.value, scale) if scale.dtype == torch.float32 else (E8M0.value, e8m0.scale_bytes(scale))
    # A dimension of size 1 has a stride that means nothing.
    x_row, x_group = (x.stride(0) if rows > 1 else 0), (x.stride(1) if groups > 1 else 0)
    unit = 8 if x_row % 8 == 0 and x_group % 8 == 0 else 1
    constants = {"G": groups, "N": n, "K": k, "X_STEP": x.stride(2) if k > 1 else 1, "X_UNIT": unit, "SCALE": form}
    return Call(c, x, w, scales, y, (x_row // unit, x_group // unit), constants)


def _run_gemv(call: Call, norm: tuple[torch.Tensor, float] | None) -> None:
    c, x, w = call.config, call.x, call.w
    # Without a norm no kernel reads its weight, and needs a pointer all the same.
    norm_weight, eps = (w, 0.0) if norm is None else norm
    # A row of few loads in one step, a longer one a load of all threads at a time. A norm is of the whole row.
    step = c.bk if norm is not None or c.bk <= WHOLE_K else 32 * c.warps * LOAD_BYTES // w.element_size()
    kernels.launch(
        _gemv, (x.shape[0], triton.cdiv(w.shape[1], c.bn), w.shape[0]),
        x, norm_weight, eps, w, call.scales, call.y, *call.strides, **call.constants,
        NORM=norm is not None, POLICY="evict_first" if c.evict_first else "", BN=c.bn, KP=c.bk, STEP=step,
        num_warps=c.warps,
    )  # fmt: skip


def _run_few_rows(call: Call) -> None:
    c, w = call.config, call.w
    kernels.launch(
        _few_rows, (triton.cdiv(w.shape[1], c.bn), w.shape[0]),
        call.x, w, call.scales, call.y, call.x.shape[0], *call.strides, **call.constants,
        BM=c.bm, BN=c.bn, KW=c.warps_k, EVEN=w.shape[2] % (c.warps_k * c.bk) == 0, STAGES=c.stages,
        POLICY="evict_first" if c.evict_first else "", num_warps=c.warps,
    )  # fmt: skip


def _run_many_rows(call: Call, op: str) -> None:
    c, x, w, y = call.config, call.x, call.w, call.y
    rows, (groups, n, k) = x.shape[0], w.shape
    tiles = (triton.cdiv(rows, c.bm) * triton.cdiv(n, c.bn), c.split, groups)
    tile = {"BM": c.bm, "BN": c.bn, "BK": c.bk, "SPLIT": c.split, "STAGES": c.stages}
    parts = y
    if c.split > 1:
        (parts,) = kernels.scratch(op, x.device, ((c.split, rows, groups, n), torch.float32))
    form = call.constants["SCALE"]
    if c.kernel == "tma" and k % c.bk == 0 and _readable_by_tma(x) and w.data_ptr() % 16 == 0:
        x_tiles = TensorDescriptor.from_tensor(x.as_strided((rows, groups * k), (x.stride(0), 1)), [c.bm, c.bk])
        w_tiles = TensorDescriptor.from_tensor(w.view(-1, k), [c.bn, c.bk])
        kernels.launch(
            _many_rows_tma, tiles, x_tiles, w_tiles, call.scales, parts, rows, G=groups, N=n, K=k, SCALE=form, **tile,
            num_warps=c.warps,
        )  # fmt: skip
    else:
        most = kernels.registers(c.warps) if form == UNSCALED.value else None
        kernels.launch(
            _many_rows, tiles, x, w, call.scales, parts, rows, *call.strides, **call.constants, **tile,
            EVEN=k % c.bk == 0, num_warps=c.warps, maxnreg=most,
        )  # fmt: skip
    if c.split > 1:
        total = math.prod(y.shape)
        kernels.launch(
            _add_parts, (triton.cdiv(total, 1024),), parts, y, total, SPLIT=c.split, BLOCK=1024, num_warps=4
        )


def _readable_by_tma(x: torch.Tensor) -> bool:
    """Whether TMA can read x [T, G, K] as [T, G * K]: it wants rows at multiples of 16 bytes."""
    packed = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return packed and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows, _, k = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(k)
    kernels.launch(
        _norm, (rows,), x, x.stride(0), weight, y, eps, N=k, X_STEP=x.stride(2) if k > 1 else 1, NP=padded, num_warps=4
    )
    return y


@triton.jit
def _scale_value(stored, SCALE: tl.constexpr):
    return e8m0_value(stored) if SCALE == E8M0 else stored.to(tl.float32)


@triton.jit
def _exact_bf16(weight, SCALE: tl.constexpr):
    # Through fp32, which converts in pairs; from E4M3 directly, every value takes a slow instruction of its own.
    return weight if SCALE == UNSCALED else weight.to(tl.float32).to(tl.bfloat16)


@triton.jit
def _store(at, value, mask):
    if at.dtype.element_ty == tl.bfloat16:
        tl.store(at, to_bf16(value), mask=mask)
    else:
        tl.store(at, value, mask=mask)


@triton.jit
def _rms_norm(value, weight, eps, K: tl.constexpr):
    """bf16 [KP] of a row and its norm's weight, both fp32 [KP] and 0 beyond K."""
    return to_bf16(value * tl.rsqrt(tl.sum(value * value, 0) / K + eps) * weight)


@triton.jit
def _norm(x, x_row, weight, y, eps, N: tl.constexpr, X_STEP: tl.constexpr, NP: tl.constexpr):
    """y bf16 [T, N] = each row's norm, a program each."""
    column = tl.arange(0, NP)
    inside = column < N
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait()
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(x + row * x_row + column * X_STEP, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + column, _rms_norm(value, w, eps, N), mask=inside)


@triton.jit
def _products(weight, value, R: tl.constexpr, K: tl.constexpr):
    """Products of weight [R, K] and value [1, K] summed by fours: fp32 [R, K / 4].

    `tl.sum` adds what a thread has as a tree (Triton 3.8), whose leaves, all products, would be held at once.
    """
    w0, w1 = tl.split(tl.reshape(weight, (R, K // 4, 2, 2)))
    v0, v1 = tl.split(tl.reshape(value, (1, K // 4, 2, 2)))
    w00, w01 = tl.split(w0)
    w10, w11 = tl.split(w1)
    v00, v01 = tl.split(v0)
    v10, v11 = tl.split(v1)
    return w00 * v00 + w01 * v01 + w10 * v10 + w11 * v11


@triton.jit(do_not_specialize=["x_row", "x_group"])
def _gemv(
    x, norm_weight, eps, w, scale, y, x_row, x_group, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    X_STEP: tl.constexpr, X_UNIT: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr, POLICY: tl.constexpr,
    BN: tl.constexpr, KP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program (t, i, g): outputs i BN … of row t and group g, from whole weight rows padded to KP.

    STEP of K after another is multiplied, so that few products are held beside the weights. NORM: every program
    normalises the row, then one step, for itself, which is less than the wait for a kernel that does.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * BN
    n = first + tl.arange(0, BN)
    k = tl.arange(0, STEP)
    at = w + group * (N * K) + (tl.minimum(n, N - 1)[:, None] * K + k[None, :])
    KB: tl.constexpr = (K + BLOCK - 1) // BLOCK
    NB: tl.constexpr = (N + BLOCK - 1) // BLOCK
    PB: tl.constexpr = STEP // BLOCK
    block = tl.arange(0, PB)
    s_at = scale + group * (NB * KB) + first // BLOCK * KB + block
    # The weights first, all of them, and before the wait: they come from far away and no kernel writes them.
    weights = ()
    scales = ()
    for i in tl.static_range(KP // STEP):
        if K == KP:
            weights += (tl.load(at + i * STEP, eviction_policy=POLICY),)
        else:
            weights += (tl.load(at + i * STEP, mask=i * STEP + k[None, :] < K, other=0.0, eviction_policy=POLICY),)
        if SCALE != UNSCALED:
            scales += (tl.load(s_at + i * PB, mask=i * PB + block < KB, other=0),)
    if NORM:
        norm = tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
    x_at = x + (row * x_row + group * x_group) * X_UNIT + k * X_STEP
    wait()
    values = ()
    for i in tl.static_range(KP // STEP):
        values += (tl.load(x_at + i * STEP * X_STEP, mask=i * STEP + k < K, other=0.0),)
    if STEP != KP:
        total = tl.zeros((BN, STEP // 4), tl.float32)
    for i in tl.static_range(KP // STEP):
        value = tl.cast(values[i], tl.float32)
        if NORM:
            value = _rms_norm(value, norm, eps, K).to(tl.float32)
        if SCALE != UNSCALED:
            value = tl.reshape(tl.reshape(value, PB, BLOCK) * _scale_value(scales[i], SCALE)[:, None], STEP)
        products = _products(tl.cast(weights[i], tl.float32), value[None, :], BN, STEP)
        # A sum of one step alone is not added to zeros, which would take registers.
        total = products if STEP == KP else total + products
    out = tl.sum(total, 1)
    _store(y + (row * G + group) * N + n, out, n < N)


@triton.jit(do_not_specialize=["rows", "x_row", "x_group"])
def _few_rows(
    x, w, scale, y, rows, x_row, x_group, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr, X_STEP: tl.constexpr,
    X_UNIT: tl.constexpr, SCALE: tl.constexpr, POLICY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KW: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """rows <= BM: program (i, g) computes outputs i BN … of group g; warp j takes every KW-th block of K."""
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BN
    n = first + tl.arange(0, BN)
    m = tl.arange(0, BM)
    live = m < rows
    part = tl.arange(0, KW)
    k = part[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    KB: tl.constexpr = (K + BLOCK - 1) // BLOCK
    NB: tl.constexpr = (N + BLOCK - 1) // BLOCK
    STEP: tl.constexpr = KW * BLOCK
    row = tl.where(live, m, 0) * (x_row.to(tl.int64) * X_UNIT)
    x_offset = row[None, None, :] + (k * X_STEP)[:, :, None]
    w_offset = tl.minimum(n, N - 1)[None, :, None] * K + k[:, None, :]
    # Orders the copies' axes, K, parts, then rows, where Triton 3.8 would take rows before parts: a thread's registers
    # then hold rows, and the swizzle of shared memory follows them. Only what it says of K is used as an address.
    w_offset = tl.max_contiguous(w_offset, (KW, 1, BLOCK))
    if X_STEP == 1:
        x_offset = tl.max_contiguous(x_offset, (KW, BLOCK, 1))
    x_at = x + group * (x_group.to(tl.int64) * X_UNIT) + x_offset
    w_at = w + group * (N * K) + w_offset
    s_at = scale + group * (NB * KB) + first // BLOCK * KB
    if SCALE != UNSCALED:
        s_next = tl.load(s_at + tl.minimum(part, KB - 1))
    wait()
    acc = tl.zeros([KW, BN, BM], tl.float32)
    for start in tl.range(0, K, STEP, num_stages=STAGES):
        if EVEN:
            weight = tl.load(w_at + start, eviction_policy=POLICY)
            value = tl.load(x_at + start * X_STEP, mask=live[None, None, :], other=0.0)
        else:
            inside = start + k < K
            weight = tl.load(w_at + start, mask=inside[:, None, :], other=0.0, eviction_policy=POLICY)
            value = tl.load(x_at + start * X_STEP, mask=inside[:, :, None] & live[None, None, :], other=0.0)
        product = dot(_exact_bf16(weight, SCALE), value)
        if SCALE == UNSCALED:
            factor = tl.full([KW], 1.0, tl.float32)
        else:
            factor = _scale_value(s_next, SCALE)
            # One step ahead, or every step would wait for its scale.
            s_next = tl.load(s_at + tl.minimum(part + (start // BLOCK + KW), KB - 1))
        acc = scaled_sum(product, factor[:, None, None], acc)
    out = tl.trans(tl.sum(acc, 0))
    at = y + (m[:, None] * G + group) * N + n[None, :]
    _store(at, out, live[:, None] & (n < N)[None, :])


@triton.jit
def _tile(rows, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(first row, first output) of this program's tile.

    Neighbouring programs share weights and GROUP_M blocks of rows, so that both stay in L2.
    """
    n_blocks: tl.constexpr = (N + BN - 1) // BN
    m_blocks = tl.cdiv(rows, BM)
    tile = tl.program_id(0)
    m_first = tile // (GROUP_M * n_blocks) * GROUP_M
    m_here = tl.minimum(m_blocks - m_first, GROUP_M)
    inside_group = tile % (GROUP_M * n_blocks)
    return (m_first + inside_group % m_here) * BM, inside_group // m_here * BN


@triton.jit
def _part(K: tl.constexpr, SPLIT: tl.constexpr):
    """(first, end) of this program's part of K: whole blocks, so that a step never straddles two scales.

    Constants where K is not split: a loop of known length is 3 % faster.
    """
    if SPLIT == 1:
        return 0, K
    else:
        PART: tl.constexpr = ((K + BLOCK - 1) // BLOCK + SPLIT - 1) // SPLIT * BLOCK
        low = tl.program_id(1) * PART
        return low, tl.minimum(low + PART, K)


@triton.jit
def _scales(scale, group, first, low, N: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr):
    """(pointer to the scales of a tile's outputs, the one of column low); without scales, nothing is read."""
    KB: tl.constexpr = (K + BLOCK - 1) // BLOCK
    NB: tl.constexpr = (N + BLOCK - 1) // BLOCK
    s_at = scale + group * (NB * KB) + first // BLOCK * KB
    if SCALE == UNSCALED:
        return s_at, s_at
    else:
        return s_at, tl.load(s_at + tl.minimum(low // BLOCK, KB - 1))


@triton.jit
def _add_step(acc, value, weight, s_at, s_now, start, K: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr):
    """(acc + value weight * scale of columns start BK …, the next step's scale), read ahead or each step would wait."""
    product = dot(value, _exact_bf16(weight, SCALE))
    if SCALE == UNSCALED:
        return scaled_sum(product, tl.full([1, 1], 1.0, tl.float32), acc), s_now
    else:
        KB: tl.constexpr = (K + BLOCK - 1) // BLOCK
        factor = tl.full([1, 1], 1.0, tl.float32) * _scale_value(s_now, SCALE)
        s_next = tl.load(s_at + tl.minimum((start + BK) // BLOCK, KB - 1))
        return scaled_sum(product, factor, acc), s_next


@triton.jit
def _store_tile(y, acc, rows, m, n, group, G: tl.constexpr, N: tl.constexpr):
    """Rows m and outputs n of y [SPLIT, rows, G, N]."""
    at = y + ((tl.program_id(1).to(tl.int64) * rows + m[:, None]) * G + group) * N + n[None, :]
    _store(at, acc, (m < rows)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["rows", "x_row", "x_group"])
def _many_rows(
    x, w, scale, y, rows, x_row, x_group, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr, X_STEP: tl.constexpr,
    X_UNIT: tl.constexpr, SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile, s, g): a tile [BM, BN] of group g over part s of K, into y [SPLIT, rows, G, N]."""
    group = tl.program_id(2).to(tl.int64)
    m_first, first = _tile(rows, N, BM, BN)
    m = m_first.to(tl.int64) + tl.arange(0, BM)
    n = first + tl.arange(0, BN)
    live = m < rows
    low, high = _part(K, SPLIT)
    k = tl.arange(0, BK)
    row = tl.where(live, m, 0) * (x_row.to(tl.int64) * X_UNIT)
    x_at = x + group * (x_group.to(tl.int64) * X_UNIT) + (row[:, None] + (k * X_STEP)[None, :])
    w_at = w + group * (N * K) + (tl.minimum(n, N - 1)[None, :] * K + k[:, None])
    s_at, s_next = _scales(scale, group, first, low, N, K, SCALE)
    wait()
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(low, high, BK, num_stages=STAGES):
        if EVEN:
            value = tl.load(x_at + start * X_STEP, mask=live[:, None], other=0.0)
            weight = tl.load(w_at + start)
        else:
            inside = start + k < K
            value = tl.load(x_at + start * X_STEP, mask=live[:, None] & inside[None, :], other=0.0)
            weight = tl.load(w_at + start, mask=inside[:, None], other=0.0)
        acc, s_next = _add_step(acc, value, weight, s_at, s_next, start, K, BK, SCALE)
    _store_tile(y, acc, rows, m, n, group, G, N)


@triton.jit(do_not_specialize=["rows"])
def _many_rows_tma(
    x, w, scale, y, rows, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `_many_rows`, of x [rows, G * K] and w [G * N, K] by descriptor, which read 0 beyond the last row."""
    group = tl.program_id(2)
    m_first, first = _tile(rows, N, BM, BN)
    low, high = _part(K, SPLIT)
    s_at, s_next = _scales(scale, group, first, low, N, K, SCALE)
    wait()
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(low, high, BK, num_stages=STAGES):
        value = x.load([m_first, group * K + start])
        weight = tl.trans(w.load([group * N + first, start]))
        acc, s_next = _add_step(acc, value, weight, s_at, s_next, start, K, BK, SCALE)
    m = m_first.to(tl.int64) + tl.arange(0, BM)
    _store_tile(y, acc, rows, m, first + tl.arange(0, BN), group, G, N)


@triton.jit(do_not_specialize=["total"])
def _add_parts(parts, y, total, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y [total] = Σ_s parts [SPLIT, total], in the order of s."""
    wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    acc = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts + part * total + at, mask=live, other=0.0)
    _store(y + at, acc, live)
