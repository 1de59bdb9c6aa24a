"""Compiles the overlay's kernels for a list of model calls, in parallel processes, without running one.

The warm-up uses it for the device it runs on, so that Triton's on-disk cache holds every kernel before the server says
ready; the compile gate uses it for sm_120a on machines without a GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch

from . import kernels, registry, tuned


@dataclass(frozen=True)
class Job:
    """The calls of one op on one of `tp` ranks, for every (rows, context) of `steps`, by one of its providers.

    only: the `variant_key` of the one kernel to compile, together with the C function that launches it; by default
    every kernel they launch, without. table: the configurations that the launches follow.
    """

    config: dict[str, Any]
    op: str
    tp: int
    steps: tuple[tuple[int, int], ...]
    sms: int = kernels.SM120_SMS
    only: str | None = None
    table: tuned.Table = field(default_factory=dict)
    provider: str = "triton"


@dataclass(frozen=True)
class Kernel:
    """One compiled specialisation, and the first call that needs it.

    variant names what the code was specialised for: argument types, constants, warps, stages. shared is bytes of
    shared memory per block, swizzles the layouts that tensors have there, as Triton writes them.
    """

    op: str
    call: str
    name: str
    variant: str
    shared: int
    swizzles: tuple[str, ...]
    ptx: str
    cubin: bytes


class _Target:
    """Stands in for Triton's driver: names the architecture to compile for and has no device."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        return self._target


def use_target(capability: int) -> None:
    """Let Triton compile for this capability times ten in this process, which runs no kernel from then on."""
    # Read when kernels are defined: in the interpreter there is nothing to compile.
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime import driver

    driver.set_active(_Target(capability))
    torch.set_num_threads(1)


def _variant(compiled: Any) -> str:
    """`x:*fp32/16, n:i32, BLOCK=64, warps=4, stages=3`: types (/16: divisible by 16) and values of constants.

    An argument that is None is left out, as the code has nothing of it.
    """
    source, words = compiled.src, []
    for index, (name, kind) in enumerate(source.signature.items()):
        if kind == "constexpr":
            value = source.constants.get((index,))
            words += [] if value is None else [f"{name}={value}"]
        else:
            divisible = any(attribute == "tt.divisibility" for attribute, _ in source.attrs.get((index,), []))
            words.append(f"{name}:{kind}{'/16' if divisible else ''}")
    return ", ".join([*words, f"warps={compiled.metadata.num_warps}", f"stages={compiled.metadata.num_stages}"])


def variant_key(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What decides which machine code a launch of `kernel` runs: its source, types, alignments, constants, options."""
    from triton.runtime import driver

    binder = kernel.device_caches[driver.active.get_current_device()][-1]
    _, specialization, parsed = binder(*args, debug=False, instrumentation_mode="", **options)
    return f"{kernel.cache_key} {specialization} {parsed}"


def _with_label(compile: Callable[..., None], label: str, *launch: Any) -> None:
    compile(*launch, label)


def rehearse_job(
    job: Job,
    compile: Callable[[Any, tuple[Any, ...], dict[str, Any], str], None],
    refused: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
    """`compile(kernel, args, options, label)` for each launch of `job`'s calls; return scratch bytes by owner.

    `refused` is told, in words, each call that the provider does not take.
    """
    from . import ops

    op = registry.ops()[job.op]
    rehearsal = kernels.Rehearsal(lambda *_: None, sms=job.sms)
    for rows, context in job.steps:
        for call in ops.calls(job.op, job.config, job.tp, rows, context):
            label = f"{call.label} tp{job.tp} rows{rows} context{context}"
            rehearsal.compile = partial(_with_label, compile, label)
            with kernels.rehearse(rehearsal), tuned.using(job.table):
                if why := op.refusal(job.provider, **call.arguments):
                    refused(f"{job.op} of {rows} rows with requests of {context} tokens: {why}")
                else:
                    op.by(job.provider, **call.arguments)
    return rehearsal.scratch


def compile_job(job: Job) -> tuple[list[Kernel], int]:
    """Compile what `job` launches for the active target; return the kernels and the op's scratch in bytes."""
    found: dict[str, Kernel] = {}

    def compile_one(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], label: str) -> None:
        if job.only not in (None, variant_key(kernel, args, options)):
            return
        compiled = kernel.run(*args, grid=(1,), warmup=True, **options)
        if compiled is None or compiled.hash in found:
            return
        found[compiled.hash] = Kernel(
            op=job.op,
            call=label,
            name=kernel.fn.__name__,
            variant=_variant(compiled),
            shared=compiled.metadata.shared,
            swizzles=tuple(re.findall(r"#ttg\.swizzled_shared<\{.*?\}>", compiled.asm["ttgir"])),
            ptx=compiled.asm["ptx"],
            cubin=compiled.asm["cubin"],
        )

    scratch = rehearse_job(job, compile_one)
    if job.only is not None and not found:
        raise RuntimeError(
            f"no call of {job.op} at {job.steps} launches {job.only}: its key differs between processes."
        )
    return list(found.values()), sum(scratch.values())


@contextlib.contextmanager
def _blank_main() -> Iterator[None]:
    """Keep processes that start inside from importing this one's main module, in a server all of SGLang."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def compile_jobs(
    jobs: Iterable[Job],
    capability: int,
    workers: int | None = None,
    done: Callable[[Job], None] | None = None,
) -> Iterator[tuple[Job, list[Kernel], int]]:
    """`compile_job` for each job in `workers` processes (default: the usable cores, at most 32), as they finish.

    Args:
        capability: compute capability to compile for, times ten: 120.
        done: called in this process after each job, for progress.

    Raises:
        whatever a kernel's compilation raised, from the first job that failed.
    """
    # Each imports torch, which more processes would spend their time on.
    workers = workers or min(32, len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, use_target, (capability,)) as pool:
        with _blank_main():
            futures = {pool.submit(compile_job, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            compiled, scratch = future.result()
            if done is not None:
                done(job)
            yield job, compiled, scratch
