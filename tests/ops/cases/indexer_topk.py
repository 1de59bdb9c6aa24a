"""Cases of `indexer_topk`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.ops.indexer_logits import indexer_logits
from sglang_sm120.tolerance import EXACT, FP32

from .common import Case, Maker
from .indexer_logits import inputs


def cases(kind: str) -> Iterator[Case]:
    """Rows with fewer, as many and more entries than k; caller's buffers; the model's k on a GPU."""

    def build(make: Maker, lengths: list[int], k: int, buffers: int | None = None, **sizes: Any) -> dict[str, Any]:
        arguments = inputs(make, 8, lengths, **sizes) | {"k": k}
        if buffers is not None:
            arguments["out"] = make.poisoned(len(lengths), buffers, dtype=torch.int32)
        return arguments

    yield Case("no-rows", EXACT, lambda make: build(make, [], 8))
    yield Case("around-k", EXACT, lambda make: build(make, [0, 1, 63, 64, 65, 200], 64))
    yield Case("70-rows", EXACT, lambda make: build(make, [(7 * t) % 130 for t in range(70)], 16, columns=3))
    yield Case("past-2^31-bytes", EXACT, lambda make: build(make, [200, 70], 32, wide=True))
    yield Case(
        "buffers",
        EXACT,
        lambda make: build(make, [200, 3], 32, buffers=40),
        lambda inputs, result: (result, inputs["out"]),
        ("out",),
    )
    if kind != "cpu":
        k = model_config()["index_topk"]
        yield Case("model", EXACT, lambda make: build(make, [1100, 1, 512, 900], k, columns=18))
        # Sums in another order may swap entries that score alike to 1e-7, so what the chosen ones score is compared.
        for rows in (1, 2, 4, 8, 16, 33, 64, 65, 256):
            lengths = [max(0, 2600 - 37 * t) for t in range(rows)]
            make_rows = partial(build, lengths=lengths, k=k, buffers=k, columns=64, pages=64)
            yield Case(f"{rows}-rows", FP32, make_rows, chosen_scores, ("out",))
        # More rows than are scored at once, in tables with the page that SGLang's have beyond a million tokens.
        lengths = [262272 if t == 39 else 700 * t for t in range(40)]
        for top in (k, 2 * k):
            make_rows = partial(build, lengths=lengths, k=top, buffers=top, columns=4098, pages=4098)
            yield Case(f"1m-context-{top}", FP32, make_rows, chosen_scores, ("out",))


def chosen_scores(inputs: dict[str, Any], result: torch.Tensor) -> torch.Tensor:
    """Scores of the chosen entries of each row in order, -inf where there is none."""
    arguments = ("q", "weights", "pages", "page_table", "lengths")
    logits = indexer_logits.reference(*(inputs[name] for name in arguments))
    slots, size = result.long(), 64
    # Of a page that a row lists twice the first entry does: it has the same key.
    column = (inputs["page_table"].unsqueeze(1) == (slots // size).unsqueeze(2)).long().argmax(2)
    scores = logits.gather(1, column * size + slots.clamp(min=0) % size)
    return scores.masked_fill(slots < 0, -torch.inf).sort(1).values
