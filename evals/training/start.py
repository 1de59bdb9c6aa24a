"""Start values of training: small random weights, and circuits that already recall a record when a key is echoed.

A circuit is written into ordinary weights, all of which training then changes. Three circuits make one hop:

- Embeddings (`_words`): keys and values are orthonormal, each role has a direction that it shares.
- Entries (`_entries`): compressed entries hold four groups of channels, each with a record's key, a mark that it is a
  record (" is") and its value. A c4 entry has 8 tokens: group g takes the key from token 2 + g, what follows from the
  next ones, so that every record is whole in exactly one group of one entry. A c128 entry takes them from whichever of
  its 128 tokens has the role.
- Attention (`_recall`): head g of a layer looks in group g for the key at its own position; tokens that are no keys
  look away. The value that it finds goes to the streams, where the LM head reads it.

The indexer (`_index`) looks for the key anywhere in an entry.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_sm120.checkpoint.config import HEAD_DIM, INDEX_HEAD_DIM, ROPE_DIM, ReferenceConfig
from training import data
from training.model import Weights, stacked

GROUPS = 4
KEY, LINK, VALUE = 48, 8, data.VALUES
"""Channels of a group: a key, the mark of a record, a value; four groups fill the channels that RoPE does not turn."""

GROUP = KEY + LINK + VALUE
ROLE = 0.6
"""Length of the role's direction in an embedding whose word has length 1; half as long, negative, without the role."""

ROLE_GATE = 1.5
"""Gate weights of a c128 entry along a role: e^12 between a token that has it and one that has not."""

PLACE_GATE = 6.0
"""Gate bias of a c4 entry at the place that a channel is for."""

ENTRY_GAIN = 2.0
"""Norm weight of entries: how far the logit of a record that matches stands above the others."""


class Basis(NamedTuple):
    """Orthonormal directions of the hidden space: keys [56, H], values [56, H], and one [H] for each mark."""

    keys: Tensor
    values: Tensor
    is_key: Tensor
    is_value: Tensor
    link: Tensor
    rest: Tensor


def initial(config: ReferenceConfig, seed: int) -> Weights:
    """fp32 weights to start training from; equal seeds give equal values."""
    weights = {name: random(name, p.shape, config, seed) for name, p in stacked(config).items()}
    basis = _basis(config.hidden_size, seed)
    _words(weights, basis, _rng(seed, "words"))
    if config.q_lora_rank != config.hidden_size or config.num_attention_heads < GROUPS:
        return weights
    for layer, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers]):
        if ratio:
            prefix = f"layers.{layer}.attn."
            turns = _rotations(prefix, seed)
            _entries(weights, prefix, ratio, basis, turns)
            _recall(weights, prefix, ratio, basis, turns, config)
        if ratio == 4:
            _index(weights, prefix, basis, _rng(seed, prefix + "indexer"))
    return weights


def _rng(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _orthogonal(n: int, rng: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))[0].float()


def _basis(hidden: int, seed: int) -> Basis:
    turned = _orthogonal(hidden, _rng(seed, "basis"))
    keys, values, marks, rest = turned.split((data.KEYS, data.VALUES, 3, hidden - data.KEYS - data.VALUES - 3))
    return Basis(keys, values, *marks, rest)


