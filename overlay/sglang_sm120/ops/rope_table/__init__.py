"""RoPE rotation table with YaRN frequency scaling."""

from __future__ import annotations

import functools
import math

import torch


def rope_table(
    dim: int, seqlen: int, original_seq_len: int, base: float, factor: float, beta_fast: float, beta_slow: float
) -> torch.Tensor:
    """`table[p, i] = exp(j · p · f_i)` with `f_i = base^(-2i/dim)`, YaRN-scaled when `original_seq_len > 0`.

    YaRN divides a frequency by `factor` where its wave turns fewer than `beta_slow` times within
    `original_seq_len` positions, leaves it where it turns more than `beta_fast` times, and ramps in between.

    Args:
        dim: rotated channels (two per frequency).
        seqlen: positions.
        original_seq_len: positions the model was trained on before extension, 0 for plain RoPE.
        base: RoPE theta.
        factor: YaRN context extension factor.
        beta_fast, beta_slow: turns at the two ends of the ramp.

    Returns:
        complex64 [seqlen, dim/2] on torch's default device, shared between equal calls: every layer of one kind
        holds the same table.

    Source: YaRN (Peng et al., 2023), section 3; SGLang `srt/layers/deepseek_v4_rope.py`, whose values this equals bit
    for bit (tested), computed without TileLang.
    """
    arguments = (dim, seqlen, original_seq_len, base, factor, beta_fast, beta_slow)
    return _table(*arguments, device=torch.get_default_device())


@functools.lru_cache(maxsize=2)
def _table(
    dim: int,
    seqlen: int,
    original_seq_len: int,
    base: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    device: torch.device,
) -> torch.Tensor:
    # Computed on CPU, so that every device has the same bits.
    with torch.device("cpu"):
        frequency = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if original_seq_len > 0:

            def index_of(turns: float) -> float:
                return dim * math.log(original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))

            low = max(math.floor(index_of(beta_fast)), 0)
            high = min(math.ceil(index_of(beta_slow)), dim - 1)
            width = max(high - low, 0.001)
            ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
            keep = 1 - ramp
            frequency = frequency / factor * (1 - keep) + frequency * keep
        angle = torch.outer(torch.arange(seqlen, dtype=torch.float32), frequency)
        return torch.polar(torch.ones_like(angle), angle).to(device)
