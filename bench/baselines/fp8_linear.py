"""Other implementations of `fp8_linear`."""

from __future__ import annotations

import torch

from baselines import FP8_ACTIVATIONS, GEMM, QUANTISES, Arguments, Baseline, Run, without
from sglang_sm120.formats import e8m0


def fp32_scale(scale: torch.Tensor) -> torch.Tensor:
    return (scale if scale.dtype == torch.float32 else e8m0.to_float(scale)).contiguous()


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 activations with one fp32 scale per 128, in the layout DeepGEMM reads on SM90 (scales column-major)."""
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    return sglang_per_token_group_quant_fp8(x, 128, column_major_scales=True, scale_tma_aligned=True)


def _deep_gemm_linear(a: Arguments) -> Run:
    import deep_gemm

    x, weight = a["x"].contiguous(), (a["w"], fp32_scale(a["scale"]))

    def run() -> torch.Tensor:
        y = torch.empty(x.shape[0], weight[0].shape[0], dtype=torch.bfloat16, device=x.device)
        deep_gemm.fp8_gemm_nt(quantised(x), weight, y)
        return y

    return run


def _sglang_triton_linear(a: Arguments) -> Run:
    from sglang.srt.layers.quantization.fp8_utils import triton_w8a8_block_fp8_linear

    x, scale = a["x"].contiguous(), fp32_scale(a["scale"])
    return lambda: triton_w8a8_block_fp8_linear(x, a["w"], [128, 128], scale)


OTHERS = [
    Baseline("deep_gemm", f"fp8_gemm_nt; {QUANTISES}", _deep_gemm_linear, FP8_ACTIVATIONS, GEMM,
             computes=without("norm_weight", "eps"), compiles=True),
    Baseline("sglang_triton", f"w8a8_block_fp8_matmul, untuned; {QUANTISES}", _sglang_triton_linear,
             FP8_ACTIVATIONS, ("sglang",), computes=without("norm_weight", "eps"), compiles=True, lowered=True),
]  # fmt: skip
