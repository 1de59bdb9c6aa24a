"""What the specs of the hyper-connection ops share: the arguments of an exit, of an entry, and their traffic."""

from __future__ import annotations

from typing import Any

import torch

from ..spec import Arguments, Inputs, nbytes


def mixing(make: Inputs, c: dict[str, Any], parts: int) -> dict[str, torch.Tensor]:
    """fn, scale and base of one mixing: `parts` scales, 24 mixes at 3, 4 at 1."""
    mixes, width = (24, 4 * c["hidden_size"]) if parts == 3 else (4, 4 * c["hidden_size"])
    return {
        "fn": make.normal(mixes, width, scale=width**-0.5),
        "scale": make.normal(parts),
        "base": make.normal(mixes),
    }


def entry(make: Inputs, c: dict[str, Any]) -> dict[str, Any]:
    return {**mixing(make, c, 3), "norm_weight": make.bf16(c["hidden_size"])}


def leaving(make: Inputs, c: dict[str, Any], rows: int) -> dict[str, torch.Tensor]:
    hidden = c["hidden_size"]
    return {
        "f": make.bf16(rows, hidden),
        "x": make.bf16(rows, 4, hidden),
        "post": make.normal(rows, 4).sigmoid() * 2,
        "comb": make.normal(rows, 4, 4).softmax(-1),
    }


def entered(a: Arguments) -> tuple[int, int]:
    """Bytes of an entry: its arguments, and of four streams one that it makes."""
    return nbytes(*a.values()) + nbytes(a["x"]) // 4, 0


def left(a: Arguments) -> tuple[int, int]:
    """Bytes of an exit, with an entry or without: its arguments, the streams and as much as it is given."""
    return nbytes(*a.values()) + nbytes(a["x"], a["f"]), 0