def _rotations(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Of each group, how a key [4, 48, 56] and a value [4, 56, 56] lie in its channels: orthonormal rows."""
    rng = _rng(seed, name + "groups")
    keys = torch.stack([_orthogonal(data.KEYS, rng)[:KEY] for _ in range(GROUPS)])
    return keys, torch.stack([_orthogonal(data.VALUES, rng) for _ in range(GROUPS)])


def _words(weights: Weights, basis: Basis, rng: torch.Generator) -> None:
    """Embeddings with the roles' directions; the LM head reads values where `_recall` writes them."""
    embed, words = weights["embed.weight"], data.words()
    hidden = embed.shape[1]
    for mark in (basis.is_key, basis.is_value, basis.link):
        embed -= (embed @ mark).unsqueeze(1) * mark
    embed /= embed.norm(dim=1, keepdim=True)
    embed[torch.from_numpy(words.keys)] = basis.keys
    embed[torch.from_numpy(words.values)] = basis.values
    embed[data.ids(" is")[0]] = basis.link
    for ids, mark in ((words.keys, basis.is_key), (words.values, basis.is_value)):
        role = torch.full((len(embed),), -ROLE / 2)
        role[torch.from_numpy(ids)] = ROLE
        embed += role.unsqueeze(1) * mark
    embed *= math.sqrt(hidden) / embed.norm(dim=1, keepdim=True)
    weights["head.weight"][torch.from_numpy(words.values)] += basis.values


def _entries(weights: Weights, prefix: str, ratio: int, basis: Basis, turns: tuple[Tensor, Tensor]) -> None:
    """Compressed entries of four groups: what each channel holds, and the token whose turn it is."""
    name = prefix + "compressor."
    # 8 channels for the mark weigh as much as 48 for the key.
    link = basis.link.expand(LINK, -1) / math.sqrt(LINK)
    held = torch.cat([torch.cat((k @ basis.keys, link, v @ basis.values)) for k, v in zip(*turns, strict=True)])
    wkv, gate, ape = (weights[name + w] for w in ("wkv.weight", "wgate.weight", "ape"))
    for half in wkv.view(-1, HEAD_DIM, wkv.shape[1]):
        half[: len(held)] = held
        half[len(held) :] *= 0.1
    weights[name + "norm.weight"].fill_(ENTRY_GAIN)
    if ratio == 4:
        gate *= 0.3
        ape *= 0.2
        for group in range(GROUPS):
            start = group * GROUP
            for place, width in zip((2, 3, 4), (KEY, LINK, VALUE), strict=True):
                half, row = divmod(place + group, ratio)
                ape[row, half * HEAD_DIM + start : half * HEAD_DIM + start + width] += PLACE_GATE
                start += width
    else:
        ape *= 0.2
        role = torch.cat((basis.is_key.expand(KEY, -1), basis.link.expand(LINK, -1), basis.is_value.expand(VALUE, -1)))
        gate[: len(held)] = ROLE_GATE * role.repeat(GROUPS, 1)


def _recall(
    weights: Weights, prefix: str, ratio: int, basis: Basis, turns: tuple[Tensor, Tensor], config: ReferenceConfig
) -> None:
    """Head g finds the entry whose group g has the key at its own position, and writes that entry's value."""
    down = _orthogonal(config.hidden_size, _rng(0, prefix + "wq_a"))
    weights[prefix + "wq_a.weight"] = down
    heads = weights[prefix + "wq_b.weight"].view(-1, HEAD_DIM, config.q_lora_rank)
    wkv = weights[prefix + "wkv.weight"]
    wo_a = weights[prefix + "wo_a.weight"].view(config.o_groups, config.o_lora_rank, -1, HEAD_DIM)
    wo_b = weights[prefix + "wo_b.weight"].view(-1, config.o_groups, config.o_lora_rank)
    wo_a[:, :VALUE] = 0
    wo_b[:, :, :VALUE] = 1.2 * basis.values.T.unsqueeze(1)
    mark = basis.is_key.expand(LINK, -1) * (1.5 / math.sqrt(LINK))
    # All four heads find the same c128 entry; of a c4 entry only one group holds the record.
    gain = 0.7 if ratio == 4 else 0.25
    for group, (key, value) in enumerate(zip(*turns, strict=True)):
        start = group * GROUP
        wkv[start : start + KEY + LINK] = 0  # the window holds no records: no head looks for one there
        heads[group] = 0
        heads[group, start : start + KEY + LINK] = torch.cat((key @ basis.keys, mark)) @ down.T
        side, place = divmod(group, config.heads_per_group)
        wo_a[side, :, place] = 0
        wo_a[side, :VALUE, place, start + KEY + LINK : start + GROUP] = gain * value.T


def _index(weights: Weights, prefix: str, basis: Basis, rng: torch.Generator) -> None:
    """Index keys hold the key of an entry's 8 tokens, all index heads look for the key at the query's position."""
    name = prefix + "indexer."
    still = INDEX_HEAD_DIM - ROPE_DIM
    turned = torch.linalg.qr(torch.randn(still, data.KEYS, generator=rng))[0] @ basis.keys
    for w, gain in (("compressor.wkv.weight", 1.0), ("wq_b.weight", 0.3)):
        for part in weights[name + w].view(-1, INDEX_HEAD_DIM, basis.keys.shape[1]):
            part[still:] *= 0.1
            part[:still] = gain * turned + 0.1 * gain * part[:still]
    queries = weights[name + "wq_b.weight"]
    queries.copy_(queries @ weights[prefix + "wq_a.weight"].T)
    weights[name + "compressor.wgate.weight"][:] = ROLE_GATE * basis.is_key
    weights[name + "compressor.ape"] *= 0.2
    # Positive for keys: only then do high scores choose.
    weights[name + "weights_proj.weight"][:] = 0.1 * basis.is_key


def random(name: str, shape: tuple[int, ...], config: ReferenceConfig, seed: int) -> Tensor:
    """A weight without a circuit in it."""
    kind = name.rsplit(".", 2)
    normal = torch.randn(shape, generator=_rng(seed, name))
    n = config.hc_mult
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(("attn_sink", "gate.bias")):
        return torch.zeros(shape)
    if name.endswith("hc_head_base"):
        return torch.full(shape, -math.log(n - 1))
    if name.endswith("_base"):
        # The streams' mean is read, all are written, each keeps to itself; the noise tells them apart.
        base = torch.cat((torch.full((n,), -math.log(n - 1)), torch.zeros(n), 4 * torch.eye(n).flatten()))
        return base + 0.5 * normal
    if name.endswith("_scale"):
        return torch.full(shape, 0.1)
    if name.endswith("ape"):
        return 0.5 * normal
    if name == "embed.weight":
        return normal
    # Into the streams, small: each layer starts near the identity. The head starts at the uniform distribution.
    small = {"wo_b.weight": 0.3, "w2.weight": 0.3, "head.weight": 0.1}
    gain = small.get(".".join(kind[-2:]), 1.0)
    return normal * (gain / math.sqrt(shape[-1]))
