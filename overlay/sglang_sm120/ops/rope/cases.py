"""Cases of `rope`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._cases import BF16, Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Both directions, with and without heads, on the last channels of wider rows."""

    def build(make: Maker, *shape: int, inverse: bool = False, dtype: torch.dtype = torch.int64) -> dict[str, Any]:
        return {
            "x": make.bf16(*shape, 96)[..., 32:],
            "freqs_cis": make.freqs_cis(),
            "positions": make.integers(0, 512, shape[0], dtype=dtype),
            "inverse": inverse,
        }

    def case(name: str, *shape: int, **options: Any) -> Case:
        return Case(
            name,
            BF16,
            lambda make: build(make, *shape, **options),
            lambda inputs, result: inputs["x"],
            ("x",),
        )

    yield case("no-rows", 0, 2)
    yield case("heads", 5, 3)
    yield case("inverse", 70, 2, inverse=True)
    yield case("no-heads", 5, dtype=torch.int32)
