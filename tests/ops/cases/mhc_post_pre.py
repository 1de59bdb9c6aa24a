"""Cases of `mhc_post_pre`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import BF16

from .common import Case, Maker
from .mhc_post import inputs as post_inputs
from .mhc_pre import inputs as pre_inputs


def cases(kind: str) -> Iterator[Case]:
    """The cases of the two ops, joined."""

    def build(make: Maker, tokens: int, hidden: int, norm: bool) -> dict[str, Any]:
        return pre_inputs(make, tokens, hidden, norm) | post_inputs(make, tokens, hidden)

    sizes = [(0, 64), (1, 64), (3, 96), (17, 96), (70, 32)]
    if kind != "cpu":
        sizes += [(tokens, model_config()["hidden_size"]) for tokens in (1, 2, 4, 8, 16, 33, 64, 65, 300)]
    for tokens, hidden in sizes:
        for norm in (False, True):
            name = f"{tokens}x{hidden}{'-norm' if norm else ''}"
            yield Case(name, BF16, partial(build, tokens=tokens, hidden=hidden, norm=norm))
