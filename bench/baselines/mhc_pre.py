"""Other implementations of `mhc_pre`."""

from __future__ import annotations

import torch

from baselines import GEMM, TF32, Arguments, Baseline, Run
from sglang_sm120.ops._math import rms_norm, sinkhorn


def _prenorm_splits(rows: int, width: int, device: torch.device) -> int:
    """How SGLang splits the mixing GEMM over its depth (`kernels/ops/layernorm/mhc.py`)."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(sms // -(-rows // 64), width // 64 // 4))


def deep_gemm_mix(x: torch.Tensor, a: Arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DeepGEMM's mixing GEMM with sums of squares; weights, sum of streams and norm in torch."""
    import deep_gemm

    flat = x.flatten(1)
    splits = _prenorm_splits(flat.shape[0], flat.shape[1], x.device)
    products = torch.empty(splits, flat.shape[0], a["fn"].shape[0], device=x.device)
    squares = torch.empty(splits, flat.shape[0], device=x.device)
    deep_gemm.tf32_hc_prenorm_gemm(flat, a["fn"], products, squares, num_splits=splits)
    mixes = products.sum(0) * torch.rsqrt(squares.sum(0) / flat.shape[1] + 1e-6).unsqueeze(1)
    pre, post, comb = sinkhorn(mixes, a["scale"], a["base"], 20, 1e-6)
    y = (pre.unsqueeze(-1) * x.float()).sum(1).bfloat16()
    return rms_norm(y, a["norm_weight"], 1e-6).bfloat16(), post, comb


def _tilelang_pre(a: Arguments) -> Run:
    from sglang.kernels.ops.layernorm.mhc import mhc_pre
    from sglang.srt.runtime_context import get_parallel

    def run() -> tuple[torch.Tensor, ...]:
        # Asked for, but not used without symmetric memory.
        with get_parallel().override(tp_group=None):
            post, comb, y = mhc_pre(
                a["x"], a["fn"], a["scale"], a["base"], 1e-6, 1e-6, 1e-6, 2.0, 20,
                norm_weight=a["norm_weight"], norm_eps=1e-6,
            )  # fmt: skip
        return y, post.view(-1, 4), comb.view(-1, 4, 4)

    return run


OTHERS = [
    Baseline("deep_gemm", "tf32_hc_prenorm_gemm, the rest in torch",
             lambda a: lambda: deep_gemm_mix(a["x"], a), TF32, ("deep_gemm",), compiles=True),
    Baseline("tilelang", "SGLang's mhc_pre: DeepGEMM and TileLang", _tilelang_pre, TF32,
             ("tilelang", *GEMM), compiles=True),
]  # fmt: skip
