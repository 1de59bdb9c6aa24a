"""Other implementations of `mhc_post`."""

from __future__ import annotations

import math

import torch

from baselines import Arguments, Baseline, Run
from sglang_sm120.tolerance import BF16


def upstream_post(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """SGLang's torch branch of `hc_post`: every product of a stream pair is materialised."""
    return (post.unsqueeze(-1) * f.unsqueeze(1) + (comb.unsqueeze(-1) * x.unsqueeze(2)).sum(1)).to(f.dtype)


def _tilelang_post(a: Arguments) -> Run:
    # `mhc_post` around it wants a server's arguments.
    from sglang.kernels.ops.layernorm.mhc import mhc_post_tilelang

    out = torch.empty_like(a["x"])
    rows, streams, hidden = out.shape
    # As `mhc_post` spreads a row of few.
    parts = hidden // math.gcd(hidden, 1024) if rows <= 256 else 1

    def run() -> torch.Tensor:
        mhc_post_tilelang(a["comb"], a["x"], a["post"], a["f"], out, streams, hidden, num_h_blocks=parts)
        return out

    return run


OTHERS = [
    Baseline("sglang_torch", "SGLang's torch hc_post, not compiled",
             lambda a: lambda: upstream_post(a["f"], a["x"], a["post"], a["comb"]), BF16),
    Baseline("tilelang", "SGLang's mhc_post_tilelang", _tilelang_post, BF16, ("tilelang", "sglang"),
             compiles=True),
]  # fmt: skip
