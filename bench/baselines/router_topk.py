"""Other implementations of `router_topk`."""

from __future__ import annotations

from typing import Any

import torch

from baselines import Arguments, Baseline, Run
from sglang_sm120.tolerance import FP32


def _sglang_gate(a: Arguments) -> Run:
    from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate

    w = a["w"].T

    def run() -> Any:
        logits = torch.mm(a["x"], w, out_dtype=torch.float32)
        return moe_fused_gate(logits, a["correction_bias"], a["k"], "sqrtsoftplus", renormalize=a["renormalize"])

    return run


OTHERS = [
    Baseline("sglang_cuda", "cuBLAS, then moe_fused_gate", _sglang_gate, FP32, ("sglang",), compiles=True),
]  # fmt: skip
