"""Cases of `hash_topk`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_sm120.tolerance import FP32

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Ordinary and extreme logits."""

    def build(make: Maker, tokens: int, scale: float = 1.0) -> dict[str, Any]:
        vocabulary, k, experts = 50, 6, 16
        return {
            "router_logits": make.normal(tokens, experts, scale=scale),
            "input_ids": make.integers(0, vocabulary, tokens, dtype=torch.int64),
            "tid2eid": torch.stack([make.choice(experts, k) for _ in range(vocabulary)]),
        }

    yield Case("no-rows", FP32, lambda make: build(make, 0))
    yield Case("rows-5", FP32, lambda make: build(make, 5))
    yield Case("rows-70", FP32, lambda make: build(make, 70))
    yield Case("large-logits", FP32, lambda make: build(make, 5, scale=40.0))
