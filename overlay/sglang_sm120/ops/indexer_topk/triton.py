"""Score and select block of rows by block of rows, through scores that never exceed 32 MiB.

A block has as many rows as fit at the page table's width (32 rows at a context of 1,048,576 tokens); both kernels stop
at each row's length, and rows of at most k entries are not scored at all. The number of launches follows from shapes.
"""

from __future__ import annotations

import torch

from ... import kernels, tuned
from ..indexer_logits.triton import refusal as scoring_refusal
from ..indexer_logits.triton import score
from ..topk_slots.triton import choose, output
from ..topk_slots.triton import refusal as selection_refusal
from . import indexer_topk

LOGITS_BYTES = 32 << 20


def _accepts(
    q: torch.Tensor, weights: torch.Tensor, pages: torch.Tensor, page_table: torch.Tensor, k: int, page_size: int = 64
) -> str | None:
    reason = scoring_refusal(q, weights, pages, page_table, page_size)
    return reason or selection_refusal(page_table.shape[1] * page_size, k)


@indexer_topk.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def indexer_topk_triton(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    page_size: int = 64,
    out: torch.Tensor | None = None,
    raw_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contract in `indexer_topk`."""
    rows, width = q.shape[0], page_table.shape[1] * page_size
    out = output(out, raw_out, rows, k, q.device)
    # By the power of two that a width belongs to, for which the selection's kernels are compiled.
    step = max(1, min(rows, LOGITS_BYTES // (4 * tuned.bucket(width))))
    (logits,) = kernels.scratch("indexer_topk", q.device, ((step, width), torch.float32))
    for first in range(0, max(1, rows), step):
        part = slice(first, min(first + step, rows))
        table, length, scores = page_table[part], lengths[part], logits[: part.stop - first]
        score(q[part], weights[part], pages, table, length, page_size, scores, least=k)
        choose(scores, length, table, k, page_size, out[part], None if raw_out is None else raw_out[part])
    return out
