"""What runs beside each other in a captured pass: no part reads or writes what another one may still write or read.

The step runs on a CPU with streams that only count. Each operation on a tensor is noted with the stream that would run
it; two on the same memory, one of them writing, need an event or a join between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import PromptOf
from standin import New, Server, Weights, stub_sglang
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_sm120 import ops, streams
from sglang_sm120.step.target import Target
from sglang_sm120.streams import Beside
from sglang_sm120.warmup import served
from sglang_sm120_reference.config_file import load_config

ALTERNATES = len(streams.PRIORITIES)


class Stream:
    """How far this stream is, and how far it knows the others to be: a vector clock."""

    def __init__(self, index: int) -> None:
        self.index, self.known, self.priority = index, {index: 0}, 0

    def record_event(self) -> dict[int, int]:
        return dict(self.known)

    def wait_event(self, event: dict[int, int]) -> None:
        for index, tick in event.items():
            self.known[index] = max(tick, self.known.get(index, 0))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.known)


class Watch(TorchDispatchMode):
    """Every operation on memory, by the stream that is current; `races` says which were not ordered."""

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream(0)
        self.alternates = [Stream(1 + i) for i in range(ALTERNATES)]
        self.races: list[str] = []
        self.operations = [0] * (1 + ALTERNATES)
        self._written: dict[int, tuple[int, int, str]] = {}
        self._read: dict[int, dict[int, tuple[int, str]]] = {}
        self._kept: list[Any] = []

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns):
            return result  # a view
        here, name = self.current, str(func)
        here.known[here.index] += 1
        self.operations[here.index] += 1
        named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (kwargs or {})
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        for argument, value in named.items():
            for tensor in _tensors(value):
                self._access(tensor, argument in written, name)
        for tensor in _tensors(result):
            self._access(tensor, True, name)
        return result

    def _access(self, tensor: torch.Tensor, writes: bool, name: str) -> None:
        here, storage = self.current, tensor.untyped_storage()
        self._kept.append(storage)  # or another tensor would get its address
        place = storage._cdata
        others = {} if not writes else self._read.get(place, {})
        before = [(stream, tick, what) for stream, (tick, what) in others.items()]
        before += [self._written[place]] if place in self._written else []
        self.races += [
            f"{name} on stream {here.index} after {what} on stream {stream}, which it does not wait for"
            for stream, tick, what in before
            if here.known.get(stream, 0) < tick
        ]
        now = here.known[here.index]
        if writes:
            self._written[place] = (here.index, now, name)
            self._read.pop(place, None)
        else:
            self._read.setdefault(place, {})[here.index] = (now, name)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


@pytest.fixture
def streams_of(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """On which streams each op with a Triton kernel has been called."""
    found: dict[str, set[int]] = {name: set() for name in served()}

    def noted(name: str, op: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            found[name].add(watch.current.index)
            return op(*arguments, **options)

        return call

    for name in served():
        monkeypatch.setattr(ops, name, noted(name, getattr(ops, name)))
    return found


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: watch.current)
    monkeypatch.setattr(torch.cuda, "stream", watch.on)
    made = iter(watch.alternates)

    def stream(priority: int) -> Stream:
        one = next(made)
        one.priority = priority
        return one

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    return watch


def test_a_captured_pass_has_no_race(
    watch: Watch,
    streams_of: dict[str, set[int]],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    prompt_of: PromptOf,
    seed: int,
) -> None:
    ranks, model, tokens = stub_sglang(monkeypatch), Weights(checkpoint).target(), prompt_of(270, seed)
    ratios = load_config(checkpoint).compress_ratios
    with torch.no_grad():
        model.model.alt_streams = ["one of SGLang's"]
        server = Server(Target(model), ratios, 1, 270, torch.Generator().manual_seed(seed))
        server.extend(New(1, 0, tokens[:255]))
        # The ends of a block of 4, of 128 and of a page; then the middle of one.
        passes = [New(1, 255, tokens[255:256]), New(1, 256, tokens[256:257])]
        twin = server.copy()
        expected = [twin.decode(one).logits for one in passes]
        ranks.capturing = True
        for used in streams_of.values():
            used.clear()
        with watch:
            found = [server.decode(one).logits for one in passes]
    assert not watch.races, watch.races[:5]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # A capture ends when its first stream does.
    assert all(watch.main.known.get(one.index, 0) == one.known[one.index] for one in watch.alternates)
    print(f"operations of each stream: {watch.operations}")
    # Each has scratch of its own, which is taken before a graph is captured.
    beside = {name: len(used) - 1 for name, used in streams_of.items() if len(used) > 1}
    assert beside == {name: spec.streams for name, spec in ops.SPECS.items() if spec.streams}
    # What attention waits for starts before the blocks of its queries' projection, which are many.
    first = {one.index for one in watch.alternates if one.priority < 0}
    assert streams_of["bf16_linear_fp32"] - {0} <= first and not streams_of["mxfp4_moe"] & first
    assert all(watch.operations) and watch.operations[0] > sum(watch.operations[1:]) / 4


@pytest.mark.parametrize("waits", [True, False])
def test_a_race_is_seen(watch: Watch, waits: bool) -> None:
    beside = Beside(watch.alternates)
    with watch:
        x = torch.ones(3)
        made = beside.mark()
        with beside.on(0, *([made] if waits else [])):
            x.add_(1)
        beside.join()
        x.add_(1)
    assert bool(watch.races) == (not waits)


def test_without_streams_all_stands_in_its_order() -> None:
    beside, done = Beside(), []
    assert beside.mark() is None
    with beside.on(3, None):
        done.append("part")
    beside.join()
    assert done == ["part"]
