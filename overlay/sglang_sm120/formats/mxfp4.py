"""MXFP4 weights: E2M1 values packed two per byte, one E8M0 scale per 32 values along K.

Byte j of a row holds value 2j in its low nibble and value 2j+1 in its high nibble. A nibble is `sign << 3 |
code`, with code 0…7 standing for 0, 0.5, 1, 1.5, 2, 3, 4, 6. Checkpoints store the packed bytes as int8; the
bits mean uint8. A dequantised weight is `E2M1_VALUES[nibble] * 2^(scale byte - 127)`, exact in fp32.

SM120's tensor cores want a weight's scale bytes swizzled in tiles of 128 rows and 4 columns, and SGLang keeps no other
copy there: the byte of row r and column c of C lies at

    (r // 128) * 128 * C  +  (c // 4) * 512  +  (r % 32) * 16  +  (r % 128 // 32) * 4  +  c % 4

of its weight, whose scale tensor keeps the shape [rows, C].
"""

from __future__ import annotations

import torch

from . import e8m0

BLOCK = 32
"""Values along K that share one scale."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES: tuple[float, ...] = _MAGNITUDES + tuple(-v for v in _MAGNITUDES)
"""Value of each nibble 0…15."""


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Nibbles uint8 [..., K], each 0…15, to bytes uint8 [..., K/2], low nibble first. K must be even."""
    if codes.shape[-1] % 2:
        raise ValueError(f"MXFP4 rows have {codes.shape[-1]} values and need an even count; pad K.")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 or int8 [..., K/2] to nibbles uint8 [..., K], low nibble first."""
    if packed.dtype not in (torch.uint8, torch.int8):
        raise TypeError(f"packed MXFP4 has dtype {packed.dtype} and needs uint8 or int8.")
    bits = packed.contiguous().view(torch.uint8)
    return torch.stack((bits & 15, bits >> 4), dim=-1).flatten(-2)


def quantise(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [..., K] to (packed uint8 [..., K/2], scale float8_e8m0fnu [..., K/32]); K is a multiple of 32.

    The scale is the smallest power of two that brings the block's largest magnitude to 6 or less. Values
    round to the nearest E2M1 value, ties to the even code. Values must be finite.
    """
    if w.shape[-1] % BLOCK:
        raise ValueError(f"MXFP4 rows have {w.shape[-1]} values and need a multiple of {BLOCK}; pad K.")
    blocks = w.float().unflatten(-1, (-1, BLOCK))
    scale = e8m0.from_amax(blocks.abs().amax(-1), 6.0)
    return pack(nearest(blocks / e8m0.to_float(scale).unsqueeze(-1)).flatten(-2)), scale


def nearest(values: torch.Tensor) -> torch.Tensor:
    """fp32 to uint8 nibbles of the nearest E2M1 values, ties to the even code; what is beyond 6 becomes 6."""
    codes = torch.signbit(values).to(torch.uint8) << 3
    v = values.abs()
    # One step per midpoint between neighbours; > and >= alternate so that a tie lands on the even code.
    for midpoint in (0.25, 1.25, 2.5, 5.0):
        codes += v > midpoint
    for midpoint in (0.75, 1.75, 3.5):
        codes += v >= midpoint
    return codes


def dequantise(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(packed uint8|int8 [..., K/2], scale float8_e8m0fnu|uint8 [..., K/32]) to fp32 [..., K], exactly."""
    codes = unpack(packed)
    if codes.shape[-1] != scale.shape[-1] * BLOCK:
        raise ValueError(
            f"MXFP4 rows have {codes.shape[-1]} values and {scale.shape[-1]} scales; "
            f"they need one scale per {BLOCK} values."
        )
    values = torch.tensor(E2M1_VALUES, device=packed.device)[codes.int()]
    return (values.unflatten(-1, (-1, BLOCK)) * e8m0.to_float(scale).unsqueeze(-1)).flatten(-2)


def swizzle_scales(scale: torch.Tensor) -> torch.Tensor:
    """Scales float8_e8m0fnu|float8_e4m3fn|uint8 [..., R, C], row-major, to the same shape and dtype, swizzled.

    Raises ValueError unless R is a multiple of 128 and C of 4.
    """
    bits = _tiled(scale)
    tiles = bits.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4, 32))
    return tiles.transpose(-4, -2).reshape(bits.shape).view(scale.dtype)


def unswizzle_scales(scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `swizzle_scales`: bytes as SM120 has them to row-major ones."""
    bits = _tiled(scale)
    rows, columns = bits.shape[-2:]
    tiles = bits.reshape(*bits.shape[:-2], rows // 128, columns // 4, 32, 4, 4)
    return tiles.transpose(-4, -2).reshape(bits.shape).view(scale.dtype)


def _tiled(scale: torch.Tensor) -> torch.Tensor:
    bits = scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else e8m0.scale_bytes(scale)
    if bits.dim() < 2 or bits.shape[-2] % 128 or bits.shape[-1] % 4:
        raise ValueError(
            f"Scales are {list(bits.shape)}, and swizzled ones need rows in multiples of 128 and columns in "
            "multiples of 4; pad the weight, or split it over fewer ranks."
        )
    return bits
