"""The providers mxfp8: the format bit by bit, the emulations by another reading, the experts' kernels in stages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases.common import Maker
from cases.mxfp4_moe import cases
from naive import E2M1, f64, fp8_linear, raw, silu, swizzled

from sglang_sm120 import kernels, registry
from sglang_sm120.formats import e8m0, mxfp4
from sglang_sm120.formats import mxfp8 as mxfp8_format
from sglang_sm120.ops._mxfp8_triton import quantise_rows
from sglang_sm120.ops.mxfp4_moe import LARGEST_SCALE_BYTE, mxfp8, triton
from sglang_sm120.registry import Arguments
from sglang_sm120.tolerance import BF16, E4M3_FLIPS, FP32

CPU = torch.device("cpu")
MOE = registry.ops()["mxfp4_moe"]
LINEAR = registry.ops()["fp8_linear"]
E4M3 = np.array([(8 + c % 8) * 2.0 ** (c // 8 - 10) if c >= 8 else c * 2.0**-9 for c in range(127)])
"""Values of the codes 0 … 126."""
PLACE = [*range(0, 32, 2), *range(1, 32, 2)]
"""Channel of each place of a block, as kernels keep activations."""
TO_REFERENCE = 2.0**-4
"""RMS: x for the gates, x for the ups and the hidden are each off by 2^-4 / sqrt(3) at most, evenly spread: together
2^-4 of the result's RMS where nothing is clamped."""


def read(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes with their signs, scale bytes, values) of finite fp64 [..., K] in MXFP8, by looking for the nearest."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(-1)
    exponent = np.full(amax.shape, -69)
    while (more := amax > 448 * 2.0**exponent).any():
        exponent += more
    scaled = np.abs(blocks) / 2.0 ** exponent[..., None]
    above = np.searchsorted(E4M3, scaled).clip(0, 126)
    below = (above - 1).clip(0)
    nearer = (E4M3[above] - scaled) - (scaled - E4M3[below])
    code = np.where((nearer < 0) | ((nearer == 0) & (above % 2 == 0)), above, below)
    values = np.copysign(E4M3[code], blocks) * 2.0 ** exponent[..., None]
    codes = code | np.signbit(blocks).astype(int) << 7
    return codes.reshape(x.shape), exponent + 127, values.reshape(x.shape)


@pytest.fixture
def wide(seed: int) -> torch.Tensor:
    """bf16 rows [41, 192] of every magnitude, small beside large, ties, zeros, powers of two, subnormals."""
    make = Maker(seed, CPU)
    x = make.normal(41, 192) * torch.exp2(make.integers(-12, 3, 41, 192).float())
    x *= torch.exp2(make.integers(-125, 118, 41, 6).float()).repeat_interleave(32, 1)
    x[0], x[1, ::3], x[2, 32:64] = 0, 0, -0.0
    x[3] = torch.exp2(torch.arange(192) % 32 - 16.0)
    x[4] = torch.arange(192) % 32 * 2.0**-9 + 2.0**-10
    x[4, ::32] = 448
    x[5, ::32], x[6, ::32], x[7, ::32] = 1.75, 1.7578125, 3e38
    x[8] = 2.0**-130
    return x.bfloat16()


def test_the_format_by_looking_for_the_nearest(wide: torch.Tensor) -> None:
    values, scale = mxfp8_format.quantise(wide)
    codes, exponents, nearest = read(f64(wide))
    assert (raw(scale) == exponents).all() and (raw(values) == codes).all()
    assert (f64(mxfp8_format.dequantise(values, scale)) == nearest).all()
    # 2^-4 of what is no subnormal, else half a step; the largest stays.
    scale_of = np.repeat(2.0 ** (exponents - 127), 32, -1)
    assert (np.abs(nearest - f64(wide)) <= np.maximum(np.abs(f64(wide)) * 2.0**-4, scale_of * 2.0**-10)).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_block_with_what_is_not_finite_is_nan(bad: float, wide: torch.Tensor) -> None:
    wide[9, 40] = bad
    broken = mxfp8_format.rounded(wide.float()).isnan()
    assert broken[9, 32:64].all() and broken.sum() == 32


