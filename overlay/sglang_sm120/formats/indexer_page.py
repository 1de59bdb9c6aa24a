"""Indexer pages: one 128-channel FP8 key per token with one fp32 scale.

A page of P tokens is planar: P rows of 128 E4M3 values, then P fp32 scales (little endian): 8,448 B for 64
tokens. The scale is max(1e-4, largest magnitude) / 448, not rounded to a power of two. The layout is that of
DeepGEMM's paged MQA logits and of SGLang's indexer pool (`mem_cache/deepseek_v4_memory_pool.py`).
"""

from __future__ import annotations

import torch

from ._pool import kept, planar, split

DIM = 128
SCALE = 4
FP8_MAX = 448.0
MIN_AMAX = 1e-4


def page_bytes(page_size: int) -> int:
    """Bytes of one page of `page_size` tokens."""
    return page_size * (DIM + SCALE)


def quantise(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [..., 128] to (float8_e4m3fn [..., 128], scale fp32 [...])."""
    if k.shape[-1] != DIM:
        raise ValueError(f"indexer vectors have {k.shape[-1]} channels and need {DIM}.")
    k = k.float()
    scale = k.abs().amax(-1).clamp(min=MIN_AMAX) / FP8_MAX
    # Times the reciprocal, not divided by the scale: the CUDA writer does so and the two round differently.
    values = (k * scale.reciprocal().unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return values.to(torch.float8_e4m3fn), scale


def dequantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(float8_e4m3fn [..., 128], fp32 [...]) to fp32 [..., 128]."""
    return values.float() * scale.unsqueeze(-1)


def store(pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, page_size: int) -> None:
    """Quantise k fp32 [N, 128] and write it to slots int [N] of the pool uint8 [pages, >= 132 * page_size].

    Slot -1 is skipped.
    """
    slots, k = kept(slots, k)
    values, scale = quantise(k)
    page, row = split(slots, page_size)
    planar(pages, page_size, 0, DIM)[page, row] = values.view(torch.uint8)
    planar(pages, page_size, DIM * page_size, SCALE)[page, row] = scale.unsqueeze(-1).view(torch.uint8)


def load(pages: torch.Tensor, slots: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys at slots int [...] as (float8_e4m3fn [..., 128], scale fp32 [...]); slot -1 gives zeros."""
    page, row = split(slots, page_size)
    absent = slots.unsqueeze(-1) < 0
    values = planar(pages, page_size, 0, DIM)[page, row].masked_fill(absent, 0)
    scale = planar(pages, page_size, DIM * page_size, SCALE)[page, row].masked_fill(absent, 0)
    return values.view(torch.float8_e4m3fn), scale.view(torch.float32).squeeze(-1)
