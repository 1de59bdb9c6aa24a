"""Values of the weights: which distribution each tensor is drawn from, and why.

A plain normal init hides defects: attention is flat, residual streams stay alike, routing and selection tie.
So a few channels of the residual stream carry fixed meanings (`Channels`), and the matrices that must decide
something read them; everything else is random.

* Routing: one channel per expert. A token prefers a fixed set of experts by a wide margin, so that two
  correct implementations agree on the choice although their roundings differ.
* Compressed entries: a few tokens are marked. Attention on c4 layers wants entries with a marked token, and
  the indexer ranks them first: by a key whose FP8 scale is large, so that forgetting the scale inverts the
  ranking. The entries around rank 512 and behind are unmarked ones, to which attention gives next to nothing.
* Attention spreads over several keys: one that took all would hand its own rounding to every later token, and
  two correct implementations would differ by as much as a defect.
* Residual streams: the biases of the mHC mixes spread widely, so that streams differ from each other.

Values depend on (seed, tensor name, shape) only, and are the same on every machine: CPU generator, no
reductions, no LAPACK.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_sm120.checkpoint.config import HEAD_DIM, INDEX_HEAD_DIM, ROPE_DIM, ReferenceConfig
from sglang_sm120.checkpoint.layout import MXFP4_GROUP, Parameter, Storage
from sglang_sm120.formats import fp8_block

from .tokenizer import SMALLEST

NOPE_DIM = HEAD_DIM - ROPE_DIM
E2M1_RMS = math.sqrt(68.5 / 8)  # of a uniformly drawn code: mean of 0, .5, 1, 1.5, 2, 3, 4, 6 squared

SELECT = slice(0, 32)
"""Head channels on which c4 attention tells marked entries from unmarked ones."""


@dataclass(frozen=True)
class Channels:
    """Residual channels with a fixed meaning; see the module's docstring."""

    experts: int

    @property
    def mark(self) -> int:
        return self.experts

    @property
    def constant(self) -> int:
        return self.experts + 1

    @property
    def count(self) -> int:
        return self.experts + 2


def check(config: ReferenceConfig) -> None:
    """Raise ValueError where the meaningful channels or the tokenizer do not fit into the model."""
    if config.vocab_size < SMALLEST:
        raise ValueError(f"vocab_size is {config.vocab_size}: use at least {SMALLEST}, the bytes and the markers")
    needed = Channels(config.n_routed_experts).count
    if config.hidden_size < needed:
        raise ValueError(
            f"hidden_size is {config.hidden_size}, {config.n_routed_experts} experts need {needed} channels: "
            "use a wider model or fewer experts"
        )


