"""Cases of `mhc_pre`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import BF16, FP32

from .common import Case, Maker


def inputs(make: Maker, tokens: int, hidden: int, norm: bool, spread: float = 1.0, eps: float = 0.1) -> dict[str, Any]:
    """Arguments of `mhc_pre`; the weights move every gate and every mixing entry visibly."""
    return {
        "x": make.bf16(tokens, 4, hidden),
        "fn": make.normal(24, 4 * hidden, scale=(4 * hidden) ** -0.5),
        "scale": make.normal(3).abs() + 0.5,
        "base": make.normal(24, scale=spread),
        "norm_weight": make.bf16(hidden) if norm else None,
        # Large enough that leaving one out shows in bf16.
        "rms_eps": 0.1,
        "hc_eps": eps,
        "norm_eps": 0.1,
    }


def cases(kind: str) -> Iterator[Case]:
    """With and without the fused norm, gates and mixes in saturation, one iteration; the model's width on a GPU."""
    sizes = [(0, 64), (1, 64), (3, 96), (17, 96), (70, 32)]
    if kind != "cpu":
        sizes += [(tokens, model_config()["hidden_size"]) for tokens in (1, 2, 4, 8, 16, 33, 64, 65, 300)]
    for tokens, hidden in sizes:
        for norm in (False, True):
            name = f"{tokens}x{hidden}{'-norm' if norm else ''}"
            yield Case(name, BF16, partial(inputs, tokens=tokens, hidden=hidden, norm=norm))
    # Converges slowly: each of the 20 iterations is seen in comb.
    saturated = partial(inputs, tokens=70, hidden=64, norm=False, spread=10.0, eps=1e-6)
    yield Case("saturated", FP32, saturated, lambda _, result: result[1:])
    one = partial(inputs, tokens=3, hidden=64, norm=False)
    yield Case("one-iteration", FP32, lambda make: one(make) | {"iters": 1}, lambda _, result: result[1:])
