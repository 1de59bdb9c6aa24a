"""Routed experts with MXFP4 weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...formats import e8m0, experts, mxfp4
from ...registry import Arguments, Op

LARGEST_SCALE_BYTE = 191
"""2^64; a larger byte (255 is NaN) comes from memory no checkpoint filled, and counts as scale 0."""


@Op
def mxfp4_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    s13: torch.Tensor,
    w2: torch.Tensor,
    s2: torch.Tensor,
    limit: float | None,
) -> torch.Tensor:
    """y = Σ_e weight_e w2_e (silu(clamp(w1_e x, max=limit)) · clamp(w3_e x, ±limit)) over the chosen experts.

    x bf16 [T, H]; topk_ids int [T, k], -1 = no expert, or another rank's; topk_weights fp32 [T, k], applied as
    given (the router's 1.5 is not in here); limit None = no clamp. The experts as in `formats.experts`, in SM120's
    layout: w13 [E, 2I, H/2] with rows w3 (up) then w1 (gate), w2 [E, H, I/2], scale bytes s13 [E, 2I, H/32] and s2
    [E, H, I/32] swizzled; H and I multiples of 128. Dequantised exactly.

    fp32 throughout, except that silu(gate) · up is rounded to bf16 before w2. Returns bf16 [T, H]. Scale
    bytes above 191 count as scale 0, so with a limit the result is finite for any weight and scale bytes and
    |x| < 2^20. Raises ValueError for shapes that `formats.experts.refusal` names.
    """
    given = Arguments(
        x=x, topk_ids=topk_ids, topk_weights=topk_weights, w13=w13, s13=s13, w2=w2, s2=s2, limit=limit
    )
    return with_operands(lambda t: t.bfloat16().float(), given)


Matrices = Callable[[Arguments, int], tuple[torch.Tensor, torch.Tensor]]


def _matrices(a: Arguments, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _dequantise(a.w13[e], a.s13[e]), _dequantise(a.w2[e], a.s2[e])


def with_operands(
    rounded: Callable[[torch.Tensor], torch.Tensor], a: Arguments, matrices: Matrices = _matrices
) -> torch.Tensor:
    """`mxfp4_moe` of a, with what the weights are multiplied by, x and silu(gate) · up, `rounded` (fp32 to fp32).

    matrices(a, e): ups then gates fp32 [2I, H], and downs fp32 [H, I], of expert e.
    """
    y = torch.zeros(a.x.shape, dtype=torch.float32, device=a.x.device)
    x = rounded(a.x.float())
    for e in a.topk_ids.unique().tolist():
        if e < 0:
            continue
        row, slot = (a.topk_ids == e).nonzero(as_tuple=True)
        first, second = matrices(a, e)
        up, gate = (x[row] @ first.T).chunk(2, dim=-1)
        if a.limit is not None:
            gate, up = gate.clamp(max=a.limit), up.clamp(-a.limit, a.limit)
        hidden = rounded(torch.nn.functional.silu(gate) * up)
        down = hidden @ second.T
        y.index_add_(0, row, down * a.topk_weights[row, slot].float().unsqueeze(-1))
    return y.bfloat16()


@mxfp4_moe.checked
def _check(a: Arguments) -> str | None:
    return experts.refusal(a.w13, a.s13, a.w2, a.s2)


def _dequantise(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    bits = mxfp4.unswizzle_scales(e8m0.scale_bytes(scale))
    weights = mxfp4.dequantise(packed, bits.clamp(max=LARGEST_SCALE_BYTE))
    return weights.masked_fill((bits > LARGEST_SCALE_BYTE).repeat_interleave(mxfp4.BLOCK, -1), 0)
