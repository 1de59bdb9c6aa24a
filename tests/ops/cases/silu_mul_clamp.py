"""Cases of `silu_mul_clamp`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang_sm120.tolerance import BF16

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Values on both sides of the limit, and so large that exp overflows."""

    def build(make: Maker, tokens: int, width: int, scale: float) -> dict[str, Any]:
        return {"gate_up": make.bf16(tokens, 2 * width, scale=scale), "limit": 10.0}

    for tokens, width, scale in ((0, 8, 1.0), (1, 64, 1.0), (70, 33, 10.0), (3, 64, 1000.0)):
        yield Case(
            f"{tokens}x{width}-{scale:g}",
            BF16,
            partial(build, tokens=tokens, width=width, scale=scale),
        )
