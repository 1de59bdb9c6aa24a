"""Cases of `sample_token`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_sm120.tolerance import EXACT

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Vocabularies around a block, a grammar's mask, equal scores, no noise at a place, rows of a wider tensor."""

    def build(make: Maker, rows: int, vocabulary: int, masked: bool = False, equal: bool = False,
              nan: bool = False, each: int = 1) -> dict[str, Any]:  # fmt: skip
        wide = make.poisoned(rows, vocabulary + 8, dtype=torch.float32)
        logits = wide[:, :vocabulary]
        logits.copy_(make.integers(0, 2, rows, vocabulary) if equal else make.normal(rows, vocabulary, scale=8.0))
        if masked:
            logits[make.integers(0, 40, rows, vocabulary) > 0] = -torch.inf
        if nan:
            logits[0], logits[1:, ::3], logits[2, 1::3] = torch.nan, torch.nan, torch.inf
        noise = make.normal(rows, vocabulary).square() + 0.01
        if equal:
            noise.fill_(1.0)
            noise[:, vocabulary // 2 :: 7] = 0.0
        return {"logits": logits, "temperature": make.normal(rows // each, 1).abs() + 0.05, "noise": noise}

    yield Case("one", EXACT, lambda make: build(make, 1, 1))
    yield Case("small", EXACT, lambda make: build(make, 5, 33))
    yield Case("a-block", EXACT, lambda make: build(make, 3, 4096))
    yield Case("past-a-block", EXACT, lambda make: build(make, 3, 4097))
    yield Case("129280", EXACT, lambda make: build(make, 2, 129_280))
    yield Case("four-a-request", EXACT, lambda make: build(make, 12, 5000, each=4))
    yield Case("masked", EXACT, lambda make: build(make, 6, 9_000, masked=True))
    yield Case("nan", EXACT, lambda make: build(make, 4, 9_000, nan=True))
    yield Case("equal", EXACT, lambda make: build(make, 4, 9_000, equal=True))
