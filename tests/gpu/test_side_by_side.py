"""What the benchmarks of whole servers compute from streamed answers, and the weights that they serve."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

import side_by_side
import sm120_lowering
import streamed
from local_server import ServerError
from sglang_sm120.formats import fp8_block
from side_by_side import Side, Turn
from streamed import Chunk

pytestmark = pytest.mark.needs_no_gpu
sys.path.append(str(Path(side_by_side.__file__).parent / "random_weights"))
import random_weights  # noqa: E402  on PYTHONPATH of servers alone


def answers(monkeypatch: pytest.MonkeyPatch, *chunks: dict[str, Any]) -> None:
    lines = [f"data: {json.dumps(chunk)}" for chunk in chunks]

    @contextlib.contextmanager
    def stream(*_: Any, **__: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(iter_lines=lambda: ["", *lines, "data: [DONE]"])

    monkeypatch.setattr(httpx, "stream", stream)


def chunk(index: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {"index": index, "meta_info": {"completion_tokens": tokens, **more}}


def test_chunks_of_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, chunk(1, 1), chunk(0, 1), chunk(0, 9, spec_verify_ct=3), chunk(1, 9))
    first, second = streamed.ask("http://x", [[5], [6]], 9)
    assert [(c.tokens, c.verifications) for c in first] == [(1, 0), (9, 3)]
    assert [c.tokens for c in second] == [1, 9] and first[0].seconds >= second[0].seconds


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([chunk(0, 1), {"error": {"message": "no"}}], "/generate answers"),
        ([chunk(0, 9), chunk(1, 8)], "ended after 8 of 9"),
        ([chunk(0, 9)], "ended after 0 of 9"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(
    monkeypatch: pytest.MonkeyPatch, chunks: list[dict[str, Any]], said: str
) -> None:
    answers(monkeypatch, *chunks)
    with pytest.raises(RuntimeError, match=said):
        streamed.ask("http://x", [[5], [6]], 9)


def test_the_pace_is_of_the_time_in_which_all_decode() -> None:
    """The first answer's 100 ms a token lie before the second one's first token."""
    first = [Chunk(0.0, 1, 0), Chunk(0.8, 9, 0), Chunk(1.6, 17, 0), Chunk(2.4, 25, 0), Chunk(2.48, 33, 0)]
    second = [Chunk(2.4, 1, 0), Chunk(2.48, 9, 0)]
    assert streamed.pace([first, second]) == pytest.approx(10)
    assert streamed.pace([first]) == pytest.approx(100)


def test_a_cycle_is_of_the_time_in_which_all_decode() -> None:
    """32 tokens took 16 verifications: the last eight, 4 of them, 20 ms each; all of them together 155."""
    first = [Chunk(0.0, 1, 0), Chunk(0.8, 9, 0), Chunk(2.4, 25, 0), Chunk(2.48, 33, 16)]
    second = [Chunk(2.4, 1, 0), Chunk(2.48, 9, 4)]
    assert streamed.cycle([first, second]) == pytest.approx(20)
    assert streamed.cycle([first]) == pytest.approx(155)


def test_what_shows_no_pace_is_an_error() -> None:
    """An answer that ended before the other began, and a server that does not speculate."""
    early, late = [Chunk(0.0, 1, 0), Chunk(0.1, 9, 4)], [Chunk(0.2, 9, 0)]
    for measured in (streamed.pace, streamed.cycle):
        with pytest.raises(RuntimeError, match="no answer shows a pace"):
            measured([early, late])
    with pytest.raises(RuntimeError, match="no answer shows a pace"):
        streamed.cycle([[Chunk(0.0, 1, 0), Chunk(0.1, 9, 0)]])


def test_the_table_has_medians_spreads_and_ratios() -> None:
    text = side_by_side.table({"sglang": {"decode 1 1024": [10.0, 12.0, 11.0]}, "sm120": {"decode 1 1024": [5.5, 5.5]}})
    (row,) = (line for line in text.splitlines() if line.startswith("decode"))
    assert row.split()[3:] == ["11.00", "±1.00", "5.50", "±0.00", "0.50x"]
    lacking = side_by_side.table({"sglang": {}, "sm120": {"ready": [60.0]}})
    assert lacking.splitlines()[1].split() == ["ready", "-", "60.00", "±0.00"]


class Recorded:
    """In a LocalServer's place: what is asked of it goes into `events`, and it is ready when its gate is open."""

    events: list[str]

    def __init__(self, *_: Any, log: Path, env: dict[str, str], **__: Any) -> None:
        self.log, self.url, self._gate = log, log.stem, Path(env["RANDOM_WEIGHTS_GATE"])
        self._stopped = threading.Event()
        log.write_text("the step takes its first decode pass" if log.stem.startswith("step") else "")

    def __enter__(self) -> Recorded:
        self.events.append(f"{self.url} starts")
        while not self._gate.exists():
            if self._stopped.wait(0.01):
                raise ServerError("stopped")
        return self

    def stop(self) -> None:
        self._stopped.set()
        self.events.append(f"{self.url} stops")


