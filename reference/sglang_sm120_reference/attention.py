"""Attention of one layer over a whole prompt: window, compressed entries, indexer. No cache, no pages.

What a server would keep in its cache is quantised and dequantised here with the same formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_sm120.checkpoint.config import HEAD_DIM, INDEX_HEAD_DIM, ROPE_DIM, WINDOW, ReferenceConfig
from sglang_sm120.formats import indexer_page, kv_page

from .checkpoint import Checkpoint
from .defects import Defect

ROWS = 128  # query tokens at a time; bounds the score matrix to rows x heads x (256 + entries)

Rounding = Callable[[Tensor], Tensor]


@dataclass
class IndexMargin:
    """How firmly the indexer's selection stands, per token; infinite gap and no stake where all is selected.

    gap: (score of the last selected - score of the first rejected entry) / |former|. stake: the share of a
    head's softmax that the entries within `band` of the threshold hold or would hold, an upper bound over the
    heads (the sum of each entry's largest share).
    """

    gap: Tensor
    stake: Tensor


class Attention:
    """Attention of the layer whose tensors start with `prefix` ("layers.3.attn.")."""

    def __init__(
        self,
        weights: Checkpoint,
        prefix: str,
        ratio: int,
        real: torch.dtype,
        rounding: Rounding,
        defect: Defect | None,
        band: float,
        hide_entries: bool,
    ) -> None:
        self.config: ReferenceConfig = weights.config
        self.ratio, self.real, self.rounding, self.defect, self.band = ratio, real, rounding, defect, band
        self._weights, self._prefix, self._hide = weights, prefix, hide_entries

    def __call__(self, x: Tensor) -> tuple[Tensor, IndexMargin]:
        """x [T, H], the normed input, to the output [T, H] and the indexer's margins [T]."""
        tokens = x.shape[0]
        turn = rotation(self.config, self.ratio, tokens, self.real)
        qr, q = self.queries(x, turn)
        keys = self.keys(x, turn)
        entries = self._cached(self._compress(x, "compressor.", HEAD_DIM)) if self.ratio else keys[:0]
        margin = IndexMargin(torch.full((tokens,), math.inf), torch.zeros(tokens))
        scores = self._index(x, qr) if self.ratio == 4 and len(entries) > self.config.index_topk else None
        out = torch.empty_like(q)
        for start in range(0, tokens, ROWS):
            rows = torch.arange(start, min(start + ROWS, tokens))
            out[rows] = self._attend(rows, q[rows], keys, entries, scores, margin)
        return self.output(out, turn), margin

    def queries(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] at positions turned by `turn` [T, 32] to the low rank [T, R] and the queries [T, h, 512]."""
        qr = self.rounding(rms_norm(self._linear(x, "wq_a"), self._w("q_norm.weight"), self.config.rms_norm_eps))
        q = self._linear(qr, "wq_b").unflatten(-1, (self.config.num_attention_heads, HEAD_DIM))
        return qr, self.rounding(self._rope(rms_norm(q, None, self.config.rms_norm_eps), turn.unsqueeze(1)))

    def keys(self, x: Tensor, turn: Tensor) -> Tensor:
        """The window's keys [T, 512] as read back from a page; they are the values too."""
        kv = rms_norm(self._linear(x, "wkv"), self._w("kv_norm.weight"), self.config.rms_norm_eps)
        return self._cached(self._rope(kv, turn))

    def output(self, out: Tensor, turn: Tensor) -> Tensor:
        """The heads' sums [T, h, 512], turned back and projected [T, H]."""
        if self.defect is not Defect.NO_INVERSE_ROPE:
            out = self._rope(out, turn.conj().unsqueeze(1))
        out = self.rounding(out)
        out = out.unflatten(1, (self.config.o_groups, -1)).flatten(2)
        wo_a = self._w("wo_a.weight").unflatten(0, (self.config.o_groups, self.config.o_lora_rank))
        low = self.rounding(torch.einsum("tgd,grd->tgr", out, wo_a))
        return self._linear(low.flatten(1), "wo_b")

    @property
    def sink(self) -> Tensor:
        """What each head's softmax has beside the keys [h]."""
        sink = self._w("attn_sink")
        return torch.full_like(sink, -math.inf) if self.defect is Defect.SINK_DROPPED else sink

    def _attend(
        self,
        rows: Tensor,
        q: Tensor,
        keys: Tensor,
        entries: Tensor,
        scores: Tensor | None,
        margin: IndexMargin,
    ) -> Tensor:
        """One softmax over window, visible entries and sink: q [R, h, 512] of tokens `rows` -> [R, h, 512]."""
        window = WINDOW - (self.defect is Defect.WINDOW_OFF_BY_ONE)
        last = int(rows[-1])
        near = torch.arange(max(0, int(rows[0]) - window + 1), last + 1)
        age = rows.unsqueeze(1) - near
        seen = self._entries_seen(rows)
        far = torch.arange(min(len(entries), int(seen[-1])))
        chosen = far < seen.unsqueeze(1)
        selecting = seen > self.config.index_topk if scores is not None else torch.zeros_like(seen, dtype=torch.bool)
        if scores is not None and selecting.any():
            selected = self._select(scores[rows][:, far], seen)
            chosen = torch.where(selecting.unsqueeze(1), selected, chosen)
        allowed = torch.cat(((age >= 0) & (age < window), chosen), dim=1).unsqueeze(1)
        values = torch.cat((keys[near], entries[far]))
        logits = (q @ values.T) * HEAD_DIM**-0.5
        masked = logits.masked_fill(~allowed, -math.inf)
        sink = self.sink.expand(len(rows), -1).unsqueeze(-1)
        peak = torch.maximum(masked.amax(-1, keepdim=True), sink)
        weights = (masked - peak).exp()
        total = weights.sum(-1, keepdim=True) + (sink - peak).exp()
        if scores is not None and selecting.any():
            shares = ((logits[..., len(near) :] - peak).exp() / total).amax(1)
            self._record(margin, rows[selecting], scores[rows][:, far][selecting], seen[selecting], shares[selecting])
        return (weights / total) @ values

    def _entries_seen(self, rows: Tensor) -> Tensor:
        """How many compressed entries are complete at each token, none where they are hidden."""
        if not self.ratio or self._hide:
            return torch.zeros_like(rows)
        early = self.ratio == 128 and self.defect is Defect.C128_ENTRY_EARLY
        return rows // self.ratio + 1 if early else (rows + 1) // self.ratio

    def _select(self, scores: Tensor, seen: Tensor) -> Tensor:
        """The index_topk best of the first `seen` entries: scores [R, E] -> bool [R, E]."""
        entry = torch.arange(scores.shape[1])
        if self.defect is Defect.INDEXER_OFF_BY_ONE_BLOCK:
            before = (entry - 1) % seen.unsqueeze(1)
            scores = scores.gather(1, before.clamp(max=scores.shape[1] - 1))
        scores = scores.masked_fill(entry >= seen.unsqueeze(1), -math.inf)
        count = min(self.config.index_topk, scores.shape[1])
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)

    def _record(self, margin: IndexMargin, rows: Tensor, scores: Tensor, seen: Tensor, shares: Tensor) -> None:
        k = self.config.index_topk
        visible = torch.arange(scores.shape[1]) < seen.unsqueeze(1)
        top = scores.masked_fill(~visible, -math.inf).topk(k + 1, dim=1).values
        last, first_out = top[:, k - 1 : k], top[:, k : k + 1]
        margin.gap[rows] = ((last - first_out) / last.abs()).squeeze(1).float()
        close = visible & ((scores - last).abs() <= self.band * last.abs())
        margin.stake[rows] = (shares * close).sum(1).float()

    def _index(self, x: Tensor, qr: Tensor) -> Tensor:
        """Scores of every entry for every token [T, E]; entries a token cannot see yet are scored too."""
        heads = self.config.index_n_heads
        keys, key_scale = indexer_page.quantise(self._compress(x, "indexer.compressor.", INDEX_HEAD_DIM).float())
        turn = rotation(self.config, self.ratio, len(x), self.real).unsqueeze(1)
        q = self._linear(qr, "indexer.wq_b").unflatten(-1, (heads, INDEX_HEAD_DIM))
        queries, q_scale = indexer_page.quantise((rope(q, turn) @ hadamard(self.real)).float())
        weight = self._linear(x, "indexer.weights_proj") * (INDEX_HEAD_DIM**-0.5 * heads**-0.5) * q_scale
        scores = torch.empty(len(x), len(keys), dtype=self.real)
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            dots = (queries[rows].to(self.real) @ keys.to(self.real).T).relu()
            scores[rows] = (dots * weight[rows].unsqueeze(-1)).sum(1)
        return scores if self.defect is Defect.INDEXER_SCALE_DROPPED else scores * key_scale

    def _compress(self, x: Tensor, name: str, dim: int) -> Tensor:
        """Entries of all complete blocks [T // ratio, dim], normed and turned, not yet quantised."""
        ratio = self.ratio
        blocks = len(x) // ratio
        x = x[: blocks * ratio]
        kv = (x @ self._w(name + "wkv.weight").T).unflatten(0, (blocks, ratio))
        gate = (x @ self._w(name + "wgate.weight").T).unflatten(0, (blocks, ratio))
        if self.defect is not Defect.APE_DROPPED:
            gate = gate + self._w(name + "ape")
        if ratio == 4:
            kv = torch.cat((_previous(kv[..., :dim], 0.0), kv[..., dim:]), dim=1)
            before = _previous(gate[..., :dim], -math.inf)
            if self.defect is Defect.C4_WITHOUT_OVERLAP:
                before = torch.full_like(before, -math.inf)
            gate = torch.cat((before, gate[..., dim:]), dim=1)
        pooled = (gate.softmax(1) * kv).sum(1)
        entries = rms_norm(pooled, self._w(name + "norm.weight"), self.config.rms_norm_eps)
        turn = rotation(self.config, ratio, len(x), self.real)[::ratio]
        if dim == INDEX_HEAD_DIM:
            return rope(entries, turn) @ hadamard(self.real)
        return self._rope(entries, turn)

    def _cached(self, kv: Tensor) -> Tensor:
        """[N, 512] as read back from a KV page."""
        return kv_page.dequantise(*kv_page.quantise(kv.float())).to(self.real)

    def _rope(self, x: Tensor, turn: Tensor) -> Tensor:
        if self.defect is Defect.ROPE_ON_FIRST_CHANNELS:
            return rope(x.roll(-ROPE_DIM, -1), turn).roll(ROPE_DIM, -1)
        return rope(x, turn)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self.rounding(x @ self._w(name + ".weight").T)

    def _w(self, name: str) -> Tensor:
        return self._weights.weight(self._prefix + name)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, times `weight` if given."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rotation(config: ReferenceConfig, ratio: int, positions: int, real: torch.dtype) -> Tensor:
    """e^(i p f_c) for positions 0 .. positions - 1 and the 32 channel pairs, complex [positions, 32].

    Window-only layers: f_c = theta^(-c/32). Layers with compressed entries use compress_rope_theta and YaRN:
    pairs that turn more than beta_fast times within the original context keep their frequency, pairs that turn
    less than beta_slow times have it divided by the factor, linearly in the pair's index between. Angles are
    rounded to fp32 as servers tabulate them.
    """
    pairs = ROPE_DIM // 2
    theta = config.compress_rope_theta if ratio else config.rope_theta
    frequency = 1.0 / (theta ** (torch.arange(pairs, dtype=torch.float32) * 2 / ROPE_DIM))
    if ratio:

        def pair_turning(times: float) -> float:
            per_turn = config.yarn_original_positions / (times * 2 * math.pi)
            return pairs * math.log(per_turn) / math.log(theta)

        low = max(math.floor(pair_turning(config.yarn_beta_fast)), 0)
        high = min(math.ceil(pair_turning(config.yarn_beta_slow)), ROPE_DIM - 1)
        slowed = ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        frequency = frequency / config.yarn_factor * slowed + frequency * (1 - slowed)
    angle = torch.outer(torch.arange(positions), frequency).to(real)
    return torch.polar(torch.ones_like(angle), angle)


def rope(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the last 64 channels of x [..., D], taken as 32 interleaved pairs, by `turn` [..., 32]."""
    pairs = torch.view_as_complex(x[..., -ROPE_DIM:].unflatten(-1, (-1, 2)).contiguous())
    return torch.cat((x[..., :-ROPE_DIM], torch.view_as_real(pairs * turn).flatten(-2)), dim=-1)


def hadamard(real: torch.dtype) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix [128, 128]."""
    h = torch.ones(1, 1, dtype=real)
    while len(h) < INDEX_HEAD_DIM:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h * INDEX_HEAD_DIM**-0.5


def _previous(blocks: Tensor, first: float) -> Tensor:
    """Each block's predecessor; `first` stands for the predecessor that the first block lacks."""
    return torch.cat((torch.full_like(blocks[:1], first), blocks[:-1]))
