"""Cases of `topk_slots`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import EXACT

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """Rows with fewer, as many and more entries than k, ties, infinities and zeros, caller's buffers.

    Logits beyond a row's length are NaN, page ids beyond it far outside.
    """

    def build(
        make: Maker,
        lengths: list[int],
        k: int,
        columns: int = 4,
        ties: bool = False,
        buffers: int | None = None,
        odd: bool = False,
    ) -> dict[str, Any]:
        rows = len(lengths)
        logits = make.integers(0, 5, rows, columns * 64).float() if ties else make.normal(rows, columns * 64)
        if ties:
            logits[logits == 0] = -torch.inf
        if odd:
            for value in (torch.inf, -torch.inf, 0.0, -0.0, -1e-40, 3e38):
                logits[make.integers(0, 9, rows, columns * 64) == 0] = value
        table = make.integers(0, 1000, rows, columns)
        for row, length in enumerate(lengths):
            logits[row, length:] = torch.nan
            table[row, -(-length // 64) :] = 2**25
        arguments = {"logits": logits, "lengths": make.tensor(lengths), "page_table": table, "k": k}
        if buffers is not None:
            arguments["out"] = make.poisoned(rows, buffers, dtype=torch.int32)
        return arguments

    yield Case("no-rows", EXACT, lambda make: build(make, [], 8))
    yield Case("around-k", EXACT, lambda make: build(make, [0, 1, 63, 64, 65, 200, 256], 64))
    yield Case("k-beyond-width", EXACT, lambda make: build(make, [0, 64, 30], 100, columns=1))
    yield Case("ties", EXACT, lambda make: build(make, [256, 100, 65, 30], 64, ties=True))
    yield Case("odd-values", EXACT, lambda make: build(make, [256, 100, 65, 30, 200], 64, odd=True))
    # More entries than one program takes.
    yield Case("long", EXACT, lambda make: build(make, [20480, 100, 16385, 64], 64, columns=320))
    yield Case("long-ties", EXACT, lambda make: build(make, [20480, 17000], 64, columns=320, ties=True))
    # Tiles that hand on more than one takes: 17 of the largest k.
    yield Case("very-long", EXACT, lambda make: build(make, [278528], 1024, columns=4352))
    # Few rows, in several programs each.
    yield Case("shared", EXACT, lambda make: build(make, [9000, 2100], 64, columns=320, odd=True))
    yield Case("shared-buffers", EXACT, lambda make: build(make, [20480], 64, columns=320, buffers=70),
               lambda inputs, result: (result, inputs["out"]), ("out",))  # fmt: skip
    # More rows than half of the interpreter's eight SMs, each longer than the shortest that is streamed.
    around_k = [0, 1, 15, 16, 17, 255, 257, 1000]
    around_tiles = [511, 512, 513, 1024, 2047, 2048, 2049, 4097]
    yield Case("streamed", EXACT, lambda make: build(make, around_k + around_tiles, 16, columns=65))
    yield Case("streamed-ties", EXACT, lambda make: build(make, [4160 - 17 * t for t in range(9)], 64, columns=65,
               ties=True))  # fmt: skip
    falling = [4160 - 300 * t for t in range(12)]
    yield Case("streamed-odd-values", EXACT, lambda make: build(make, falling, 512, columns=65, odd=True, buffers=600),
               lambda inputs, result: (result, inputs["out"]), ("out",))  # fmt: skip
    yield Case("streamed-1024", EXACT, lambda make: build(make, [9000, 5000, *range(1020, 1028)], 1024, columns=150))
    yield Case("70-rows", EXACT, lambda make: build(make, [(7 * t) % 130 for t in range(70)], 16, columns=3))
    yield Case(
        "buffers",
        EXACT,
        lambda make: build(make, [200, 3], 32, buffers=40),
        lambda inputs, result: (result, inputs["out"]),
        ("out",),
    )
    if kind != "cpu":
        k = model_config()["index_topk"]
        for top in (k, 2 * k):
            yield Case(f"model-{top}", EXACT, partial(build, lengths=[16384, 1, 512, 513], k=top, columns=256))
            # With the page that SGLang's tables have beyond a million tokens; rows that share no search, and ties.
            for rows, ties in ((3, False), (3, True), (70, False)):
                lengths = [262272, 9, 30000, *(262208 - 999 * t for t in range(rows - 3))]
                build_rows = partial(build, lengths=lengths, k=top, columns=4098, ties=ties)
                yield Case(f"1m-context-{rows}-rows-{top}{'-ties' * ties}", EXACT, build_rows)
        for rows in (1, 2, 4, 8, 16, 33, 64, 65, 256):
            lengths = [16384 - 200 * t % 16000 for t in range(rows)]
            yield Case(f"{rows}-rows", EXACT, partial(build, lengths=lengths, k=k, columns=256))
            yield Case(f"{rows}-rows-ties", EXACT, partial(build, lengths=lengths, k=k, columns=256, ties=True))
        # More than one row to a program.
        lengths = [16384 - 5 * t % 16000 for t in range(3000)]
        for top in (k, 2 * k):
            yield Case(f"3000-rows-{top}", EXACT, partial(build, lengths=lengths, k=top, columns=256))
            odd = partial(build, lengths=lengths, k=top, columns=256, odd=True)
            yield Case(f"3000-rows-odd-values-{top}", EXACT, odd)
