"""What the gate has to compile, and how: the steps, the registry's kernels, and one run of the compiler for both."""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from kernel_table import Key, key
from resources import Resources, read_resources
from torch.utils._pytree import tree_map_only
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sglang_sm120 import ops, registry
from sglang_sm120.checkpoint.config import FLASH, PRO, RANKS, model_config
from sglang_sm120.compilation import Job, Kernel, compile_jobs
from sglang_sm120.parity import LONGEST
from sglang_sm120.spec import Call

SAMPLED = ((FLASH, 2),)
"""Of RANKS those of the sample."""
ROWS = tuple(sorted({2**i + more for i in range(14) for more in (0, 1)} - {8193}))
"""1 … 8,192, the largest chunk of a prefill: providers choose by powers of two, so each and the one above it.

`other_steps` are between these, and no step may need a kernel of its own.
"""
CONTEXTS = (100, 2047, 2600, *(2**i for i in range(12, 21)), LONGEST)
SAMPLE = ((1, 65_536),)
MANY = ((65, 65_536), (2048, 65_536), (8192, 65_536))
"""For providers with arithmetic of their own, which are for prefill: each tile of theirs."""

Step = tuple[int, int]
Rank = tuple[str, int]
Name = tuple[str, str, str]
"""A specialisation: op, kernel and variant."""
Compiled = dict[Name, tuple[Kernel, Resources]]


class Run(NamedTuple):
    """Every kernel compiled; which of them the gate's steps need, and which the steps in between."""

    found: Compiled
    steps: set[Name]
    between: set[Name]


def all_steps(op: str) -> tuple[Step, ...]:
    """Every (rows, context) of `op`; one context where its arguments do not depend on it."""
    short, long = (
        [_shapes(call) for call in _calls(op, FLASH, 1, 1, context)] for context in (CONTEXTS[0], CONTEXTS[-1])
    )
    return tuple(itertools.product(ROWS, CONTEXTS if short != long else CONTEXTS[-1:]))


def other_steps(op: str) -> tuple[Step, ...]:
    """Steps between those of `all_steps`, the same in every run."""
    rng = random.Random(op)
    return tuple((int(2 ** rng.uniform(0, 13)), int(2 ** rng.uniform(0, 20))) for _ in range(40))


def jobs(steps: Callable[[str], tuple[Step, ...]], ranks: Iterable[Rank]) -> list[Job]:
    """One job per op, or provider with its own arithmetic, and rank; those of one, which share kernels, are far apart.
    """
    own = [ops.named(name) for name in ops.with_own()]
    return [
        job
        for model, tp in ranks
        for job in (
            *(Job(model_config(model), op, tp, steps(op)) for op in ops.with_triton() if _has_calls(op)),
            *(Job(model_config(model), op, tp, steps(op) + MANY, provider=provider) for op, provider in own),
        )
    ]


def sample() -> list[Job]:
    """One row at TP 2, and top-k of V4-Pro's full context, whose second launch has keys of more than a tile."""
    return [*jobs(lambda _: SAMPLE, SAMPLED), Job(model_config(PRO), "topk_slots", 8, ((70, LONGEST),))]


def compile_all(wanted: list[Job], done: Callable[[Job, set[Name]], None]) -> Compiled:
    """Compile for sm_120a and read what each kernel needs; `done` gets each finished job and what it launches."""
    pending: dict[Name, tuple[Kernel, Future[Resources]]] = {}
    with ThreadPoolExecutor(2) as readers:
        for job, kernels, _ in compile_jobs(wanted, capability=120):
            names = {(kernel.op, kernel.name, kernel.variant): kernel for kernel in kernels}
            for name in names.keys() - pending.keys():
                kernel = names[name]
                pending[name] = (kernel, readers.submit(read_resources, kernel.cubin, kernel.shared))
            done(job, set(names))
    return {name: (kernel, use.result()) for name, (kernel, use) in pending.items()}


def lines(compiled: Compiled) -> Iterator[tuple[Key, Resources]]:
    """(line of the table, figures) of each variant."""
    return ((key(*name), use) for name, (_, use) in compiled.items())


def uncovered(registered: Mapping[str, registry.Op[..., Any]]) -> list[str]:
    """Providers that the gate does not compile, or that refuse a call of the model: one sentence each."""
    problems = []
    for name, op in registered.items():
        problems += [
            f"op {name} has a provider {provider}, and the gate compiles Triton's: teach it the other."
            # SGLang builds and checks its own.
            for provider in op.providers.keys() - {registry.TORCH, "triton", "sglang"}
            if not op.providers[provider].own
        ]
        if "triton" not in op.providers:
            continue
        if not _has_calls(name):
            problems.append(f"op {name} has a Triton provider and no calls in its spec: add the model's.")
            continue
        for (model, tp), step in itertools.product(RANKS, ((ROWS[0], CONTEXTS[0]), (ROWS[-1], CONTEXTS[-1]))):
            at = f"of {model} at TP {tp}, {step[0]} rows"
            for call in _calls(name, model, tp, *step):
                for provider in ("triton", *(p.name for p in op.providers.values() if p.own)):
                    refusal = op.refusal(provider, **call.arguments)
                    if refusal is not None:
                        problems.append(f"op {name} refuses {call.label} {at}: {refusal}")
    return problems


def kernels_defined(modules: Iterable[Any] | None = None) -> set[tuple[str, str]]:
    """(op, name) of the kernels in `modules` (default: all of the overlay): jit functions that no other one calls.

    The op is empty where several share the module.
    """
    if modules is None:
        modules = [module for name, module in sys.modules.items() if name.startswith("sglang_sm120.")]
    values = [value for module in modules for value in vars(module).values()]
    functions = [value.fn for value in values if isinstance(value, JITFunction | InterpretedFunction)]
    called = {getattr(f.__globals__.get(name), "fn", None) for f in functions for name in f.__code__.co_names}
    owners = {f: re.search(r"\.ops\.([a-z]\w*)\.", f.__module__) for f in functions if f not in called}
    return {(owner[1] if owner else "", f.__name__) for f, owner in owners.items()}


def _has_calls(op: str) -> bool:
    return op in ops.SPECS and ops.SPECS[op].calls is not None


def _calls(op: str, model: str, tp: int, rows: int, context: int) -> list[Call]:
    return list(ops.calls(op, model_config(model), tp, rows, context))


def _shapes(call: Call) -> list[object]:
    return list(tree_map_only(torch.Tensor, lambda tensor: tuple(tensor.shape), call.arguments).values())
