"""Scores of compressed entries for each query token."""

from __future__ import annotations

import torch

from ...formats import indexer_page
from ...registry import Op
from .._math import row_chunks

PAGES_AT_ONCE = 512
"""Pages of a row scored together: 16 MiB of fp32 keys at 64 tokens per page."""


@Op
def indexer_logits(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int = 64,
) -> torch.Tensor:
    """logit[t, s] = k_scale[s] Σ_head weights[t, head] relu(q[t, head] · k[s]), fp32 [T, M * page_size].

    q float8_e4m3fn [T, h, 128] and weights fp32 [T, h], which include q's scale; pages uint8 [P, >= 132 *
    page_size] as in `formats.indexer_page`; page_table int32 [T, M] page ids of entries 0, page_size, …;
    lengths int [T] entries of each row. At and beyond lengths the result is -inf and nothing is read,
    whatever page_table holds there.
    """
    tokens, columns = page_table.shape
    logits = q.new_full((tokens, columns * page_size), -torch.inf, dtype=torch.float32)
    token = torch.arange(page_size, device=q.device)
    step = min(columns, PAGES_AT_ONCE)
    for rows in row_chunks(tokens, step * page_size * (indexer_page.DIM + q.shape[1]) * 4):
        longest = min(int(lengths[rows].max()), columns * page_size)
        for first in range(0, -(-longest // page_size), max(1, step)):
            table = page_table[rows, first : min(first + step, -(-longest // page_size))].long()
            entry = first * page_size + torch.arange(table.shape[1] * page_size, device=q.device)
            live = entry < lengths[rows].unsqueeze(1)
            slots = (table.unsqueeze(-1) * page_size + token).flatten(1).masked_fill(~live, -1)
            distinct, index = slots.unique(return_inverse=True)
            values, scale = indexer_page.load(pages, distinct, page_size)
            dots = q[rows].float() @ values.float()[index].transpose(1, 2)
            scores = (weights[rows].float().unsqueeze(1) @ dots.relu()).squeeze(1) * scale[index]
            logits[rows, entry[0] : entry[-1] + 1] = scores.masked_fill(~live, -torch.inf)
    return logits
