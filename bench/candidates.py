"""What `make tune` tries: calls of the real model, most valuable first, and configurations of their kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sglang_sm120 import kernels, ops, registry, tuned
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.spec import Call, nbytes

ROWS = (1, 8, 64, 2, 4, 16, 32)
MANY_ROWS = (256, 4096)
OPS = tuple(name for name in ops.with_triton() if ops.SPECS[name].served and ops.SPECS[name].tunables)
OF_THE_MODEL = tuple(name for name in OPS if ops.SPECS[name].where(model_config()))
"""Those that the step calls for the published model."""


@dataclass(frozen=True)
class Case:
    """One call of the model (the `position`th of its op), and by table key what is tried, the heuristic's first."""

    op: str
    label: str
    position: int
    tp: int
    rows: int
    context: int
    tried: dict[tuned.Key, list[Any]] = field(repr=False)


class _Asked(dict[tuned.Key, Any]):
    """An empty table that remembers what it was asked for, and what the heuristic had."""

    def get(self, key: tuned.Key, default: Any = None) -> Any:
        return self.setdefault(key, default)


def asked(call: Call, sms: int) -> dict[tuned.Key, Any]:
    """The heuristic's choice by each table key that a call looks up, on meta tensors."""
    table = _Asked()
    with kernels.rehearse(kernels.Rehearsal(lambda *_: None, sms)), tuned.using(table):
        registry.ops()[call.op].by("triton", **call.arguments)
    return dict(table)


def cases(names: Iterable[str], tp: int, rows: Iterable[int], contexts: Iterable[int], sms: int) -> list[Case]:
    """Every case, most valuable first; calls that share all their keys with one before are left out."""
    found: list[tuple[tuple[int, int], Case]] = []
    seen: set[frozenset[tuned.Key]] = set()
    for op, count, context in itertools.product(names, rows, contexts):
        for position, call in enumerate(ops.calls(op, model_config(), tp, count, context)):
            chosen = asked(call, sms)
            if frozenset(chosen) in seen:
                continue
            seen.add(frozenset(chosen))
            tried = {key: candidates(op, key, heuristic) for key, heuristic in chosen.items()}
            found.append((_turn(call, count), Case(op, call.label, position, tp, count, context, tried)))
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def _turn(call: Call, rows: int) -> tuple[int, int]:
    """Where a call stands in line: what decode and verification have most of first, and of it the largest."""
    return (0 if rows in (1, 8) else 1 if rows <= 64 else 2), -nbytes(*call.arguments.values())


def candidates(op: str, key: tuned.Key, heuristic: Any) -> list[Any]:
    """The heuristic's configuration and others that its family accepts, each once."""
    name, shape, rows = key
    refusal = tuned.FAMILIES[name].refusal
    others = (c for c in ops.SPECS[op].tunables[name](shape, rows, heuristic) if refusal(shape, rows, c) is None)
    return list(dict.fromkeys((heuristic, *others)))
