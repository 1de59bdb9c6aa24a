"""DeepSeek-V4 as `sglang_sm120_reference.oracle` computes it, batched and differentiable, in plain PyTorch.

Sequences of one length, no cache and no pages; what a cache or checkpoint would round is rounded here with
straight-through gradients (`quantise`). Matrix products run in `Mode.dtype`; what the oracle keeps in fp32 stays fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_sm120.checkpoint.config import HEAD_DIM, INDEX_HEAD_DIM, ROPE_DIM, WINDOW, DSparkConfig, ReferenceConfig
from sglang_sm120.checkpoint.layout import Parameter, Storage, parameters
from sglang_sm120_reference.attention import hadamard, rms_norm, rotation
from sglang_sm120_reference.weights import draw
from training import quantise
from training.sinkhorn import sinkhorn

SEGMENT = 2048
"""Query tokens whose attention is computed at a time: a multiple of 128; earlier ones see fewer entries."""

INDEX_TEMPERATURE = 32.0
"""Factor on index scores in the distillation loss: only their order counts when serving, the softmax needs range."""

PAD = 2

Weights = dict[str, Tensor]


class Mode(NamedTuple):
    """How to run the model.

    dtype: of matrix products and activations, bf16 or fp32. select: the indexer's top-k decides what c4 layers
    see, as when serving; otherwise they see every completed entry. levels: see `quantise.fp8_weight`, 0 for all of
    FP8. exact: False leaves the weights unquantised (the trained model before quantisation).
    """

    dtype: torch.dtype = torch.float32
    select: bool = True
    levels: int = 0
    exact: bool = True


@dataclass
class Output:
    """hidden [B, T, 4, H]: the streams that enter the LM head. index_loss: mean KL of the indexers' distribution to
    attention's, weighted by the share of attention that goes to c4 entries. loads: tokens per expert [E] by
    `layers.L.ffn.` prefix; the MTP layer's joins them when it runs. captured [B, T, 4, H]: the streams after layers."""

    hidden: Tensor
    index_loss: Tensor
    loads: dict[str, Tensor] = field(default_factory=dict)
    captured: dict[int, Tensor] = field(default_factory=dict)


def stack_name(name: str) -> str:
    """`layers.0.ffn.experts.3.w1.weight` -> `layers.0.ffn.experts.w1.weight`: experts train as one tensor."""
    head, _, tail = name.partition(".experts.")
    return f"{head}.experts.{tail.partition('.')[2]}" if tail else name


def stacked(config: ReferenceConfig, dspark: DSparkConfig | None = None) -> dict[str, Parameter]:
    """What is trained, of the model or its drafter: name -> parameter; experts of a layer are one [E, N, K].

    Hash tables are not trained.
    """
    found: dict[str, Parameter] = {}
    for p in parameters(config, dspark):
        if p.storage is Storage.MXFP4:
            name = stack_name(p.name)
            found[name] = Parameter(name, ((dspark or config).n_routed_experts, *p.shape), p.storage)
        elif p.storage is not Storage.INT32:
            found[p.name] = p
    return found


def tables(config: ReferenceConfig, seed: int) -> Weights:
    """The hash layers' expert tables, int32 [V, 6], as the checkpoint writer draws them."""
    hashed = [p for p in parameters(config) if p.storage is Storage.INT32]
    return {name: table for p in hashed for name, table in draw(p, config, seed).items()}


def served(weights: Weights, config: ReferenceConfig, mode: Mode, dspark: DSparkConfig | None = None) -> Weights:
    """The weights as a server reads them from the exported checkpoint, gradients straight through.

    FP8 and MXFP4 come in `mode.dtype`, everything else in fp32. fp32 tensors hold bf16 values, which halves what
    they add to the committed file.
    """
    found = stacked(config, dspark)
    fp8 = [n for n, p in found.items() if p.storage is Storage.FP8]
    mxfp4 = [n for n, p in found.items() if p.storage is Storage.MXFP4]
    if not mode.exact:
        return {n: w.to(mode.dtype) if n in (*fp8, *mxfp4) else w for n, w in weights.items()}
    short = [
        n for n, p in found.items() if p.storage is Storage.BF16 or (p.storage is Storage.FP32 and len(p.shape) > 1)
    ]
    values = dict(weights)
    values |= zip(fp8, quantise.fp8_weights([weights[n] for n in fp8], mode.levels, mode.dtype), strict=True)
    values |= zip(mxfp4, quantise.mxfp4_weights([weights[n] for n in mxfp4], mode.dtype), strict=True)
    values |= zip(short, quantise.bf16_weights([weights[n] for n in short]), strict=True)
    return values


