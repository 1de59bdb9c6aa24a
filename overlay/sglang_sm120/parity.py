"""The Triton kernels on the real model's calls: against what they are to give, and under CUDA-graph replay.

`python -m sglang_sm120.parity [OP …]` is the part of `sglang-sm120 prove` that runs kernels. It says what it finds as
JSON objects, one a line: first the GPU and the ops, or that there is none; then each op's name, and its calls. A
provider with arithmetic of its own is named `op=provider`.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import kernels, ops, registry, tuned
from .checkpoint.config import FLASH, model_config
from .spec import Call
from .tolerance import BF16, EXACT, FP32, Tolerance

DEVICE = torch.device("cuda")
LONGEST = 1_048_576 + 275
"""Tokens that SGLang's page tables have room for with ten drafts: a request's, twice the drafts', a page's less one."""
STEPS = ((1, 8192), (4, 8192), (16, 8192), (64, 8192), (256, 8192), (1, LONGEST))
"""(rows, context) of the steps that `prove` runs, of one of TP ranks."""
OWN_STEPS = ((65, 8192), (256, 8192), (4096, 8192), (8192, 8192))
"""Those for providers with arithmetic of their own, which are for prefill, and are timed beside the default there."""
TP = 2
SEED = 20
REPLAYS = 8
SILENCE_SECONDS = 300
"""A call that takes longer hangs: SIGALRM ends the process, wherever it waits."""


def calls_of(op: str, tp: int, rows: int, context: int, seed: int, model: str = FLASH) -> Iterator[Call]:
    """A published model's calls of one op, with random values on the GPU."""
    return ops.calls(op, model_config(model), tp, rows, context, DEVICE, seed)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a provider's result, nested tuples and lists flattened."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple | list) else []


def triton_result(call: Call, provider: str = "triton") -> list[torch.Tensor]:
    """What Triton kernels of the op make of a call."""
    return tensors(registry.ops()[call.op].by(provider, **call.arguments))


def reference_result(call: Call, provider: str = "triton") -> list[torch.Tensor]:
    """What they are to make of it: the torch reference's result, or that of the provider's own arithmetic."""
    return tensors(registry.ops()[call.op].meant(provider, **call.arguments))


class Verdict(NamedTuple):
    """How a result compares with its reference: None or what is wrong, and its errors where values were compared.

    rms, largest: RMS error over the reference's RMS value, largest error over its largest value; None beyond fp32 too.
    """

    problem: str | None
    rms: float | None = None
    largest: float | None = None


def compare(call: Call, provider: str = "triton") -> Verdict:
    """How the Triton result of a call compares with what it is to be."""
    # The next allocations get this memory.
    torch.full((1 << 26,), torch.nan, device=DEVICE)
    got = triton_result(call, provider)
    own = registry.ops()[call.op].providers[provider].own
    if own:
        return worst(call.op, got, reference_result(call, provider), own.tolerance)
    if ops.SPECS[call.op].scores:
        return Verdict(selection_problem(call, got[0]))
    if problem := ops.SPECS[call.op].problem:
        return Verdict(problem(call.arguments, *got))
    return worst(call.op, got, reference_result(call))


def worst(
    op: str, got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: Tolerance | None = None
) -> Verdict:
    """The results of an op beside what is expected: the first problem, and the largest errors of all.

    tolerance: by default that of the op's results.
    """
    found = [
        difference(a, b, tolerance or (EXACT if ops.SPECS[op].exact else FP32 if b.dtype == torch.float32 else BF16))
        for a, b in zip(got, expected, strict=True)
    ]
    problem = next((verdict.problem for verdict in found if verdict.problem), None)
    rms = max((verdict.rms for verdict in found if verdict.rms is not None), default=None)
    return Verdict(problem, rms, max((v.largest for v in found if v.largest is not None), default=None))


