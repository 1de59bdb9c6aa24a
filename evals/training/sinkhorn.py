"""Sinkhorn's iterations on a GPU in one launch forward and one backward; in PyTorch they are some 280."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Matrices of one program."""


def sinkhorn(logits: Tensor, iterations: int, eps: float, fused: bool | None = None) -> Tensor:
    """`blocks.sinkhorn` of fp32 [..., 4, 4], differentiable; fused: in Triton, by default on a GPU."""
    function = _Fused if (logits.is_cuda if fused is None else fused) else _Plain
    return function.apply(logits, iterations, eps)


class _Plain(torch.autograd.Function):
    """In PyTorch, with a backward pass of a third of autograd's operations."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        share = logits.softmax(-1)
        m, kept = share + eps, [share]
        for i in range(2 * iterations - 1):
            total = m.sum(-2 if i % 2 == 0 else -1, keepdim=True) + eps
            m = m / total
            kept += [total, m]
        ctx.save_for_backward(*kept)
        return m

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        share, *kept = ctx.saved_tensors
        for i in reversed(range(len(kept) // 2)):
            total, m = kept[2 * i : 2 * i + 2]
            grad = (grad - (grad * m).sum(-2 if i % 2 == 0 else -1, keepdim=True)) / total
        return share * (grad - (grad * share).sum(-1, keepdim=True)), None, None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        logits = logits.contiguous()
        count = logits.numel() // 16
        m, totals = torch.empty_like(logits), logits.new_empty((2 * iterations - 1, count, 4))
        _forward[triton.cdiv(count, ROWS),](logits, m, totals, count, eps, iterations, ROWS)
        ctx.save_for_backward(m, totals)
        ctx.iterations, ctx.eps = iterations, eps
        return m

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        m, totals = ctx.saved_tensors
        grad, count = grad.contiguous(), m.numel() // 16
        out = torch.empty_like(m)
        _backward[triton.cdiv(count, ROWS),](grad, m, totals, out, count, ctx.eps, ctx.iterations, ROWS)
        return out, None, None


@triton.jit
def _places(count, R: tl.constexpr):
    """Offsets [R, 4, 4] of whole matrices, [R, 1, 4] of sums of columns, [R, 4, 1] of rows, and which exist."""
    matrix = (tl.program_id(0) * R + tl.arange(0, R))[:, None, None]
    row, column = tl.arange(0, 4)[None, :, None], tl.arange(0, 4)[None, None, :]
    return matrix * 16 + row * 4 + column, matrix * 4 + column, matrix * 4 + row, matrix < count


@triton.jit
def _forward(logits, out, totals, count, eps, ITERATIONS: tl.constexpr, R: tl.constexpr):
    at, columns, rows, real = _places(count, R)
    x = tl.load(logits + at, mask=real, other=0.0)
    m = tl.exp(x - tl.max(x, 2, keep_dims=True))
    m = m / tl.sum(m, 2, keep_dims=True) + eps
    total = tl.sum(m, 1, keep_dims=True) + eps
    tl.store(totals + columns, total, mask=real)
    m = m / total
    for _ in range(ITERATIONS - 1):
        totals += count * 4
        total = tl.sum(m, 2, keep_dims=True) + eps
        tl.store(totals + rows, total, mask=real)
        m = m / total
        totals += count * 4
        total = tl.sum(m, 1, keep_dims=True) + eps
        tl.store(totals + columns, total, mask=real)
        m = m / total
    tl.store(out + at, m, mask=real)


@triton.jit
def _backward(grads, results, totals, out, count, eps, ITERATIONS: tl.constexpr, R: tl.constexpr):
    at, columns, rows, real = _places(count, R)
    g = tl.load(grads + at, mask=real, other=0.0)
    m = tl.load(results + at, mask=real, other=0.0)
    totals += 2 * (ITERATIONS - 1) * count * 4
    # Each step back multiplies by the total that the step divided by.
    for _ in range(ITERATIONS - 1):
        total = tl.load(totals + columns, mask=real, other=1.0)
        g = (g - tl.sum(g * m, 1, keep_dims=True)) / total
        m = m * total
        totals -= count * 4
        total = tl.load(totals + rows, mask=real, other=1.0)
        g = (g - tl.sum(g * m, 2, keep_dims=True)) / total
        m = m * total
        totals -= count * 4
    total = tl.load(totals + columns, mask=real, other=1.0)
    g = (g - tl.sum(g * m, 1, keep_dims=True)) / total
    share = m * total - eps
    tl.store(out + at, share * (g - tl.sum(g * share, 2, keep_dims=True)), mask=real)
