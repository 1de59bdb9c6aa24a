"""The overlay's inline PTX on a GPU, against a table of values and torch; in `tests/ops` the same is computed."""

from __future__ import annotations

import torch
from ptx_kernels import BLOCK, arithmetic, nibbles, split

from sglang_sm120.ops.mxfp4_moe import LARGEST_SCALE_BYTE

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
WORDS = 1 << 16


def test_every_nibble_at_every_scale(seed: int) -> None:
    in_order = torch.arange(WORDS, device="cuda")
    # In order, every word lies beside its successor in a register; mixed, beside any other.
    mixed = torch.randperm(WORDS, generator=torch.Generator().manual_seed(seed)).cuda()
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64, device="cuda")
    out = torch.empty(4, WORDS, dtype=torch.bfloat16, device="cuda")
    for words in (in_order, mixed):
        packed = words.to(torch.int16)
        weights = torch.stack([table[words >> 4 * nibble & 15] for nibble in range(4)])
        for byte in range(LARGEST_SCALE_BYTE + 1):
            scale = torch.tensor([((byte + 63) << 7) * 0x10001], device="cuda").to(torch.int32)
            nibbles[(WORDS // BLOCK,)](packed, scale, out, COUNT=WORDS, BLOCK=BLOCK)
            expected = (weights * 2.0 ** (byte - 127 - 63)).to(torch.bfloat16)
            assert torch.equal(out.view(torch.int16), expected.view(torch.int16)), f"scale byte {byte}"


def test_every_fp32_is_rounded_to_one_bf16_and_is_two(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    upper = torch.arange(WORDS)
    # Not the largest binade, where rounding up overflows.
    upper = upper[(upper >> 7 & 0xFF) < 0xFE]
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, *torch.randint(0, WORDS, (10,), generator=random)])
    bits = (upper[None, :] << 16 | lower[:, None]).flatten()
    x = bits[torch.randperm(len(bits), generator=random)].to(torch.int32).view(torch.float32).cuda()
    high, low = (torch.empty(len(x), dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rounded = torch.empty_like(x)
    assert len(x) % BLOCK == 0
    split[(len(x) // BLOCK,)](x, high, low, rounded, BLOCK=BLOCK)
    expected = x.bfloat16()
    assert torch.equal(high, expected) and torch.equal(rounded, expected.float())
    assert torch.equal(low, (x - expected.float()).bfloat16())


def test_sums_and_reciprocals(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    count = 1 << 23

    def integers() -> torch.Tensor:
        """fp32 integers below 2^24, whose products and their sums fp64 holds exactly."""
        return torch.randint(1, 1 << 24, (count,), generator=random).float().cuda()

    # Every mantissa, in a binade of its own.
    a = torch.arange(1 << 23, 1 << 24).float().cuda() * 2.0 ** torch.randint(-20, 1, (count,), generator=random).cuda()
    b, c = integers(), -integers() * 2.0 ** torch.randint(0, 24, (count,), generator=random).cuda()
    stream = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    total, inverse = torch.empty_like(a), torch.empty_like(a)
    arithmetic[(count // BLOCK,)](a, b, c, stream, total, inverse, BLOCK=BLOCK)
    assert torch.equal(stream, (a * b + c).bfloat16())
    whole = a.floor()
    arithmetic[(count // BLOCK,)](whole, b, c, stream, total, torch.empty_like(a), BLOCK=BLOCK)
    assert torch.equal(total, (whole.double() * b.double() + c.double()).float())
    exact = 1 / a.double()
    # `rcp.approx.ftz.f32` is good to one unit in the last place.
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    assert ((inverse.double() - exact).abs() <= unit).all()
