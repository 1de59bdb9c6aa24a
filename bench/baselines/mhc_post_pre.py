"""Other implementations of `mhc_post_pre`."""

from __future__ import annotations

import torch

from baselines import GEMM, TF32, Arguments, Baseline, Run
from baselines.mhc_post import upstream_post
from baselines.mhc_pre import deep_gemm_mix


def _deep_gemm_post_pre(a: Arguments) -> Run:
    def run() -> tuple[torch.Tensor, ...]:
        x = upstream_post(a["f"], a["x"], a["post"], a["comb"])
        return x, *deep_gemm_mix(x, a)

    return run


def _tilelang_post_pre(a: Arguments) -> Run:
    from sglang.kernels.ops.layernorm.mhc import mhc_fused_post_pre
    from sglang.srt.runtime_context import get_parallel

    def run() -> tuple[torch.Tensor, ...]:
        with get_parallel().override(tp_group=None):
            x, post, comb, y = mhc_fused_post_pre(
                a["f"], a["x"], a["post"], a["comb"], a["fn"], a["scale"], a["base"], 1e-6, 1e-6, 1e-6, 2.0, 20,
                norm_weight=a["norm_weight"], norm_eps=1e-6,
            )  # fmt: skip
        return x, y, post.view(-1, 4), comb

    return run


OTHERS = [
    Baseline("deep_gemm", "SGLang's torch hc_post, tf32_hc_prenorm_gemm, the rest in torch",
             _deep_gemm_post_pre, TF32, ("deep_gemm",), compiles=True),
    Baseline("tilelang", "SGLang's mhc_fused_post_pre", _tilelang_post_pre, TF32,
             ("tilelang", *GEMM), compiles=True),
]  # fmt: skip
