"""Other implementations of `fp8_grouped_linear`."""

from __future__ import annotations

import torch

from baselines import FP8_ACTIVATIONS, GEMM, QUANTISES, Arguments, Baseline, Run
from baselines.fp8_linear import fp32_scale, quantised
from sglang_sm120.formats import fp8_block
from sglang_sm120.tolerance import BF16


def _dequantised_groups(a: Arguments) -> torch.Tensor:
    return torch.stack([fp8_block.dequantise(w, s) for w, s in zip(a["w"], a["scale"], strict=True)]).bfloat16()


def _einsum_grouped(a: Arguments) -> Run:
    w = _dequantised_groups(a)
    return lambda: torch.einsum("tgd,grd->tgr", a["o"], w)


def _deep_gemm_grouped(a: Arguments) -> Run:
    """One FP8 GEMM per group: `fp8_einsum`, which SGLang calls, has an SM100 kernel only."""
    import deep_gemm

    o, weights = a["o"], list(zip(a["w"], fp32_scale(a["scale"]), strict=True))

    def run() -> torch.Tensor:
        parts = [torch.empty(o.shape[0], w.shape[0], dtype=torch.bfloat16, device=o.device) for w, _ in weights]
        for group, (weight, part) in enumerate(zip(weights, parts, strict=True)):
            deep_gemm.fp8_gemm_nt(quantised(o[:, group].contiguous()), weight, part)
        return torch.stack(parts, dim=1)

    return run


def _deep_gemm_einsum(a: Arguments) -> Run:
    import deep_gemm

    o, w = a["o"], _dequantised_groups(a)

    def run() -> torch.Tensor:
        y = torch.empty(o.shape[0], w.shape[0], w.shape[1], dtype=torch.bfloat16, device=o.device)
        deep_gemm.einsum("bhr,hdr->bhd", o, w, y)
        return y

    return run


OTHERS = [
    Baseline("deep_gemm", f"fp8_gemm_nt once per group; {QUANTISES}", _deep_gemm_grouped,
             FP8_ACTIVATIONS, GEMM, compiles=True),
    Baseline("deep_gemm_bf16", "einsum bhr,hdr->bhd with bf16 weights", _deep_gemm_einsum, BF16,
             ("deep_gemm",), compiles=True),
    Baseline("sglang_torch", "einsum with bf16 weights, SGLang's path on Hopper",
             _einsum_grouped, BF16),
]  # fmt: skip