def test_the_picture_has_a_panel_for_each_kind_of_figure(tmp_path: Path) -> None:
    figures = {
        "sglang": {"ready": [73.0], "prefill 1024": [9.0], "decode 1 1024": [3.0, 1.0, 2.0], "eagle 4 1024": [5.0]},
        "sm120": {"eagle ready": [60.0], "decode 1 1024": [1.0], "decode 8 1024": [4.0], "decode 1 16384": [7.0]},
    }
    own = {"sglang": [(1, 2.0)], "sm120": [(1, 1.0), (8, 4.0)]}
    assert [(panel.title, panel.x_label, panel.y_label, panel.series) for panel in side_by_side.panels(figures)] == [
        ("decode, 1,024 tokens of context", "requests", "ms a token", own),
        ("decode, 16,384 tokens of context", "requests", "ms a token", {"sm120": [(1, 7.0)]}),
        ("eagle, 1,024 tokens of context", "requests", "ms a cycle", {"sglang": [(4, 5.0)]}),
        ("prefill", "tokens of the prompt", "tokens/s", {"sglang": [(1024, 9.0)]}),
    ]
    run = {"gpu": "NVIDIA <1>", "asked": {"tp": 2}, "torch": "2", "experts": 128, "date": "2026-11-30"}
    (tmp_path / "a.json").write_text(json.dumps(run | {"figures": figures}))
    script = Path(side_by_side.__file__)
    subprocess.run([sys.executable, script, "--draw", tmp_path / "a.json"], check=True, timeout=120)
    assert "NVIDIA &lt;1&gt;, TP 2, torch 2, 128 experts" in (tmp_path / "a.svg").read_text()


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> side_by_side.Turns:
    def measure(url: str, *_: Any) -> Iterator[tuple[str, float]]:
        Recorded.events.append(f"{url} is measured")
        if url.endswith("9"):
            raise RuntimeError("no answer")
        yield "decode 1 1024", 5.0

    Recorded.events = []
    monkeypatch.setattr(side_by_side, "LocalServer", Recorded)
    monkeypatch.setattr(side_by_side, "measure", measure)
    monkeypatch.setattr(side_by_side, "sides", lambda _: {"sglang": Side(is_step=False), "step": Side()})
    args = SimpleNamespace(
        out=tmp_path, overlay=[], batch=[1], eagle=[1], context=[1024], prefill=[], mem_fraction=0.8, ready=9,
        deadline=0, tp=1, ep=1,
    )  # fmt: skip
    return side_by_side.Turns(tmp_path, args)  # type: ignore[arg-type]


def test_a_server_that_is_prepared_loads_in_its_own_turn(turns: side_by_side.Turns) -> None:
    first, second = Turn("sglang", 0, False), Turn("step", 0, False)
    told: list[dict[str, float]] = []
    assert set(turns.serve(first, second, lambda so_far: told.append(dict(so_far)))) == {"ready", "decode 1 1024"}
    assert [found["decode 1 1024"] for found in told] == [5.0]
    deadline = time.monotonic() + 10
    while "step-0 starts" not in Recorded.events and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "step-0 starts" in Recorded.events and not turns._gate(second).exists()
    assert set(turns.serve(second, None)) == {"load", "decode 1 1024"}
    turns.close()
    stops = [Recorded.events.index(f"{name} stops") for name in ("sglang-0", "step-0")]
    assert stops[0] < Recorded.events.index("step-0 is measured") < stops[1]


def test_a_server_that_fails_is_stopped_and_so_is_the_prepared_one(turns: side_by_side.Turns) -> None:
    with pytest.raises(RuntimeError, match="no answer"):
        turns.serve(Turn("step", 9, False), Turn("sglang", 9, False))
    turns.close()
    assert {"step-9 stops", "sglang-9 stops"} <= set(Recorded.events)


def test_sides_take_turns_and_speculate_last() -> None:
    def order(batch: list[int], eagle: list[int]) -> list[str]:
        asked = argparse.Namespace(batch=batch, eagle=eagle, runs=2)
        return [str(turn) for turn in side_by_side.turns_of(["sglang", "step"], asked)]

    plain = ["sglang-0", "step-0", "sglang-1", "step-1"]
    speculating = [f"{name}-eagle-{run}" for run in (0, 1) for name in ("sglang", "step")]
    assert order([1], [1]) == plain + speculating
    assert order([1], []) == plain and order([], [1]) == speculating
    assert order([], []) == []


