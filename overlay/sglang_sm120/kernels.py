"""Launching Triton kernels: for real, or on meta tensors to compile them and to learn how much scratch they need.

Every provider launches through `launch` and takes scratch through `scratch`. Run on meta tensors inside `rehearsal`,
a provider executes nothing: its kernels are compiled for the rehearsal's target and its scratch is counted. The
compile gate (for sm_120a, without a GPU), the warm-up and the scratch plan are all rehearsals of the same shapes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger(__name__)

SM120_SMS = 188
"""SMs of an RTX PRO 6000: what a rehearsal without a GPU plans for."""
ALIGNMENT = 256


class ScratchError(RuntimeError):
    """Scratch that a CUDA graph would hold was not reserved before."""


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


def rehearsing() -> bool:
    """Whether launches are rehearsed; where sizes between those rehearsed choose other variants, launch these too."""
    return _rehearsal.get() is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; an empty grid launches nothing but is still compiled in a rehearsal.

    Unless SGLANG_SM120_PDL is 0 it may start while the kernel before it still runs (`ops._pdl_triton`).
    """
    if dependent():
        options["launch_pdl"] = True
    rehearsal = _rehearsal.get()
    if rehearsal is not None:
        rehearsal.compile(kernel, args, options)
    elif 0 not in grid:
        kernel[grid](*args, **options)


