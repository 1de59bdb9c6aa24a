"""Cases of `nvfp4_moe`: those of `mxfp4_moe` with experts in NVFP4."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .common import Case, Maker
from .mxfp4_moe import cases as cases_with


def weights(
    make: Maker, experts: int, hidden: int, inter: int, raw: bool = False, bad_scales: bool = False
) -> dict[str, torch.Tensor]:
    """A layer; raw: int8 for packed bytes; bad_scales: with some of NaN, of either sign, and subnormal ones."""
    halves = [make.nvfp4_weight(experts, inter, hidden) for _ in range(2)]
    (w3, s3, g3), (w1, s1, g1) = halves
    # Both are a multiple of 128 rows, so that their swizzled scales lie one after the other too.
    w13, s13, g13 = torch.cat((w3, w1), 1), torch.cat((s3, s1), 1), torch.stack((g1, g3), 1)
    w2, s2, g2 = make.nvfp4_weight(experts, hidden, inter)
    if bad_scales:
        bits = s13.view(torch.uint8)
        bits[:, ::3], bits[:, 1::3, ::2] = 0x7F, make.integers(0, 8, *bits[:, 1::3, ::2].shape, dtype=torch.uint8)
        s2.view(torch.uint8)[:, ::5] = 0xFF
    if raw:
        w13, w2 = w13.view(torch.int8), w2.view(torch.int8)
    return {"w13": w13, "s13": s13, "g13": g13, "w2": w2, "s2": s2, "g2": g2}


def cases(kind: str) -> Iterator[Case]:
    """Those of `mxfp4_moe`."""
    return cases_with(kind, weights)
