"""Cases of `k_norm_rope_store`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_sm120.formats import kv_page
from sglang_sm120.tolerance import FP8

from .common import Case, Maker, stored


def cases(kind: str) -> Iterator[Case]:
    """Every page size, -1 slots, an input that is a slice of wider rows, pages past 2^31 bytes."""

    def build(make: Maker, tokens: int, page_size: int, wide: bool = False) -> dict[str, Any]:
        pages = 20
        slots = make.choice(pages * page_size, tokens)
        slots[1::4] = -1
        return {
            "kv": make.bf16(tokens, 600)[:, 88:],
            "weight": make.bf16(512),
            "eps": 0.1,
            "freqs_cis": make.freqs_cis(),
            "positions": make.integers(0, 512, tokens, dtype=torch.int64),
            "slots": slots,
            "pages": make.pool(pages, kv_page.page_bytes(page_size), wide),
            "page_size": page_size,
        }

    def case(name: str, *sizes: Any, **options: Any) -> Case:
        return Case(name, FP8, lambda make: build(make, *sizes, **options), stored, ("pages",))

    yield case("no-rows", 0, 256)
    yield case("page-256", 70, 256)
    yield case("page-64", 7, 64)
    yield case("past-2^31-bytes", 30, 2, wide=True)
