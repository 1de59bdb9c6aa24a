"""Steps that several references share, all in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_BYTES = 16 << 20
"""Working memory a reference may take at once; more is given back to the system and faulted in again at each step."""


def linear_refusal(x: torch.Tensor, w: torch.Tensor) -> str | None:
    """Why x [..., G, K] is no input of weights [G, N, K], or x [..., K] none of [N, K]; or None."""
    needed = [*w.shape[:-2], w.shape[-1]]
    if list(x.shape[-len(needed) :]) == needed:
        return None
    return f"input is {list(x.shape)} and needs {needed} last for weight {list(w.shape)}."


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / rms(x) over the last dimension, times weight if given; fp32 whatever x is."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight.float()


def rotate(x: torch.Tensor, freqs_cis: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """RoPE of x [T, ..., 64] by freqs_cis complex64 [S, 32] at positions int [T]; pairs are interleaved.

    Channels 2i and 2i+1 are the real and imaginary part of a number that is multiplied by freqs_cis[position,
    i], or by its conjugate when inverse. Returns fp32.
    """
    turn = torch.view_as_real(freqs_cis[positions.long()])
    turn = turn.view(turn.shape[0], *(1 for _ in x.shape[1:-1]), *turn.shape[1:])
    cos, sin = turn.unbind(-1)
    if inverse:
        sin = -sin
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1).flatten(-2)


def rotate_tail(x: torch.Tensor, freqs_cis: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE on the last 64 channels of x, the others unchanged; fp32."""
    x = x.float()
    return torch.cat((x[..., :-64], rotate(x[..., -64:], freqs_cis, positions)), dim=-1)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Walsh-Hadamard transform over the last dimension (a power of two n), times n ** -0.5; fp32.

    Butterflies go from the lowest index bit to the highest, as in the CUDA kernels, so that sums round alike.
    """
    n = x.shape[-1]
    x = x.float()
    width = 1
    while width < n:
        low, high = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        width *= 2
    return x * n**-0.5


def sinkhorn(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, iters: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixes of a hyper-connection split into the gates pre and post and a Sinkhorn-normalised comb.

    mixes fp32 [T, 24] = 4 | 4 | 16, scale fp32 [3], base fp32 [24]; iters >= 1 counts column normalisations.

        pre  = sigmoid(m0 s0 + b0) + eps        [T, 4]
        post = 2 sigmoid(m1 s1 + b1)            [T, 4]
        comb = m2 s2 + b2 as [T, 4, 4]: row softmax, + eps, columns / (sum + eps),
               then iters - 1 times rows / (sum + eps), columns / (sum + eps)

    Returns (pre [T, 4], post [T, 4], comb [T, 4, 4]) fp32; comb's first index is the source stream.
    Source: the mHC equations of DeepSeek-V4; SGLang `layers/mhc.py` computes the same.
    """
    m, b = mixes.float(), base.float()
    pre = torch.sigmoid(m[:, :4] * scale[0] + b[:4]) + eps
    post = 2 * torch.sigmoid(m[:, 4:8] * scale[1] + b[4:8])
    comb = (m[:, 8:] * scale[2] + b[8:]).view(-1, 4, 4).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return pre, post, comb


def sqrt_softplus(x: torch.Tensor) -> torch.Tensor:
    """sqrt(log(1 + exp(x))) without overflow; fp32."""
    x = x.float()
    return (x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))).sqrt()


def row_chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Slices that cover `rows` rows with at most CHUNK_BYTES of working memory each (at least one row)."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
