"""Routed experts with NVFP4 weights."""

from __future__ import annotations

import torch

from ...formats import experts, mxfp4, nvfp4
from ...registry import Arguments, Op
from ..mxfp4_moe import with_operands


@Op
def nvfp4_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    s13: torch.Tensor,
    g13: torch.Tensor,
    w2: torch.Tensor,
    s2: torch.Tensor,
    g2: torch.Tensor,
    limit: float | None,
) -> torch.Tensor:
    """`mxfp4_moe` of experts in NVFP4, as in `formats.experts`: x, topk_ids, topk_weights and limit are the same.

    w13 [E, 2I, H/2] with rows w3 (up) then w1 (gate), w2 [E, H, I/2]; E4M3 scales s13 [E, 2I, H/16] and s2
    [E, H, I/16] swizzled; factors g13 fp32 [E, 2] of w1 and w3, g2 fp32 [E]; H and I multiples of 128. Activations stay
    bf16: a checkpoint's input scales are for those in FP4.

    fp32 throughout, products of weights with their factors included, except that silu(gate) · up is rounded to bf16
    before w2. Returns bf16 [T, H]. A scale of NaN comes from memory that no checkpoint filled, and counts as 0, so that
    with a limit the result is finite for any bytes, factors up to 2^64 and |x| < 2^20. Raises ValueError for what
    `formats.experts.nvfp4_refusal` names.
    """
    given = Arguments(
        x=x, topk_ids=topk_ids, topk_weights=topk_weights, w13=w13, s13=s13, g13=g13, w2=w2, s2=s2, g2=g2, limit=limit
    )
    return with_operands(lambda t: t.bfloat16().float(), given, _matrices)


@nvfp4_moe.checked
def _check(a: Arguments) -> str | None:
    return experts.nvfp4_refusal(experts.Nvfp4Experts(a.w13, a.s13, a.g13, a.w2, a.s2, a.g2))


def _matrices(a: Arguments, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Rows are ups, then gates; factors the reverse.
    halves = zip(a.w13[e].chunk(2), mxfp4.unswizzle_scales(a.s13[e]).chunk(2), a.g13[e].flip(0), strict=True)
    first = torch.cat([_dequantise(*half) for half in halves])
    return first, _dequantise(a.w2[e], mxfp4.unswizzle_scales(a.s2[e]), a.g2[e])


def _dequantise(packed: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    weights = nvfp4.dequantise(packed, scale, factor)
    return weights.masked_fill(scale.float().isnan().repeat_interleave(nvfp4.BLOCK, -1), 0)
