"""Triton provider of `router_topk`: a row per warp, k rounds of an argmax that stays in registers.

A few rows are one launch: every program sums logits as `_linear_triton._gemv` does, and the last one of a row to arrive
chooses among them. That saves the second launch for what an arrival costs, a fence and an atomic add in turn; done in
all programs at once these delay a step once, so more rows than run at once are two launches.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels, tuned
from ...registry import Arguments
from .._arithmetic import LOWEST, sort_key
from .._arrival_triton import last_to_arrive
from .._linear_triton import chosen, gemv_sums, linear, refusal, run_gemv, sized
from .._pdl_triton import wait
from . import router_topk

TILE = 128
"""Experts that a warp loads at once; wider tiles Triton would share among warps."""
WARPS_AT_ONCE = 48
"""On an SM of SM120, whose registers hold as many of `_gemv_route`."""


@triton.jit
def _sqrt_softplus(x):
    # log1p(u) = log(1 + u) u / ((1 + u) - 1): the rounding of 1 + u cancels.
    u = tl.exp(-tl.abs(x))
    sum_ = 1.0 + u
    log1p = tl.where(sum_ == 1.0, u, tl.log(sum_) * (u / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))
    return tl.sqrt_rn(tl.maximum(x, 0.0) + log1p)


@triton.jit
def _by_tiles(at, EXPERTS: tl.constexpr, TILE: tl.constexpr, CACHED: tl.constexpr):
    """fp32 [1, TILE] or [ROWS, TILE] after another from pointers [1] or [ROWS] to expert 0, 0 beyond the last."""
    found = ()
    for i in tl.static_range((EXPERTS + TILE - 1) // TILE):
        expert = (i * TILE + tl.arange(0, TILE))[None, :]
        found += (tl.load(at[:, None] + expert, mask=expert < EXPERTS, other=0.0, cache_modifier=CACHED),)
    return found


@triton.jit
def _choose(
    logits, bias, weights_ptr, ids_ptr, row, stored, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    RENORMALIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the choice by `_by_tiles` of logits and bias for each row [ROWS] that is to be stored.

    What lanes compare are integers, for which a warp has an instruction.
    """
    TILES: tl.constexpr = (EXPERTS + TILE - 1) // TILE
    lane = tl.arange(0, TILE)[None, :]
    scores = ()
    keys = ()
    for i in tl.static_range(TILES):
        score = _sqrt_softplus(logits[i])
        scores += (score.to(tl.int32, bitcast=True),)
        keys += (tl.where(i * TILE + lane < EXPERTS, sort_key(score + bias[i]), LOWEST),)
    place = tl.arange(0, WIDTH)
    weights = tl.zeros((ROWS, WIDTH), tl.float32)
    ids = tl.zeros((ROWS, WIDTH), tl.int32)
    for k in tl.static_range(CHOSEN):
        top = tl.full((ROWS, TILE), LOWEST, tl.int32)
        for i in tl.static_range(TILES):
            top = tl.maximum(top, keys[i])
        top = tl.max(top, 1)[:, None]
        # Of equal ones the first. There is one whatever the logits are (NaN of unset dummy weights).
        best = tl.full((ROWS, TILE), EXPERTS - 1, tl.int32)
        for i in tl.static_range(TILES):
            best = tl.minimum(best, tl.where(keys[i] == top, i * TILE + lane, EXPERTS - 1))
        best = tl.min(best, 1)
        # Scores are no less than 0, so that the only one left among zeros is their largest, as bits too.
        score = tl.zeros((ROWS, TILE), tl.int32)
        left = ()
        for i in tl.static_range(TILES):
            is_best = i * TILE + lane == best[:, None]
            score = tl.maximum(score, tl.where(is_best, scores[i], 0))
            left += (tl.where(is_best, LOWEST, keys[i]),)
        keys = left
        score = tl.max(score, 1).to(tl.float32, bitcast=True)
        weights = tl.where(place[None, :] == k, score[:, None], weights)
        ids = tl.where(place[None, :] == k, best[:, None], ids)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    out = row.to(tl.int64)[:, None] * CHOSEN + place[None, :]
    mask = stored[:, None] & (place < CHOSEN)[None, :]
    tl.store(weights_ptr + out, weights, mask=mask)
    tl.store(ids_ptr + out, ids, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _route(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, rows, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    RENORMALIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bias = _by_tiles(bias_ptr + tl.arange(0, 1), EXPERTS, TILE, "")
    wait()
    logits = _by_tiles(logits_ptr + tl.minimum(row, rows - 1).to(tl.int64) * EXPERTS, EXPERTS, TILE, "")
    _choose(logits, bias, weights_ptr, ids_ptr, row, row < rows, EXPERTS, CHOSEN, RENORMALIZE, WIDTH, ROWS, TILE)


@triton.jit(do_not_specialize=["x_row", "x_group"])
def _gemv_route(
    x, norm_weight, eps, w, scale, y, x_row, x_group, bias_ptr, counters, weights_ptr, ids_ptr, G: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, X_STEP: tl.constexpr, X_UNIT: tl.constexpr, SCALE: tl.constexpr,
    NORM: tl.constexpr, POLICY: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, STEP: tl.constexpr,
    EXPERTS: tl.constexpr, CHOSEN: tl.constexpr, RENORMALIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """`_gemv`, whose last program of a row to arrive at counters int32 [T], all zero, does what `_route` does."""
    out = gemv_sums(
        x, norm_weight, eps, w, scale, x_row, x_group, N, K, X_STEP, X_UNIT, SCALE, NORM, POLICY, BN, KP, STEP
    )
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.program_id(0)
    at = y + row.to(tl.int64) * EXPERTS
    tl.store(at + n, out, mask=n < EXPERTS)
    if last_to_arrive(counters + row, tl.num_programs(1)):
        # Each warp chooses by itself among all experts, so that none waits for another one; the first one stores.
        warp = tl.arange(0, WARPS)
        bias = _by_tiles(bias_ptr + tl.arange(0, 1), EXPERTS, TILE, "")
        logits = _by_tiles(at + 0 * warp, EXPERTS, TILE, ".cg")
        _choose(
            logits, bias, weights_ptr, ids_ptr, row + 0 * warp, warp == 0, EXPERTS, CHOSEN, RENORMALIZE, WIDTH, WARPS,
            TILE,
        )  # fmt: skip


def _accepts(a: Arguments) -> str | None:
    if a.correction_bias.dtype != torch.float32:
        return f"correction_bias is {a.correction_bias.dtype} and needs torch.float32."
    return refusal(a.w, None)


@router_topk.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def router_topk_triton(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, ties too; with NaN logits the ids are arbitrary experts."""
    x, w, k, device = a.x.unsqueeze(1), a.w.unsqueeze(0), a.k, a.x.device
    rows, experts = a.x.shape[0], a.w.shape[0]
    weights = torch.empty(rows, k, dtype=torch.float32, device=device)
    ids = torch.empty(rows, k, dtype=torch.int32, device=device)
    routing = {
        "EXPERTS": experts, "CHOSEN": k, "RENORMALIZE": a.renormalize, "WIDTH": triton.next_power_of_2(k),
        "TILE": min(TILE, triton.next_power_of_2(experts)),
    }  # fmt: skip
    c = chosen(x, w)
    warps = rows * triton.cdiv(experts, c.bn) * c.warps
    if c.kernel == "gemv" and warps <= WARPS_AT_ONCE * max(8, kernels.sms(device)):
        # For as many rows as the power of two that is rehearsed.
        (logits,) = kernels.scratch("router_topk", device, ((tuned.bucket(rows), 1, experts), torch.float32))
        counters = kernels.counters("router_topk", device, rows)
        run_gemv(
            sized(c, x, w, None, logits), None, _gemv_route, a.correction_bias, counters, weights, ids, **routing,
            WARPS=c.warps,
        )  # fmt: skip
        return weights, ids
    logits = linear("bf16_linear_fp32", x, w, None, torch.float32)
    block = 1 if rows <= 64 else 4
    kernels.launch(
        _route, (triton.cdiv(rows, block),), logits, a.correction_bias, weights, ids, rows, **routing, ROWS=block,
        num_warps=block,
    )  # fmt: skip
    return weights, ids
