"""Other implementations of `bf16_linear_fp32`."""

from __future__ import annotations

import torch

from baselines import CUBLAS, Arguments, Baseline, Run, without


def _cublas_linear(a: Arguments) -> Run:
    w = a["w"].T
    return lambda: torch.mm(a["x"], w, out_dtype=torch.float32)


OTHERS = [
    Baseline("cublas", "bf16 GEMM with fp32 result, what SGLang's linear_bf16_fp32 calls",
             _cublas_linear, CUBLAS, computes=without("dtype")),
]  # fmt: skip
