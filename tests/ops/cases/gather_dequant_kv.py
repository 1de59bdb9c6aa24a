"""Cases of `gather_dequant_kv`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import EXACT

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Every page size, empty rows, -1 inside, more than 64 rows, pages past 2^31 bytes.

    Slots beyond a row's length are far outside the pool, and memory of unlisted slots is NaN.
    """

    def build(
        make: Maker,
        page_size: int,
        lengths: list[int],
        pages: int = 20,
        gaps: bool = False,
        wide: bool = False,
        width: int = 24,
        keys: float = 1.0,
    ) -> dict[str, Any]:
        slots = make.slots(pages * page_size, width, lengths, gaps)
        pool = make.kv_pool(page_size, slots, pages, wide, keys)
        for row, length in enumerate(lengths):
            slots[row, length:] = 2**31 - 1
        return {"pages": pool, "slots": slots, "lengths": make.tensor(lengths), "page_size": page_size}

    for page_size in (2, 64, 256):
        yield Case(f"page-{page_size}", EXACT, partial(build, page_size=page_size, lengths=[24, 0, 5]))
    yield Case("no-rows", EXACT, lambda make: build(make, 64, []))
    yield Case("gaps", EXACT, lambda make: build(make, 64, [24, 1, 7], gaps=True))
    yield Case("70-rows", EXACT, lambda make: build(make, 64, [t % 5 for t in range(70)]))
    yield Case("several-blocks", EXACT, lambda make: build(make, 64, [70, 33, 0], width=70))
    for name, keys in (("small-keys", 2e-5), ("large-keys", 1e30)):
        yield Case(name, EXACT, partial(build, page_size=64, lengths=[24, 0, 5], keys=keys))
    yield Case("past-2^31-bytes", EXACT, lambda make: build(make, 2, [24, 0, 20], wide=True))
    if kind != "cpu":
        c = model_config()
        for rows in (1, 8, 65):
            lengths = [c["index_topk"] - t for t in range(rows)]
            yield Case(f"{rows}-rows", EXACT, partial(build, page_size=64, lengths=lengths, width=c["index_topk"]))
