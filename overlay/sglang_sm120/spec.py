"""What every tool knows of an op: `spec.py` of its folder, read by `ops`.

The real model's calls are generated from its `config.json`. On meta tensors they are what the compile gate, the warm-up
and the scratch plan rehearse; on a GPU, with random values, they are the benchmarks' and the parity tests' inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .formats import indexer_page, kv_page
from .limits import PAGE

C4_PAGE, C128_PAGE, WINDOW_PAGE = PAGE // 4, PAGE // 128, PAGE
"""Entries per page of the three caches."""
Arguments = dict[str, Any]
Calls = Iterator[tuple[str, Arguments]]


@dataclass(frozen=True)
class Call:
    """One call: `op` by name, what it is in the model, and its keyword arguments."""

    op: str
    label: str
    arguments: Arguments


@dataclass(frozen=True)
class Spec:
    """What an op's folder says of the op besides its reference and its providers. Ops with Triton kernels have `calls`.

    calls(make, config, tp, rows, context): label and arguments of each call of one pass on one of `tp` ranks.
    traffic(arguments): bytes read and written once, and floating-point operations, that a call cannot do without.
    aim(arguments, rows, context): what a call at TP 2 is to reach: `bench`'s name of a share, at least, or of a time.
    tunables: by family of kernels, (shape, rows, heuristic's) -> configurations that `make tune` tries.
    served: a server with the step calls it, and warm-up compiles its Triton kernels; of models that `where` names.
    speculates: with EAGLE alone.
    where(config): whether a model's step calls it, by its `config.json`; by default each does.
    lent: patched SGLang's own forward calls it too, in its prefill and in the graphs of that.
    context: powers of two of the context that launch the same kernels; 0 where its arguments do not depend on it.
    streams: how many of `streams` call it, beside the step's own.
    by_experts: expert parallelism divides its experts by number.
    trials(arguments): name and table of launches that no default takes, whose errors `prove` tells and does not judge.
    exact: its results are not rounded. scores: the op by whose result it chooses. problem(arguments, *results): where
    equal results are not what is asked, of another choice or of what was written in place, what is wrong with them.
    synchronises: its reference asks the GPU for sizes, so that no graph can hold it.
    prefill: what SGLang's own forward runs in its place on SM12x, as its source says.
    """

    calls: Callable[[Inputs, dict[str, Any], int, int, int], Calls] | None = None
    traffic: Callable[[Arguments], tuple[int, int]] | None = None
    aim: Callable[[Arguments, int, int], tuple[str, float] | None] = lambda *_: None
    tunables: Mapping[str, Callable[[tuple[int, ...], int, Any], Iterator[Any]]] = field(default_factory=dict)
    trials: Callable[[Arguments], Mapping[str, Mapping[Any, Any]]] = lambda _: {}
    served: bool = False
    speculates: bool = False
    where: Callable[[dict[str, Any]], bool] = lambda _: True
    lent: bool = False
    context: int = 0
    streams: int = 0
    by_experts: bool = False
    exact: bool = False
    scores: str | None = None
    problem: Callable[..., str | None] | None = None
    synchronises: bool = False
    prefill: str | None = None


class Inputs:
    """Random inputs on a device; on `meta` shapes and dtypes alone."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._rng = torch.Generator(device).manual_seed(seed) if device.type != "meta" else None

    def _empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal values times scale."""
        if self._rng is None:
            return self._empty(*shape, dtype=dtype)
        return (torch.randn(shape, generator=self._rng, device=self.device) * scale).to(dtype)

    def bf16(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal values times scale, bf16."""
        return self.normal(*shape, scale=scale, dtype=torch.bfloat16)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Uniform integers low … high - 1."""
        if self._rng is None:
            return self._empty(*shape, dtype=dtype)
        return torch.randint(low, high, shape, generator=self._rng, device=self.device, dtype=dtype)

    def fp8(self, *shape: int) -> torch.Tensor:
        """E4M3 values of every magnitude up to 30, both signs, no NaN."""
        if self._rng is None:
            return self._empty(*shape, dtype=torch.float8_e4m3fn)
        magnitude = self.integers(0, 0x5F, *shape, dtype=torch.uint8)
        return (magnitude | self.integers(0, 2, *shape, dtype=torch.uint8) << 7).view(torch.float8_e4m3fn)

    def e8m0(self, *shape: int, around: int = -10) -> torch.Tensor:
        """Scales 2^(around - 2) … 2^(around + 2)."""
        return self.integers(125 + around, 130 + around, *shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)

    def distinct(self, rows: int, width: int, total: int) -> torch.Tensor:
        """Different slots int32 [rows, width] of 0 … total - 1 in each row, scattered."""
        if self._rng is None:
            return self._empty(rows, width, dtype=torch.int32)
        start = self.integers(0, total, rows, 1, dtype=torch.int64)
        return ((start + torch.arange(width, device=self.device) * 7919) % total).int()

    def kv_pool(self, entries: int, page_size: int) -> torch.Tensor:
        """KV pages that hold `entries` random vectors."""
        pages = -(-entries // page_size)
        pool = torch.zeros(pages, kv_page.page_bytes(page_size), dtype=torch.uint8, device=self.device)
        if self._rng is not None:
            slots = torch.arange(entries, device=self.device)
            kv_page.store(pool, slots, self.bf16(entries, kv_page.DIM), page_size)
        return pool

    def indexer_pool(self, entries: int) -> torch.Tensor:
        """Indexer pages that hold `entries` random keys."""
        pool = torch.zeros(
            -(-entries // C4_PAGE), indexer_page.page_bytes(C4_PAGE), dtype=torch.uint8, device=self.device
        )
        if self._rng is not None:
            slots = torch.arange(entries, device=self.device)
            indexer_page.store(pool, slots, self.normal(entries, indexer_page.DIM), C4_PAGE)
        return pool


def nbytes(*values: Any) -> int:
    """Bytes of tensors, also of those in tuples; other values left out."""
    tensors = (value.nbytes for value in values if isinstance(value, torch.Tensor))
    return sum(tensors) + sum(nbytes(*value) for value in values if isinstance(value, tuple))
