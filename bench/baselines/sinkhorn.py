"""Other implementations of `sinkhorn`."""

from __future__ import annotations

import torch

from baselines import Arguments, Baseline, Run
from sglang_sm120.tolerance import FP32


def _tilelang_sinkhorn(a: Arguments) -> Run:
    from sglang.kernels.ops.layernorm.mhc import hc_split_sinkhorn

    def run() -> tuple[torch.Tensor, ...]:
        parts = hc_split_sinkhorn(a["mixes"].unsqueeze(1), a["scale"], a["base"], 4, a["iters"], a["eps"])
        return tuple(part.squeeze(1) for part in parts)

    return run


OTHERS = [
    Baseline("tilelang", "SGLang's hc_split_sinkhorn", _tilelang_sinkhorn, FP32, ("tilelang", "sglang"),
             compiles=True),
]  # fmt: skip
