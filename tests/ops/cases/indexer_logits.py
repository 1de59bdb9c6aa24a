"""Cases of `indexer_logits`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import FP32

from .common import Case, Maker


def inputs(
    make: Maker, heads: int, lengths: list[int], columns: int = 4, wide: bool = False, pages: int = 20
) -> dict[str, Any]:
    """Arguments of `indexer_logits`; beyond a row's length entries are NaN and page ids far outside."""
    tables = [make.choice(pages, columns) for _ in lengths]
    table = torch.stack(tables) if tables else make.tensor([]).view(0, columns)
    live = [
        table[row, torch.arange(length) // 64].long() * 64 + torch.arange(length, device=make.device) % 64
        for row, length in enumerate(lengths)
    ]
    pool = make.indexer_pool(64, torch.cat([*live, make.tensor([])]).long(), pages, wide)
    for row, length in enumerate(lengths):
        table[row, -(-length // 64) :] = 2**31 - 1
    return {
        "q": make.normal(len(lengths), heads, 128).to(torch.float8_e4m3fn),
        "weights": make.normal(len(lengths), heads),
        "pages": pool,
        "page_table": table,
        "lengths": make.tensor(lengths),
    }


def cases(kind: str) -> Iterator[Case]:
    """Empty rows, partial pages, more than 64 rows, pages past 2^31 bytes; the model's heads on a GPU."""
    yield Case("no-rows", FP32, lambda make: inputs(make, 8, []))
    yield Case("partial-pages", FP32, lambda make: inputs(make, 8, [1, 64, 65, 200, 256, 0]))
    yield Case("all-empty", FP32, lambda make: inputs(make, 8, [0, 0]))
    yield Case("70-rows", FP32, lambda make: inputs(make, 4, [(7 * t) % 130 for t in range(70)], columns=3))
    yield Case("past-2^31-bytes", FP32, lambda make: inputs(make, 8, [200, 70], wide=True))
    if kind != "cpu":
        heads = model_config()["index_n_heads"]
        yield Case("model", FP32, lambda make: inputs(make, heads, [1100, 1, 900], columns=18))
        for rows in (1, 2, 4, 8, 16, 33, 64, 65, 256):
            lengths = [max(0, 2600 - 37 * t) for t in range(rows)]
            yield Case(f"{rows}-rows", FP32, partial(inputs, heads=heads, lengths=lengths, columns=64, pages=64))
        yield Case("1m-context", FP32, partial(inputs, heads=heads, lengths=[262144, 16384], columns=4096, pages=4096))