@pytest.mark.parametrize("even_first", [True, False])
@pytest.mark.parametrize("stride", [192, 256])
def test_rows_are_quantised_as_the_format_says(stride: int, even_first: bool, wide: torch.Tensor) -> None:
    place, shift = (PLACE, mxfp8.SHIFT.value) if even_first else (list(range(32)), 0)
    wide[9, 40], wide[10, 70], wide[11, 0] = math.inf, -math.inf, math.nan
    x = torch.full((41, stride), math.nan, dtype=torch.bfloat16)
    x[:, :192] = wide
    x8 = torch.full((41, 192), 0xFF, dtype=torch.uint8)
    sx = torch.full((41, 6), 0xFF, dtype=torch.uint8)
    for count in (4, 64):
        quantise_rows[(41, -(-6 // count))](
            x, x8.view(torch.float8_e4m3fn), sx, K=192, X_STRIDE=stride, COUNT=count, EVEN_FIRST=even_first, SHIFT=shift
        )
        values, scale = mxfp8_format.quantise(wide)
        expected = values.view(torch.uint8).unflatten(-1, (6, 32))[..., place].flatten(-2)
        nan = values.isnan().unflatten(-1, (6, 32))[..., place].flatten(-2)
        assert torch.equal(x8[~nan], expected[~nan]) and (x8[nan] & 0x7F == 0x7F).all() and nan.sum() == 96
        finite = ~values.isnan().unflatten(-1, (6, 32)).any(-1)
        assert torch.equal(sx[finite] + shift, e8m0.scale_bytes(scale)[finite]) and sx.min() >= 1


def experts(make: Maker, rows: int, k: int, count: int, hidden: int, inter: int, **more: Any) -> dict[str, Any]:
    """Inputs with all experts chosen, one row that is zero and one that has no expert."""
    w13, s13 = make.mxfp4_weight(count, 2 * inter, hidden)
    w2, s2 = make.mxfp4_weight(count, hidden, inter)
    ids = torch.stack([make.choice(count, k) for _ in range(rows)])
    x, weights = make.bf16(rows, hidden), make.normal(rows, k).abs()
    x[rows // 3] = 0
    ids[rows // 2] = -1
    weights[ids < 0] = math.nan
    found = {"x": x, "topk_ids": ids, "topk_weights": weights, "w13": w13, "s13": s13, "w2": w2, "s2": s2}
    return found | {"limit": 10.0} | more


def of_float64(a: Arguments) -> np.ndarray:
    """The op in fp64 from operands rounded by `read`, expert by expert and row by row."""

    def weight(packed: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
        bits, (rows, columns) = raw(packed), np.indices(scale.shape)
        exponents = raw(scale).reshape(-1)[swizzled(rows, columns, scale.shape[1])].astype(int)
        values = E2M1[np.stack((bits & 15, bits >> 4), -1).reshape(bits.shape[0], -1)]
        return values * np.where(exponents > LARGEST_SCALE_BYTE, 0, 2.0 ** (exponents - 127.0)).repeat(32, -1)

    x, y = read(f64(a.x))[2], np.zeros(a.x.shape)
    for row, ids in enumerate(a.topk_ids.tolist()):
        for slot, e in enumerate(ids):
            if e < 0:
                continue
            up, gate = np.split(weight(a.w13[e], a.s13[e]) @ x[row], 2)
            if a.limit is not None:
                gate, up = np.minimum(gate, a.limit), np.clip(up, -a.limit, a.limit)
            hidden = read((silu(gate) * up)[None])[2][0]
            y[row] += float(a.topk_weights[row, slot]) * (weight(a.w2[e], a.s2[e]) @ hidden)
    return y


def rms(value: np.ndarray) -> float:
    return float(np.sqrt(np.square(value).mean()))


@pytest.mark.parametrize("limit", [None, 1.0, 10.0])
def test_the_emulation_by_another_reading(limit: float | None, seed: int) -> None:
    a = Arguments(**experts(Maker(seed, CPU), 70, 2, 3, 256, 128, limit=limit))
    e8m0.scale_bytes(a.s13)[0, ::3], e8m0.scale_bytes(a.s2)[1, ::5] = 255, 192
    e8m0.scale_bytes(a.s13)[1, ::2], e8m0.scale_bytes(a.s2)[2, ::2] = 0, 0
    got, expected = f64(mxfp8.emulated(a)), of_float64(a)
    assert rms(got - expected) <= E4M3_FLIPS.rms * rms(expected)
    assert np.abs(got - expected).max() <= E4M3_FLIPS.largest * np.abs(expected).max()


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**17])
def test_the_emulation_is_as_near_to_the_reference_as_e4m3_allows(scale: float, seed: int) -> None:
    given = experts(Maker(seed, CPU), 70, 2, 3, 512, 256, limit=None)
    given["x"] = (given["x"] * scale).bfloat16()
    got, expected = f64(mxfp8.emulated(Arguments(**given))), f64(MOE.reference(**given))
    assert 0 < rms(got - expected) <= TO_REFERENCE * rms(expected)


def test_few_rows_keep_the_references_arithmetic(seed: int) -> None:
    given = experts(Maker(seed, CPU), 64, 2, 3, 128, 128)
    assert torch.equal(mxfp8.emulated(Arguments(**given)), MOE.reference(**given))
    assert torch.equal(MOE.by("mxfp8", **given), MOE.by("triton", **given))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The scratch of the last call."""
    scratch, found = kernels.scratch, []

    def kept(*arguments: Any) -> list[torch.Tensor]:
        found[:] = scratch(*arguments)
        return list(found)

    monkeypatch.setattr(kernels, "scratch", kept)
    return found


SHAPES = {
    "few pairs an expert": (67, 2, 5, 128, 256),
    "tile of 64": (70, 2, 2, 256, 128),
    "tile of 128": (131, 1, 1, 128, 384),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_product_from_its_own_operands(shape: tuple[int, ...], taken: list[torch.Tensor], seed: int) -> None:
    """What stands between the two products, and the second from that, so that no rounding the other way is allowed for.

    Of whole numbers the first product is exact in any order; silu's last bits may round the other way.
    """
    make = Maker(seed, CPU)
    given = experts(make, *shape)
    given["x"] = make.integers(-8, 9, *given["x"].shape).bfloat16()
    for name in ("s13", "s2"):
        e8m0.scale_bytes(given[name]).copy_(make.integers(124, 128, *given[name].shape, dtype=torch.uint8))
    MOE.by("mxfp8", **given)
    hidden8, sh, work = taken[:3]
    (rows, slots), inter = given["topk_ids"].shape, hidden8.shape[1]
    hidden = hidden8.view(rows, slots, inter // 32, 32)[..., np.argsort(PLACE)].flatten(-2)
    scale = sh.view(rows, slots, -1) + mxfp8.SHIFT.value
    partial = work.view(torch.float32)[: rows * slots * shape[3]].view(rows, slots, -1)
    other_way = 0
    for e in range(shape[2]):
        chosen = given["topk_ids"] == e
        weights = [
            f64(mxfp4.dequantise(given[w][e], mxfp4.unswizzle_scales(given[s][e])))
            for w, s in (("w13", "s13"), ("w2", "s2"))
        ]
        up, gate = np.split(f64(given["x"])[chosen.nonzero()[:, 0]] @ weights[0].T, 2, -1)
        wanted = silu(np.minimum(gate, 10)) * np.clip(up, -10, 10)
        codes, exponents, _ = read(wanted.astype(np.float32).astype(np.float64))
        step = np.abs(raw(hidden[chosen]).astype(int) - codes)
        assert (raw(scale[chosen]) == exponents).all() and step.max() <= 1
        other_way += int(step.sum())
        own = f64(mxfp8_format.dequantise(hidden[chosen], scale[chosen]))
        error = f64(partial[chosen]) - own @ weights[1].T
        assert np.abs(error).max() <= FP32.largest * np.abs(own @ weights[1].T).max()
    assert other_way <= hidden.numel() / 1000


@pytest.mark.parametrize("provider", ["mxfp8", "triton"])
def test_outputs_made_in_stretches_are_those_made_at_once(
    provider: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    given = experts(Maker(seed, CPU), 70, 2, 3, 512, 128)
    expected = MOE.by(provider, **given)
    monkeypatch.setattr(triton, "PARTIAL_BYTES", 140 * 128 * 4)
    assert triton.stretch_of(140, 512, 128)[0] == 128
    assert torch.equal(MOE.by(provider, **given), expected)


def compare(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels give and what the emulation gives, whose finite values agree."""
    got, expected = MOE.by("mxfp8", **given), MOE.meant("mxfp8", **given)
    finite = expected.isfinite()
    assert torch.equal(finite, got.isfinite())
    error, values = f64(got - expected)[finite.numpy()], f64(expected)[finite.numpy()]
    assert rms(error) <= E4M3_FLIPS.rms * rms(values)
    assert np.abs(error).max() <= E4M3_FLIPS.largest * np.abs(values).max()
    return got, expected


@pytest.mark.parametrize("scale", [2.0**-62, 2.0**-20, 2.0**17])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_magnitude(shape: tuple[int, ...], scale: float, seed: int) -> None:
    """2^-62: a block's scale is no smaller than 2^-69, and many values are E4M3's subnormals."""
    given = experts(Maker(seed, CPU), *shape, limit=None)
    given["x"] = (given["x"] * scale).bfloat16()
    for name in ("s13", "s2"):  # so that no product of gate and up leaves fp32
        e8m0.scale_bytes(given[name]).sub_(round(math.log2(scale)) // 2)
    compare(given)


def test_scales_of_every_size(seed: int) -> None:
    """Bytes 0 and 191 are scales, 192 to 255 are none; with a limit all is finite."""
    make = Maker(seed, CPU)
    given = experts(make, 70, 2, 3, 256, 128)
    given["x"] = (given["x"] * 2.0**17).clamp(-(2.0**20), 2.0**20)
    for name in ("s13", "s2"):
        bits = e8m0.scale_bytes(given[name])
        bits.copy_(torch.where(make.integers(0, 4, *bits.shape) == 0, make.integers(0, 256, *bits.shape), bits))
        bits.view(-1)[:3] = torch.tensor([0, 191, 192])
    got, _ = compare(given)
    assert got.isfinite().all()
    for name in ("s13", "s2"):
        none = dict(given)
        none[name] = torch.full_like(e8m0.scale_bytes(given[name]), 192)
        assert not MOE.by("mxfp8", **none).any()


def test_products_with_a_scale_that_counts_as_zero_vanish_in_fp32() -> None:
    """In the interpreter the byte 0 is 0; in the tensor core 2^-127. fp32's least is 2^-149, half of it rounds to 0."""
    largest_scale = read(np.full((1, 32), np.nextafter(2.0**20, 0)))[1][0, 0] - mxfp8.SHIFT.value
    weight = 6 * 2.0**-6 * 2.0**-127
    assert math.log2(32 * 448 * weight) + (largest_scale - 127) < -150


def test_a_row_with_what_is_not_finite_is_nan_and_no_other(seed: int) -> None:
    given = experts(Maker(seed, CPU), 70, 2, 3, 256, 128)
    given["x"][5, 7], given["x"][6, 200], given["x"][69, 255] = math.inf, math.nan, -math.inf
    got, _ = compare(given)
    assert got.isnan().all(1).nonzero()[:, 0].tolist() == [5, 6, 69] and got.isnan().sum() == 3 * 256


def test_the_models_calls_have_a_tile_of_each_size() -> None:
    tiles = {mxfp8._tile(rows * 6 / 256).tokens for rows in (65, 2048, 8192)}
    assert tiles == {32, 64, 128}


def test_the_cases_of_parity_reach_these_kernels() -> None:
    rows = [case.build(Maker(0, CPU))["x"].shape[0] for case in cases("cpu")]
    assert sum(r > mxfp8.SORT_ABOVE for r in rows) >= 5


def linear(make: Maker, rows: int, n: int, k: int, **more: Any) -> dict[str, Any]:
    w, scale = make.fp8_weight(n, k)
    x = make.bf16(rows, k)
    x[rows // 3] = 0
    return {"x": x, "w": w, "scale": scale} | more


@pytest.mark.parametrize("rows", [65, 130])
def test_the_linears_emulation_by_another_reading(rows: int, seed: int) -> None:
    given = linear(Maker(seed, CPU), rows, 200, 384)
    got = f64(LINEAR.meant("mxfp8", **given))
    rounded = torch.from_numpy(read(f64(given["x"]))[2])
    expected = f64(fp8_linear(rounded, given["w"], given["scale"]))
    assert rms(got - expected) <= BF16.rms * rms(expected)
    reference = f64(LINEAR.reference(**given))
    # 2^-4 / sqrt(3) of what is no subnormal, as above.
    assert 0 < rms(got - reference) <= 2.0**-4 / math.sqrt(3) * rms(reference)


@pytest.mark.parametrize(("rows", "k"), [(64, 256), (70, 200)])
def test_the_linears_that_keep_the_references_arithmetic(rows: int, k: int, seed: int) -> None:
    given = linear(Maker(seed, CPU), rows, 130, k)
    assert torch.equal(LINEAR.meant("mxfp8", **given), LINEAR.reference(**given))
    assert torch.equal(LINEAR.by("mxfp8", **given), LINEAR.by("triton", **given))


@pytest.mark.parametrize("rows", [67, 131])
@pytest.mark.parametrize("scale", ["bytes", "fp32", "no power of two"])
@pytest.mark.parametrize("normed", [False, True])
def test_linears(rows: int, scale: str, normed: bool, seed: int) -> None:
    make = Maker(seed, CPU)
    given = linear(make, rows, 200, 384)
    given["x"] = (given["x"] * torch.exp2(make.integers(-20, 60, rows, 1).float())).bfloat16()
    if scale != "bytes":
        given["scale"] = e8m0.to_float(given["scale"]) * (1.0 if scale == "fp32" else 1.37)
    if normed:
        given |= {"norm_weight": make.bf16(384), "eps": 1e-6}
    got, expected = f64(LINEAR.by("mxfp8", **given)), f64(LINEAR.meant("mxfp8", **given))
    # Row by row, whose magnitudes differ; a norm's last bit may let a value round the other way.
    error, size = np.abs(got - expected), np.abs(expected).max(1, keepdims=True)
    assert (error <= (E4M3_FLIPS if normed else BF16).largest * size).all()
    assert not got[rows // 3].any()


def test_a_linears_row_with_what_is_not_finite_is_nan_and_no_other(seed: int) -> None:
    given = linear(Maker(seed, CPU), 70, 200, 384)
    given["x"][5, 7], given["x"][69, 300] = math.inf, math.nan
    bits = e8m0.scale_bytes(given["scale"]).clone()
    bits[1, 2] = 255
    for scale in (e8m0.from_bytes(bits), e8m0.to_float(e8m0.from_bytes(bits))):
        wrong = LINEAR.by("mxfp8", **given | {"scale": scale}).isnan()
        assert wrong[:, 128:].all() and wrong[:, :128].all(1).nonzero()[:, 0].tolist() == [5, 69]
        assert wrong[:, :128].sum() == 2 * 128
