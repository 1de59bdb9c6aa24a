"""Cases of `mhc_head`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import BF16

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Odd widths; the model's width on a GPU."""

    def build(make: Maker, tokens: int, hidden: int) -> dict[str, Any]:
        return {
            "x": make.bf16(tokens, 4, hidden),
            "fn": make.normal(4, 4 * hidden, scale=(4 * hidden) ** -0.5),
            "scale": make.normal(1).abs() + 0.5,
            "base": make.normal(4),
            # Large enough that leaving either out shows in bf16.
            "rms_eps": 0.1,
            "hc_eps": 0.1,
        }

    sizes = [(0, 64), (1, 64), (3, 100), (17, 96), (70, 32)]
    if kind != "cpu":
        sizes += [(tokens, model_config()["hidden_size"]) for tokens in (1, 2, 4, 8, 16, 33, 64, 65, 300)]
    for tokens, hidden in sizes:
        yield Case(f"{tokens}x{hidden}", BF16, partial(build, tokens=tokens, hidden=hidden))
