"""Cases of `router_topk`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_sm120.tolerance import FP32

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Ordinary and extreme logits, ties, weights left as scores."""

    def build(
        make: Maker,
        tokens: int,
        experts: int = 16,
        scale: float = 1.0,
        ties: bool = False,
        renormalize: bool = True,
    ) -> dict[str, Any]:
        return {
            "router_logits": make.integers(0, 2, tokens, experts).float()
            if ties
            else make.normal(tokens, experts) * scale,
            "correction_bias": make.normal(experts) * (not ties),
            "k": 6,
            "renormalize": renormalize,
        }

    yield Case("no-rows", FP32, lambda make: build(make, 0))
    yield Case("rows-70", FP32, lambda make: build(make, 70))
    yield Case("256-experts", FP32, lambda make: build(make, 5, experts=256))
    yield Case("384-experts", FP32, lambda make: build(make, 5, experts=384))
    yield Case("ties", FP32, lambda make: build(make, 5, ties=True))
    yield Case("large-logits", FP32, lambda make: build(make, 5, scale=40.0))
    yield Case("scores", FP32, lambda make: build(make, 5, renormalize=False))
