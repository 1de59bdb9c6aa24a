"""KV vectors of listed slots, dequantised."""

from __future__ import annotations

import torch

from ...formats import kv_page
from ...registry import Op

__all__ = ["gather_dequant_kv"]


@Op
def gather_dequant_kv(pages: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """bf16 [T, W, 512] of the KV pages at slots int32 [T, W]; zeros for slot -1 and at or beyond lengths int
    [T].

    pages uint8 [P, >= 584 * page_size] as in `formats.kv_page`, any page stride. What slots hold beyond
    lengths does not matter.
    """
    inside = torch.arange(slots.shape[1], device=slots.device) < lengths.unsqueeze(1)
    return kv_page.load(pages, slots.masked_fill(~inside, -1), page_size)
