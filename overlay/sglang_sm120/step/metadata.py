"""What one pass needs of SGLang's pools and attention metadata, as the arguments of the ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..limits import PAGE
from ..streams import IN_ORDER, Beside

INDEX_PAGE = PAGE // 4
"""Entries of an indexer page, whose ratio is 4."""


class Keys(NamedTuple):
    """Pages uint8 [P, bytes] of `page_size` keys, and for each row the slots int32 [T, W] it sees and how many."""

    pages: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    page_size: int


MaybeKeys = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int | None]


class Plan(NamedTuple):
    """A compressor plan as in `formats.compress_plan`, and the slots int [T] where finished blocks are stored."""

    plans: tuple[torch.Tensor, ...]
    is_decode: bool
    out_slots: torch.Tensor


class Pass:
    """One forward pass over `rows` tokens: decode, verification or a chunk of a prompt.

    Args:
        view: SGLang's `ForwardView` of the running pass.
        forward_batch: its `ForwardBatch`.
        positions: int [T].
        beside: the streams for parts of a layer that need nothing of each other.
    """

    def __init__(self, view: Any, forward_batch: Any, positions: torch.Tensor, beside: Beside = IN_ORDER) -> None:
        self.beside = beside
        self.positions = positions
        self.rows = positions.shape[0]
        self.window_slots = self._cut(view.swa_out_cache_loc(forward_batch))
        self._pool = view.kv_pool.pool
        self._metadata = view.metadata
        self._core = view.metadata.core_attn_metadata

    def window(self, layer_id: int) -> Keys:
        """The last 128 tokens of each row."""
        core, pool = self._core, self._pool
        return Keys(
            pool.get_swa_key_buffer_radix(layer_id).view(torch.uint8),
            self._cut(core.swa_page_indices),
            self._cut(core.swa_topk_lengths),
            pool.get_swa_key_page_size(),
        )

    def extra(self, layer_id: int, ratio: int) -> Keys:
        """The compressed entries of each row: of ratio 4 those that `index_slots` names, of ratio 128 all."""
        core, pool = self._core, self._pool
        return Keys(
            pool.get_extra_key_buffer(layer_id).view(torch.uint8),
            self._cut(core.sparse_page_indices(ratio)),
            self._cut(core.sparse_topk_lengths(ratio)),
            pool.get_extra_key_page_size(layer_id),
        )

    def index_pages(self, layer_id: int) -> torch.Tensor:
        """The indexer's keys uint8 [P, 64 * 132]."""
        return self._pool.get_index_k_with_scale_buffer(layer_id).view(torch.uint8)

    def index_table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Index pages int32 [T, pages] of each row's request, and how many entries each row sees."""
        return self._cut(self._metadata.indexer_metadata.page_table), self._cut(self._core.c4_topk_lengths_raw)

    def index_slots(self) -> torch.Tensor:
        """Where the indexer's choice goes, int32 [T, >= k]: each layer of ratio 4 writes it anew."""
        return self._cut(self._core.c4_sparse_page_indices)

    def ring(self, layer_id: int, ratio: int, of_indexer: bool) -> torch.Tensor:
        """The compressor's state ring fp32 [pages, ratio, D]."""
        pool = self._pool
        states = (pool.get_indexer_compress_states if of_indexer else pool.get_attention_compress_states)(layer_id)
        rows = states.kv_score_buffer.kv_score
        return rows.view(-1, ratio, rows.shape[-1])

    def plan(self, ratio: int) -> Plan:
        """Which tokens end a block of `ratio`, and which stay in the ring."""
        made = getattr(self._metadata, f"c{ratio}_compress_metadata")
        plans = (self._cut(made.plan_d),) if made.is_decode else (made.plan_c, made.plan_w)
        return Plan(plans, made.is_decode, self._cut(getattr(self._core, f"c{ratio}_out_loc")))

    def _cut(self, rows: torch.Tensor) -> torch.Tensor:
        # SGLang may have made the metadata of a larger batch that this one is padded to.
        return rows[: self.rows]
