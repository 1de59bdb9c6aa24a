"""Cases of `l2_prefetch`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_sm120.tolerance import EXACT

from .common import Case, Maker


def both(inputs: dict[str, Any], result: None) -> Any:
    """The weights, which stay as they were."""
    assert result is None
    return inputs["first"], inputs["second"]


def cases(kind: str) -> Iterator[Case]:
    """FP8 and bf16 weights of a few orders and of less than one, in place of each other."""

    def build(make: Maker, first: tuple[int, ...], second: tuple[int, ...]) -> dict[str, Any]:
        return {"first": make.bf16(*first), "second": make.fp8_weight(*second)[0]}

    yield Case("orders", EXACT, lambda make: build(make, (3, 128, 256), (384, 128)), both)
    yield Case("less-than-one", EXACT, lambda make: build(make, (8,), (1, 16)), both)
