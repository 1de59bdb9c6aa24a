"""Cases of `indexer_q`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_sm120.tolerance import FP8

from .common import Case, Maker


def dequantised(inputs: dict[str, Any], result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values and folded weights, both as numbers."""
    q, weights = result
    return q.float(), weights


def cases(kind: str) -> Iterator[Case]:
    """Ordinary rows, and rows so small that the floor under the scale acts."""

    def build(make: Maker, tokens: int, heads: int, scale: float = 1.0) -> dict[str, Any]:
        return {
            "q": make.bf16(tokens, heads, 128, scale=scale),
            "weight": make.bf16(tokens, heads),
            "weight_scale": 0.01,
            "freqs_cis": make.freqs_cis(),
            "positions": make.integers(0, 512, tokens, dtype=torch.int64),
        }

    yield Case("no-rows", FP8, lambda make: build(make, 0, 8), dequantised)
    yield Case("rows-5", FP8, lambda make: build(make, 5, 8), dequantised)
    yield Case("rows-70", FP8, lambda make: build(make, 70, 2), dequantised)
    yield Case("tiny", FP8, lambda make: build(make, 3, 4, scale=1e-6), dequantised)
    yield Case("zero", FP8, lambda make: build(make, 3, 4, scale=0.0), dequantised)
