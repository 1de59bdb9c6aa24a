"""Examples worked on paper: the second, independent point that formats and Sinkhorn rest on."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from sglang_sm120 import ops
from sglang_sm120.formats import e8m0, fp8_block, indexer_page, kv_page, mxfp4
from sglang_sm120.ops import _math
from sglang_sm120.ops.clear_draft_states import Layers


def test_sinkhorn_two_iterations() -> None:
    # exp(C) has rows (1 1 1 1) and, second, (3 1 1 1). Row softmax: 1/4 …; 1/2 1/6 1/6 1/6.
    # Columns sum to 5/4 and 11/12:  1/5 3/11 …; 2/5 2/11 …
    # Rows sum to 56/55 and 52/55:   11/56 15/56 …; 11/26 5/26 …
    # Columns: 737/728 and 725/728:  13/67 39/145 …; 28/67 28/145 …
    scale = torch.tensor([2.0, 3.0, 5.0])
    mixes = torch.ones(1, 24)
    comb_base = torch.tensor([[1.0, 1, 1, 1], [3, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).log().flatten() - 5
    three = torch.tensor(3.0).log()
    base = torch.cat((torch.tensor([-2.0, -2, -2, -2]), (three - 3).expand(4), comb_base))
    pre, post, comb = _math.sinkhorn(mixes, scale, base, 2, 0.0)

    torch.testing.assert_close(pre, torch.full((1, 4), 0.5))
    torch.testing.assert_close(post, torch.full((1, 4), 1.5))
    ordinary = [Fraction(13, 67)] + 3 * [Fraction(39, 145)]
    second = [Fraction(28, 67)] + 3 * [Fraction(28, 145)]
    expected = torch.tensor([[[float(v) for v in row] for row in (ordinary, second, ordinary, ordinary)]])
    torch.testing.assert_close(comb, expected)


def test_sinkhorn_eps_enters_where_the_model_says() -> None:
    # All entries equal: softmax 1/4, + 1 = 5/4; columns / (5 + 1) = 5/24; rows / (5/6 + 1) = 5/44;
    # columns / (5/11 + 1) = 5/64. pre = 1/2 + 1, post = 1 without it.
    pre, post, comb = _math.sinkhorn(torch.zeros(1, 24), torch.ones(3), torch.zeros(24), 2, 1.0)
    torch.testing.assert_close(pre, torch.full((1, 4), 1.5))
    torch.testing.assert_close(post, torch.full((1, 4), 1.0))
    torch.testing.assert_close(comb, torch.full((1, 4, 4), 5 / 64))


def test_mxfp4_block() -> None:
    # Largest 12: 12 / 6 = 2, so the scale byte is 128. Divided by 2 the values are 6 -3 2 -1 .5 .25 .75 4;
    # .25 and .75 lie between two codes and go to the even one: 0 and 1.
    w = torch.zeros(32)
    w[:8] = torch.tensor([12.0, -6, 4, -2, 1, 0.5, 1.5, 8])
    packed, scale = mxfp4.quantise(w)
    assert packed.tolist() == [0xD7, 0xA4, 0x01, 0x62] + 12 * [0]
    assert e8m0.scale_bytes(scale).tolist() == [128]
    back = mxfp4.dequantise(packed, scale)
    assert back[:8].tolist() == [12, -6, 4, -2, 1, 0, 2, 8]


def test_mxfp4_moe_reads_up_first_and_swizzled_scales() -> None:
    # One expert of 128 channels inside and out. A scale byte of row r and block c lies at
    # (r // 128) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c; the others are 255 and would count as 0.
    w13, w2 = torch.zeros(1, 256, 64, dtype=torch.uint8), torch.zeros(1, 128, 64, dtype=torch.uint8)
    s13, s2 = torch.full((1, 256, 4), 255, dtype=torch.uint8), torch.full((1, 128, 4), 255, dtype=torch.uint8)
    # Up, row 37 = 1 * 32 + 5, channel 67 (block 2): 1.5 * 2^2 = 6.
    w13[0, 37, 33] = 0x30
    s13.view(-1)[5 * 16 + 1 * 4 + 2] = 129
    # Gate, row 128 + 37, channel 0 (block 0): 2 * 2^0 = 2.
    w13[0, 165, 0] = 0x04
    s13.view(-1)[512 + 5 * 16 + 1 * 4] = 127
    # Down, output 100 = 3 * 32 + 4, channel 37 (block 1): 4 * 2^-1 = 2.
    w2[0, 100, 18] = 0x60
    s2.view(-1)[4 * 16 + 3 * 4 + 1] = 126
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 67], x[0, 0] = 3, 8
    expected = torch.zeros(1, 128)
    # Up 18, gate 16: silu(16) = 16 - 2e-6, times 18 = 288, times 2 and the routed weight 1/4.
    expected[0, 100] = 144
    for provider in ops.mxfp4_moe.providers:
        y = ops.mxfp4_moe.by(provider, x, torch.tensor([[0, -1]]), torch.tensor([[0.25, 9.0]]), w13, s13, w2, s2, None)
        torch.testing.assert_close(y.float(), expected, msg=provider)


def test_nvfp4_moe_reads_up_first_and_factors_of_gates_first() -> None:
    # As above, with a scale for 16 channels: eight columns of scales, in tiles of 512 bytes. The others are NaN.
    w13, w2 = torch.zeros(1, 256, 64, dtype=torch.uint8), torch.zeros(1, 128, 64, dtype=torch.uint8)
    s13, s2 = torch.full((1, 256, 8), 0x7F, dtype=torch.uint8), torch.full((1, 128, 8), 0xFF, dtype=torch.uint8)
    # Up, row 37 = 1 * 32 + 5, channel 83 (block 5): 1.5, scale 0x4C = 2^2 * 1.5, factor 1/2: 4.5.
    w13[0, 37, 41] = 0x30
    s13.view(-1)[512 + 5 * 16 + 1 * 4 + 1] = 0x4C
    # Gate, row 128 + 37, channel 0 (block 0): 2, scale 0x01 = 2^-9, factor 2^9: 2.
    w13[0, 165, 0] = 0x04
    s13.view(-1)[1024 + 5 * 16 + 1 * 4] = 0x01
    # Down, output 100 = 3 * 32 + 4, channel 37 (block 2): 4, scale 0x38 = 1, factor 1/4: 1.
    w2[0, 100, 18] = 0x60
    s2.view(-1)[4 * 16 + 3 * 4 + 2] = 0x38
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 83], x[0, 0] = 4, 8
    expected = torch.zeros(1, 128)
    # Up 18, gate 16: silu(16) = 16 - 2e-6, times 18 = 288, times 1 and the routed weight 1/4.
    expected[0, 100] = 72
    scales = [s.view(torch.float8_e4m3fn) for s in (s13, s2)]
    factors = torch.tensor([[512, 0.5]]), torch.tensor([0.25])
    layer = [part for matrix in zip((w13, w2), scales, factors, strict=True) for part in matrix]
    for provider in ops.nvfp4_moe.providers:
        y = ops.nvfp4_moe.by(provider, x, torch.tensor([[0, -1]]), torch.tensor([[0.25, 9.0]]), *layer, None)
        torch.testing.assert_close(y.float(), expected, msg=provider)


def test_fp8_block() -> None:
    # Block (0, 0) has 896: scale 2; block (0, 1) has 7: 7 / 448 = 2^-6.
    w = torch.zeros(2, 130)
    w[0, 0], w[1, 1], w[1, 129] = 896, -2, 7
    values, scale = fp8_block.quantise(w)
    assert e8m0.scale_bytes(scale).tolist() == [[128, 121]]
    data = values.view(torch.uint8)
    assert (data[0, 0], data[1, 1], data[1, 129]) == (0x7E, 0xB8, 0x7E)
    assert torch.equal(fp8_block.dequantise(values, scale), w)


def test_kv_page_record() -> None:
    k = torch.zeros(1, 512)
    k[0, 0], k[0, 1], k[0, 2] = 448, -1, 0.0625  # group 0: scale 1
    k[0, 64], k[0, 65] = 3.5, 1 / 64  # group 1: 3.5 / 448 = 2^-7
    k[0, 192] = 449  # group 3: just above 448, scale 2; 224.5 rounds to 224
    k[0, 448], k[0, 511] = 1, -2.5  # bf16 3F80, C020
    pages = torch.full((2, kv_page.page_bytes(2)), 0xAA, dtype=torch.uint8)
    kv_page.store(pages, torch.tensor([3]), k, 2)

    expected = [0xAA] * 1728
    expected[576:1152] = [0] * 576
    expected[576:579] = [0x7E, 0xB8, 0x18]
    expected[640:642] = [0x7E, 0x40]
    expected[768] = 0x76
    expected[1024:1026] = [0x80, 0x3F]
    expected[1150:1152] = [0x20, 0xC0]
    # 1e-4 / 448 lies between 2^-23 and 2^-22: the empty groups have byte 105. The eighth byte is unused.
    expected[1160:1167] = [127, 120, 105, 128, 105, 105, 105]
    assert pages[1].tolist() == expected
    assert set(pages[0].tolist()) == {0xAA}

    back = kv_page.load(pages, torch.tensor([3, -1]), 2)
    k[0, 192] = 448
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.float(), torch.cat((k, torch.zeros(1, 512))))


def test_indexer_page_record() -> None:
    k = torch.zeros(1, 128)
    k[0, 0], k[0, 127] = 896, -2  # scale 2.0 = 00 00 00 40; 448 and -1
    pages = torch.full((1, indexer_page.page_bytes(64)), 0xAA, dtype=torch.uint8)
    indexer_page.store(pages, torch.tensor([5]), k, 64)
    expected = [0xAA] * 8448
    expected[640:768] = [0x7E] + 126 * [0] + [0xB8]
    expected[8192 + 20 : 8192 + 24] = [0x00, 0x00, 0x00, 0x40]
    assert pages[0].tolist() == expected


@pytest.mark.parametrize(("page_size", "size"), [(256, 149_760), (64, 37_440), (2, 1_728)])
def test_kv_page_bytes(page_size: int, size: int) -> None:
    assert kv_page.page_bytes(page_size) == size


def test_refused_drafts_leave_their_slots() -> None:
    # Rings of 4 slots, verifications of 3 tokens. Request 0 has ring 2, slots 8 to 11: its tokens lie in 11, 8 and 9,
    # of which the first stays. Request 1 has ring 0: of 1, 2 and 3 the last goes. Request 2 keeps all.
    states = [torch.arange(48.0).view(12, 4) + layer for layer in (0, 100)]
    lengths, accepted = torch.tensor([7, 5, 2]), torch.tensor([1, 2, 3])
    for provider in ops.clear_draft_states.providers:
        found = [layer.clone() for layer in states]
        rings = torch.tensor([2, 0, 1])
        ops.clear_draft_states.by(provider, Layers.of(found), rings, lengths, accepted, 4, 3)
        for before, after in zip(states, found, strict=True):
            expected = before.clone()
            expected[[8, 9, 3]] = torch.tensor([0, 0, -torch.inf, -torch.inf])
            assert torch.equal(after, expected)
