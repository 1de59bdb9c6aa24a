"""The rotation table against SGLang's own."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_sm120.ops.rope_table import rope_table

# dim, positions, original positions, base, factor, beta_fast, beta_slow: window layers, compressed layers, no YaRN.
ARGUMENTS = [
    (64, 4096, 0, 10000.0, 16.0, 32, 1),
    (64, 4096, 65536, 160000.0, 16.0, 32, 1),
    (64, 1000, 4096, 10000.0, 4.0, 32, 1),
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_equals_sglangs_bit_for_bit(arguments: tuple) -> None:
    from sglang.kernels.ops.attention.dsv4.rope import precompute_freqs_cis

    expected = precompute_freqs_cis(*arguments)
    assert torch.equal(torch.view_as_real(rope_table(*arguments)), torch.view_as_real(expected))


def test_by_hand() -> None:
    # Two channels turn by one radian a position; plain RoPE.
    table = rope_table(2, 4, 0, 10000.0, 1.0, 32, 1)
    assert table.flatten().tolist() == pytest.approx([complex(math.cos(p), math.sin(p)) for p in range(4)])
