"""The four residual streams between blocks: the exit of one block waits for the entry of the next, to run as one op."""

from __future__ import annotations

from typing import Any

import torch

from . import ops

__all__ = ["Deferred", "enter", "leave", "value"]


class Deferred:
    """Streams bf16 [T, 4, H] that `mhc_post` of f, x, post and comb will make, with the next entry if it can."""

    def __init__(self, f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> None:
        self._exit: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = (f, x, post, comb)
        self._value = x

    def enter(
        self, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`mhc_pre` of the streams, which exist afterwards."""
        if self._exit is None:
            return ops.mhc_pre(self._value, fn, scale, base, **options)
        f, x, post, comb = self._exit
        self._value, y, post, comb = ops.mhc_post_pre(f, x, post, comb, fn, scale, base, **options)
        self._exit = None
        return y, post, comb

    def value(self) -> torch.Tensor:
        """The streams as a tensor."""
        if self._exit is not None:
            self._value, self._exit = ops.mhc_post(*self._exit), None
        return self._value


def enter(
    x: torch.Tensor | Deferred, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mhc_pre(x, fn, scale, base, **options)`, fused with the exit that x waits for."""
    return (
        x.enter(fn, scale, base, **options) if isinstance(x, Deferred) else ops.mhc_pre(x, fn, scale, base, **options)
    )


def leave(f: torch.Tensor, x: torch.Tensor | Deferred, post: torch.Tensor, comb: torch.Tensor) -> Deferred:
    """`mhc_post(f, x, post, comb)`, deferred to the next `enter` or `value`."""
    return Deferred(f, value(x), post, comb)


def value(x: torch.Tensor | Deferred) -> torch.Tensor:
    """The streams x as a tensor."""
    return x.value() if isinstance(x, Deferred) else x
