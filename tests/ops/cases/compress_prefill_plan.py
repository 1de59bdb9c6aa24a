"""Cases of `compress_prefill_plan`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.tolerance import EXACT

from .common import Case, Maker

SWA_PAGE_SIZE = 256


def mapping(make: Maker, requests: int) -> dict[str, Any]:
    """Requests of up to 1,024 tokens, whose window pages lie in random order."""
    order = make.choice(requests * 4, requests * 4).long()
    tokens = order.unsqueeze(1) * SWA_PAGE_SIZE + torch.arange(SWA_PAGE_SIZE, device=make.device)
    shuffled = make.choice(requests * 4, requests * 4).long()
    return {
        "req_pool_indices": make.choice(requests, requests).long(),
        "req_to_token": tokens.view(requests, -1).int(),
        "full_to_swa": (
            shuffled.unsqueeze(1) * SWA_PAGE_SIZE + torch.arange(SWA_PAGE_SIZE, device=make.device)
        ).flatten(),
        "swa_page_size": SWA_PAGE_SIZE,
    }


def cases(kind: str) -> Iterator[Case]:
    """First chunks, later chunks, chunks of one token, several requests; both ratios and a longer ring."""

    def build(make: Maker, ratio: int, ring_size: int, pairs: list[tuple[int, int]]) -> dict[str, Any]:
        return {
            "ratio": ratio,
            "seq_lens": make.tensor([s for s, _ in pairs], torch.int64),
            "extend_lens": make.tensor([e for _, e in pairs], torch.int64),
            "ring_size": ring_size,
            **mapping(make, len(pairs)),
        }

    batches = {
        "first": [(1, 1), (3, 3), (4, 4), (9, 9), (300, 300)],
        "later": [(260, 3), (257, 1), (640, 128), (512, 256), (1000, 5)],
        "one": [(128, 1)],
    }
    for ratio, ring_size in ((4, 8), (4, 16), (128, 128), (128, 256)):
        for name, pairs in batches.items():
            yield Case(
                f"c{ratio}-ring{ring_size}-{name}",
                EXACT,
                partial(build, ratio=ratio, ring_size=ring_size, pairs=pairs),
            )
