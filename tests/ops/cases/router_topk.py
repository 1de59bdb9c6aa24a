"""Cases of `router_topk`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import FP32

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """In one launch and in two, experts around a tile, ordinary and extreme logits, ties, weights left as scores.

    Inputs are small integers times a power of two: all orders of summing give the same logits, so that none chooses
    other experts.
    """

    def build(
        make: Maker,
        tokens: int,
        experts: int = 16,
        k: int = 64,
        scale: float = 2.0**-5,
        ties: bool = False,
        renormalize: bool = True,
    ) -> dict[str, Any]:
        x, w = (make.integers(-4, 5, rows, k).bfloat16() for rows in (tokens, experts))
        if ties:
            w[1::2], w[:, 1:] = w[::2], 0
        return {
            "x": make_strided(x),
            "w": w * scale,
            "correction_bias": make.normal(experts) * (not ties),
            "k": 6,
            "renormalize": renormalize,
        }

    def make_strided(x: torch.Tensor) -> torch.Tensor:
        """The same values as columns of a wider tensor, as a layer's input may lie."""
        return torch.nn.functional.pad(x, (0, 8), value=torch.nan)[:, : x.shape[1]]

    for tokens in (0, 1, 5, 12, 13, 17, 70):
        yield Case(f"rows-{tokens}", FP32, partial(build, tokens=tokens))
    for experts in (6, 33, 128, 160, 256):
        yield Case(f"{experts}-experts", FP32, partial(build, tokens=1, experts=experts))
    yield Case("5-rows-of-256", FP32, partial(build, tokens=5, experts=256, k=100))
    yield Case("70-rows-of-160", FP32, partial(build, tokens=70, experts=160))
    for tokens in (5, 20):
        yield Case(f"{tokens}-rows-of-ties", FP32, partial(build, tokens=tokens, ties=True))
        yield Case(f"{tokens}-rows-of-large-logits", FP32, partial(build, tokens=tokens, scale=2.0))
        yield Case(f"{tokens}-rows-of-scores", FP32, partial(build, tokens=tokens, renormalize=False))
    if kind != "cpu":
        c = model_config()
        for tokens in (1, 2, 4, 5, 8, 9, 16, 33, 64, 65, 300):
            sizes = {"experts": c["n_routed_experts"], "k": c["hidden_size"], "scale": 2.0**-8}
            yield Case(f"{tokens}-rows-of-model", FP32, partial(build, tokens=tokens, **sizes))
