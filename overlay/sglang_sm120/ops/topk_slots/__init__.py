"""The highest-scoring entries of each row, as cache slots."""

from __future__ import annotations

import torch

from ...registry import Arguments, Op


@Op
def topk_slots(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    k: int,
    page_size: int = 64,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slots int32 [T, k] of the k largest of logits fp32 [T, S] among the first lengths int [T], ascending by
    entry.

    A row with lengths <= k gets entries 0 … lengths - 1; missing slots are -1. Ties go to the lower entry;
    NaN ranks lowest. Entry i is slot page_table[t, i // page_size] * page_size + i % page_size, page_table
    int32 [T, M].

    out int32 [T, >= k], if given, receives the slots, -1 beyond k, and is the result.
    """
    index = _topk(logits, lengths, k)
    column = (index // page_size).clamp(min=0)
    page = page_table.long().gather(1, column) if page_table.shape[1] else column
    slots = torch.where(index < 0, -1, page * page_size + index % page_size)
    if out is None:
        return slots.to(torch.int32)
    out[:, :k] = slots
    out[:, k:] = -1
    return out


def out_refusal(out: torch.Tensor | None, rows: int, k: int) -> str | None:
    """Why the caller's tensor cannot take the slots, or None."""
    if out is None or (out.dtype == torch.int32 and out.shape[0] == rows and out.shape[1] >= k and out.stride(1) == 1):
        return None
    return f"out is {out.dtype} {list(out.shape)} and needs torch.int32 [{rows}, {k}] or wider, with adjacent columns."


@topk_slots.checked
def _check(a: Arguments) -> str | None:
    return out_refusal(a.out, a.logits.shape[0], a.k)


def _topk(logits: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
    """Chosen entries int64 [T, k], ascending, -1 at the end."""
    rows, width = logits.shape
    index = torch.full((rows, k), -1, dtype=torch.int64, device=logits.device)
    if rows == 0 or width == 0 or k == 0:
        return index
    inside = torch.arange(width, device=logits.device) < lengths.unsqueeze(1)
    scores = logits.masked_fill(~inside | logits.isnan(), -torch.inf)
    threshold = scores.topk(min(k, width), dim=1).values[:, -1:]
    above, equal = scores > threshold, scores == threshold
    chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    chosen = torch.where(lengths.unsqueeze(1) <= k, inside, chosen)
    row, entry = chosen.nonzero(as_tuple=True)
    index[row, chosen.cumsum(1)[row, entry] - 1] = entry
    return index
