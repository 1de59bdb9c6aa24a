"""Other implementations of `mhc_head`."""

from __future__ import annotations

from baselines import Arguments, Baseline, Run
from sglang_sm120.tolerance import BF16


def _sglang_head(a: Arguments) -> Run:
    from sglang.kernels.ops.layernorm.mhc_head import fused_hc_head

    return lambda: fused_hc_head(a["x"], a["fn"], a["scale"], a["base"], 1e-6, 1e-6)


OTHERS = [
    Baseline("sglang_triton", "SGLang's fused_hc_head", _sglang_head, BF16, ("sglang",), compiles=True,
             lowered=True),
]  # fmt: skip