def test_nothing_to_measure_is_misuse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sys, "argv", ["side_by_side", "--out", str(tmp_path / "out"), "--batch", "--eagle"])
    assert side_by_side.main() == 2
    assert capsys.readouterr().err.startswith("side_by_side: nothing to measure, needed --batch or --eagle")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("side", "is_step"), [("sglang", True), ("step", False)])
def test_the_other_forwards_figures_are_refused(
    turns: side_by_side.Turns, side: str, is_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_sides", {side: Side(is_step=is_step)})
    with pytest.raises(ServerError, match="The other forward served decode passes"):
        turns.serve(Turn(side, 0, False), None)
    turns.close()


def test_another_overlay_is_a_side_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for text in (str(tmp_path), f"old={tmp_path}", "=", "old="):
        with pytest.raises(argparse.ArgumentTypeError, match="a folder that holds sglang_sm120"):
            side_by_side.overlay(text)
    (tmp_path / "sglang_sm120").mkdir()
    (tmp_path / "sglang_sm120/__init__.py").touch()
    known = side_by_side.sides([side_by_side.overlay(f"old={tmp_path}")])
    assert list(known) == ["sglang", "sm120", "native", "old"]
    assert known["old"].flags == known["sm120"].flags and known["old"].path == (tmp_path, *known["sm120"].path)


@pytest.mark.parametrize(("variable", "fused"), [(None, True), ("0", True), ("1", False)])
def test_where_multicast_is_forbidden_sglang_fuses_no_all_reduce(
    variable: str | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", raising=False)
    if variable is not None:
        monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", variable)
    flags = {name: side.flags for name, side in side_by_side.sides().items()}
    assert (sm120_lowering.NO_FUSED_ALL_REDUCE not in flags["sglang"]) == fused
    assert all(sm120_lowering.NO_FUSED_ALL_REDUCE in flags[name] for name in ("sm120", "native"))


def test_a_child_waits_for_its_gate(tmp_path: Path) -> None:
    gate = tmp_path / "open"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(random_weights.wait_for, gate, lambda: True)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        gate.touch()
        waiting.result(5)
    with pytest.raises(SystemExit):
        random_weights.wait_for(tmp_path / "never", lambda: False)


class Model(torch.nn.Module):
    """Tensors named and typed as some of SGLang's DeepSeek-V4, 512 channels."""

    def __init__(self) -> None:
        super().__init__()
        tensors = {
            "a.wo_a.weight": torch.zeros(256, 512, dtype=torch.bfloat16),
            "a.wq.weight": torch.zeros(256, 512, dtype=torch.float8_e4m3fn),
            "a.wq.weight_scale_inv": torch.zeros(2, 4),
            "m.experts.w13_weight": torch.zeros(2, 64, 256, dtype=torch.int8),
            "m.experts.w13_weight_scale_inv": torch.zeros(2, 64, 16).to(torch.float8_e8m0fnu),
            "m.gate.weight": torch.zeros(8, 512, dtype=torch.bfloat16),
            "m.topk.tid2eid": torch.full((4, 6), 3, dtype=torch.int32),
            "a.q_norm.weight": torch.zeros(512),
            "a.k_scale": torch.tensor(-1.0),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "__"), tensor)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        return {name.replace("__", "."): tensor for name, tensor in super().state_dict().items()}


def test_random_weights_are_a_models() -> None:
    model = Model()
    random_weights.fill(model)
    found = model.state_dict()
    fp8_block.requantise(found["a.wo_a.weight"])  # made of FP8 blocks, or it raises
    assert (found["a.wq.weight_scale_inv"] == 2.0**-12).all()
    assert (found["m.experts.w13_weight_scale_inv"].float() == 2.0**-8).all()
    assert found["m.experts.w13_weight"].view(torch.uint8).unique().numel() == 256
    assert (found["m.topk.tid2eid"] == 3).all() and found["a.k_scale"] == -1 and (found["a.q_norm.weight"] == 1).all()
    # Unit rows stay near one: 1/64 for each of 4,096 channels.
    dequantised = found["a.wq.weight"].float() * 2.0**-12
    for weight in (dequantised, found["a.wo_a.weight"].float(), found["m.gate.weight"].float()):
        assert weight.std() == pytest.approx(1 / 64, rel=0.05) and weight[0].ne(weight[1]).any()
    again = Model()
    random_weights.fill(again)
    same = zip(found.values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a.float(), b.float()) for a, b in same)
