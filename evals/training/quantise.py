"""Straight-through quantisers: forward the value a checkpoint or cache would give back, backward the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_sm120.formats import e8m0, fp8_block, indexer_page, kv_page, mxfp4

E4M3_INTEGERS = 16
"""Integers up to here times a power of two are E4M3 values."""


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, value: Tensor) -> Tensor:
        return value.to(x.dtype).view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ThroughAll(torch.autograd.Function):
    """(weights, values of the same shapes) to the values; each weight gets its value's gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *both: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.view_as(value) for value in both[len(both) // 2 :])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*grads, *[None] * len(grads))


def fp8_weights(weights: list[Tensor], levels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Matrices [N, K] of whole 128 x 128 blocks as read back from FP8 blocks, all in some 40 launches.

    levels > 0 keeps to the integers -levels .. levels times a power of two.
    """
    block = fp8_block.BLOCK
    with torch.no_grad():
        blocks = [w.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2) for w in weights]
        stack = torch.cat([b.reshape(-1, block) for b in blocks])
        stack = coarse(stack, levels) if levels else fp8_block.dequantise(*fp8_block.quantise(stack))
        parts = stack.to(dtype).split([b.numel() // block for b in blocks])
        values = [
            part.view(b.shape).transpose(1, 2).reshape(w.shape)
            for part, b, w in zip(parts, blocks, weights, strict=True)
        ]
    return _ThroughAll.apply(*weights, *values)


def mxfp4_weights(weights: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """[..., K] each as read back from MXFP4."""
    with torch.no_grad():
        stack = mxfp4_value(torch.cat([w.reshape(-1, mxfp4.BLOCK) for w in weights])).to(dtype)
        parts = stack.split([w.numel() // mxfp4.BLOCK for w in weights])
        values = [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
    return _ThroughAll.apply(*weights, *values)


def bf16_weights(weights: list[Tensor]) -> tuple[Tensor, ...]:
    """fp32 tensors rounded to bf16 values."""
    with torch.no_grad():
        stack = torch.cat([w.flatten() for w in weights]).bfloat16().float()
        values = [
            part.view(w.shape) for part, w in zip(stack.split([w.numel() for w in weights]), weights, strict=True)
        ]
    return _ThroughAll.apply(*weights, *values)


def coarse(w: Tensor, levels: int) -> Tensor:
    """[N, K] rounded to integers -levels .. levels times one power of two per 128 x 128 block: exact in FP8.

    Fewer distinct bytes make the committed file smaller. Raises ValueError where E4M3 does not hold the integers.
    """
    if not 0 < levels <= E4M3_INTEGERS:
        raise ValueError(f"levels is {levels}: use 1 to {E4M3_INTEGERS}, the integers that E4M3 holds")
    n, k = w.shape
    block = fp8_block.BLOCK
    amax = torch.nn.functional.pad(w.abs(), (0, -k % block, 0, -n % block))
    amax = amax.unflatten(1, (-1, block)).unflatten(0, (-1, block)).amax((1, 3))
    scale = e8m0.to_float(e8m0.from_amax(amax, levels))
    scale = scale.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
    return (w / scale).round().clamp(-levels, levels) * scale


def mxfp4_value(w: Tensor) -> Tensor:
    """[..., K] as read back from MXFP4: `mxfp4.quantise` and `dequantise` without the nibbles between.

    Below 1 the step is a half, from 2 on 1, from 4 on 2; ties go to the even code, as `round` sends them.
    """
    blocks = w.unflatten(-1, (-1, mxfp4.BLOCK))
    scale = e8m0.to_float(e8m0.from_amax(blocks.abs().amax(-1), 6.0)).unsqueeze(-1)
    v = blocks / scale
    step = torch.where(v.abs() < 2, 0.5, torch.where(v.abs() < 4, 1.0, 2.0))
    return ((v / step).round() * step * scale).flatten(-2)


def kv_entry(kv: Tensor) -> Tensor:
    """fp32 [..., 512] as read back from a KV page."""
    with torch.no_grad():
        value = kv_page.dequantise(*kv_page.quantise(kv))
    return _Through.apply(kv, value)


def index_vector(x: Tensor) -> Tensor:
    """fp32 [..., 128] as read back from an indexer page: FP8 with one fp32 scale."""
    with torch.no_grad():
        value = indexer_page.dequantise(*indexer_page.quantise(x))
    return _Through.apply(x, value)
