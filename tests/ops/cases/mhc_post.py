"""Cases of `mhc_post`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import BF16

from .common import Case, Maker


def inputs(make: Maker, tokens: int, hidden: int) -> dict[str, Any]:
    """Arguments of `mhc_post`; comb is not symmetric, so that its transpose shows."""
    return {
        "f": make.bf16(tokens, hidden),
        "x": make.bf16(tokens, 4, hidden),
        "post": make.normal(tokens, 4).abs(),
        "comb": make.normal(tokens, 16).softmax(-1).view(-1, 4, 4),
    }


def cases(kind: str) -> Iterator[Case]:
    """Odd widths; the model's width on a GPU."""
    sizes = [(0, 64), (1, 64), (3, 100), (70, 32)]
    if kind != "cpu":
        sizes += [(tokens, model_config()["hidden_size"]) for tokens in (1, 2, 4, 8, 16, 33, 64, 65, 300)]
    for tokens, hidden in sizes:
        yield Case(f"{tokens}x{hidden}", BF16, partial(inputs, tokens=tokens, hidden=hidden))
