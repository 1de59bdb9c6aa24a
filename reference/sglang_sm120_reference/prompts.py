"""Prompts on which every part of a checkpoint written here shows."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoint import Checkpoint
from .tokenizer import MARKUP_TOKENS, SPECIAL_TOKENS
from .weights import Channels

SPACING = 160
"""Tokens between marked ones: each is far behind most of the prompt, so only a compressed entry shows it."""


def prompt(checkpoint: str | Path, length: int, seed: int = 0) -> list[int]:
    """`length` random token ids without the encoding's markers, with a marked token near each 160th place.

    A marked token is one that attention on c4 layers looks for (see `weights`): what the indexer must select.
    """
    weights = Checkpoint(checkpoint, torch.float32, None)
    marks = weights.weight("embed.weight")[:, Channels(weights.config.n_routed_experts).mark] > 0
    ids = torch.arange(weights.config.vocab_size)
    plain = ids[~marks & (ids >= len(SPECIAL_TOKENS) + len(MARKUP_TOKENS))]
    marked = ids[marks]
    rng = torch.Generator().manual_seed(seed)
    tokens = plain[torch.randint(len(plain), (length,), generator=rng)]
    places = torch.arange(0, length, SPACING)
    places = places + torch.randint(8, 72, places.shape, generator=rng)
    places = places[places < length]
    tokens[places] = marked[torch.randint(len(marked), places.shape, generator=rng)]
    return tokens.tolist()
