"""DeepSeek-V4 over a whole prompt in plain PyTorch, straight from the checkpoint files.

The model in one place, without pages, batches or parallelism: what a server's log-probabilities are judged
against. Activations are rounded to bf16 where a server stores them, everything in between is `real` (fp32).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_sm120.checkpoint.config import ReferenceConfig

from .attention import Attention, IndexMargin, Rounding, rms_norm
from .checkpoint import Checkpoint
from .defects import Defect

LOGPROB_TOLERANCE = 0.05
"""How far a correct implementation's log-probability of a next token may lie from the oracle's.

Roundings to bf16 and FP8 that fall the other way add up. Measured on the small checkpoint, five prompts of 2,600
tokens: the oracle in float64 differs by at most 0.025, with an error of 2^-20 before every rounding by 0.036.
The defects of `Defect` differ by ten tolerances and more.
"""

ROUTER_GAP = 0.02
"""Relative distance of choices 6 and 7 up to which rounding may swap them: it moved the distance by 0.0125."""

INDEX_BAND = 0.06
"""Relative distance from the indexer's threshold up to which rounding may select or drop an entry.

Scores are sums of clipped FP8 dot products: of the entries that changed sides 99 % lay within 0.04.
"""

INDEX_STAKE = 0.1
"""Share of a head's softmax within INDEX_BAND from which on another selection may show.

