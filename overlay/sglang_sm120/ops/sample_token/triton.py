"""Triton provider of `sample_token`: the best of each part of a row, then the best of the parts."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels
from ...registry import Arguments
from .._pdl_triton import wait
from . import LEAST, sample_token

PART = 4096
"""Logits of one block: a row of DeepSeek-V4's vocabulary has 32 of them."""
_LEAST = tl.constexpr(LEAST)


@triton.jit(do_not_specialize=["vocabulary", "parts", "stride", "each"])
def _best_of_part(
    logits_ptr, temperature_ptr, noise_ptr, best_ptr, place_ptr, vocabulary, parts, stride, each, PART: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    live = at < vocabulary
    wait()
    logits = tl.load(logits_ptr + row * stride + at, mask=live, other=-float("inf"))
    noise = tl.load(noise_ptr + row * vocabulary + at, mask=live, other=1.0)
    scores = logits / tl.load(temperature_ptr + row // each) - tl.log(tl.maximum(noise, _LEAST))
    scores = tl.where(scores == scores, scores, -float("inf"))  # a comparison with NaN could choose no token at all
    best, place = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_ptr + row * parts + part, best)
    tl.store(place_ptr + row * parts + part, part * PART + place)


@triton.jit(do_not_specialize=["parts"])
def _best_of_row(best_ptr, place_ptr, tokens_ptr, parts, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    wait()
    best = tl.load(best_ptr + row * parts + lane, mask=lane < parts, other=-float("inf"))
    _, part = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens_ptr + row, tl.load(place_ptr + row * parts + part))


def _accepts(a: Arguments) -> str | None:
    dtypes = {a.logits.dtype, a.temperature.dtype, a.noise.dtype}
    if dtypes != {torch.float32}:
        return f"dtypes are {', '.join(sorted(map(str, dtypes)))}, and all need torch.float32."
    if a.logits.stride(1) != 1 or not a.noise.is_contiguous() or not a.temperature.is_contiguous():
        return f"logits have strides {list(a.logits.stride())}, needed a row side by side, and the others contiguous."
    return None


@sample_token.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def sample_token_triton(a: Arguments) -> torch.Tensor:
    """As the reference but for scores that differ by rounding alone."""
    rows, vocabulary = a.logits.shape
    parts = triton.cdiv(vocabulary, PART)
    best, place = kernels.scratch(
        "sample_token", a.logits.device, ((rows, parts), torch.float32), ((rows, parts), torch.int32)
    )
    tokens = torch.empty(rows, dtype=torch.int32, device=a.logits.device)
    kernels.launch(
        _best_of_part, (rows, parts), a.logits, a.temperature, a.noise, best, place, vocabulary, parts,
        a.logits.stride(0), rows // a.temperature.shape[0], PART=PART, num_warps=8,
    )  # fmt: skip
    lanes = triton.next_power_of_2(parts)
    kernels.launch(_best_of_row, (rows,), best, place, tokens, parts, LANES=lanes, num_warps=1)
    return tokens
