"""KV pages: one 512-channel key/value vector per token, 448 channels FP8 and the last 64 (RoPE) bf16.

A page of P tokens is planar:

    byte 0                 P rows of 576 B: 448 E4M3 values, then 64 bf16 values (little endian)
    byte 576 P             P footers of 8 B: 7 E8M0 scales, one per 64 E4M3 channels, then one unused byte
    byte 584 P             padding up to a multiple of 576 B

so 149,760 B for 256 tokens, 37,440 B for 64 and 1,728 B for 2. A group's scale is the smallest power of two s
with max(1e-4, largest magnitude) / 448 <= s. The layout is that of FlashMLA's sparse decode and of SGLang's
DeepSeek-V4 pools (`mem_cache/deepseek_v4_memory_pool.py`).
"""

from __future__ import annotations

import torch

from ..limits import KV_FOOTER as FOOTER
from ..limits import KV_ROW as ROW
from ..limits import page_bytes as page_bytes
from . import e8m0
from ._pool import kept, planar, split

DIM = 512
NOPE = 448
ROPE = 64
GROUP = 64
TOKEN = ROW + FOOTER
FP8_MAX = 448.0
MIN_AMAX = 1e-4


def quantise(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 [..., 512] to (nope float8_e4m3fn [..., 448], scale float8_e8m0fnu [..., 7], rope bf16 [..., 64]).

    Values must be finite.
    """
    if k.shape[-1] != DIM:
        raise ValueError(f"KV vectors have {k.shape[-1]} channels and need {DIM}.")
    k = k.float()
    groups = k[..., :NOPE].unflatten(-1, (-1, GROUP))
    scale = e8m0.from_amax(groups.abs().amax(-1).clamp(min=MIN_AMAX), FP8_MAX)
    nope = (groups / e8m0.to_float(scale).unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return nope.flatten(-2).to(torch.float8_e4m3fn), scale, k[..., NOPE:].bfloat16()


def dequantise(nope: torch.Tensor, scale: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """(float8_e4m3fn [..., 448], float8_e8m0fnu|uint8 [..., 7], bf16 [..., 64]) to bf16 [..., 512].

    E4M3 has 4 significant bits and the scale is a power of two, so bf16 holds every product exactly.
    """
    groups = nope.float().unflatten(-1, (-1, GROUP)) * e8m0.to_float(scale).unsqueeze(-1)
    return torch.cat((groups.flatten(-2).bfloat16(), rope), dim=-1)


def store(pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, page_size: int) -> None:
    """Quantise k fp32 [N, 512] and write it to slots int [N] of the pool uint8 [pages, >= 584 * page_size].

    Slot -1 is skipped. The unused footer byte and the padding are left alone.
    """
    slots, k = kept(slots, k)
    nope, scale, rope = quantise(k)
    page, row = split(slots, page_size)
    data = torch.cat((nope.view(torch.uint8), rope.view(torch.uint8)), dim=-1)
    planar(pages, page_size, 0, ROW)[page, row] = data
    planar(pages, page_size, ROW * page_size, FOOTER)[page, row, : NOPE // GROUP] = e8m0.scale_bytes(scale)


def load(pages: torch.Tensor, slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """The vectors at slots int [...] as bf16 [..., 512]; slot -1 gives zeros."""
    page, row = split(slots, page_size)
    data = planar(pages, page_size, 0, ROW)[page, row]
    scale = planar(pages, page_size, ROW * page_size, FOOTER)[page, row, : NOPE // GROUP]
    nope = data[..., :NOPE].view(torch.float8_e4m3fn)
    k = dequantise(nope, scale.contiguous(), data[..., NOPE:].contiguous().view(torch.bfloat16))
    return k.masked_fill(slots.unsqueeze(-1) < 0, 0)