Below it, scores with an error of 3 % (RMS) moved no log-probability by more than 0.012.
"""


def to_bf16(x: Tensor) -> Tensor:
    """Round to bf16, keeping the dtype."""
    return x.bfloat16().to(x.dtype)


@dataclass
class Result:
    """One forward pass over T tokens.

    logprobs fp32 [T, V]: log-softmax after each token. hidden [T, 4, H]: the residual streams that enter the
    LM head; captured: those after each layer asked for, by its number. router_gap [T]: smallest (choice 6 -
    choice 7) / |choice 6| of score + bias over the scored layers. index_gap, index_stake [T]: the indexer's
    margins (`attention.IndexMargin`), worst c4 layer.
    """

    logprobs: Tensor
    hidden: Tensor
    router_gap: Tensor
    index_gap: Tensor
    index_stake: Tensor
    captured: dict[int, Tensor]

    def decided(self) -> Tensor:
        """bool [T]: where a correct implementation must agree within LOGPROB_TOLERANCE.

        Elsewhere rounding alone may choose another expert, or another compressed entry that attention would
        look at.
        """
        return (self.router_gap > ROUTER_GAP) & (self.index_stake < INDEX_STAKE)


class Oracle:
    """The model of one checkpoint directory.

    clamp_shared: clamp the shared expert like the routed ones, as SGLang does; the published reference does
    not. hide_c4: attention sees no c4 entries, so that c128 entries alone tell what lies behind the window.
    defect: make this one mistake. real: dtype of the arithmetic between roundings. rounding: replaces the
    rounding to bf16; keeps the dtype. device: where it computes; results are on the CPU.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        clamp_shared: bool = True,
        hide_c4: bool = False,
        defect: Defect | None = None,
        real: torch.dtype = torch.float32,
        rounding: Rounding = to_bf16,
        device: str = "cpu",
    ) -> None:
        self._weights = Checkpoint(directory, real, defect, device)
        self._device = torch.device(device)
        self.config: ReferenceConfig = self._weights.config
        self._clamp_shared, self._hide_c4 = clamp_shared, hide_c4
        self._defect, self._real, self._round = defect, real, rounding

    @torch.inference_mode()
    def forward(self, token_ids: list[int] | Tensor, capture: Collection[int] = ()) -> Result:
        """The model over one prompt; `capture` lists the layers after which the streams are wanted.

        Raises ValueError when the prompt is empty or holds an id out of range.
        """
        with self._device:
            result = self._forward(self._ids(token_ids).to(self._device), capture)
        parts = {name: part.cpu() for name, part in vars(result).items() if isinstance(part, Tensor)}
        return replace(result, **parts, captured={layer: x.cpu() for layer, x in result.captured.items()})

    @torch.inference_mode()
    def mtp_logits(self, hidden: Tensor, next_tokens: list[int] | Tensor) -> Tensor:
        """Logits [T, V] of the MTP layer: `hidden` of a Result and the token that follows each position.

        Raises ValueError when the checkpoint has no MTP layer, or the tokens are not T ids in range.
        """
        if "mtp.0.e_proj.weight" not in self._weights:
            raise ValueError("the checkpoint has no MTP layer: write one with num_nextn_predict_layers 1")
        tokens = self._ids(next_tokens)
        if len(tokens) != len(hidden):
            raise ValueError(f"{len(tokens)} next_tokens came with {len(hidden)} positions: pass one for each")
        with self._device:
            return self._mtp(hidden.to(self._device), tokens.to(self._device)).cpu()

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """The n most probable next tokens, one after the other; a full forward pass each."""
        tokens = list(prompt)
        for _ in range(n):
            tokens.append(int(self.forward(tokens).logprobs[-1].argmax()))
        return tokens[len(prompt) :]

    def _forward(self, tokens: Tensor, capture: Collection[int]) -> Result:
        streams = self._w("embed.weight")[tokens].unsqueeze(1).repeat(1, self.config.hc_mult, 1)
        router_gap = torch.full((len(tokens),), math.inf)
        index = IndexMargin(router_gap.clone(), torch.zeros(len(tokens)))
        captured: dict[int, Tensor] = {}
        for layer in range(self.config.num_hidden_layers):
            ratio = self.config.compress_ratios[layer]
            streams, gap, margin = self._layer(f"layers.{layer}.", ratio, streams, tokens)
            router_gap = torch.minimum(router_gap, gap)
            index.gap = torch.minimum(index.gap, margin.gap)
            index.stake = torch.maximum(index.stake, margin.stake)
            if layer in capture:
                captured[layer] = streams
        logits = self._head("", streams)
        return Result(logits.float().log_softmax(-1), streams, router_gap, index.gap, index.stake, captured)

    def _mtp(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        eps = self.config.rms_norm_eps
        e = self._round(rms_norm(self._w("embed.weight")[tokens], self._w("mtp.0.enorm.weight"), eps))
        h = self._round(rms_norm(hidden, self._w("mtp.0.hnorm.weight"), eps))
        projected = self._linear(e, "mtp.0.e_proj").unsqueeze(1)
        streams = self._round(projected + self._linear(h, "mtp.0.h_proj"))
        streams, _, _ = self._layer("mtp.0.", 0, streams, tokens)
        return self._head("mtp.0.", streams)

    def _ids(self, token_ids: list[int] | Tensor) -> Tensor:
        tokens = torch.as_tensor(token_ids, dtype=torch.int64)
        if tokens.numel() == 0 or tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"the prompt needs one or more ids in 0 .. {self.config.vocab_size - 1}")
        return tokens

    def _layer(self, prefix: str, ratio: int, streams: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, IndexMargin]:
        hide = self._hide_c4 and ratio == 4
        attention = Attention(
            self._weights, prefix + "attn.", ratio, self._real, self._round, self._defect, INDEX_BAND, hide_entries=hide
        )
        x, post, comb = self._mhc_pre(prefix, "attn", streams)
        out, margin = attention(x)
        streams = self._mhc_post(out, streams, post, comb)
        x, post, comb = self._mhc_pre(prefix, "ffn", streams)
        out, gap = self._moe(prefix + "ffn.", x, tokens)
        return self._mhc_post(out, streams, post, comb), gap, margin

    def _mixes(self, streams: Tensor, fn: str) -> Tensor:
        v = streams.flatten(1)
        return (v @ self._w(fn).T) * torch.rsqrt(v.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)

    def _mhc_pre(self, prefix: str, block: str, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [T, 4, H] to the normed input of attention or MoE [T, H], post [T, 4], comb [T, 4, 4]."""
        n, eps = self.config.hc_mult, self.config.hc_eps
        name = f"{prefix}hc_{block}_"
        parts = self._mixes(streams, name + "fn").split((n, n, n * n), dim=-1)
        bases = self._w(name + "base").split((n, n, n * n))
        pre, post, comb = (m * s + b for m, s, b in zip(parts, self._w(name + "scale"), bases, strict=True))
        x = self._round(((pre.sigmoid() + eps).unsqueeze(-1) * streams).sum(1))
        x = self._round(rms_norm(x, self._w(f"{prefix}{block}_norm.weight"), self.config.rms_norm_eps))
        factor = 1 if self._defect is Defect.POST_FACTOR_MISSING else 2
        iterations = 1 if self._defect is Defect.ONE_SINKHORN_ITERATION else self.config.hc_sinkhorn_iters
        return x, factor * post.sigmoid(), sinkhorn(comb.unflatten(-1, (n, n)), iterations, eps)

    def _mhc_post(self, out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        if self._defect is Defect.COMB_TRANSPOSED:
            comb = comb.mT
        return self._round(post.unsqueeze(-1) * out.unsqueeze(1) + comb.mT @ streams)

    def _head(self, prefix: str, streams: Tensor) -> Tensor:
        """Logits [T, V], rounded to bf16 as SGLang's LM head returns them."""
        mixes = self._mixes(streams, prefix + "hc_head_fn")
        w = (mixes * self._w(prefix + "hc_head_scale") + self._w(prefix + "hc_head_base")).sigmoid()
        x = self._round(((w + self.config.hc_eps).unsqueeze(-1) * streams).sum(1))
        x = self._round(rms_norm(x, self._w(prefix + "norm.weight"), self.config.rms_norm_eps))
        return self._linear(x, "head")

    def _moe(self, prefix: str, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] to (output [T, H], router gap [T])."""
        ids, weights, gap = self._route(prefix, x, tokens)
        routed = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            row, slot = (ids == expert).nonzero(as_tuple=True)
            y = self._expert(f"{prefix}experts.{expert}.", x[row])
            routed.index_add_(0, row, y * weights[row, slot].unsqueeze(-1))
        scale = 1.0 if self._defect is Defect.ROUTED_SCALE_MISSING else self.config.routed_scaling_factor
        shared = self._shared_expert(prefix + "shared_experts.", x)
        # SGLang adds the rounded sum as `shared.add_(routed, alpha=1.5)`: the product is not rounded by itself.
        return self._round(shared + self._round(routed) * scale), gap

    def _route(self, prefix: str, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Expert ids [T, 6], their weights [T, 6], router gap [T] (infinite where a table decides)."""
        k = self.config.num_experts_per_tok
        score = F.softplus(x @ self._w(prefix + "gate.weight").T).sqrt()
        table = prefix + "gate.tid2eid"
        gap = torch.full((len(x),), math.inf)
        if table in self._weights and self._defect is not Defect.HASH_LAYER_SCORED:
            ids = self._weights.raw(table)[tokens].long()
        else:
            biased = score if table in self._weights else score + self._w(prefix + "gate.bias")
            best = biased.topk(min(k + 1, biased.shape[1]), dim=1)
            ids = best.indices[:, :k]
            if table not in self._weights and best.values.shape[1] > k:
                gap = ((best.values[:, k - 1] - best.values[:, k]) / best.values[:, k - 1].abs()).float()
        weights = score.gather(1, ids)
        if self._defect is not Defect.ROUTING_NOT_NORMALISED:
            weights = weights / weights.sum(1, keepdim=True)
        return ids, weights, gap

    def _expert(self, prefix: str, x: Tensor) -> Tensor:
        limit = self.config.swiglu_limit
        gate = (x @ self._w(prefix + "w1.weight").T).clamp(max=limit)
        up = (x @ self._w(prefix + "w3.weight").T).clamp(-limit, limit)
        return self._round(F.silu(gate) * up) @ self._w(prefix + "w2.weight").T

    def _shared_expert(self, prefix: str, x: Tensor) -> Tensor:
        limit = self.config.swiglu_limit if self._clamp_shared else math.inf
        gate = self._linear(x, prefix + "w1").clamp(max=limit)
        up = self._linear(x, prefix + "w3").clamp(-limit, limit)
        return self._linear(self._round(F.silu(gate) * up), prefix + "w2")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self._round(x @ self._w(name + ".weight").T)

    def _w(self, name: str) -> Tensor:
        return self._weights.weight(name)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Nearly doubly stochastic [..., n, n]: a row softmax plus eps, then columns and rows in turn.

    One iteration is the softmax and one division of the columns; each further one divides rows, then columns,
    by (sum + eps).
    """
    m = logits.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m
