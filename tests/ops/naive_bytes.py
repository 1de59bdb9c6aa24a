"""Formats a second time: bytes decoded and written one by one, without the overlay's code."""

from __future__ import annotations

import math
import struct

import numpy as np
import torch

Array = np.ndarray


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -value if sign else value


E4M3 = np.array([e4m3(byte) for byte in range(256)])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e8m0(byte: int) -> float:
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def to_e4m3(value: float) -> int:
    """Nearest E4M3 byte, ties to even, saturating."""
    magnitude = min(abs(value), 448.0)
    # Bytes 0 … 126 ascend in value.
    above = int(np.searchsorted(E4M3[:127], magnitude))
    byte = min((max(above - 1, 0), above), key=lambda b: (abs(E4M3[b] - magnitude), b & 1))
    return byte | (128 if math.copysign(1, value) < 0 else 0)


def kv_vector(pages, slot: int, page_size: int) -> Array:
    page, row = pages[slot // page_size].cpu().numpy(), slot % page_size
    data = page[row * 576 : row * 576 + 576]
    footer = page[page_size * 576 + row * 8 :]
    nope = [E4M3[data[c]] * e8m0(int(footer[c // 64])) for c in range(448)]
    rope = [struct.unpack("<f", bytes([0, 0, *data[448 + 2 * c : 450 + 2 * c]]))[0] for c in range(64)]
    return np.array(nope + rope)


def kv_store(pages, slot: int, page_size: int, k: Array) -> None:
    page, row = pages[slot // page_size], slot % page_size
    for group in range(7):
        values = k[64 * group : 64 * group + 64]
        needed = max(1e-4, float(np.abs(values).max())) / 448
        exponent = next(e for e in range(-40, 40) if 2.0**e >= needed)
        page[page_size * 576 + row * 8 + group] = exponent + 127
        for c, v in enumerate(values.tolist()):
            page[row * 576 + 64 * group + c] = to_e4m3(v / 2.0**exponent)
    rope = torch.from_numpy(k[448:]).bfloat16().view(torch.uint8)
    page[row * 576 + 448 : row * 576 + 576] = rope.to(pages.device)


def indexer_vector(pages, slot: int, page_size: int) -> tuple[Array, float]:
    page, row = pages[slot // page_size].cpu().numpy(), slot % page_size
    scale = struct.unpack("<f", bytes(page[page_size * 128 + 4 * row :][:4]))[0]
    return E4M3[page[row * 128 : row * 128 + 128]], scale


def indexer_fp8(k: Array) -> tuple[list[int], float]:
    scale = max(1e-4, float(np.abs(k).max())) / 448
    return [to_e4m3(v / scale) for v in k.tolist()], scale


def indexer_store(pages, slot: int, page_size: int, k: Array) -> None:
    page, row = pages[slot // page_size], slot % page_size
    codes, scale = indexer_fp8(k)
    page[row * 128 : row * 128 + 128] = torch.tensor(codes, dtype=torch.uint8)
    page[page_size * 128 + 4 * row :][:4] = torch.tensor(list(struct.pack("<f", scale)), dtype=torch.uint8)
