"""Cases of `sinkhorn`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang_sm120.tolerance import FP32

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Row counts around a block of 64, one and many iterations, gates and mixes in saturation."""

    def build(make: Maker, tokens: int, iters: int = 20, spread: float = 1.0) -> dict[str, Any]:
        return {
            "mixes": make.normal(tokens, 24),
            "scale": make.normal(3).abs() + 0.5,
            "base": make.normal(24, scale=spread),
            "iters": iters,
            "eps": 1e-6,
        }

    for tokens in (0, 1, 5, 70, *(() if kind == "cpu" else (2, 4, 8, 16, 33, 64, 65, 4096))):
        yield Case(f"rows-{tokens}", FP32, partial(build, tokens=tokens))
    yield Case("one-iteration", FP32, lambda make: build(make, 3, iters=1))
    yield Case("saturated", FP32, lambda make: build(make, 7, spread=10.0))
