"""A layer around its attention: residual streams, experts, head. Shared by the model and its DSpark drafter."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_sm120.checkpoint.config import ReferenceConfig

from .attention import Rounding, rms_norm
from .checkpoint import Checkpoint
from .defects import Defect


def to_bf16(x: Tensor) -> Tensor:
    """Round to bf16, keeping the dtype."""
    return x.bfloat16().to(x.dtype)


class Blocks:
    """The arithmetic of one checkpoint's layers but for attention; the arguments are `Oracle`'s."""

    def __init__(
        self, weights: Checkpoint, clamp_shared: bool, real: torch.dtype, rounding: Rounding, defect: Defect | None
    ) -> None:
        self._weights = weights
        self.config: ReferenceConfig = weights.config
        self._clamp_shared, self._real, self._round, self._defect = clamp_shared, real, rounding, defect

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
        return self._logits(prefix, self._collapsed(prefix, streams))

    def _collapsed(self, prefix: str, streams: Tensor) -> Tensor:
        """The streams' weighted sum [T, H]."""
        mixes = self._mixes(streams, prefix + "hc_head_fn")
        w = (mixes * self._w(prefix + "hc_head_scale") + self._w(prefix + "hc_head_base")).sigmoid()
        return self._round(((w + self.config.hc_eps).unsqueeze(-1) * streams).sum(1))

    def _logits(self, prefix: str, x: Tensor) -> Tensor:
        x = self._round(rms_norm(x, self._w(prefix + "norm.weight"), self.config.rms_norm_eps))
        return self._linear(x, "head")

    def _experts(self, prefix: str, streams: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The streams [T, 4, H] through a layer's MoE, and the router gap [T]."""
        x, post, comb = self._mhc_pre(prefix, "ffn", streams)
        out, gap = self._moe(prefix + "ffn.", x, tokens)
        return self._mhc_post(out, streams, post, comb), gap

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
