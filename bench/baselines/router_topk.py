"""Other implementations of `router_topk`."""

from __future__ import annotations

from baselines import Arguments, Baseline, Run
from sglang_sm120.tolerance import FP32


def _sglang_gate(a: Arguments) -> Run:
    from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate

    return lambda: moe_fused_gate(
        a["router_logits"], a["correction_bias"], a["k"], "sqrtsoftplus", renormalize=a["renormalize"]
    )


OTHERS = [
    Baseline("sglang_cuda", "moe_fused_gate", _sglang_gate, FP32, ("sglang",), compiles=True),
]  # fmt: skip
