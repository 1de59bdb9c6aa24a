"""Before a server says ready: compile every kernel it can need, and reserve the scratch its CUDA graphs will hold.

What is compiled later is a defect, logged and counted (`kernels.late_compiles`).
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import kernels, ops, registry, tuned
from .compilation import Job, compile_jobs, rehearse_job, variant_key

logger = logging.getLogger(__name__)


def served(speculates: bool = True) -> list[str]:
    """The ops with Triton kernels that the step calls, of any model, or calls without speculation."""
    return [name for name in ops.with_triton() if ops.SPECS[name].served and speculates >= ops.SPECS[name].speculates]


def steps(op: str, prefill_rows: int, graph_rows: int, context: int) -> tuple[tuple[int, int], ...]:
    """(rows, context) of calls of `op` that between them launch every variant of its kernels.

    Args:
        prefill_rows: tokens of the largest prefill step.
        graph_rows: tokens of the largest step in a CUDA graph.
        context: tokens of the longest request.

    Heuristics and the tables of `tuned` choose by powers of two of the rows, and kernels do not specialise on the
    number itself, so each power of two and its successor stand for the rows up to the next.
    """
    largest = max(prefill_rows, graph_rows)
    rows = {graph_rows, largest}
    for exponent in range(largest.bit_length()):
        rows |= {1 << exponent, (1 << exponent) + 1}
    contexts = {context}
    apart = ops.SPECS[op].context
    for exponent in range(8, context.bit_length(), apart) if apart else ():
        contexts |= {1 << exponent, min(context, (1 << exponent) + 256)}
    return tuple((r, c) for r in sorted(rows) if 0 < r <= largest for c in sorted(contexts))


def warm_up(
    config: dict[str, Any],
    tp: int,
    ep: int,
    prefill_rows: int,
    graph_rows: int,
    context: int,
    device: torch.device,
    barrier: Callable[[], None] = lambda: None,
    compiles: bool = True,
    lent_rows: int = 0,
    speculates: bool = True,
) -> None:
    """Compile in parallel into Triton's cache on disk, load every kernel from there, reserve scratch.

    Args:
        config: the model's `config.json`.
        tp, ep: ranks, and how many of them divide the experts by number.
        prefill_rows, graph_rows, context: the sizes as in `steps`.
        device: the CUDA device of this rank.
        barrier: waits for the other ranks.
        compiles: whether this rank is the one that compiles for its host.
        lent_rows: tokens of the largest pass in which SGLang's own forward calls what is lent to it.
        speculates: whether the server does, with EAGLE.

    Raises:
        ValueError: a call of as many rows as graphs may have is none that the chosen provider takes; its torch
            reference, which eager passes have then, cannot be captured.
    """
    sizes = (tp, ep, prefill_rows, graph_rows, context)
    key = (*sizes, lent_rows, speculates, device)
    if key in _warm:
        return
    began = time.monotonic()
    table = registry.table(registry.device_kind(device))
    called = (ops.named(name) for name in (*served(speculates), *ops.with_own()))
    ours = {(op, provider) for op, provider in called if ops.SPECS[op].where(config)}
    names = [f"{row.op}={row.provider}" for row in table if row.chosen and (row.op, row.provider) in ours]
    found = variants(config, *sizes, names, kernels.sms(device), tuned.of_device(device), lent_rows)
    if found.refused:
        raise ValueError(
            f"The step cannot serve requests of {context} tokens of this model: {found.refused[-1].rstrip('.')}. "
            "Give a smaller --context-length, or the variable SGLANG_SM120=0, with which SGLang's own forward serves."
        )
    for op, size in found.scratch.items():
        kernels.reserve(op, size, device, kernels.STREAMS + ops.SPECS[op].streams)
    mark = _mark(found.launches)
    listed = time.monotonic()
    if compiles and not mark.exists() and not multiprocessing.current_process().daemon:
        major, minor = torch.cuda.get_device_capability(device)
        with tqdm(total=len(found.jobs), desc="Compiling sglang_sm120 kernels", unit="kernel") as bar:
            for _ in compile_jobs(found.jobs, major * 10 + minor, done=lambda _: bar.update()):
                pass
    barrier()
    compiled = time.monotonic()
    for kernel, args, options in found.launches.values():
        # Reading `run` loads module and launcher, which a first launch would otherwise do in a capture or a request.
        getattr(kernel.run(*args, grid=(1,), warmup=True, **options), "run")  # noqa: B009
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    kernels.freeze()
    _warm.add(key)
    logger.info(
        "sglang_sm120: %d kernels ready (%.1f s to list, %.1f s to compile, %.1f s to load).",
        len(found.launches), listed - began, compiled - listed, time.monotonic() - compiled,
    )  # fmt: skip


_warm: set[tuple[int, int, int, int, int, int, bool, torch.device]] = set()
_Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass
class Variants:
    """What a server can launch: by key, a launch on meta tensors; a job that compiles each; graphs' scratch bytes.

    refused: calls of as many rows as graphs may have that a provider does not take, in words, the longest last.
    """

    launches: dict[str, _Launch] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    scratch: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def variants(
    config: dict[str, Any],
    tp: int,
    ep: int,
    prefill_rows: int,
    graph_rows: int,
    context: int,
    names: list[str],
    sms: int,
    table: tuned.Table = tuned.EMPTY,
    lent_rows: int = 0,
) -> Variants:
    """Rehearse the ops `names` (`ops.named`) at all their `steps`, for the active Triton target with `sms` SMs."""
    found = Variants()
    for op_and_provider in names:
        name, provider = ops.named(op_and_provider)
        spec = ops.SPECS[name]
        mine = _divided(config, ep) if spec.by_experts else config
        captured = max(graph_rows, lent_rows) if spec.lent else graph_rows
        for step in steps(name, prefill_rows, captured, context):
            job = Job(mine, name, tp, (step,), sms, table=table, provider=provider)

            def collect(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], _: str, job: Job = job) -> None:
                key = variant_key(kernel, args, options)
                if key not in found.launches:
                    found.launches[key] = (kernel, args, options)
                    found.jobs.append(replace(job, only=key))

            refused = found.refused.append if step[0] <= graph_rows else lambda _: None
            for op, size in rehearse_job(job, collect, refused).items():
                if step[0] <= captured:
                    found.scratch[op] = max(size, found.scratch.get(op, 0))
    return found


def _divided(config: dict[str, Any], ep: int) -> dict[str, Any]:
    """A configuration whose experts, divided by width among `tp` ranks, are as `ep` of them divide them by number."""
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    return {**config, "n_routed_experts": experts // ep, "moe_intermediate_size": width * ep}


def _mark(keys: Iterable[str]) -> Path:
    """A file beside Triton's cache whose presence says: these variants were compiled into it."""
    from triton import knobs
    from triton.runtime import driver

    names = "\n".join([str(driver.active.get_current_target()), *sorted(keys)])
    return Path(knobs.cache.dir) / f"sglang_sm120-{hashlib.sha256(names.encode()).hexdigest()[:16]}"