class Model:
    """One forward pass over `served` weights and the hash `tables`."""

    def __init__(self, config: ReferenceConfig, weights: Weights, hash_tables: Weights, mode: Mode) -> None:
        self.config, self.mode = config, mode
        self._weights, self._tables = weights, hash_tables
        self._device = weights["embed.weight"].device
        self._index_loss: list[tuple[Tensor, Tensor]] = []
        self._loads: dict[str, Tensor] = {}

    def __call__(self, tokens: Tensor, hide_c4: Tensor | None = None, capture: Collection[int] = ()) -> Output:
        """tokens [B, T]. hide_c4 bool [B]: sequences whose attention may not see c4 entries. capture: layers."""
        self._index_loss, self._loads = [], {}
        length = tokens.shape[1]
        tokens = self._padded(tokens)
        streams = self._round(self._w("embed.weight")[tokens]).unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        captured: dict[int, Tensor] = {}
        for layer in range(self.config.num_hidden_layers):
            ratio = self.config.compress_ratios[layer]
            streams = self._layer(f"layers.{layer}.", ratio, streams, tokens, hide_c4)
            if layer in capture:
                captured[layer] = streams[:, :length]
        losses = [kl / mass.clamp(min=1e-6) for kl, mass in self._index_loss]
        index_loss = torch.stack(losses).mean() if losses else streams.new_zeros((), dtype=torch.float32)
        return Output(streams[:, :length], index_loss, self._loads, captured)

    def logits(self, hidden: Tensor, prefix: str = "") -> Tensor:
        """hidden [..., 4, H] to fp32 logits [..., V], rounded to bf16 as SGLang's LM head returns them."""
        return self._logits(self._collapsed(hidden, prefix), prefix)

    def _collapsed(self, hidden: Tensor, prefix: str) -> Tensor:
        mixes = self._mixes(hidden, prefix + "hc_head_fn")
        w = (mixes * self._w(prefix + "hc_head_scale") + self._w(prefix + "hc_head_base")).sigmoid()
        return self._round(((w + self.config.hc_eps).unsqueeze(-1) * hidden).sum(-2))

    def _logits(self, x: Tensor, prefix: str) -> Tensor:
        x = self._norm(x, prefix + "norm.weight")
        return self._round(x @ self._w("head.weight").to(self.mode.dtype).T).float()

    def mtp(self, hidden: Tensor, following: Tensor) -> Tensor:
        """The MTP layer's streams [B, T, 4, H] from a pass's `hidden` and the token after each position [B, T]."""
        length = following.shape[1]
        hidden = F.pad(hidden, (0, 0, 0, 0, 0, -length % WINDOW))
        tokens = self._padded(following)
        e = self._norm(self._round(self._w("embed.weight")[tokens]), "mtp.0.enorm.weight")
        h = self._norm(hidden, "mtp.0.hnorm.weight")
        streams = self._round(self._linear(e, "mtp.0.e_proj").unsqueeze(2) + self._linear(h, "mtp.0.h_proj"))
        return self._layer("mtp.0.", 0, streams, tokens, None)[:, :length]

    def _padded(self, tokens: Tensor) -> Tensor:
        """Whole windows: nothing earlier sees what is appended."""
        return F.pad(tokens, (0, -tokens.shape[1] % WINDOW), value=PAD)

    def _layer(self, prefix: str, ratio: int, streams: Tensor, tokens: Tensor, hide_c4: Tensor | None) -> Tensor:
        x, post, comb = self._mhc_pre(prefix, "attn", streams)
        streams = self._mhc_post(self._attention(prefix + "attn.", ratio, x, hide_c4), streams, post, comb)
        x, post, comb = self._mhc_pre(prefix, "ffn", streams)
        return self._mhc_post(self._moe(prefix + "ffn.", x, tokens), streams, post, comb)

    def _mixes(self, streams: Tensor, fn: str) -> Tensor:
        v = streams.flatten(-2).float()
        return (v @ self._w(fn).T) * torch.rsqrt(v.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)

    def _mhc_pre(self, prefix: str, block: str, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, eps, name = self.config.hc_mult, self.config.hc_eps, f"{prefix}hc_{block}_"
        parts = self._mixes(streams, name + "fn").split((n, n, n * n), dim=-1)
        bases = self._w(name + "base").split((n, n, n * n))
        pre, post, comb = (m * s + b for m, s, b in zip(parts, self._w(name + "scale"), bases, strict=True))
        x = self._round(((pre.sigmoid() + eps).unsqueeze(-1) * streams).sum(-2))
        x = self._norm(x, f"{prefix}{block}_norm.weight")
        return x, 2 * post.sigmoid(), sinkhorn(comb.unflatten(-1, (n, n)), self.config.hc_sinkhorn_iters, eps)

    def _mhc_post(self, out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return self._round(post.unsqueeze(-1) * out.unsqueeze(-2) + comb.mT @ streams.float())

    def _attention(self, prefix: str, ratio: int, x: Tensor, hide_c4: Tensor | None) -> Tensor:
        length = x.shape[1]
        turn = self._turn(ratio, length)
        qr, q = self._queries(prefix, x, turn)
        keys = self._keys(prefix, x, turn)
        entries = keys[:, :0]
        if ratio:
            entries = self._compress(x, prefix + "compressor.", HEAD_DIM, ratio)
            entries = quantise.kv_entry(entries).to(self.mode.dtype)
        index = self._index(prefix + "indexer.", x.detach(), qr.detach()) if ratio == 4 else None
        out = self._attend(q, keys, entries, self._w(prefix + "attn_sink"), ratio, index, hide_c4)
        return self._projected(prefix, out, turn)

    def _queries(self, prefix: str, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, H] to the low rank [B, T, R] and the queries [B, T, h, 512]."""
        qr = self._norm(self._linear(x, prefix + "wq_a"), prefix + "q_norm.weight")
        q = self._linear(qr, prefix + "wq_b").unflatten(-1, (self.config.num_attention_heads, HEAD_DIM))
        return qr, self._round(rope(rms_norm(q.float(), None, self.config.rms_norm_eps), turn.unsqueeze(-2)))

    def _keys(self, prefix: str, x: Tensor, turn: Tensor) -> Tensor:
        """x [B, T, H] to the window's keys [B, T, 512] as read back from a page."""
        kv = self._rms(self._linear(x, prefix + "wkv"), prefix + "kv_norm.weight")
        return quantise.kv_entry(rope(kv, turn)).to(self.mode.dtype)

    def _projected(self, prefix: str, out: Tensor, turn: Tensor) -> Tensor:
        """The heads' sums [B, T, h, 512], turned back, to [B, T, H]."""
        out = self._round(rope(out.float(), turn.conj().unsqueeze(-2)))
        out = out.unflatten(2, (self.config.o_groups, -1)).flatten(3)
        wo_a = self._w(prefix + "wo_a.weight").unflatten(0, (self.config.o_groups, self.config.o_lora_rank))
        low = self._round(torch.einsum("btgd,grd->btgr", out, wo_a))
        return self._linear(low.flatten(2), prefix + "wo_b")

    def _attend(
        self,
        q: Tensor,
        keys: Tensor,
        entries: Tensor,
        sink: Tensor,
        ratio: int,
        index: tuple[Tensor, Tensor, Tensor] | None,
        hide_c4: Tensor | None,
    ) -> Tensor:
        length = q.shape[1]
        # Block b of 128 queries sees the keys of blocks b - 1 and b.
        pairs = F.pad(keys, (0, 0, WINDOW, 0)).unfold(1, 2 * WINDOW, WINDOW).transpose(2, 3)
        outs = []
        for start in range(0, length, SEGMENT):
            end = min(start + SEGMENT, length)
            blocks = pairs[:, start // WINDOW : end // WINDOW]
            seen = end // ratio if ratio else 0
            part = (index[0][:, start:end], index[1][:, start:end], index[2][:, :seen]) if index else None
            select = self.mode.select and seen > self.config.index_topk
            run = _Segment(start, ratio, self.config.index_topk if select else 0, hide_c4 if ratio == 4 else None)
            out, kl, mass = run(q[:, start:end], blocks, entries[:, :seen], sink, part)
            outs.append(self._round(out))
            if index:
                self._index_loss.append((kl, mass))
        return torch.cat(outs, dim=1)

    def _index(self, prefix: str, x: Tensor, qr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, heads, 128], their weights [B, T, heads] and keys [B, T // 4, 128]."""
        heads, turn = self.config.index_n_heads, self._turn(4, x.shape[1])
        rotated = _hadamard(self._device)
        keys = self._compress(x, prefix + "compressor.", INDEX_HEAD_DIM, 4) @ rotated
        q = self._linear(qr, prefix + "wq_b").unflatten(-1, (heads, INDEX_HEAD_DIM)).float()
        q = rope(q, turn.unsqueeze(1)) @ rotated
        weight = self._round(x.float() @ self._w(prefix + "weights_proj.weight").T).float()
        return quantise.index_vector(q), weight * (INDEX_HEAD_DIM**-0.5 * heads**-0.5), quantise.index_vector(keys)

    def _compress(self, x: Tensor, name: str, dim: int, ratio: int) -> Tensor:
        """fp32 entries of all complete blocks [B, T // ratio, dim], normed and turned, not yet quantised."""
        blocks = x.shape[1] // ratio
        x = x[:, : blocks * ratio].float()
        kv = (x @ self._w(name + "wkv.weight").T).unflatten(1, (blocks, ratio))
        gate = (x @ self._w(name + "wgate.weight").T).unflatten(1, (blocks, ratio)) + self._w(name + "ape")
        if ratio == 4:
            kv = torch.cat((_previous(kv[..., :dim], 0.0), kv[..., dim:]), dim=2)
            gate = torch.cat((_previous(gate[..., :dim], -math.inf), gate[..., dim:]), dim=2)
        pooled = self._rms((gate.softmax(2) * kv).sum(2), name + "norm.weight")
        return rope(pooled, self._turn(ratio, x.shape[1])[::ratio])

    def _moe(self, prefix: str, x: Tensor, tokens: Tensor) -> Tensor:
        ids, weights = self._route(prefix, x, tokens)
        experts, limit = self.config.n_routed_experts, self.config.swiglu_limit
        share = x.new_zeros((*ids.shape[:2], experts), dtype=torch.float32).scatter(2, ids, weights)
        self._loads[prefix] = (share > 0).sum((0, 1))  # bincount would wait for the GPU
        w1, w2, w3 = (self._w(f"{prefix}experts.{w}.weight") for w in ("w1", "w2", "w3"))
        # All experts on all tokens: with six of eight chosen that is cheaper than sorting.
        gate = (x @ w1.flatten(0, 1).T).unflatten(-1, (experts, -1)).clamp(max=limit)
        up = (x @ w3.flatten(0, 1).T).unflatten(-1, (experts, -1)).clamp(-limit, limit)
        act = self._round(F.silu(gate) * up) * share.unsqueeze(-1).to(self.mode.dtype)
        routed = self._round(act.flatten(2) @ w2.transpose(0, 1).flatten(1).T)
        shared = prefix + "shared_experts."
        gate = self._linear(x, shared + "w1").clamp(max=limit)
        up = self._linear(x, shared + "w3").clamp(-limit, limit)
        own = self._linear(self._round(F.silu(gate) * up), shared + "w2")
        return self._round(own.float() + routed.float() * self.config.routed_scaling_factor)

    def _route(self, prefix: str, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [B, T, 6] and their weights."""
        score = F.softplus(x.float() @ self._w(prefix + "gate.weight").T).sqrt()
        if (table := prefix + "gate.tid2eid") in self._tables:
            ids = self._tables[table][tokens].long()
        else:
            biased = score.detach() + self._w(prefix + "gate.bias").detach()
            ids = biased.topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = score.gather(2, ids)
        return ids, weights / weights.sum(2, keepdim=True)

    def _turn(self, ratio: int, length: int) -> Tensor:
        return _rotation(self.config, bool(ratio), length, self._device)

    def _rms(self, x: Tensor, weight: str) -> Tensor:
        return rms_norm(x.float(), self._w(weight), self.config.rms_norm_eps)

    def _norm(self, x: Tensor, weight: str) -> Tensor:
        return self._round(self._rms(x, weight))

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self._round(x @ self._w(name + ".weight").T)

    def _round(self, x: Tensor) -> Tensor:
        return x.bfloat16().to(self.mode.dtype)

    def _w(self, name: str) -> Tensor:
        return self._weights[name]


class _Segment(NamedTuple):
    """Attention of the queries from `start` on; topk 0 selects nothing."""

    start: int
    ratio: int
    topk: int
    hide_c4: Tensor | None

    def __call__(
        self, q: Tensor, pairs: Tensor, entries: Tensor, sink: Tensor, index: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, R, h, 512], pairs [B, R / 128, 256, 512], entries [B, E, 512] to the output [B, R, h, 512], the
        indexer's divergence summed over tokens, and the attention on c4 entries that weighted it."""
        rows = torch.arange(self.start, self.start + q.shape[1], device=q.device)
        heads = q.shape[2]
        blocked = q.unflatten(1, (-1, WINDOW)).flatten(2, 3)
        near = (blocked @ pairs.mT).unflatten(2, (WINDOW, heads)).flatten(1, 2)
        scores = _index_scores(*index) if index else None
        chosen = self._chosen(rows, entries.shape[1], scores)
        far = (q.flatten(1, 2) @ entries.mT).unflatten(1, (-1, heads))
        seen = torch.cat((self._window(rows).expand(len(chosen), -1, -1), chosen), dim=-1)
        logits = torch.cat((near, far), dim=-1).float() * HEAD_DIM**-0.5
        logits = logits.masked_fill(~seen.unsqueeze(2), -math.inf)
        # The sink only scales: e^s / (e^lse + e^sink) = softmax * sigmoid(lse - sink).
        kept = (logits.logsumexp(-1) - sink).sigmoid().unsqueeze(-1)
        shares = logits.softmax(-1).to(q.dtype)
        width = near.shape[-1]
        out = shares[..., :width].unflatten(1, (-1, WINDOW)).flatten(2, 3) @ pairs
        out = out.unflatten(2, (WINDOW, heads)).flatten(1, 2)
        out = out + (shares[..., width:].flatten(1, 2) @ entries).unflatten(1, (-1, heads))
        zero = out.new_zeros((), dtype=torch.float32)
        kl, mass = zero, zero
        if scores is not None:
            kl, mass = _divergence(scores, chosen, (shares[..., width:] * kept).detach().float().mean(2))
        return out * kept, kl, mass

    def _window(self, rows: Tensor) -> Tensor:
        """bool [R, 256]: which of its pair of key blocks each query sees."""
        query = torch.arange(WINDOW, device=rows.device).unsqueeze(1)
        key = torch.arange(2 * WINDOW, device=rows.device) - WINDOW
        age = (query - key).repeat(len(rows) // WINDOW, 1)
        return (age >= 0) & (age < WINDOW) & (age <= rows.unsqueeze(1))

    def _chosen(self, rows: Tensor, count: int, scores: Tensor | None) -> Tensor:
        """bool [B or 1, R, E]: which compressed entries each query sees."""
        entry = torch.arange(count, device=rows.device)
        seen = (rows + 1) // self.ratio if self.ratio else torch.zeros_like(rows)
        chosen = (entry < seen.unsqueeze(1)).unsqueeze(0)
        if self.topk and scores is not None:
            ranked = scores.detach().masked_fill(~chosen, -math.inf).topk(self.topk, dim=-1).indices
            chosen = chosen & torch.zeros_like(scores, dtype=torch.bool).scatter(2, ranked, True)
        if self.hide_c4 is not None:
            chosen = chosen & ~self.hide_c4[:, None, None]
        return chosen


def _index_scores(q: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    dots = (q.flatten(1, 2) @ keys.mT).unflatten(1, q.shape[1:3]).relu()
    return (dots * weight.unsqueeze(-1)).sum(2)


def _divergence(scores: Tensor, chosen: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens of mass x KL(attention over entries || softmax of the scores), and the sum of mass.

    attention [B, R, E], the heads' mean; its sum over the entries is a token's mass. Tokens that do not look at
    entries teach nothing.
    """
    mass = attention.sum(-1)
    target = attention / mass.clamp(min=1e-9).unsqueeze(-1)
    guess = (scores * INDEX_TEMPERATURE).masked_fill(~chosen, -1e9).log_softmax(-1)
    kl = torch.xlogy(target, target).sum(-1) - (target * guess.masked_fill(target == 0, 0.0)).sum(-1)
    return (kl * mass).sum(), mass.sum()


def rope(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the last 64 channels of fp32 x [..., T, (h,) D], taken as 32 interleaved pairs, by complex `turn`."""
    pairs = torch.view_as_complex(x[..., -ROPE_DIM:].unflatten(-1, (-1, 2)).contiguous())
    return torch.cat((x[..., :-ROPE_DIM], torch.view_as_real(pairs * turn).flatten(-2)), dim=-1)


@functools.cache
def _rotation(config: ReferenceConfig, compressed: bool, length: int, device: torch.device) -> Tensor:
    # YaRN and the other theta go with compressed entries, whatever their ratio.
    return rotation(config, 4 * compressed, length, torch.float32).to(device)


@functools.cache
def _hadamard(device: torch.device) -> Tensor:
    return hadamard(torch.float32).to(device)


def _previous(blocks: Tensor, first: float) -> Tensor:
    """Each block's predecessor [B, N, ...]; `first` stands for the predecessor that the first block lacks."""
    return torch.cat((torch.full_like(blocks[:, :1], first), blocks[:, :-1]), dim=1)
