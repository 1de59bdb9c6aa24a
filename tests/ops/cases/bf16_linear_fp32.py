"""Cases of `bf16_linear_fp32`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import BF16, FP32

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Odd sizes; compressor and gate of the model on a GPU."""

    def build(make: Maker, tokens: int, k: int, n: int, rounded: bool = False) -> dict[str, Any]:
        inputs = {"x": make.bf16(tokens, k), "w": make.bf16(n, k, scale=k**-0.5)}
        return inputs | ({"dtype": torch.bfloat16} if rounded else {})

    sizes = [(0, 64, 8), (1, 64, 8), (1, 5000, 10), (3, 100, 33), (16, 264, 100), (40, 1024, 70), (65, 136, 16)]
    sizes += [(70, 128, 16)]
    if kind != "cpu":
        hidden = model_config()["hidden_size"]
        sizes += [(t, hidden, n) for n in (64, 256, 512, 1024, 2048) for t in (1, 2, 4, 8, 16, 33, 64, 65, 300)]
    for t, k, n in sizes:
        yield Case(f"{t}x{k}-to-{n}", FP32, partial(build, tokens=t, k=k, n=n))
        yield Case(f"{t}x{k}-to-{n}-bf16", BF16, partial(build, tokens=t, k=k, n=n, rounded=True))
