"""Cases of `indexer_topk`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._cases import EXACT, Case, Maker, model_config
from ..indexer_logits.cases import inputs


def cases(kind: str) -> Iterator[Case]:
    """Rows with fewer, as many and more entries than k; caller's buffers; the model's k on a GPU."""

    def build(make: Maker, lengths: list[int], k: int, buffers: int | None = None, **sizes: Any) -> dict[str, Any]:
        arguments = inputs(make, 8, lengths, **sizes) | {"k": k}
        if buffers is not None:
            arguments["out"] = make.poisoned(len(lengths), buffers, dtype=torch.int32)
            arguments["raw_out"] = make.poisoned(len(lengths), buffers, dtype=torch.int32)
        return arguments

    yield Case("no-rows", EXACT, lambda make: build(make, [], 8))
    yield Case("around-k", EXACT, lambda make: build(make, [0, 1, 63, 64, 65, 200], 64))
    yield Case("70-rows", EXACT, lambda make: build(make, [(7 * t) % 130 for t in range(70)], 16, columns=3))
    yield Case("past-2^31-bytes", EXACT, lambda make: build(make, [200, 70], 32, wide=True))
    yield Case(
        "buffers",
        EXACT,
        lambda make: build(make, [200, 3], 32, buffers=40),
        lambda inputs, result: (result, inputs["out"], inputs["raw_out"]),
        ("out", "raw_out"),
    )
    if kind != "cpu":
        k = model_config()["index_topk"]
        yield Case("model", EXACT, lambda make: build(make, [1100, 1, 512, 900], k, columns=18))
