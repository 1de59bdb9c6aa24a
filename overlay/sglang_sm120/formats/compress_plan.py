"""Compressor plans: which tokens to compress, and which to keep for a later block.

SGLang's CUDA planner and kernels (`compress_v2.cuh`) exchange them as uint8 rows, little endian, no padding:

    compress plan, 16 B   uint32 seq_len       tokens up to and including the block's last one
                          uint16 ragged_id     that token's row in the batch of this step
                          uint16 buffer_len    how many of the block's leading tokens lie in the state ring
                          int32  read_page_0   ring page of the previous block (ratio 4)
                          int32  read_page_1   ring page of this block
    write plan, 8 B       uint32 ragged_id     the token's row in the batch of this step
                          int32  write_loc     its row in the state ring
    decode plan, 16 B     uint32 seq_len · int32 write_loc · int32 read_page_0 · int32 read_page_1

A row whose first field is 2^32 - 1 is invalid (padding). ragged_id has 16 bits in a compress plan, so a step
has at most 65,536 tokens. When buffer_len is 0 no ring page is read; read_page_0 is then -1 and read_page_1
the request's index in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..limits import WINDOW, drafts_kept

MAX_TOKENS = 65_536
"""Tokens one step may have."""


class CompressPlan(NamedTuple):
    """Fields of a compress plan, int64 [N] each; seq_len -1 marks an invalid row."""

    seq_len: torch.Tensor
    ragged_id: torch.Tensor
    buffer_len: torch.Tensor
    read_page_0: torch.Tensor
    read_page_1: torch.Tensor

    def pack(self) -> torch.Tensor:
        """uint8 [N, 16]."""
        return _words(self.seq_len, self.ragged_id | self.buffer_len << 16, self.read_page_0, self.read_page_1)

    @classmethod
    def unpack(cls, plan: torch.Tensor) -> CompressPlan:
        """From uint8 [N, 16]."""
        seq_len, ids, page_0, page_1 = _fields(plan, 4)
        return cls(seq_len, ids & 0xFFFF, ids >> 16 & 0xFFFF, page_0, page_1)


class WritePlan(NamedTuple):
    """Fields of a write plan, int64 [N] each; ragged_id -1 marks an invalid row."""

    ragged_id: torch.Tensor
    write_loc: torch.Tensor

    def pack(self) -> torch.Tensor:
        """uint8 [N, 8]."""
        return _words(*self)

    @classmethod
    def unpack(cls, plan: torch.Tensor) -> WritePlan:
        """From uint8 [N, 8]."""
        return cls(*_fields(plan, 2))


class DecodePlan(NamedTuple):
    """Fields of a decode plan, int64 [N] each."""

    seq_len: torch.Tensor
    write_loc: torch.Tensor
    read_page_0: torch.Tensor
    read_page_1: torch.Tensor

    def pack(self) -> torch.Tensor:
        """uint8 [N, 16]."""
        return _words(*self)

    @classmethod
    def unpack(cls, plan: torch.Tensor) -> DecodePlan:
        """From uint8 [N, 16]."""
        return cls(*_fields(plan, 4))


class Ring(NamedTuple):
    """Where the state ring keeps a token of a request (a row of req_to_token), in rows.

    Ratio 4: one ring of `size` rows per window page. req_to_token int [R, L] maps (request, position) to a full slot,
    full_to_swa int [N] that to a window slot s; the row is s // swa_page_size * size + s % size. A prefix hit finds the
    last block of each window page there.
    Ratio 128: one ring per request, row request * size + position % size; the two maps are not read. A prefix ends with
    a window page and so with a block, of which a hit needs nothing.

    Ratio 4 by request (`use_req_ring`) belongs to SGLang's unified pool, which is AMD's only.
    """

    ratio: int
    req_to_token: torch.Tensor
    full_to_swa: torch.Tensor
    swa_page_size: int
    size: int

    def check(self) -> None:
        """Raise ValueError for a ratio or sizes that no ring can have."""
        if self.ratio not in (4, 128):
            raise ValueError(f"compress ratio is {self.ratio} and needs to be 4 or 128.")
        if self.size % self.ratio or self.swa_page_size % self.size:
            raise ValueError(
                f"ring of {self.size} rows needs to be a multiple of ratio {self.ratio} and to divide the "
                f"window page of {self.swa_page_size} tokens."
            )

    @property
    def window(self) -> int:
        """Tokens that one compressed entry is made of; ratio 4 overlaps with the block before."""
        return WINDOW[self.ratio]

    @property
    def drafts(self) -> int:
        """Last tokens of a step that may be drafts, of which only the first are accepted; 0 in the smallest ring."""
        return drafts_kept(self.ratio, self.size)

    def row(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Ring rows int64 of tokens at position int [N] of request int [N]."""
        if self.ratio == 128:
            return request.long() * self.size + position.long() % self.size
        slot = self.full_to_swa[self.req_to_token[request.long(), position.long()].long()].long()
        return slot // self.swa_page_size * self.size + slot % self.size

    def page(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Ring pages of `ratio` rows that hold those tokens."""
        return self.row(request, position) // self.ratio


def _words(*fields: torch.Tensor) -> torch.Tensor:
    # Through int64 and a wrapping cast: word 1 of a compress plan uses all 32 bits.
    return torch.stack([field.long() for field in fields], dim=-1).to(torch.int32).view(torch.uint8)


def _fields(plan: torch.Tensor, words: int) -> list[torch.Tensor]:
    if plan.dtype != torch.uint8 or plan.dim() != 2 or plan.shape[1] != 4 * words:
        raise ValueError(f"plan is {plan.dtype} {list(plan.shape)} and needs torch.uint8 [N, {4 * words}].")
    return list(plan.contiguous().view(torch.int32).long().unbind(-1))
