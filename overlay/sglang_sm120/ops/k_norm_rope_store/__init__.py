"""Normalise, rotate and store the window's key/value vectors."""

from __future__ import annotations

import torch

from ...formats import kv_page
from ...registry import Op
from .._math import rms_norm, rotate_tail


@Op
def k_norm_rope_store(
    kv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    pages: torch.Tensor,
    page_size: int,
) -> None:
    """RMS norm of kv bf16 [T, 512] with weight [512], RoPE on its last 64 channels, written to KV pages.

    fp32 up to the page's own rounding (`formats.kv_page`). freqs_cis complex64 [S, 32], positions int [T],
    slots int [T] with -1 = do not store, pages uint8 [P, >= 584 * page_size].
    """
    kv_page.store(pages, slots, rotate_tail(rms_norm(kv, weight, eps), freqs_cis, positions), page_size)
