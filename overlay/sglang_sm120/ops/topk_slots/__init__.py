"""The highest-scoring entries of each row, as cache slots."""

from __future__ import annotations

import torch

from ...registry import Op

__all__ = ["topk_slots"]


@Op
def topk_slots(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    k: int,
    page_size: int = 64,
    out: torch.Tensor | None = None,
    raw_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slots int32 [T, k] of the k largest of logits fp32 [T, S] among the first lengths int [T], ascending by
    entry.

    A row with lengths <= k gets entries 0 … lengths - 1; missing slots are -1. Ties go to the lower entry;
    NaN ranks lowest. Entry i is slot page_table[t, i // page_size] * page_size + i % page_size, page_table
    int32 [T, M].

    out and raw_out int32 [T, >= k], if given, receive the slots and the entries themselves, -1 beyond k; out
    is then the result.
    """
    index = _topk(logits, lengths, k)
    column = (index // page_size).clamp(min=0)
    page = page_table.long().gather(1, column) if page_table.shape[1] else column
    slots = torch.where(index < 0, -1, page * page_size + index % page_size)
    if raw_out is not None:
        _fill(raw_out, index)
    if out is None:
        return slots.to(torch.int32)
    return _fill(out, slots)


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


def _fill(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    k = values.shape[1]
    if out.dtype != torch.int32 or out.shape[0] != values.shape[0] or out.shape[1] < k:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} and needs torch.int32 [{values.shape[0]}, {k}] or wider."
        )
    out[:, :k] = values
    out[:, k:] = -1
    return out
