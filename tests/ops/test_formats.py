"""Formats: round trips, exactness of what is representable, error bounds, byte order, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_bytes import e4m3

from sglang_sm120 import ops
from sglang_sm120.formats import compress_plan, e8m0, experts, fp8_block, indexer_page, kv_page, mxfp4, nvfp4

MOST = settings(max_examples=60)
finite = st.floats(-(2.0**60), 2.0**60, width=32, allow_nan=False)
seeds = st.integers(0, 2**32 - 1)
# Exponents of a whole block, from where scales saturate at 2^-127 to where fp32 ends.
magnitudes = st.integers(-140, 120)


def normal(seed: int, *shape: int, exponent: int = 0) -> torch.Tensor:
    return torch.ldexp(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), torch.tensor(exponent))


def ceil_log2(x: float) -> int:
    mantissa, exponent = math.frexp(x)
    return exponent - (mantissa == 0.5)


@MOST
@given(st.floats(2.0**-126, 2.0**127, width=32), st.sampled_from([6.0, 448.0]))
def test_scale_is_the_smallest_sufficient_power_of_two(amax: float, largest: float) -> None:
    byte = int(e8m0.scale_bytes(e8m0.from_amax(torch.tensor([amax]), largest)))
    quotient = float(torch.tensor(amax) / largest)
    assert byte == max(0, min(254, ceil_log2(quotient) + 127))


@pytest.mark.parametrize("exponent", range(-120, 120, 7))
def test_scale_of_exact_powers_of_two_is_exact(exponent: int) -> None:
    for largest in (6.0, 448.0):
        scale = e8m0.from_amax(torch.tensor([largest * 2.0**exponent]), largest)
        assert e8m0.to_float(scale).item() == 2.0**exponent


def test_scale_bytes_are_bits_not_values() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    scale = e8m0.from_bytes(bits)
    assert torch.equal(e8m0.scale_bytes(scale), bits)
    values = e8m0.to_float(scale)
    assert values[255].isnan()
    assert values[:255].tolist() == [2.0 ** (e - 127) for e in range(255)]
    assert e8m0.from_amax(torch.zeros(1), 6.0).float().item() == 1
    with pytest.raises(TypeError, match="float8_e8m0fnu or uint8"):
        e8m0.scale_bytes(torch.ones(1))


@MOST
@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_mxfp4_pack_low_nibble_first(codes: list[int]) -> None:
    packed = mxfp4.pack(torch.tensor(codes, dtype=torch.uint8))
    assert packed.tolist() == [low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert mxfp4.unpack(packed).tolist() == codes
    assert mxfp4.unpack(packed.view(torch.int8)).tolist() == codes


@MOST
@given(st.lists(st.integers(0, 15), min_size=64, max_size=64), st.integers(3, 250), st.integers(3, 250))
def test_mxfp4_representable_values_survive(codes: list[int], first: int, second: int) -> None:
    scale = e8m0.from_bytes(torch.tensor([first, second], dtype=torch.uint8))
    w = mxfp4.dequantise(mxfp4.pack(torch.tensor(codes, dtype=torch.uint8)), scale)
    for i, code in enumerate(codes):
        assert w[i] == mxfp4.E2M1_VALUES[code] * 2.0 ** ((first, second)[i // 32] - 127)
    assert torch.equal(mxfp4.dequantise(*mxfp4.quantise(w)), w)


@MOST
@given(st.lists(finite, min_size=32, max_size=32))
def test_mxfp4_picks_the_nearest_value(values: list[float]) -> None:
    w = torch.tensor(values)
    packed, scale = mxfp4.quantise(w)
    grid = torch.tensor(mxfp4.E2M1_VALUES).double() * e8m0.to_float(scale).double()
    nearest = (w.double().unsqueeze(1) - grid).abs().amin(1)
    assert torch.equal((mxfp4.dequantise(packed, scale).double() - w).abs(), nearest)
    # No value is clipped: the scale brings the largest to 6 or less.
    assert w.abs().max() <= 6 * e8m0.to_float(scale).double()


@MOST
@given(seeds, magnitudes)
def test_mxfp4_is_idempotent(seed: int, exponent: int) -> None:
    once = mxfp4.dequantise(*mxfp4.quantise(normal(seed, 3, 64, exponent=exponent)))
    assert torch.equal(mxfp4.dequantise(*mxfp4.quantise(once)), once)


# Factors that multiply exactly: what is left to see is the format's own arithmetic.
powers = st.integers(-30, 30).map(lambda exponent: torch.tensor(2.0**exponent))


@MOST
@given(
    st.lists(st.integers(0, 15), min_size=32, max_size=32),
    st.lists(st.integers(0, 255), min_size=2, max_size=2),
    powers,
)
def test_nvfp4_bytes_mean_what_is_said(codes: list[int], scales: list[int], factor: torch.Tensor) -> None:
    packed, bits = mxfp4.pack(torch.tensor(codes, dtype=torch.uint8)), torch.tensor(scales, dtype=torch.uint8)
    w = nvfp4.dequantise(packed, bits.view(torch.float8_e4m3fn), factor).tolist()
    for i, code in enumerate(codes):
        expected = mxfp4.E2M1_VALUES[code] * e4m3(scales[i // 16]) * factor.item()
        assert w[i] == expected or math.isnan(w[i]) and math.isnan(expected)


@MOST
@given(seeds, st.integers(-100, 100))
def test_nvfp4_picks_the_nearest_value(seed: int, exponent: int) -> None:
    make = torch.Generator().manual_seed(seed)
    w = normal(seed, 4, 64, exponent=exponent)
    # Blocks of many magnitudes, down to where a scale is subnormal or 0.
    w = torch.ldexp(w, -torch.randint(0, 16, (4, 4), generator=make).repeat_interleave(16, 1))
    packed, scale, factor = nvfp4.quantise(w)
    step = (scale.double() * factor.double()).repeat_interleave(16, -1)
    grid = torch.tensor(mxfp4.E2M1_VALUES).double() * step.unsqueeze(-1)
    error = (w.double().unsqueeze(-1) - grid).abs().amin(-1)
    got = nvfp4.dequantise(packed, scale, factor).double()
    # The divisor and the result are each rounded once to fp32, which decides between neighbours that are as near.
    assert ((got - w).abs() <= error + 2.0**-21 * w.abs()).all()
    assert scale.float().max() == 448
    # What is cut off: a scale that E4M3 rounds is off by 2^-4 of itself, a subnormal one by 2^-10.
    amax = w.double().unflatten(-1, (-1, 16)).abs().amax(-1)
    lost = amax - 6 * scale.double() * factor.double()
    assert (lost <= torch.maximum(amax / 16, 6 * 2.0**-10 * factor.double()) * (1 + 1e-6)).all()


@MOST
@given(seeds, st.integers(-60, 60))
def test_nvfp4_is_idempotent_where_every_scale_is_reached(seed: int, exponent: int) -> None:
    """Of blocks that have a 6, and one that has the largest scale, each byte is found again."""
    make = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (4, 64), dtype=torch.uint8, generator=make)
    codes[:, ::16] = 7
    bits = torch.randint(1, 0x7F, (4, 4), dtype=torch.uint8, generator=make)
    bits[3, 2] = 0x7E
    given_ = mxfp4.pack(codes), bits.view(torch.float8_e4m3fn), torch.tensor(2.0**exponent)
    packed, scale, factor = nvfp4.quantise(nvfp4.dequantise(*given_))
    assert torch.equal(mxfp4.unpack(packed), codes)
    assert torch.equal(scale.view(torch.uint8), bits) and torch.equal(factor, given_[2])


def test_nvfp4_of_zeros_is_zero() -> None:
    packed, scale, factor = nvfp4.quantise(torch.zeros(2, 32))
    assert factor == 1 and not nvfp4.dequantise(packed, scale, factor).any()


@MOST
@given(seeds, magnitudes, st.integers(1, 300), st.integers(1, 300))
def test_fp8_block_error_and_idempotence(seed: int, exponent: int, n: int, k: int) -> None:
    w = normal(seed, n, k, exponent=exponent)
    values, scale = fp8_block.quantise(w)
    assert scale.shape == (-(-n // 128), -(-k // 128))
    back = fp8_block.dequantise(values, scale)
    step = e8m0.to_float(scale).double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    # Half a step: 2^-4 of the value, or of the smallest normal 2^-6 below it; fp32 itself ends at 2^-149.
    bound = torch.maximum(w.double().abs() / 16, step * 2.0**-10).clamp(min=2.0**-149)
    assert ((back.double() - w).abs() <= bound).all()
    assert torch.equal(fp8_block.dequantise(*fp8_block.quantise(back)), back)
    assert torch.equal(fp8_block.dequantise(values, e8m0.to_float(scale)), back)


def test_fp8_block_neighbours_do_not_share_a_scale() -> None:
    w = torch.ones(129, 129)
    w[128, 128] = 2.0**20
    values, scale = fp8_block.quantise(w)
    assert torch.equal(fp8_block.dequantise(values, scale), w)
    assert e8m0.to_float(scale).unique().numel() == 2


@MOST
@given(seeds, st.integers(-30, 20), st.sampled_from([2, 64, 256]), st.integers(0, 64))
def test_kv_page_round_trip(seed: int, exponent: int, page_size: int, slack: int) -> None:
    k = normal(seed, 6, 512, exponent=exponent)
    nope, scale, rope = kv_page.quantise(k)
    pages = torch.full((4, kv_page.page_bytes(page_size) + slack), 255, dtype=torch.uint8)
    pool = pages[:, : kv_page.page_bytes(page_size)]
    slots = torch.randperm(4 * page_size, generator=torch.Generator().manual_seed(seed))[:6]
    slots[2] = -1
    kv_page.store(pool, slots, k, page_size)
    loaded = kv_page.load(pool, slots.view(2, 3), page_size).view(6, 512)
    expected = kv_page.dequantise(nope, scale, rope)
    expected[2] = 0
    assert torch.equal(loaded, expected)
    # Nothing beside five rows of 576 bytes and their seven scales was written.
    assert int((pages != 255).sum()) <= 5 * (576 + 7)
    assert (pages[:, pool.shape[1] :] == 255).all()

    step = e8m0.to_float(scale).double().repeat_interleave(64, -1)
    bound = torch.maximum(k[:, :448].double().abs() / 16, step * 2.0**-10)
    error = (kv_page.dequantise(nope, scale, rope).double() - k).abs()
    assert (error[:, :448] <= bound).all()
    assert (error[:, 448:] <= k[:, 448:].double().abs() * 2.0**-8).all()
    assert ((1e-4 / 448 <= e8m0.to_float(scale)) & (nope.float().abs() <= 448).all()).all()


@MOST
@given(seeds, st.integers(-30, 20))
def test_kv_page_is_idempotent(seed: int, exponent: int) -> None:
    once = kv_page.dequantise(*kv_page.quantise(normal(seed, 2, 512, exponent=exponent)))
    assert torch.equal(kv_page.dequantise(*kv_page.quantise(once.float())), once)


@MOST
@given(seeds, st.integers(-30, 20), st.sampled_from([2, 64]))
def test_indexer_page_round_trip(seed: int, exponent: int, page_size: int) -> None:
    k = normal(seed, 6, 128, exponent=exponent)
    values, scale = indexer_page.quantise(k)
    # The floor under the scale is 1e-4 rounded to fp32.
    assert torch.equal(scale, k.abs().amax(-1).clamp(min=1e-4) / 448)
    pages = torch.full((4, indexer_page.page_bytes(page_size)), 255, dtype=torch.uint8)
    slots = torch.randperm(4 * page_size, generator=torch.Generator().manual_seed(seed))[:6]
    slots[2] = -1
    indexer_page.store(pages, slots, k, page_size)
    got, got_scale = indexer_page.load(pages, slots, page_size)
    values.view(torch.uint8)[2], scale[2] = 0, 0
    assert torch.equal(got.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(got_scale, scale)
    back = indexer_page.dequantise(got, got_scale)
    keep = torch.arange(6) != 2
    bound = torch.maximum(k.abs() / 15.9, scale.unsqueeze(-1) * 2.0**-10)
    assert ((back - k).abs() <= bound)[keep].all()


u32 = st.integers(0, 2**31 - 1)


@MOST
@given(st.lists(st.tuples(u32, st.integers(0, 65535), st.integers(0, 65535), u32, st.integers(-1, 99)), max_size=5))
def test_compress_plan_round_trip(rows: list[tuple[int, ...]]) -> None:
    fields = torch.tensor(rows, dtype=torch.int64).view(-1, 5).unbind(1)
    packed = compress_plan.CompressPlan(*fields).pack()
    assert packed.shape == (len(rows), 16)
    for got, expected in zip(compress_plan.CompressPlan.unpack(packed), fields, strict=True):
        assert torch.equal(got, expected)


def test_plan_bytes() -> None:
    one = [torch.tensor([v]) for v in (0x01020304, 0xFFFE, 0x0007, -1, 5)]
    expected = [4, 3, 2, 1, 0xFE, 0xFF, 7, 0, 255, 255, 255, 255, 5, 0, 0, 0]
    assert compress_plan.CompressPlan(*one).pack().tolist() == [expected]
    assert compress_plan.WritePlan(*one[:1], torch.tensor([258])).pack().tolist() == [[4, 3, 2, 1, 2, 1, 0, 0]]
    invalid = torch.full((1, 16), 255, dtype=torch.uint8)
    assert compress_plan.CompressPlan.unpack(invalid).seq_len.tolist() == [-1]
    with pytest.raises(ValueError, match=r"needs torch.uint8 \[N, 8\]"):
        compress_plan.WritePlan.unpack(invalid)


@MOST
@given(
    st.integers(0, 2), st.integers(1, 3), st.integers(1, 5),
    st.sampled_from([torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn]), seeds,
)  # fmt: skip
def test_swizzled_scales_lie_where_sm120_wants_them(
    experts: int, row_tiles: int, column_tiles: int, dtype: torch.dtype, seed: int
) -> None:
    rows, columns = 128 * row_tiles, 4 * column_tiles
    shape = (experts, rows, columns) if experts else (rows, columns)
    plain = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    swizzled = mxfp4.swizzle_scales(plain.view(dtype))
    assert swizzled.shape == shape and swizzled.dtype == dtype and swizzled.is_contiguous()
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place = (r // 128) * 128 * columns + (c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
    for given_, got in zip(
        plain.view(-1, rows, columns), swizzled.view(torch.uint8).view(-1, rows * columns), strict=True
    ):
        assert torch.equal(got[place], given_)
    back = mxfp4.unswizzle_scales(swizzled)
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), plain)


def _gate_first(seed: int, e: int = 2, hidden: int = 256, inter: int = 128) -> tuple[torch.Tensor, ...]:
    """A layer's packed w1, w3, w2 and their scale bytes, as a checkpoint has them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    packed = [torch.randint(-128, 128, (e, n, k // 2), dtype=torch.int8, generator=generator) for n, k in shapes]
    scales = [torch.randint(0, 255, (e, n, k // 32), dtype=torch.uint8, generator=generator) for n, k in shapes]
    return (*packed, *scales)


@MOST
@given(seeds)
def test_experts_from_gate_first(seed: int) -> None:
    w1, w3, w2, s1, s3, s2 = _gate_first(seed)
    values = [e8m0.to_float(s) for s in (s1, s3, s2)]
    got = experts.from_gate_first(torch.cat((w1, w3), 1), torch.cat(values[:2], 1), w2, values[2])
    assert experts.refusal(*got) is None
    assert torch.equal(got.w13, torch.cat((w3, w1), 1)) and torch.equal(got.w2, w2)
    assert torch.equal(e8m0.scale_bytes(mxfp4.unswizzle_scales(got.s13)), torch.cat((s3, s1), 1))
    assert torch.equal(e8m0.scale_bytes(mxfp4.unswizzle_scales(got.s2)), s2)


@pytest.mark.parametrize("wrong", [3.0, 0.0, -1.0, float("nan"), float("inf"), 2.0**-128, 1 + 2.0**-23])
def test_a_scale_that_is_no_power_of_two_is_refused(wrong: float) -> None:
    w1, w3, w2, s1, s3, s2 = _gate_first(0)
    values = [e8m0.to_float(s) for s in (torch.cat((s1, s3), 1), s2)]
    values[1][1, 7, 2] = wrong
    with pytest.raises(ValueError, match=f"has the value {wrong} and needs a power of two".replace("+", r"\+")):
        experts.from_gate_first(torch.cat((w1, w3), 1), values[0], w2, values[1])


@pytest.mark.parametrize(("hidden", "inter"), [(192, 128), (256, 96)])
def test_experts_that_fill_no_tile_are_refused(hidden: int, inter: int) -> None:
    w1, w3, w2, s1, s3, s2 = _gate_first(0, 1, hidden, inter)
    layer = (torch.cat((w3, w1), 1), torch.cat((s3, s1), 1), w2, s2)
    with pytest.raises(
        ValueError, match=f"{hidden} channels and {inter} inside, and swizzled scales need multiples of 128"
    ):
        experts.from_gate_first(layer[0], layer[1].float(), layer[2], layer[3].float())
    x = torch.zeros(1, hidden, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"{hidden} channels and {inter} inside"):
        ops.mxfp4_moe(x, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), *layer, None)


def test_experts_of_other_shapes_are_refused() -> None:
    w1, w3, w2, s1, s3, s2 = _gate_first(0)
    w13, s13 = torch.cat((w3, w1), 1), torch.cat((s3, s1), 1)
    why = experts.refusal(w13, s13[:, :128], w2, s2)
    assert why == "s13 is [2, 128, 8] and needs [2, 256, 8], as w2 is [2, 256, 64]."
    assert "w13 is" in str(experts.refusal(w13[:1], s13, w2, s2))
    assert "s2 is" in str(experts.refusal(w13, s13, w2, s2[..., :3]))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rows in multiples of 128 and columns in multiples of 4"):
        mxfp4.swizzle_scales(torch.zeros(128, 6, dtype=torch.uint8))
    with pytest.raises(ValueError, match="rows in multiples of 128"):
        mxfp4.unswizzle_scales(torch.zeros(2, 96, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple of 32"):
        mxfp4.quantise(torch.zeros(40))
    with pytest.raises(ValueError, match="even count"):
        mxfp4.pack(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8 or int8"):
        mxfp4.unpack(torch.zeros(2))
    with pytest.raises(ValueError, match="one scale per 32"):
        mxfp4.dequantise(torch.zeros(32, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple of 16"):
        nvfp4.quantise(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="one scale per 16"):
        nvfp4.dequantise(torch.zeros(32, dtype=torch.uint8), torch.zeros(2).to(torch.float8_e4m3fn), torch.ones(()))
    with pytest.raises(TypeError, match="need float8_e4m3fn"):
        nvfp4.dequantise(torch.zeros(8, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8), torch.ones(()))
    with pytest.raises(ValueError, match=r"needs \[2, 1\]"):
        fp8_block.dequantise(torch.zeros(129, 1).to(torch.float8_e4m3fn), torch.ones(1, 1))
    with pytest.raises(ValueError, match="need 512"):
        kv_page.quantise(torch.zeros(128))
    with pytest.raises(ValueError, match="need 128"):
        indexer_page.quantise(torch.zeros(512))
    pool = torch.zeros(2, kv_page.page_bytes(2), dtype=torch.uint8)
    with pytest.raises(ValueError, match="needs at least"):
        kv_page.load(pool, torch.tensor([0]), 64)
    with pytest.raises(ValueError, match="bytes adjacent"):
        kv_page.load(pool[:, ::2], torch.tensor([0]), 2)
    with pytest.raises(TypeError, match="needs uint8"):
        kv_page.load(pool.float(), torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="one slot per row"):
        kv_page.store(pool, torch.tensor([0]), torch.zeros(2, 512), 2)
