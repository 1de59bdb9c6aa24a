"""Cases of `fp8_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.formats import e8m0
from sglang_sm120.ops.fp8_linear.spec import shapes
from sglang_sm120.tolerance import BF16

from .common import Case, Maker


def model_shapes(tp: int) -> list[tuple[int, int]]:
    """(N, K) of every FP8 linear of the model on one of tp ranks."""
    return list(shapes(model_config(), tp).values())


def cases(kind: str) -> Iterator[Case]:
    """Partial blocks, both scale dtypes, norms, leading dimensions, each kernel's row counts; the model's shapes on a
    GPU."""

    def build(make: Maker, shape: tuple[int, ...], n: int, fp32_scale: bool = False) -> dict[str, Any]:
        w, scale = make.fp8_weight(n, shape[-1])
        return {"x": make.bf16(*shape), "w": w, "scale": e8m0.to_float(scale) if fp32_scale else scale}

    shapes: list[tuple[tuple[int, ...], int]] = [
        ((0, 128), 128),
        ((1, 128), 128),
        ((1, 5000), 10),
        ((1, 8192), 130),
        ((3, 200), 300),
        ((2, 3, 256), 128),
        ((8, 520), 200),
        ((9, 256), 130),
        ((12, 256), 320),
        ((16, 128), 100),
        ((33, 128), 16),
        ((40, 1024), 130),
        ((40, 2048), 130),
        ((65, 200), 130),
        ((70, 256), 130),
        ((1100, 128), 16),
    ]
    if kind != "cpu":
        rows = (1, 2, 4, 8, 16, 33, 64, 65, 300)
        shapes += [((t, k), n) for tp in (1, 2, 4) for n, k in model_shapes(tp) for t in rows]
    for shape, n in shapes:
        for fp32_scale in (False, True):
            name = "x".join(map(str, shape)) + f"-to-{n}{'-fp32-scale' if fp32_scale else ''}"
            yield Case(name, BF16, partial(build, shape=shape, n=n, fp32_scale=fp32_scale))

    def build_sliced(make: Maker, tokens: int, k: int = 136, first: int = 17) -> dict[str, Any]:
        w, scale = make.fp8_weight(130, k)
        return {"x": make.bf16(tokens, 400)[:, first : first + k], "w": w, "scale": scale}

    def build_unusual(make: Maker, tokens: int) -> dict[str, Any]:
        w, scale = make.fp8_weight(256, 256)
        bits = e8m0.scale_bytes(scale).clone()
        bits[0, 0], bits[1, 0] = 0, 255
        return {"x": make.bf16(tokens, 256), "w": w, "scale": e8m0.from_bytes(bits)}

    def build_normed(make: Maker, tokens: int, zeros: bool = False) -> dict[str, Any]:
        inputs = {**build_sliced(make, tokens), "norm_weight": make.bf16(136), "eps": 1e-6}
        if zeros:
            inputs["x"][0] = 0
        return inputs

    # TMA reads rows that begin at multiples of 16 bytes, and not the others.
    for first in (16, 17):
        yield Case(f"70-sliced-at-{first}", BF16, partial(build_sliced, tokens=70, k=256, first=first))
    yield Case("no-rows-normed", BF16, partial(build_normed, tokens=0))
    for tokens in (1, 3, 33):
        yield Case(f"{tokens}-normed", BF16, partial(build_normed, tokens=tokens))
        yield Case(f"{tokens}-normed-zeros", BF16, partial(build_normed, tokens=tokens, zeros=True))
        yield Case(f"{tokens}-sliced-input", BF16, partial(build_sliced, tokens=tokens))
        yield Case(f"{tokens}-smallest-and-nan-scale", BF16, partial(build_unusual, tokens=tokens))
