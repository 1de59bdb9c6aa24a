"""E8M0 block scales: one byte e per block, meaning 2^(e - 127); byte 255 is NaN.

Scales are held as `torch.float8_e8m0fnu`. Converting such a tensor to uint8 converts values, not bits:
`scale_bytes` gives the bits.
"""

from __future__ import annotations

import torch


def from_amax(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """The smallest power of two s with `amax / s <= largest`, as float8_e8m0fnu of amax's shape.

    amax is fp32, finite and not negative. The power comes from the fp32 bits of `amax / largest` (frexp), not
    from a float logarithm, so exact powers of two stay exact. An all-zero block gets scale 1. Results outside
    2^-127 … 2^127 are clamped.
    """
    mantissa, exponent = torch.frexp(amax / largest)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)  # frexp gives 2^n as 0.5 * 2^(n+1)
    bits = (exponent + 127).clamp(0, 254)
    return from_bytes(torch.where(amax == 0, 127, bits).to(torch.uint8))


def from_bytes(bits: torch.Tensor) -> torch.Tensor:
    """uint8 exponent bytes to float8_e8m0fnu, bit for bit."""
    return bits.view(torch.float8_e8m0fnu)


def from_float(scale: torch.Tensor) -> torch.Tensor:
    """fp32 powers of two 2^-127 … 2^127 to float8_e8m0fnu, exactly.

    Raises ValueError for any other value, which no scale byte means.
    """
    bits = scale.float().contiguous().view(torch.int32)
    byte = bits >> 23
    # 2^-127 is subnormal: its one bit lies below the exponent's.
    exact = ((bits & 0x7FFFFF) == 0) & (byte > 0) & (byte < 255) | (bits == 1 << 22)
    if not bool(exact.all()):
        raise ValueError(
            f"E8M0 scale has the value {scale[~exact][0].item()} and needs a power of two, 2^-127 to 2^127; "
            "pass the checkpoint's scales as they were loaded."
        )
    return from_bytes(byte.to(torch.uint8))


def scale_bytes(scale: torch.Tensor) -> torch.Tensor:
    """float8_e8m0fnu (or uint8, returned as it is) to uint8 exponent bytes, bit for bit.

    Raises TypeError for another dtype, whose bits are not exponents.
    """
    if scale.dtype == torch.uint8:
        return scale
    if scale.dtype != torch.float8_e8m0fnu:
        raise TypeError(
            f"E8M0 scale has dtype {scale.dtype} and needs float8_e8m0fnu or uint8; "
            "pass the checkpoint's scale bytes unconverted."
        )
    return scale.view(torch.uint8)


def to_float(scale: torch.Tensor) -> torch.Tensor:
    """float8_e8m0fnu or raw uint8 bytes to fp32 2^(e - 127), exactly; byte 255 gives NaN."""
    return scale_bytes(scale).view(torch.float8_e8m0fnu).float()
