"""Addressing shared by the page formats.

A pool is a uint8 tensor [pages, bytes per page] whose page stride is `pages.stride(0)`: it may be a slice of
a wider allocation. A slot is a flat token index: page = slot // page_size, row = slot % page_size; slot -1 is
no token. Addresses are int64.
"""

from __future__ import annotations

import torch


def planar(pages: torch.Tensor, page_size: int, start: int, width: int) -> torch.Tensor:
    """View [pages, page_size, width] of `width` bytes per token, lying `start` bytes into each page."""
    if pages.dtype != torch.uint8:
        raise TypeError(f"page pool has dtype {pages.dtype} and needs uint8.")
    if pages.stride(-1) != 1 or pages.dim() != 2:
        raise ValueError(
            f"page pool has shape {list(pages.shape)} and strides {list(pages.stride())} "
            "and needs two dimensions with bytes adjacent inside a page."
        )
    if pages.shape[1] < start + page_size * width:
        raise ValueError(
            f"page pool has {pages.shape[1]} bytes per page and needs at least {start + page_size * width} "
            f"for {page_size} tokens."
        )
    shape, strides = (pages.shape[0], page_size, width), (pages.stride(0), width, 1)
    return pages.as_strided(shape, strides, pages.storage_offset() + start)


def split(slots: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots to (page, row), int64; slot -1 becomes (0, 0), so mask it."""
    slots = slots.long().clamp(min=0)
    return slots // page_size, slots % page_size


def kept(slots: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The (slots, values) rows whose slot is not -1."""
    if slots.shape != values.shape[:1]:
        raise ValueError(f"{values.shape[0]} rows came with slots {list(slots.shape)}; pass one slot per row.")
    keep = slots >= 0
    return slots[keep], values[keep]
