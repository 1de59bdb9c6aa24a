"""Cases of `compress_norm_rope_store`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_sm120.formats import indexer_page, kv_page
from sglang_sm120.formats.compress_plan import CompressPlan, DecodePlan
from sglang_sm120.tolerance import FP8

from .common import Case, Maker, stored


def cases(kind: str) -> Iterator[Case]:
    """KV and indexer entries, prefill and decode, rows that complete no block, pages past 2^31 bytes."""

    def build(make: Maker, dim: int, ratio: int, decode: bool, page_size: int, wide: bool = False) -> dict[str, Any]:
        pages, blocks = 20, torch.tensor([1, 2, 3, 3, 1])
        page_bytes = (kv_page if dim == kv_page.DIM else indexer_page).page_bytes(page_size)
        seq_len = blocks * ratio
        zero = torch.zeros_like(seq_len)
        if decode:
            seq_len[1] += 1
            plan = DecodePlan(seq_len, zero, zero, zero).pack()
            slots = make.choice(pages * page_size, len(blocks))
        else:
            seq_len[1] = -1
            ragged = torch.tensor([3, 0, 7, 11, 9])
            plan = CompressPlan(seq_len, ragged, zero, zero, zero).pack()
            slots = make.choice(pages * page_size, 12)
            slots[9] = -1
        return {
            "kv": make.normal(len(blocks), dim),
            "plan": plan.to(make.device),
            "is_decode": decode,
            "ratio": ratio,
            "norm_weight": make.normal(dim),
            "eps": 0.1,
            "freqs_cis": make.freqs_cis(),
            "out_slots": slots,
            "pages": make.pool(pages, page_bytes, wide),
            "page_size": page_size,
        }

    def case(name: str, *sizes: Any, **options: Any) -> Case:
        return Case(name, FP8, lambda make: build(make, *sizes, **options), stored, ("pages",))

    for decode in (False, True):
        mode = "decode" if decode else "prefill"
        yield case(f"kv-c4-{mode}", 512, 4, decode, 64)
        yield case(f"kv-c128-{mode}", 512, 128, decode, 2)
        yield case(f"indexer-{mode}", 128, 4, decode, 64)
    yield case("kv-past-2^31-bytes", 512, 128, False, 2, wide=True)
    yield case("indexer-past-2^31-bytes", 128, 4, False, 64, wide=True)
