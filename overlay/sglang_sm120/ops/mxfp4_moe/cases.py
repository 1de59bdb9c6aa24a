"""Cases of `mxfp4_moe`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ...formats import e8m0
from .._cases import BF16, Case, Maker, model_config


def cases(kind: str) -> Iterator[Case]:
    """Absent experts, an expert without tokens or with all, raw dtypes; the model's shapes on a GPU."""

    def build(
        make: Maker,
        tokens: int,
        k: int = 2,
        experts: int = 5,
        hidden: int = 64,
        inter: int = 96,
        limit: float | None = 1.0,
        absent: bool = False,
        raw: bool = False,
        bad_scales: bool = False,
    ) -> dict[str, Any]:
        # Scaled up so that half of the activations meet the clamp of 1.
        w13, s13 = make.mxfp4_weight(experts, 2 * inter, hidden)
        w2, s2 = make.mxfp4_weight(experts, hidden, inter)
        if bad_scales:
            e8m0.scale_bytes(s13)[:, ::3] = 255
            e8m0.scale_bytes(s2)[:, ::5] = 200
        if raw:
            w13, w2, s13, s2 = (
                w13.view(torch.int8),
                w2.view(torch.int8),
                e8m0.scale_bytes(s13),
                e8m0.scale_bytes(s2),
            )
        ids = torch.stack([make.choice(experts - 1, k) for _ in range(tokens)]) if tokens else make.tensor([[]] * 0)
        ids = ids.view(tokens, k)
        if absent:
            ids[::2, 0] = -1
            ids[1] = -1
        return {
            "x": make.bf16(tokens, hidden),
            "topk_ids": ids,
            "topk_weights": make.normal(tokens, k).abs(),
            "w13": w13,
            "s13": s13,
            "w2": w2,
            "s2": s2,
            "limit": limit,
        }

    yield Case("no-rows", BF16, lambda make: build(make, 0))
    yield Case("one-row", BF16, lambda make: build(make, 1))
    yield Case("many-rows", BF16, lambda make: build(make, 70))
    yield Case("one-expert-takes-all", BF16, lambda make: build(make, 9, k=1, experts=2))
    yield Case("absent-experts", BF16, lambda make: build(make, 7, absent=True))
    yield Case("no-limit", BF16, lambda make: build(make, 5, limit=None))
    yield Case("int8-and-uint8", BF16, lambda make: build(make, 5, raw=True))
    yield Case("unfilled-scales", BF16, lambda make: build(make, 5, bad_scales=True))
    if kind != "cpu":
        c = model_config()
        for tp in (1, 2, 4):
            for tokens in (1, 8, 300):
                full = partial(
                    build,
                    tokens=tokens,
                    k=c["num_experts_per_tok"],
                    experts=16,
                    hidden=c["hidden_size"],
                    inter=c["moe_intermediate_size"] // tp,
                    limit=c["swiglu_limit"],
                )
                yield Case(f"tp{tp}-{tokens}", BF16, full)
