"""Triton provider of `router_topk`: one launch, a row per warp, k rounds of an argmax that stays in registers."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels
from ...registry import Arguments
from .._pdl_triton import wait
from . import router_topk


@triton.jit
def _sqrt_softplus(x):
    # log1p(u) = log(1 + u) u / ((1 + u) - 1): the rounding of 1 + u cancels.
    u = tl.exp(-tl.abs(x))
    sum_ = 1.0 + u
    log1p = tl.where(sum_ == 1.0, u, tl.log(sum_) * (u / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))
    return tl.sqrt_rn(tl.maximum(x, 0.0) + log1p)


@triton.jit(do_not_specialize=["rows", "stride"])
def _route(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, rows, stride, EXPERTS: tl.constexpr, K: tl.constexpr,
    RENORMALIZE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, LANES)
    live = (row < rows)[:, None] & (expert < EXPERTS)[None, :]
    bias = tl.load(bias_ptr + expert, mask=expert < EXPERTS, other=0.0)
    wait()
    logits = tl.load(logits_ptr + row.to(tl.int64)[:, None] * stride + expert[None, :], mask=live, other=0.0)
    scores = _sqrt_softplus(logits)
    biased = scores + bias[None, :]
    biased = tl.where(live, biased, -float("inf"))
    place = tl.arange(0, WIDTH)
    weights = tl.zeros((ROWS, WIDTH), tl.float32)
    ids = tl.zeros((ROWS, WIDTH), tl.int32)
    for k in tl.static_range(K):
        _, best = tl.max(biased, axis=1, return_indices=True, return_indices_tie_break_left=True)
        # Whatever the logits are (NaN of unset dummy weights), an id must name an expert.
        best = tl.minimum(best, EXPERTS - 1)
        chosen = expert[None, :] == best[:, None]
        score = tl.sum(tl.where(chosen, scores, 0.0), axis=1)
        biased = tl.where(chosen, -float("inf"), biased)
        weights = tl.where(place[None, :] == k, score[:, None], weights)
        ids = tl.where(place[None, :] == k, best[:, None], ids)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    out = row.to(tl.int64)[:, None] * K + place[None, :]
    mask = (row < rows)[:, None] & (place < K)[None, :]
    tl.store(weights_ptr + out, weights, mask=mask)
    tl.store(ids_ptr + out, ids, mask=mask)


def _accepts(a: Arguments) -> str | None:
    if a.router_logits.dtype != torch.float32 or a.correction_bias.dtype != torch.float32:
        return f"logits are {a.router_logits.dtype}, bias {a.correction_bias.dtype}, and both need torch.float32."
    if a.router_logits.stride(1) != 1:
        return f"logits have strides {list(a.router_logits.stride())} and need the experts side by side."
    return None


@router_topk.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def router_topk_triton(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, ties too; with NaN logits the ids are arbitrary experts."""
    logits, k = a.router_logits, a.k
    rows, experts = logits.shape
    weights = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    block = 1 if rows <= 64 else 4
    kernels.launch(
        _route, (triton.cdiv(rows, block),), logits, a.correction_bias, weights, ids, rows, logits.stride(0),
        EXPERTS=experts, K=k, RENORMALIZE=a.renormalize, ROWS=block, LANES=1 << (experts - 1).bit_length(),
        WIDTH=1 << (k - 1).bit_length(), num_warps=block,
    )  # fmt: skip
    return weights, ids
