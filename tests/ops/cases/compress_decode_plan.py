"""Cases of `compress_decode_plan`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.tolerance import EXACT

from .common import Case, Maker
from .compress_prefill_plan import mapping


def cases(kind: str) -> Iterator[Case]:
    """First tokens, block ends and page ends; both ratios and a longer ring."""

    def build(make: Maker, ratio: int, ring_size: int) -> dict[str, Any]:
        seq_lens = [1, 2, 4, 5, 8, 127, 128, 129, 256, 257, 1000]
        return {
            "ratio": ratio,
            "seq_lens": make.tensor(seq_lens, torch.int64),
            "ring_size": ring_size,
            **mapping(make, len(seq_lens)),
        }

    for ratio, ring_size in ((4, 8), (4, 16), (128, 128), (128, 256)):
        yield Case(f"c{ratio}-ring{ring_size}", EXACT, partial(build, ratio=ratio, ring_size=ring_size))