def registers(warps: int, resident: int = 8) -> int:
    """`maxnreg` of a kernel with `warps` a block of which an SM is to hold `resident` warps at once.

    Left to itself, ptxas may spill to make room for more than its shared memory allows, or take a few registers more
    than the next block needs. SM120's shared memory holds eight warps of most tiles, a Hopper card's sixteen.
    """
    return min(255, 65_536 // (32 * max(warps, resident)))


@cache
def dependent() -> bool:
    """Whether SGLANG_SM120_PDL allows dependent launches; the interpreter runs one kernel after the other."""
    from triton import knobs

    value = os.environ.get("SGLANG_SM120_PDL", "1")
    if value not in ("0", "1"):
        raise ValueError(f"SGLANG_SM120_PDL is {value!r} and needs 0 or 1.")
    return value == "1" and not knobs.runtime.interpret


def fix_cache_keys(module: ModuleType) -> None:
    """Have Triton hash the kernels of `module` now, helpers before the kernels that call them.

    It leaves the globals of a helper out of a kernel's hash unless that helper was hashed before (3.6.0), so that a
    process would miss what another one, which met the kernels in another order, has put into the cache on disk.
    """
    from triton.runtime.jit import JITFunction

    for value in vars(module).values():
        if isinstance(value, JITFunction):
            hash(value.cache_key)


def leaves_room(programs: int, following: int, device: torch.device) -> int:
    """1 if each of `programs` and of the next kernel's `following` programs finds an SM of its own, else 0."""
    return int(programs + following <= sms(device))


def sms(device: torch.device) -> int:
    """SMs of `device`; the target's in a rehearsal; 1 on CPU."""
    rehearsal = _rehearsal.get()
    if rehearsal is not None:
        return rehearsal.sms
    return _sms(device) if device.type == "cuda" else 1


@cache
def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


STREAMS = 2
"""Streams that a server runs the step on: one captures graphs, the other runs what has none."""
_reserved: dict[tuple[str, torch.device], int] = {}
_spare: dict[tuple[str, torch.device], list[torch.Tensor]] = {}
_parts: dict[tuple[str, torch.device, int], torch.Tensor] = {}


def reserve(op: str, size: int, device: torch.device, streams: int = STREAMS) -> None:
    """Let calls of `op` on `device` that need up to `size` bytes of scratch use memory that keeps its address.

    Called before the first CUDA-graph capture with the most that a captured call needs; on a GPU the memory of
    `streams` streams is taken now, so that whoever sizes a cache afterwards sees it taken.

    Raises:
        ScratchError: it would grow after a stream was given memory, whose address a graph may hold.
    """
    if device.type == "cuda" and device.index is None:
        # As tensors on it name it.
        device = torch.device("cuda", torch.cuda.current_device())
    size = -(-size // ALIGNMENT) * ALIGNMENT
    reserved = _reserved.get((op, device), 0)
    if size <= reserved:
        return
    if any(part[:2] == (op, device) for part in _parts):
        raise ScratchError(
            f"op {op} asks for {size} bytes of scratch, and its {reserved} bytes are in use: reserve the larger first."
        )
    _reserved[op, device] = size
    if device.type == "cuda":
        _spare[op, device] = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(streams)]


def scratch(op: str, device: torch.device, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    """Uninitialised tensors of the wanted (shape, dtype), which `op` owns until its next call on this stream.

    Up to the reserved size they lie in memory of (op, stream), at the same address every time. A larger call, such
    as a prefill, which no graph holds, gets new ones.

    Raises:
        ScratchError: inside a CUDA-graph capture, more was asked for than is reserved, or the stream is new.
    """
    rehearsal = _rehearsal.get()
    sizes = [-(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape, dtype in wanted]
    total = sum(sizes)
    if rehearsal is not None:
        rehearsal.scratch[op] = max(total, rehearsal.scratch.get(op, 0))
    reserved = _reserved.get((op, device), 0)
    if device.type == "cuda" and total > reserved and torch.cuda.is_current_stream_capturing():
        raise ScratchError(
            f"op {op} needs {total} bytes of scratch in a CUDA graph and {reserved} are reserved: "
            "reserve its largest case before the first capture."
        )
    if device.type != "cuda" or total > reserved:
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in wanted]
    memory = _part(op, device, reserved)
    tensors, start = [], 0
    for (shape, dtype), size in zip(wanted, sizes, strict=True):
        flat = memory[start : start + math.prod(shape) * dtype.itemsize]
        tensors.append(flat.view(dtype).view(shape))
        start += size
    return tensors


def _part(op: str, device: torch.device, size: int) -> torch.Tensor:
    """The memory of (op, current stream): reserved, or for a further stream taken at its first call."""
    key = (op, device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _parts:
        if torch.cuda.is_current_stream_capturing():
            raise ScratchError(f"op {op} first runs on this stream inside a capture: run it there once before.")
        spare = _spare[op, device]
        _parts[key] = spare.pop() if spare else torch.empty(size, dtype=torch.uint8, device=device)
    return _parts[key]


_late: list[str] = []


def freeze() -> None:
    """End of warm-up: from here on a compilation of an overlay kernel is a defect, logged and counted."""
    from triton import knobs

    knobs.runtime.jit_post_compile_hook = _count_late_compile


def reset() -> None:
    """Undo `freeze` and every `reserve` (tests)."""
    from triton import knobs

    _reserved.clear()
    _spare.clear()
    _parts.clear()
    _late.clear()
    knobs.runtime.jit_post_compile_hook = None


def late_compiles() -> list[str]:
    """Kernels compiled after `freeze`, the overlay's first by their module `sglang_sm120.`; SGLang's own too."""
    return list(_late)


def _count_late_compile(*, fn: Any, compile: dict[str, Any], **_: Any) -> None:
    constants = {path[0]: value for path, value in compile["constants"].items()}
    kinds = [constants.get(i, kind) for i, kind in enumerate(compile["signature"].values())]
    described = ", ".join(f"{name}={kind}" for name, kind in zip(compile["signature"], kinds, strict=True))
    name = f"{fn.module}.{fn.name}({described}, warps={compile['num_warps']}, stages={compile['num_stages']})"
    _late.append(name)
    if fn.module.startswith("sglang_sm120."):
        logger.error("An overlay kernel was compiled while serving: %s. Please report this line.", name)
    else:
        logger.info("SGLang compiled one of its own kernels while serving: %s", name)