def difference(got: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Verdict:
    """How a tensor compares with the one that is expected."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return Verdict(f"{got.dtype} {list(got.shape)} and needs {expected.dtype} {list(expected.shape)}")
    got, expected = got.float(), expected.float()
    finite = expected.isfinite()
    if wrong := int((got.isfinite() != finite).sum()):
        return Verdict(f"{wrong} values are not finite where they should be, or the reverse")
    error, expected = (got - expected)[finite], expected[finite]
    if not error.numel():
        return Verdict(None)
    rms, largest = error.square().mean().sqrt().item(), error.abs().max().item()
    whole_rms, whole = expected.square().mean().sqrt().item(), expected.abs().max().item()
    allowed_rms, allowed = tolerance.rms * whole_rms, tolerance.largest * whole
    problem = None
    if rms > allowed_rms or largest > allowed:
        problem = f"RMS error {rms:.2e} (allowed {allowed_rms:.2e}), largest {largest:.2e} (allowed {allowed:.2e})"
    errors = (rms / (whole_rms or 1), largest / (whole or 1))
    # JSON has no infinity.
    return Verdict(problem, *(error if math.isfinite(error) else None for error in errors))


def selection_problem(call: Call, slots: torch.Tensor) -> str | None:
    """Whether `slots` are k best entries of each row by the reference's scores, near ties apart."""
    arguments = {name: value for name, value in call.arguments.items() if name != "k"}
    logits = registry.ops()[ops.SPECS[call.op].scores or call.op].reference(**arguments)
    k, page_size, table = call.arguments["k"], call.arguments["page_size"], call.arguments["page_table"]
    # Page ids of a row are different, so a slot names its entry.
    entry_of = torch.full((table.shape[0], int(table.max()) + 1), -1, device=DEVICE)
    entry_of.scatter_(1, table.long(), torch.arange(table.shape[1], device=DEVICE).expand_as(table))
    live = slots >= 0
    entry = entry_of.gather(1, (slots.clamp(min=0) // page_size).long()) * page_size + slots.clamp(min=0) % page_size
    length = call.arguments["lengths"].clamp(max=k)
    if not torch.equal(live.sum(1), length.to(torch.int64)):
        return "a row has another number of slots than entries it may choose"
    ascending = entry.masked_fill(~live, torch.iinfo(torch.int64).max)
    if not (ascending[:, 1:] >= ascending[:, :-1]).all() or not live.long().diff(dim=1).le(0).all():
        return "slots are not in ascending order of their entries"
    # Absent slots are marked in a column of their own.
    width = logits.shape[1]
    marks = torch.zeros(logits.shape[0], width + 1, dtype=torch.bool, device=DEVICE)
    chosen = marks.scatter_(1, entry.masked_fill(~live, width), True)[:, :width]
    if not torch.equal(chosen.sum(1), length.to(torch.int64)):
        return "a slot is listed twice"
    lowest = logits.masked_fill(~chosen, torch.inf).amin(1)
    best_rejected = logits.masked_fill(chosen, -torch.inf).amax(1)
    # fp32 sums over 64 heads in another order.
    slack = 1e-5 * logits.masked_fill(~logits.isfinite(), 0).abs().amax(1)
    if (best_rejected > lowest + slack).any():
        return "a rejected entry scores higher than a chosen one"
    return None


def replay(call: Call, seed: int, provider: str = "triton") -> str | None:
    """None, or how a replayed CUDA graph of the call differs, by a bit, from the call outside of a graph.

    Before each of the REPLAYS the call's lengths, choices and tables change in place, and free memory and what the
    graph is to write are filled with ones and NaN.
    """
    kernels.reset()
    with kernels.rehearse(kernels.Rehearsal(lambda *_: None, kernels.sms(DEVICE))) as rehearsal:
        triton_result(call, provider)
    for owner, size in rehearsal.scratch.items():
        kernels.reserve(owner, size, torch.device("cuda", 0))
    stream = torch.cuda.Stream()
    # It reads what the other stream has made.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        triton_result(call, provider)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = triton_result(call, provider)
    rng = torch.Generator(DEVICE).manual_seed(seed)
    change = changing(call, rng, seed)
    for number in range(1, REPLAYS + 1):
        change()
        disturbance = [torch.full((size,), torch.nan, device=DEVICE) for size in (1 << 20, 1000, 1 << 24)]
        del disturbance
        for tensor in captured:
            tensor.view(torch.uint8).fill_(0xFF)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, triton_result(call, provider), strict=True):
            if differ := int((a.view(torch.uint8) != b.view(torch.uint8)).sum()):
                return f"replay {number}: {differ} of {b.nbytes} bytes differ from those of the call outside the graph"
    return None


def changing(call: Call, rng: torch.Generator, seed: int) -> Callable[[], None]:
    """What changes a call's lengths, choices and tables in place: lengths and choices up to those that it has now."""
    highs = {
        name: max(int(value.max()) + 1, 1)
        for name, value in call.arguments.items()
        if value is not None and (name == "topk_ids" or name.endswith("lengths"))
    }

    def change() -> None:
        for name, value in call.arguments.items():
            if name in highs:
                value.copy_(torch.randint(0, highs[name], value.shape, generator=rng, device=value.device))
            elif value is not None and name in ("page_table", "slots", "window_slots", "extra_slots"):
                value.copy_(value.roll(1 + seed % 5, dims=1))

    return change


def _say(**found: Any) -> None:
    # On a line of its own, whatever a library may have left on the last.
    print(f"\n{json.dumps(found)}", flush=True)
    signal.alarm(SILENCE_SECONDS)


def microseconds(call: Call, provider: str) -> float:
    """Median GPU time of eleven runs of a call, each after the L2 was overwritten."""
    other = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(12):
        other.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        triton_result(call, provider)
        ended.record()
        torch.cuda.synchronize()
        times.append(1000 * began.elapsed_time(ended))
    return round(statistics.median(times[1:]), 1)


def _prove(name: str) -> None:
    """Say how each call of an op, or of one of its providers, fares; an error ends the calls of its step."""
    op, provider = ops.named(name)
    own = registry.ops()[op].providers[provider].own
    kind = registry.device_kind(DEVICE)
    why = registry.refusal(registry.ops()[op].providers[provider], kind) if own else None
    _say(op=name, not_run=why)
    if why:
        return
    for rows, context in OWN_STEPS if own else STEPS:
        step, label = {"rows": rows, "context": context}, "arguments"
        try:
            for call in calls_of(op, TP, rows, context, SEED):
                began, label = time.monotonic(), call.label
                verdict, trials = compare(call, provider), []
                for trial, table in {} if own else ops.SPECS[op].trials(call.arguments).items():
                    with tuned.using(table):
                        trials.append((trial, compare(call)._replace(problem=None)._asdict()))
                # Last, since it changes the arguments.
                replayed = replay(call, SEED, provider)
                times = [microseconds(call, p) if own else None for p in (provider, "triton")]
                seconds = round(time.monotonic() - began, 2)
                found = verdict._asdict() | {"replay": replayed, "us": times[0], "default_us": times[1]}
                _say(call=label, **step, **found, seconds=seconds)
                for trial, tried in trials:
                    _say(call=f"{call.label}, {trial}", **step, **found | tried | {"replay": None}, seconds=None)
                label = "arguments"
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:500] or 'no message'}"
            found = Verdict(problem)._asdict() | {"replay": None, "us": None, "default_us": None}
            _say(call=label, **step, **found, seconds=None)
            # A bad address poisons the context: then nothing after it could be believed, and this raises.
            torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main() -> None:
    """Say everything of the ops that are named, by default of all that have Triton kernels."""
    import triton

    signal.alarm(SILENCE_SECONDS)
    if not torch.cuda.is_available():
        _say(none="torch sees no CUDA device, needed one: run it on a GPU machine with a driver that `doctor` takes.")
        return
    card = torch.cuda.get_device_properties(DEVICE)
    native = f"sm{card.major}{card.minor}"
    compiled_for = triton.knobs.runtime.override_arch or native
    gpu = {"name": card.name, "compute_capability": f"{card.major}.{card.minor}", "sms": card.multi_processor_count}
    gpu |= {"memory_mib": card.total_memory >> 20, "kernels": compiled_for, "dependent_launches": kernels.dependent()}
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}
    names = sys.argv[1:] or [*ops.with_triton(), *ops.with_own()]
    evidence = "measured" if card.major == 12 and compiled_for == native else "emulated"
    _say(gpu=gpu, versions=versions, evidence=evidence, ops=names)
    for name in names:
        _prove(name)


if __name__ == "__main__":
    main()
