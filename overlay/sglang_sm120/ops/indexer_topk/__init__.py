"""Score and select in one op, without keeping the scores of all rows."""

from __future__ import annotations

import torch

from ...registry import Arguments, Op
from .._math import row_chunks
from ..indexer_logits import indexer_logits
from ..topk_slots import out_refusal, topk_slots


@Op
def indexer_topk(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    page_size: int = 64,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`topk_slots` of `indexer_logits`, row chunk by row chunk: slots int32 [T, k].

    Arguments as in the two ops. Working memory is about 16 MiB, or one row's scores if those are larger.
    """
    rows = q.shape[0]
    if out is None:
        out = torch.full((rows, k), -1, dtype=torch.int32, device=q.device)
    # 16 bytes per entry: the score, its masked copy and the two index sums that selection makes of it.
    for chunk in row_chunks(rows, page_table.shape[1] * page_size * 16):
        table, length = page_table[chunk], lengths[chunk]
        logits = indexer_logits.reference(q[chunk], weights[chunk], pages, table, length, page_size)
        topk_slots.reference(logits, length, table, k, page_size, out=out[chunk])
    return out


@indexer_topk.checked
def _check(a: Arguments) -> str | None:
    return out_refusal(a.out, a.q.shape[0], a.k)
