"""The model's calls of `topk_slots`, and what the tools know of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...spec import C4_PAGE, Calls, Inputs, Spec, nbytes
from ...tuned import Shape
from ..indexer_logits.spec import page_table
from . import streamed
from .triton import TUNED, WARPS, Config


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    table = page_table(make, rows, context)
    logits = make.normal(rows, table["page_table"].shape[1] * C4_PAGE)
    for k in (512, 1024):
        yield f"k{k}", {"logits": logits, **table, "k": k, "page_size": C4_PAGE}


def others(shape: Shape, rows: int, h: Any) -> Iterator[Any]:
    for tile in streamed.TILES:
        for warps in streamed.WARPS:
            yield Config(tile, warps, stream=True)
    for tile, usual in WARPS.items():
        for warps in (usual, usual // 2, usual * 2):
            yield Config(tile, warps, h.warps_again or usual)
        for again in (4, 8, 16, 32):
            yield Config(tile, usual, again)


SPEC = Spec(
    calls=_calls,
    traffic=lambda a: (nbytes(a["logits"]) + a["lengths"].numel() * a["k"] * 4, 0),
    tunables={TUNED.name: others},
    exact=True,
    synchronises=True,
    prefill="SGLang's CUDA kernel",
)