def draw(parameter: Parameter, config: ReferenceConfig, seed: int) -> dict[str, Tensor]:
    """The stored tensors of one weight: name -> tensor, as `Parameter.stored` lists them."""
    rng = torch.Generator().manual_seed(_seed_of(seed, parameter.name))
    if parameter.storage in (Storage.MXFP4, Storage.NVFP4):
        return _expert(parameter, config, rng)
    channels = Channels(config.n_routed_experts)
    field = parameter.name.split(".", 2)[-1] if parameter.name.startswith(("layers.", "mtp.")) else parameter.name
    values = _DRAW[field](_Draw(parameter, config, channels, rng))
    if parameter.storage is Storage.FP8:
        weight, scale = fp8_block.quantise(values)
        return {parameter.name: weight, parameter.scale_name: scale}
    dtype = {Storage.BF16: torch.bfloat16, Storage.FP32: torch.float32, Storage.INT32: torch.int32}
    return {parameter.name: values.to(dtype[parameter.storage])}


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _expert(parameter: Parameter, config: ReferenceConfig, rng: torch.Generator) -> dict[str, Tensor]:
    n, k = parameter.shape
    codes = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32, generator=rng)
    down = parameter.name.endswith(".w2.weight")
    exponent = round(math.log2((0.07 if down else 3.0) / (E2M1_RMS * math.sqrt(k))))
    scale = exponent + torch.randint(-1, 2, (n, k // MXFP4_GROUP), dtype=torch.int32, generator=rng)
    if down:
        scale[: Channels(config.n_routed_experts).count] -= 3
    if parameter.storage is Storage.NVFP4:
        return _nvfp4(parameter, codes, exponent, scale, rng)
    biased = (scale + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return {parameter.name: codes.view(torch.int8), parameter.scale_name: biased}


def _nvfp4(
    parameter: Parameter, codes: Tensor, exponent: int, scale: Tensor, rng: torch.Generator
) -> dict[str, Tensor]:
    """The same codes; each half of a block of MXFP4 has its own mantissa, and a matrix an odd factor."""
    n, blocks = scale.shape
    mantissa = 1 + torch.randint(0, 8, (n, 2 * blocks), generator=rng) / 8
    values = torch.ldexp(mantissa, (scale - exponent).repeat_interleave(2, 1))
    # Mantissas and factors are about 1.44 and 1.12 on average, which is taken back.
    factor = 2.0**exponent * (1 + torch.rand((), generator=rng) / 4) / 1.6
    name, input_scale = parameter.name, f"{parameter.name.removesuffix('.weight')}.input_scale"
    scales = {f"{name}_scale": values.to(torch.float8_e4m3fn), f"{name}_scale_2": factor}
    # No reader that keeps activations in bf16 may multiply by it.
    return {name: codes.view(torch.uint8), **scales, input_scale: torch.tensor(1e-3)}


@dataclass(frozen=True)
class _Draw:
    """One drawing: the weight, the model and the weight's own generator."""

    parameter: Parameter
    config: ReferenceConfig
    channels: Channels
    rng: torch.Generator

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape or self.shape, generator=self.rng)

    def matrix(self, gain: float) -> Tensor:
        """[N, K] that maps rows of rms 1 to rows of rms about `gain`."""
        values = self.normal() * (gain / math.sqrt(self.shape[-1]))
        if self.parameter.storage is Storage.FP8:
            # Neighbouring blocks differ in scale, so that a block read with another block's scale shows.
            n, k = self.shape
            blocks = (-(-n // 128), -(-k // 128))
            factor = (1 + torch.randint(0, 2, blocks, generator=self.rng)) / math.sqrt(2.5)
            values = values * factor.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        return values

    def into_stream(self, gain: float) -> Tensor:
        """A matrix whose output joins the residual streams: it leaves the meaningful channels alone."""
        values = self.matrix(gain)
        values[: self.channels.count] *= 0.125
        return values


def _embed(d: _Draw) -> Tensor:
    vocab, experts = d.config.vocab_size, d.config.n_routed_experts
    values = d.normal()
    # A preferred expert's channel lies in [2.5, 4.5], another's in [-4.5, -2.5]: the gap decides the routing.
    strength = 2.5 + 2 * torch.rand(vocab, experts, generator=d.rng)
    order = torch.rand(vocab, experts, generator=d.rng).argsort(-1)
    preferred = order < d.config.num_experts_per_tok
    values[:, :experts] = torch.where(preferred, strength, -strength)
    # Bytes, markers and the commonest words stay unmarked: a text has few marked tokens.
    first = max(vocab // 2, SMALLEST)
    candidates = first + torch.randperm(vocab - first, generator=d.rng)
    marked = torch.zeros(vocab, dtype=torch.bool)
    marked[candidates[: vocab // 200]] = True
    values[:, d.channels.mark] = torch.where(marked, 7.0, -1.0)
    values[:, d.channels.constant] = 5.0
    return values


def _near_one(d: _Draw) -> Tensor:
    return 1 + 0.2 * d.normal()


def _kv_norm(d: _Draw) -> Tensor:
    values = 0.95 * (1 + 0.1 * d.normal())
    values[NOPE_DIM:] *= 2.5  # so that positions matter as much as contents
    return values


def _wkv(d: _Draw) -> Tensor:
    values = d.matrix(1.0)
    values[SELECT, d.channels.mark] = 0.4  # a marked token leaving the window shows
    return values


def _mix_fn(d: _Draw) -> Tensor:
    return d.matrix(1.0)


def _mix_base(d: _Draw) -> Tensor:
    """pre [4], post [4], comb [4, 4]: one stream is read, two are written, then each moves on by one."""
    n = d.config.hc_mult
    pre = torch.where(torch.randperm(n, generator=d.rng) < 1, 2.0, -2.5)
    post = torch.where(torch.randperm(n, generator=d.rng) < n // 2, 2.5, -2.5)
    comb = 3.0 * d.normal(n, n) + 4 * torch.eye(n).roll(1, 1)
    return torch.cat((pre, post, comb.flatten()))


def _head_base(d: _Draw) -> Tensor:
    return torch.where(torch.randperm(d.config.hc_mult, generator=d.rng) < 1, 2.0, -2.5)


def _mix_scale(d: _Draw) -> Tensor:
    return torch.tensor([1.0, 1.0, 2.0]) * (1 + 0.1 * d.normal())


def _wq_a(d: _Draw) -> Tensor:
    values = d.matrix(1.0)
    values[0] *= 0.1
    values[0, d.channels.constant] = 1.5  # qr[0] is nearly constant: the queries' common part
    return values


def _wq_b(d: _Draw) -> Tensor:
    values = d.matrix(1.0).view(d.config.num_attention_heads, HEAD_DIM, -1)
    values[:, SELECT, 0] = 0.8
    return values.view(d.shape)


def _compressor_kv(d: _Draw) -> Tensor:
    values = d.matrix(1.0)
    if d.shape[0] == 2 * HEAD_DIM:  # c4: the first half are the channels that the following entry pools
        values.view(2, HEAD_DIM, -1)[:, SELECT, d.channels.constant] = -0.4
        values[SELECT, d.channels.mark] = 0.8
    else:
        values[SELECT, d.channels.constant] = 0.75
    return values


def _compressor_gate(d: _Draw) -> Tensor:
    values = d.matrix(1.5)
    if d.shape[0] == 2 * HEAD_DIM:
        # A marked token alone makes its entry, so that all marked entries are wanted about alike.
        values[SELECT, d.channels.mark] = 2.5
    return values


def _peaked() -> Tensor:
    """[64] of +-1 whose Hadamard transform is a single peak: a key along it needs a large FP8 scale."""
    return torch.tensor([(-1.0) ** (i & 37).bit_count() for i in range(64)])


def _indexer_wq_b(d: _Draw) -> Tensor:
    values = d.matrix(1.0).view(d.config.index_n_heads, INDEX_HEAD_DIM, -1)
    values[:, :64, 0] = 0.22 * _peaked()
    values[:, 63, 0] += 1.4
    return values.view(d.shape)


def _indexer_kv(d: _Draw) -> Tensor:
    # First-half channels again: a marked token makes the following entry wanted.
    values = d.matrix(1.0)
    values[:64, d.channels.mark] = 0.8 * _peaked()
    # An unmarked entry's key lies along one channel instead: its Hadamard transform is flat, the FP8 scale
    # small. The query prefers the peaked key, its quantised values alone the flat one.
    values.view(2, INDEX_HEAD_DIM, -1)[:, 63, d.channels.constant] = 4.0
    values[63, d.channels.mark] -= 2.8
    # The marked token's own entry is the least wanted: selecting by the neighbour's score drops the wanted one.
    values[INDEX_HEAD_DIM + 63, d.channels.mark] = -2.0
    return values


def _indexer_gate(d: _Draw) -> Tensor:
    values = d.matrix(1.0)
    values[:64, d.channels.mark] = 1.5
    values[INDEX_HEAD_DIM + 63, d.channels.mark] = 1.5
    return values


def _weights_proj(d: _Draw) -> Tensor:
    values = d.matrix(0.7)
    values[:, d.channels.constant] = 0.6
    return values


def _gate(d: _Draw) -> Tensor:
    values = d.matrix(0.3)
    experts = d.config.n_routed_experts
    values[torch.arange(experts), torch.randperm(experts, generator=d.rng)] = 3.0
    return values


def _tid2eid(d: _Draw) -> Tensor:
    vocab, chosen = d.shape
    return torch.rand(vocab, d.config.n_routed_experts, generator=d.rng).argsort(-1)[:, :chosen]


def _scaled(scale: float, shift: float = 0.0) -> Callable[[_Draw], Tensor]:
    return lambda d: shift + scale * d.normal()


def _matrix(gain: float) -> Callable[[_Draw], Tensor]:
    return lambda d: d.matrix(gain)


def _into_stream(gain: float) -> Callable[[_Draw], Tensor]:
    return lambda d: d.into_stream(gain)


_DRAW: dict[str, Callable[[_Draw], Tensor]] = {
    "embed.weight": _embed,
    "head.weight": _matrix(0.53),
    "norm.weight": _near_one,
    "enorm.weight": _near_one,
    "hnorm.weight": _near_one,
    "main_proj.weight": _matrix(1.0),
    "main_norm.weight": _near_one,
    # A bias about half as large as the logits that it is added to.
    "markov_head.markov_w1.weight": _scaled(1.0),
    "markov_head.markov_w2.weight": _matrix(0.3),
    "confidence_head.proj.weight": _matrix(1.0),
    "e_proj.weight": _matrix(1.0),
    "h_proj.weight": _matrix(1.0),
    "hc_head_fn": _mix_fn,
    "hc_head_base": _head_base,
    "hc_head_scale": _scaled(0.1, 1.0),
    **{f"hc_{block}_fn": _mix_fn for block in ("attn", "ffn")},
    **{f"hc_{block}_base": _mix_base for block in ("attn", "ffn")},
    **{f"hc_{block}_scale": _mix_scale for block in ("attn", "ffn")},
    "attn_norm.weight": _near_one,
    "ffn_norm.weight": _near_one,
    "attn.wq_a.weight": _wq_a,
    "attn.q_norm.weight": _near_one,
    "attn.wq_b.weight": _wq_b,
    "attn.wkv.weight": _wkv,
    "attn.kv_norm.weight": _kv_norm,
    "attn.attn_sink": _scaled(1.5, 4.0),
    "attn.wo_a.weight": _matrix(1.0),
    "attn.wo_b.weight": _into_stream(0.7),
    "attn.compressor.wkv.weight": _compressor_kv,
    "attn.compressor.wgate.weight": _compressor_gate,
    "attn.compressor.norm.weight": _kv_norm,
    "attn.compressor.ape": _scaled(1.5),
    "attn.indexer.wq_b.weight": _indexer_wq_b,
    "attn.indexer.weights_proj.weight": _weights_proj,
    "attn.indexer.compressor.wkv.weight": _indexer_kv,
    "attn.indexer.compressor.wgate.weight": _indexer_gate,
    "attn.indexer.compressor.norm.weight": _near_one,
    "attn.indexer.compressor.ape": _scaled(1.0),
    "ffn.gate.weight": _gate,
    "ffn.gate.bias": _scaled(0.2),
    "ffn.gate.tid2eid": _tid2eid,
    "ffn.shared_experts.w1.weight": _matrix(3.0),
    "ffn.shared_experts.w2.weight": _into_stream(0.03),
    "ffn.shared_experts.w3.weight": _matrix(3.0),
}
