"""The ops: each is a contract with a torch reference, and has room for providers.

A folder here is an op: `__init__.py` its reference, under `Op`; and where there are, `triton.py` and `sglang.py` its
providers of our kernels and of SGLang's, `mxfp8.py` one of our kernels with arithmetic of its own, and `spec.py` what
the tools know of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

import torch

from .. import kernels, registry
from ..spec import Call, Inputs, Spec

if TYPE_CHECKING:

    def __getattr__(name: str) -> registry.Op[..., Any]: ...


SPECS: dict[str, Spec] = {}
"""By the op's name."""


def load() -> None:
    """Register the ops of the folders in this package's `__path__`."""
    for name in sorted(module.name for module in iter_modules(__path__) if module.ispkg and module.name not in SPECS):
        package = f"{__name__}.{name}"
        op = getattr(import_module(package), name)
        parts = {part for part in ("triton", "mxfp8", "sglang", "spec") if find_spec(f"{package}.{part}")}
        found = {part: import_module(f"{package}.{part}") for part in sorted(parts)}
        theirs = "SGLang's CUDA kernel" if "sglang" in parts else None
        SPECS[name] = found["spec"].SPEC if "spec" in found else Spec(prefill=theirs)
        globals()[name] = op
    for imported in [module for name, module in sys.modules.items() if name.startswith(f"{__name__}.")]:
        kernels.fix_cache_keys(imported)


load()


def with_triton() -> list[str]:
    """Names of the ops that have Triton kernels."""
    return sorted(name for name, op in registry.ops().items() if "triton" in op.providers)


def with_own() -> list[str]:
    """`op=provider` of the providers that have Triton kernels with arithmetic of their own."""
    return [f"{op.name}={p.name}" for op in registry.ops().values() for p in op.providers.values() if p.own]


def named(name: str) -> tuple[str, str]:
    """Op and provider of `op=provider`, or of an op's name alone: its Triton provider."""
    op, _, provider = name.partition("=")
    return op, provider or "triton"


def calls(
    op: str,
    config: dict[str, Any],
    tp: int,
    rows: int,
    context: int,
    device: torch.device | str = "meta",
    seed: int = 0,
) -> Iterator[Call]:
    """The calls of an op in one forward pass on one of `tp` ranks; none of an op whose spec has none.

    Args:
        config: the model's `config.json`.
        rows: tokens of the step.
        context: tokens each row can see.
    """
    made = SPECS[op].calls if op in SPECS else None
    if made is not None:
        for label, arguments in made(Inputs(torch.device(device), seed), config, tp, rows, context):
            yield Call(op, label, arguments)
