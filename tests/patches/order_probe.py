"""Prints, as JSON, on which stream and in which order a layer of experts launches its parts, by rows and activity.

Run by `test_launch_order.py` with the patched SGLang; streams and parts are stand-ins that write down what happens.
"""

from __future__ import annotations

import contextlib
import json
import types
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.models import deepseek_v2

import sglang_sm120

log: list[str] = []
current: list[Any] = []


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        log.append(f"{self.name} waits for {other.name}")


@contextlib.contextmanager
def on(stream: Stream) -> Iterator[None]:
    current.append(stream)
    yield
    current.pop()


def part(name: str, result: Any) -> Any:
    def run(*_: Any, **__: Any) -> Any:
        log.append(f"{name} on {current[-1].name}")
        return result

    return run


def launches(rows: int) -> list[str]:
    log.clear()
    current[:] = [Stream("main")]
    ones = torch.ones(rows, 8)
    experts = part("experts", ones.clone())
    layer = types.SimpleNamespace(
        alt_stream=Stream("alt"), gate=part("gate", ones), topk=part("topk", None), layer_id=0, tp_size=1,
        _forward_shared_experts=part("shared", ones.clone()), _shared_expert_tp1=False, routed_scaling_factor=1.0,
        experts=experts,
    )  # fmt: skip
    experts.quant_method = None
    y = deepseek_v2.DeepseekV2MoE.forward_normal_dual_stream(layer, ones)
    assert torch.equal(y, ones * 2), y
    return list(log)


torch.cuda.current_stream = lambda: current[-1]  # type: ignore[assignment, misc]
torch.cuda.stream = on  # type: ignore[assignment]
deepseek_v2.get_global_server_args = lambda: types.SimpleNamespace(enable_eplb=False)
found = {}
for active in (False, True):
    sglang_sm120._active = active
    found[str(active)] = {rows: launches(rows) for rows in (1, 2)}
print(json.dumps(found))
