"""Prompts of the server tests."""

from __future__ import annotations

import torch


def random_prompt(tokens: int, seed: int) -> list[int]:
    """`tokens` byte tokens of the small vocabulary."""
    return torch.randint(0, 250, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


# From here on the indexer chooses 512 of 650 entries, and 20 c128 entries are in sight.
LONG = random_prompt(2600, 1)
SHORT = random_prompt(200, 2)
