"""Cases of `sparse_mla`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import BF16, Tolerance

from .common import Case, Maker

SMALL_KEYS = Tolerance(2e-3, 1e-2)
"""fp16 holds the smallest keys to 6e-4 of their RMS: enough for one result in seven to round to bf16's other side."""


def cases(kind: str) -> Iterator[Case]:
    """With and without compressed entries, turned or not, empty rows, -1 inside, over 64 rows, pages past 2^31 bytes.

    Slots beyond a row's length are far outside the pool, and memory of unlisted slots is NaN.
    """

    def build(
        make: Maker,
        heads: int,
        window: list[int],
        extra: list[int] | None = None,
        extra_page_size: int = 64,
        width: int = 16,
        gaps: bool = False,
        wide: bool = False,
        pages: int = 20,
        sink: bool = True,
        turned: torch.dtype | None = None,
        keys: float = 1.0,
        q_eps: float | None = None,
    ) -> dict[str, Any]:

        def listed(lengths: list[int], page_size: int) -> tuple[Any, Any]:
            slots = make.slots(pages * page_size, width, lengths, gaps)
            pool = make.kv_pool(page_size, slots, pages, wide, keys)
            for row, length in enumerate(lengths):
                slots[row, length:] = 2**31 - 1
            return pool, slots

        window_pages, window_slots = listed(window, 256)
        inputs: dict[str, Any] = {
            # Of the largest keys it would otherwise choose one alone.
            "q": make.bf16(len(window), heads, 512, scale=min(1.0, 10 / keys)),
            "window_pages": window_pages,
            "window_slots": window_slots,
            "window_lengths": make.tensor(window),
            "window_page_size": 256,
            "extra_pages": None,
            "extra_slots": None,
            "extra_lengths": None,
            "extra_page_size": None,
            # Sinks of the size of the largest scores, so that leaving them out shows.
            "sink": make.normal(heads, scale=2.0) if sink else make.tensor([-torch.inf] * heads, torch.float32),
            "scale": 512**-0.5,
        }
        if extra is not None:
            inputs["extra_pages"], inputs["extra_slots"] = listed(extra, extra_page_size)
            inputs["extra_lengths"], inputs["extra_page_size"] = make.tensor(extra), extra_page_size
        if turned is not None:
            inputs["freqs_cis"] = make.freqs_cis()
            inputs["positions"] = make.integers(0, 512, len(window), dtype=turned)
            inputs["q_eps"] = q_eps
        return inputs

    def longer(inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["window_lengths"][0] += 5
        inputs["extra_lengths"][0] += 7
        return inputs

    yield Case("no-rows", BF16, lambda make: build(make, 8, []))
    yield Case("turned", BF16, lambda make: build(make, 8, [16, 0, 7], [5, 0, 16], turned=torch.int64))
    long_rows = [t % 7 for t in range(20)]
    yield Case("20-rows-turned", BF16, lambda make: build(make, 24, long_rows, turned=torch.int32))
    projected = partial(build, turned=torch.int64, q_eps=0.1)
    yield Case("queries-as-projected", BF16, partial(projected, heads=8, window=[16, 0, 7], extra=[5, 0, 16]))
    yield Case("queries-as-projected-in-parts", BF16, partial(projected, heads=24, window=[150, 3], width=160))
    yield Case("window-only", BF16, lambda make: build(make, 8, [16, 1, 7]))
    yield Case("window-empty", BF16, lambda make: build(make, 8, [0, 3, 0]))
    yield Case("with-c4", BF16, lambda make: build(make, 16, [16, 5, 3], [16, 0, 9]))
    yield Case("with-c128", BF16, lambda make: build(make, 8, [16, 5, 3], [1, 0, 6], extra_page_size=2))
    yield Case("nothing-at-all", BF16, lambda make: build(make, 8, [0, 2, 0], [0, 0, 3]))
    yield Case("neither-candidate-nor-sink", BF16, lambda make: build(make, 8, [0, 2, 0], [0, 0, 3], sink=False))
    yield Case("gaps", BF16, lambda make: build(make, 8, [16, 1, 7], [1, 16, 4], gaps=True))
    yield Case("70-rows", BF16, lambda make: build(make, 8, [t % 7 for t in range(70)], [t % 3 for t in range(70)]))
    many = partial(build, heads=24, window=[150, 128, 0, 31], extra=[150, 0, 100, 5], width=160, gaps=True)
    yield Case("several-blocks", BF16, many)
    some_empty = partial(build, heads=8, window=[150, 3, 0], extra=[70, 1, 0], width=160)
    yield Case("some-parts-empty", BF16, some_empty)
    # Scales 2^-22, the smallest that a page holds, and 2^6 or 2^7, the largest that fp16 has room for.
    small, large = (partial(build, heads=8, window=[16, 5], extra=[9, 16], keys=keys) for keys in (2e-5, 1.3e4))
    yield Case("small-keys", SMALL_KEYS, small)
    yield Case("large-keys", BF16, large)
    yield Case("lengths-beyond-width", BF16, lambda make: longer(build(make, 8, [16, 3], [16, 2])))
    yield Case("past-2^31-bytes", BF16, lambda make: build(make, 8, [16, 5], [16, 9], extra_page_size=2, wide=True))
    if kind != "cpu":
        c = model_config()
        for tp in (1, 2, 4, 8):
            heads = c["num_attention_heads"] // tp
            window, extra = [c["sliding_window"]] * 3, [c["index_topk"], 0, 77]
            yield Case(
                f"tp{tp}",
                BF16,
                partial(build, heads=heads, window=window, extra=extra, width=max(*window, *extra)),
            )
        for rows in (1, 2, 4, 8, 16, 33, 64, 65, 256):
            window = [c["sliding_window"] - t % 3 for t in range(rows)]
            extra = [max(0, c["index_topk"] - 7 * t) for t in range(rows)]
            yield Case(
                f"{rows}-rows",
                BF16,
                partial(build, heads=32, window=window, extra=extra, width=c["index_topk"], gaps=rows == 4),
            )
        yield Case(
            "c128-1m-context",
            BF16,
            partial(build, heads=32, window=[128, 128], extra=[8192, 300], extra_page_size=2, width=8192, pages=4200),
        )
