"""Other implementations of `sparse_mla`."""

from __future__ import annotations

import torch

from baselines import BF16_STEPS, Arguments, Baseline, Run
from sglang_sm120.formats import kv_page

FLASH_MLA_HEADS = 64


def _without_turn(a: Arguments) -> Arguments:
    return {**a, "freqs_cis": None, "positions": None}


def _flash_mla(a: Arguments) -> Run:
    """FlashMLA's sparse decode of both caches, with the sink; heads padded to 64 as SGLang pads them."""
    from sglang.kernels.ops.attention.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata

    q = a["q"]
    rows, heads, dim = q.shape
    padded = torch.zeros(rows, 1, FLASH_MLA_HEADS, dim, dtype=q.dtype, device=q.device)
    sink = torch.nn.functional.pad(a["sink"], (0, FLASH_MLA_HEADS - heads))
    extra: tuple[torch.Tensor | None, ...] = (None, None, None)
    if a["extra_pages"] is not None:
        extra = _of_flash_mla(a, "extra")
    cache, slots, lengths = _of_flash_mla(a, "window")
    # The first call plans into it, the others take it from there, as the layers of a step do.
    plan, _ = get_mla_metadata()

    def run() -> torch.Tensor:
        padded[:, 0, :heads] = q
        out, _ = flash_mla_with_kvcache(
            q=padded, k_cache=cache, block_table=None, cache_seqlens=None, head_dim_v=dim, tile_scheduler_metadata=plan,
            softmax_scale=a["scale"], is_fp8_kvcache=True, indices=slots, topk_length=lengths, attn_sink=sink,
            extra_k_cache=extra[0], extra_indices_in_kvcache=extra[1], extra_topk_length=extra[2],
        )  # fmt: skip
        return out[:, 0, :heads]

    return run


def _of_flash_mla(a: Arguments, which: str) -> tuple[torch.Tensor, ...]:
    """A cache as [pages, size, 1, 584] over its strided pages, slots [T, 1, multiple of 64] and lengths."""
    pages, slots, size = a[f"{which}_pages"], a[f"{which}_slots"], a[f"{which}_page_size"]
    entry = kv_page.ROW + kv_page.FOOTER
    cache = pages.as_strided((pages.shape[0], size, 1, entry), (pages.stride(0), entry, entry, 1))
    slots = torch.nn.functional.pad(slots, (0, -slots.shape[1] % 64), value=-1).unsqueeze(1)
    return cache, slots, a[f"{which}_lengths"].int()


OTHERS = [
    Baseline("flash_mla", "FlashMLA's sparse decode: no inverse RoPE, 64 heads", _flash_mla, BF16_STEPS,
             ("flash_mla", "sglang"), computes=_without_turn),
]  # fmt: skip
