"""Cases of `rms_norm`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._cases import BF16, Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Widths that are no power of two, columns of wider rows, a row of zeros."""

    def build(make: Maker, rows: int, width: int, wider: int = 0, zeros: bool = False) -> dict[str, Any]:
        x = make.bf16(rows, width + wider)[:, :width]
        if zeros:
            x[0] = 0
        return {"x": x, "weight": make.bf16(width), "eps": 1e-6}

    yield Case("no-rows", BF16, lambda make: build(make, 0, 64))
    yield Case("columns", BF16, lambda make: build(make, 3, 100, wider=60))
    yield Case("zeros", BF16, lambda make: build(make, 2, 64, zeros=True))
    yield Case("70-rows", BF16, lambda make: build(make, 70, 24, wider=3))
