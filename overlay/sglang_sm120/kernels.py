"""Launching Triton kernels: for real, or on meta tensors to compile them and to learn how much scratch they need.

Every provider launches through `launch` and takes scratch through `scratch`. Run on meta tensors inside `rehearsal`,
a provider executes nothing: its kernels are compiled for the rehearsal's target and its scratch is counted. The
compile gate (for sm_120a, without a GPU), the warm-up and the scratch plan are all rehearsals of the same shapes.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

SM120_SMS = 188
"""Streaming multiprocessors of an RTX PRO 6000: what a rehearsal without a GPU plans for."""
ALIGNMENT = 256
STREAMS = 4
"""Streams that may hold an op's scratch at once: SGLang's main stream and the three it captures beside it."""


class ScratchError(RuntimeError):
    """Scratch was asked for that no rehearsal had counted, after it was frozen or inside a CUDA-graph capture."""


@dataclass
class Rehearsal:
    """What providers would have done: `compile(kernel, args, options)` once per launch, scratch bytes per op."""

    compile: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
    sms: int = SM120_SMS
    scratch: dict[str, int] = field(default_factory=dict)


_rehearsal: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)


@contextlib.contextmanager
def rehearse(rehearsal: Rehearsal) -> Iterator[Rehearsal]:
    """Inside, `launch` and `scratch` report to `rehearsal` instead of running."""
    token = _rehearsal.set(rehearsal)
    try:
        yield rehearsal
    finally:
        _rehearsal.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; an empty grid launches nothing but is still compiled in a rehearsal."""
    rehearsal = _rehearsal.get()
    if rehearsal is not None:
        rehearsal.compile(kernel, args, options)
    elif 0 not in grid:
        kernel[grid](*args, **options)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; the target's in a rehearsal; 1 on CPU."""
    rehearsal = _rehearsal.get()
    if rehearsal is not None:
        return rehearsal.sms
    return _multiprocessors(device) if device.type == "cuda" else 1


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Pool:
    """Scratch of one op on one device: `STREAMS` equal parts, each for one stream, at addresses that stay."""

    def __init__(self) -> None:
        self.part = 0
        self.streams: dict[int, int] = {}
        self.memory: torch.Tensor | None = None

    def allocate(self, part: int, device: torch.device) -> None:
        self.part = -(-part // ALIGNMENT) * ALIGNMENT
        self.memory = torch.empty(self.part * STREAMS, dtype=torch.uint8, device=device)


_pools: dict[tuple[str, torch.device], _Pool] = {}
_frozen = False


def reserve(op: str, part: int, device: torch.device) -> None:
    """Give `op` at least `part` bytes of scratch per stream on `device`, before it is frozen."""
    pool = _pools.setdefault((op, device), _Pool())
    if pool.part < part:
        if _frozen:
            raise ScratchError(f"op {op} wants {part} bytes of scratch, has {pool.part}, and scratch is frozen.")
        pool.allocate(part, device)


def scratch(op: str, device: torch.device, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    """Uninitialised tensors of the wanted (shape, dtype), which `op` owns until its next call on this stream.

    On a CUDA device they lie in memory reserved for (op, stream), at the same address every time; elsewhere they
    are new.

    Raises:
        ScratchError: more was asked for than is reserved, and it is frozen or a graph is being captured.
    """
    sizes = [-(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape, dtype in wanted]
    total = sum(sizes)
    rehearsal = _rehearsal.get()
    if rehearsal is not None:
        rehearsal.scratch[op] = max(total, rehearsal.scratch.get(op, 0))
    if rehearsal is not None or device.type != "cuda":
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in wanted]
    pool = _pools.setdefault((op, device), _Pool())
    stream = torch.cuda.current_stream(device).cuda_stream
    number = pool.streams.setdefault(stream, len(pool.streams))
    if number >= STREAMS:
        raise ScratchError(f"op {op} runs on {number + 1} streams, and its scratch is for {STREAMS}: raise STREAMS.")
    if total > pool.part:
        if _frozen or torch.cuda.is_current_stream_capturing():
            raise ScratchError(
                f"op {op} needs {total} bytes of scratch and was given {pool.part} before the first CUDA graph: "
                f"plan for its largest case."
            )
        pool.allocate(total, device)
    assert pool.memory is not None or total == 0
    tensors, start = [], number * pool.part
    for (shape, dtype), size in zip(wanted, sizes, strict=True):
        flat = pool.memory[start : start + math.prod(shape) * dtype.itemsize] if pool.memory is not None else None
        tensors.append(
            flat.view(dtype).view(shape) if flat is not None else torch.empty(shape, dtype=dtype, device=device)
        )
        start += size
    return tensors


_late: list[str] = []


def freeze() -> None:
    """End of warm-up: from here on a compilation of an overlay kernel is a defect, and scratch does not grow."""
    global _frozen
    from triton import knobs

    _frozen = True
    knobs.runtime.jit_post_compile_hook = _count_late_compile


def thaw() -> None:
    """Undo `freeze` (tests)."""
    global _frozen
    from triton import knobs

    _frozen = False
    _late.clear()
    knobs.runtime.jit_post_compile_hook = None


def late_compiles() -> list[str]:
    """Kernels compiled after `freeze`, the overlay's first by their module `sglang_sm120.`; SGLang's own too."""
    return list(_late)


def _count_late_compile(*, fn: Any, repr: str, **_: Any) -> None:
    _late.append(f"{fn.module}.{repr}")
    if fn.module.startswith("sglang_sm120."):
        logger.error("An overlay kernel was compiled while serving: %s.%s. Please report this line.", fn.module, repr)
    else:
        logger.warning("SGLang compiled one of its own kernels while serving: %s.%s", fn.module, repr)
