"""Cases of `mxfp4_moe`, and of `nvfp4_moe`, whose arguments are made alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.formats import e8m0
from sglang_sm120.tolerance import BF16

from .common import Case, Maker


def weights(
    make: Maker, experts: int, hidden: int, inter: int, raw: bool = False, bad_scales: bool = False
) -> dict[str, torch.Tensor]:
    """A layer; raw: in other dtypes that mean the same bytes; bad_scales: with some that count as 0."""
    w13, s13 = make.mxfp4_weight(experts, 2 * inter, hidden)
    w2, s2 = make.mxfp4_weight(experts, hidden, inter)
    if bad_scales:
        e8m0.scale_bytes(s13)[:, ::3] = 255
        e8m0.scale_bytes(s2)[:, ::5] = 200
    if raw:
        w13, w2, s13, s2 = w13.view(torch.int8), w2.view(torch.int8), e8m0.scale_bytes(s13), e8m0.scale_bytes(s2)
    return {"w13": w13, "s13": s13, "w2": w2, "s2": s2}


def cases(kind: str, weights: Callable[..., dict[str, torch.Tensor]] = weights) -> Iterator[Case]:
    """Absent experts, an expert without tokens or with all, the last one, raw dtypes; the model's shapes on a GPU."""

    def build(
        make: Maker,
        tokens: int,
        k: int = 2,
        experts: int = 5,
        hidden: int = 128,
        inter: int = 128,
        limit: float | None = 1.0,
        absent: bool = False,
        raw: bool = False,
        bad_scales: bool = False,
        sliced: bool = False,
        repeated: bool = False,
        last: int = 0,
        rows: slice = slice(None),
    ) -> dict[str, Any]:
        # Scaled up so that half of the activations meet the clamp of 1.
        layer = weights(make, experts, hidden, inter, raw, bad_scales)
        # The last expert gets no token, if the others suffice, but of `last` rows in three.
        chosen = [make.choice(max(experts - 1, k), k) for _ in range(tokens)]
        ids = torch.stack(chosen) if tokens else make.tensor([]).view(0, k)
        if repeated:
            ids = ids // 2
        for row in range(last):
            ids[row::3, -1] = experts - 1
        if absent:
            ids[::2, 0] = -1
            ids[1] = -1
        x, routed = make.bf16(tokens, hidden), make.normal(tokens, k).abs()
        # Weights of absent experts mean nothing.
        routed[ids < 0] = float("nan")
        if sliced:
            x, routed = (torch.cat((t, torch.full_like(t, float("nan"))), -1)[:, : t.shape[1]] for t in (x, routed))
            ids = torch.cat((ids, ids), -1).long()[:, :k]
        return {
            "x": x[rows],
            "topk_ids": ids[rows],
            "topk_weights": routed[rows],
            **layer,
            "limit": limit,
        }

    yield Case("no-rows", BF16, lambda make: build(make, 0))
    yield Case("one-row", BF16, lambda make: build(make, 1))
    yield Case("many-rows", BF16, lambda make: build(make, 70))
    yield Case("one-expert-takes-all", BF16, lambda make: build(make, 9, k=1, experts=2))
    yield Case("absent-experts", BF16, lambda make: build(make, 7, absent=True))
    yield Case("one-row-absent-expert", BF16, lambda make: build(make, 2, k=4, absent=True, rows=slice(0, 1)))
    # With six slots of 256 words the expert changes in the middle of a stretch.
    alone = {"one-row-one-slot": (1, 128), "one-row-four-slots": (4, 128), "one-row-six-slots": (6, 1024)}
    for name, (k, inter) in alone.items():
        yield Case(name, BF16, partial(build, tokens=1, k=k, inter=inter, experts=7))
        absent = partial(build, tokens=2, k=k, inter=inter, experts=7, absent=True, rows=slice(0, 1))
        yield Case(f"{name}-absent-expert", BF16, absent)
    yield Case("one-row-nine-slots", BF16, lambda make: build(make, 1, k=9, experts=10))
    yield Case("many-rows-absent-experts", BF16, lambda make: build(make, 67, absent=True))
    yield Case("one-expert-takes-all-many-rows", BF16, lambda make: build(make, 66, k=1, experts=2))
    yield Case("one-expert-twice-in-a-row", BF16, lambda make: build(make, 3, k=6, repeated=True))
    yield Case("one-row-last-expert", BF16, lambda make: build(make, 1, last=1))
    yield Case("last-expert", BF16, lambda make: build(make, 7, last=2))
    # Sorted, an expert ends where the next one begins; of the last one nothing else says where.
    yield Case("last-expert-many-rows", BF16, lambda make: build(make, 70, last=1))
    yield Case("last-expert-takes-all-many-rows", BF16, lambda make: build(make, 66, k=1, experts=4, last=3))
    yield Case("sliced-rows-long-ids", BF16, lambda make: build(make, 6, sliced=True))
    yield Case("sliced-many-rows", BF16, lambda make: build(make, 65, sliced=True))
    for tokens in (4, 33, 64):
        yield Case(f"rows-{tokens}", BF16, partial(build, tokens=tokens))
    # Depths that no step divides, rows of several tiles of scales.
    yield Case("three-blocks-deep", BF16, lambda make: build(make, 4, hidden=384, inter=384))
    # Sorted, tiles of 16, 32 and 64 tokens, and what is left of those; 16 have steps that do not divide the depth.
    yield Case("few-an-expert-many-rows", BF16, lambda make: build(make, 66, k=1, experts=7, hidden=384, inter=384))
    yield Case("three-blocks-deep-many-rows", BF16, lambda make: build(make, 65, k=1, experts=3, hidden=256, inter=384))
    yield Case("many-an-expert-many-rows", BF16, lambda make: build(make, 70, experts=3, hidden=256))
    # Few rows of 512 channels are cut in four stretches, or in two.
    yield Case("stretches", BF16, lambda make: build(make, 4, hidden=512))
    yield Case("one-row-stretches", BF16, lambda make: build(make, 1, hidden=512))
    yield Case("no-limit", BF16, lambda make: build(make, 5, limit=None))
    yield Case("int8-and-uint8", BF16, lambda make: build(make, 5, raw=True))
    yield Case("unfilled-scales", BF16, lambda make: build(make, 5, bad_scales=True))
    if kind != "cpu":
        c = model_config()
        for tp in (1, 2, 4):
            for tokens in (1, 2, 4, 8, 16, 33, 64, 65, 256, 4096):
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
