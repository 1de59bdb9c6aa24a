"""What the ops' case lists are made of: named inputs and how results are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sglang_sm120.formats import fp8_block, indexer_page, kv_page, mxfp4, nvfp4
from sglang_sm120.tolerance import Tolerance

POISON = 0xFF
"""Fills memory nobody may read: NaN as E4M3, bf16, fp32 and E8M0, -1 as an index."""


class Maker:
    """Random inputs on a device, the same for a seed on every device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal values times scale."""
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype).to(self.device)

    def bf16(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal values times scale, bf16."""
        return self.normal(*shape, scale=scale, dtype=torch.bfloat16)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Uniform integers low … high - 1."""
        return torch.randint(low, high, shape, generator=self._generator).to(dtype).to(self.device)

    def choice(self, n: int, k: int) -> torch.Tensor:
        """k different integers of 0 … n - 1 in random order, int32 [k]."""
        return torch.randperm(n, generator=self._generator)[:k].int().to(self.device)

    def tensor(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Given values."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def fp8_weight(self, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight [n, k] whose products with normal inputs are of order one, and its E8M0 scales."""
        return fp8_block.quantise(self._uneven(fp8_block.BLOCK, fp8_block.BLOCK, n, k))

    def mxfp4_weight(self, e: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed weights [e, n, k/2] of the same magnitude and their E8M0 scales [e, n, k/32], swizzled."""
        packed, scale = mxfp4.quantise(self._uneven(1, mxfp4.BLOCK, e, n, k))
        return packed, mxfp4.swizzle_scales(scale)

    def nvfp4_weight(self, e: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same in NVFP4: packed [e, n, k/2], E4M3 scales [e, n, k/16], swizzled, and uneven factors fp32 [e]."""
        matrices = [nvfp4.quantise(self._uneven(1, nvfp4.BLOCK, n, k)) for _ in range(e)]
        packed, scale, factor = (torch.stack(parts).to(self.device) for parts in zip(*matrices, strict=True))
        uneven = torch.exp2(self.integers(-1, 2, e).float())
        return packed, mxfp4.swizzle_scales(scale), factor * uneven

    def _uneven(self, rows: int, columns: int, *shape: int) -> torch.Tensor:
        """Normal values whose magnitude changes from block to block, so that a wrong scale shows."""
        *outer, n, k = shape
        exponent = self.integers(-2, 3, *outer, -(-n // rows), -(-k // columns))
        factor = torch.exp2(exponent.float())
        factor = factor.repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(columns, -1)[..., :k]
        return self.normal(*shape, scale=k**-0.5) * factor

    def freqs_cis(self, positions: int = 512) -> torch.Tensor:
        """A table of unit complex numbers, complex64 [positions, 32]."""
        angle = torch.arange(positions).unsqueeze(1) * 10000 ** (-torch.arange(32) / 32)
        return torch.polar(torch.ones_like(angle), angle).to(self.device)

    def poisoned(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """Memory that nobody may read before writing it."""
        size = torch.empty(0, dtype=dtype).element_size()
        flat = torch.full((*shape[:-1], shape[-1] * size), POISON, dtype=torch.uint8, device=self.device)
        return flat.view(dtype)

    def pool(self, pages: int, page_bytes: int, wide: bool = False) -> torch.Tensor:
        """A poisoned page pool uint8 [pages, page_bytes] that is a slice of longer rows.

        wide: rows of 2^27 bytes, of which the last pages lie past 2^31 bytes; only the slice is touched, so
        the rest costs address space and no memory.
        """
        stride = 1 << 27 if wide else page_bytes + 64
        pool = torch.empty((pages, stride), dtype=torch.uint8, device=self.device)[:, :page_bytes]
        return pool.fill_(POISON)

    def kv_pool(
        self, page_size: int, slots: torch.Tensor, pages: int, wide: bool = False, scale: float = 1.0
    ) -> torch.Tensor:
        """A pool with random vectors times scale at slots and poison elsewhere."""
        pool = self.pool(pages, kv_page.page_bytes(page_size), wide)
        live = slots[slots >= 0].unique()
        kv_page.store(pool, live, self.normal(len(live), kv_page.DIM, scale=scale), page_size)
        return pool

    def indexer_pool(self, page_size: int, slots: torch.Tensor, pages: int, wide: bool = False) -> torch.Tensor:
        """The same for indexer keys."""
        pool = self.pool(pages, indexer_page.page_bytes(page_size), wide)
        live = slots[slots >= 0].unique()
        indexer_page.store(pool, live, self.normal(len(live), indexer_page.DIM), page_size)
        return pool

    def slots(self, total: int, width: int, lengths: list[int], gaps: bool = False) -> torch.Tensor:
        """Slots int32 [len(lengths), width] of 0 … total - 1, each row different ones, -1 beyond its length.

        gaps: every third slot inside is -1 too.
        """
        rows = torch.full((len(lengths), width), -1, dtype=torch.int32, device=self.device)
        for row, length in enumerate(lengths):
            rows[row, :length] = self.choice(total, length)
            if gaps:
                rows[row, :length:3] = -1
        return rows


def returned(inputs: dict[str, Any], result: Any) -> Any:
    """The result itself."""
    return result


def stored(inputs: dict[str, Any], result: Any) -> torch.Tensor:
    """Every vector of the pool `pages` after a store of `kv`, poison as zeros, so that stray writes show."""
    pages, page_size = inputs["pages"], inputs["page_size"]
    slots = torch.arange(pages.shape[0] * page_size, device=pages.device)
    if inputs["kv"].shape[-1] == kv_page.DIM:
        vectors = kv_page.load(pages, slots, page_size).float()
    else:
        vectors = indexer_page.dequantise(*indexer_page.load(pages, slots, page_size))
    return vectors.nan_to_num()


class Case(NamedTuple):
    """One call of an op.

    build makes the arguments. observe(arguments, result) gives the tensor or tensors to compare, from the
    result or from arguments written in place; mutates names those arguments, every other one must stay as it
    is.
    """

    name: str
    tolerance: Tolerance
    build: Callable[[Maker], dict[str, Any]]
    observe: Callable[[dict[str, Any], Any], Any] = returned
    mutates: tuple[str, ...] = ()
