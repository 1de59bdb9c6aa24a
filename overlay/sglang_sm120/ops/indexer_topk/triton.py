"""Score and select block of rows by block of rows, through scores of about 32 MiB at most.

A block has as many rows as fit at the page table's width (32 rows at a context of 1,048,576 tokens); both kernels stop
at each row's length, and rows of at most k entries are not scored at all. The number of launches follows from shapes.
"""

from __future__ import annotations

import torch

from ... import kernels, tuned
from ...registry import Arguments
from ..indexer_logits.triton import refusal as scoring_refusal
from ..indexer_logits.triton import score
from ..topk_slots.triton import choose, output
from ..topk_slots.triton import refusal as selection_refusal
from . import indexer_topk

LOGITS_BYTES = 32 << 20
PAGES_BEYOND = 4
"""For drafts, in SGLang's page tables, behind those of the longest request, mostly a power of two: a block keeps its
rows for one or two of them."""


def _accepts(a: Arguments) -> str | None:
    return scoring_refusal(a) or selection_refusal(a.page_table.shape[1] * a.page_size, a.k)


@indexer_topk.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def indexer_topk_triton(a: Arguments) -> torch.Tensor:
    """Contract in `indexer_topk`."""
    rows, width = a.q.shape[0], a.page_table.shape[1] * a.page_size
    out = output(a, rows, a.q.device)
    # By powers of two of rows and of entries, for which the selection's kernels are compiled.
    beyond = PAGES_BEYOND * a.page_size
    entries = tuned.bucket(max(1, width - beyond))
    step = max(1, min(rows, LOGITS_BYTES // (4 * entries)))
    (room,) = kernels.scratch("indexer_topk", a.q.device, ((step * (entries + beyond),), torch.float32))
    logits = room[: step * width].view(step, width)
    for first in range(0, max(1, rows), step):
        part = slice(first, min(first + step, rows))
        scores = logits[: part.stop - first]
        score(a, part, scores, least=a.k)
        choose(a, part, scores, out[part])
    return out
