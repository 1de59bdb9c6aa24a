"""The overlay's inline PTX on every operand that matters, computed here: Triton's interpreter leaves it out.

`tests/gpu/test_ptx_on_gpu.py` runs the same on a GPU.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sglang_sm120.ops import _mhc_triton
from sglang_sm120.ops.mxfp4_moe import LARGEST_SCALE_BYTE, grouped, mxfp8

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
Bits = np.ndarray
"""uint32: what registers hold."""


def as_bf16(value: np.ndarray) -> Bits:
    """The 16 bits of the nearest bf16, ties to even, of finite values."""
    bits = value.astype(np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _f32(bits: Bits) -> np.ndarray:
    return bits.view(np.float32)


def _fma_bf16x2(a: Bits, b: Bits, c: Bits) -> Bits:
    def half(shift: int) -> Bits:
        x, y, z = (_f32((bits >> shift & 0xFFFF) << 16).astype(np.float64) for bits in (a, b, c))
        return as_bf16(x * y + z) << shift

    return half(0) | half(16)


INSTRUCTIONS: dict[str, Callable[..., Bits]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "add.u32": lambda a, b: a + b,
    "fma.rn.bf16x2": _fma_bf16x2,
    "mul.rn.f32": lambda a, b: (_f32(a) * _f32(b)).view(np.uint32),
    "add.rn.f32": lambda a, b: (_f32(a) + _f32(b)).view(np.uint32),
    "sub.rn.f32": lambda a, b: (_f32(a) - _f32(b)).view(np.uint32),
    # The first operand goes to the upper half.
    "cvt.rn.bf16x2.f32": lambda a, b: as_bf16(_f32(a)) << 16 | as_bf16(_f32(b)),
}


def run(ptx: str, results: int, *operands: Bits) -> list[Bits]:
    """Registers `$0` … of straight-line PTX, given those after them."""
    registers = {f"${results + i}": operand.astype(np.uint32) for i, operand in enumerate(operands)}

    def read(name: str) -> Bits:
        return np.full_like(operands[0], int(name, 0), np.uint32) if name[0].isdecimal() else registers[name]

    for line in re.sub(r"[{}]", "", ptx).split(";"):
        opcode, _, names = line.strip().partition(" ")
        if opcode in ("", ".reg"):
            continue
        to, *sources = (name.strip() for name in names.split(","))
        registers[to] = INSTRUCTIONS[opcode](*map(read, sources))
    return [registers[f"${i}"] for i in range(results)]


def assembly(function: Any) -> str:
    """The block of PTX in a kernel's helper."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    [found] = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ".reg" in node.value
    ]
    return found


def bits_of(value: np.ndarray) -> Bits:
    return value.astype(np.float32).view(np.uint32)


@pytest.mark.parametrize("nibble", range(4))
def test_every_nibble_at_every_scale(nibble: int, seed: int) -> None:
    low = np.arange(1 << 16, dtype=np.uint32)
    high = np.random.default_rng(seed).permutation(low)
    ptx = getattr(grouped, f"NIBBLE_{nibble}").value
    for byte in range(LARGEST_SCALE_BYTE + 1):
        scale = np.full_like(low, ((byte + 63) << 7) * 0x10001)
        [found] = run(ptx, 1, low | high << 16, scale)
        for word, half in ((low, found & 0xFFFF), (high, found >> 16)):
            code = word >> 4 * nibble & 15
            weight = np.array([*E2M1, *(-value for value in E2M1)])[code] * 2.0 ** (byte - 127 - 63)
            assert (half == as_bf16(weight)).all(), f"scale byte {byte}"


@pytest.mark.parametrize(("ptx", "shift"), [(mxfp8.LOW, 0), (mxfp8.HIGH, 4)])
def test_every_nibble_of_four_bytes_is_an_e4m3(ptx: Any, shift: int, seed: int) -> None:
    """Each byte beside every other: nothing carries over."""
    words = np.arange(1 << 16, dtype=np.uint32)
    words |= np.random.default_rng(seed).permutation(words) << 16
    [found] = run(ptx.value, 1, words)
    codes = words.view(np.uint8) >> shift & 15
    weights = np.array([*E2M1, *(-value for value in E2M1)], np.float32)[codes]
    values = torch.from_numpy(found.view(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    assert (values * 64 == weights).all() and (np.signbit(values) == (codes >= 8)).all()


@pytest.fixture
def floats(seed: int) -> np.ndarray:
    """Every upper half of a finite fp32, with lower halves that round down, up and, at ties, to even."""
    random = np.random.default_rng(seed)
    upper = np.arange(1 << 16, dtype=np.uint32)
    # Not the largest binade, where rounding up overflows.
    upper = upper[(upper >> 7 & 0xFF) < 0xFE] << 16
    lower = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, *random.integers(0, 1 << 16, 4)]
    return random.permutation(np.concatenate([upper | low for low in np.array(lower, np.uint32)])).view(np.float32)


def test_every_fp32_is_two_bf16(floats: np.ndarray) -> None:
    pairs = floats.reshape(2, -1)
    high, low = run(assembly(_mhc_triton._two_bf16), 2, *map(bits_of, pairs))
    for value, shift in zip(pairs, (0, 16), strict=True):
        first = as_bf16(value)
        assert (high >> shift & 0xFFFF == first).all()
        assert (low >> shift & 0xFFFF == as_bf16(value - _f32(first << 16))).all()


def test_every_fp32_is_rounded_to_bf16(floats: np.ndarray) -> None:
    pairs = floats.reshape(2, -1)
    for value, found in zip(pairs, run(assembly(_mhc_triton._rounded), 2, *map(bits_of, pairs)), strict=True):
        assert (found == as_bf16(value) << 16).all()


def test_a_stream_rounds_the_product_and_the_sum(seed: int) -> None:
    post, f, mixed = (np.random.default_rng(seed).normal(size=(3, 2, 1 << 16))).astype(np.float32)
    [found] = run(assembly(_mhc_triton._stream), 1, *(bits_of(pair) for pairs in (post, f, mixed) for pair in pairs))
    expected = as_bf16(post * f + mixed)
    assert (found == (expected[0] | expected[1] << 16)).all()
