"""The model's call of `indexer_logits`, and what the tools know of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...formats import indexer_page
from ...spec import C4_PAGE, Arguments, Calls, Inputs, Spec, nbytes
from ...tuned import Shape, Table, bucket
from .triton import TUNED, Config


def pages_of(context: int) -> int:
    """Columns of SGLang's page tables, cut from those of its tokens: a page that no entry fills yet has one too."""
    return -(-context // (4 * C4_PAGE))


def page_table(make: Inputs, rows: int, context: int) -> dict[str, torch.Tensor]:
    pages, entries = pages_of(context), max(1, context // 4)
    return {
        "page_table": make.distinct(rows, pages, pages),
        "lengths": make.integers(entries, entries + 1, rows),
    }


def arguments(make: Inputs, c: dict[str, Any], rows: int, context: int) -> dict[str, Any]:
    heads = c["index_n_heads"]
    return {
        "q": make.fp8(rows, heads, c["index_head_dim"]),
        "weights": make.normal(rows, heads),
        "pages": make.indexer_pool(pages_of(context) * C4_PAGE),
        **page_table(make, rows, context),
        "page_size": C4_PAGE,
    }


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    yield "c4", arguments(make, c, rows, context)


def traffic(a: Arguments) -> tuple[int, int]:
    """Bytes and operations: the keys of all entries once."""
    entries = int(a["lengths"].sum())
    key = indexer_page.page_bytes(1)
    return entries // a["q"].shape[0] * key + nbytes(a["q"]), 2 * entries * a["q"].shape[1] * indexer_page.DIM


def others(shape: Shape, rows: int, h: Any) -> Iterator[Any]:
    # With FP8 operands by hand alone: what SM120's sums of them lose is not known.
    for block, warps in ((32, 2), (32, 4), (64, 2), (64, 4), (128, 4), (128, 8), (256, 8)):
        for programs in (2, 4, 8):
            yield Config(block, programs, warps)


def _trials(a: Arguments) -> dict[str, Table]:
    (rows, heads, _), width = a["q"].shape, a["page_table"].shape[1] * a["page_size"]
    return {"FP8 operands": {TUNED.key((bucket(width), heads), rows): Config(fp8=True)}}


SPEC = Spec(
    calls=_calls,
    traffic=traffic,
    tunables={TUNED.name: others},
    trials=_trials,
    synchronises=True,
    prefill="TileLang, all scores at once in fp32",
)
