"""Cases of `q_norm_rope`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_sm120.tolerance import BF16

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Own result and a strided one of the caller."""

    def build(make: Maker, tokens: int, heads: int, out: bool = False) -> dict[str, Any]:
        arguments = {
            "q": make.bf16(tokens, 2 * heads, 512)[:, :heads],
            "eps": 0.1,
            "freqs_cis": make.freqs_cis(),
            "positions": make.integers(0, 512, tokens, dtype=torch.int64),
        }
        if out:
            arguments["out"] = make.poisoned(tokens, 2 * heads, 512, dtype=torch.bfloat16)[:, heads:]
        return arguments

    yield Case("no-rows", BF16, lambda make: build(make, 0, 8))
    yield Case("rows-3", BF16, lambda make: build(make, 3, 8))
    yield Case("rows-70", BF16, lambda make: build(make, 70, 2))
    yield Case(
        "strided-out",
        BF16,
        lambda make: build(make, 5, 4, out=True),
        lambda inputs, result: (result, inputs["out"]),
        ("out",),
    )
