"""Cycles of decoding in traces made by hand: what belongs to a cycle, what is busy, what waits, and the picture."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
import torch

import cycles
import decode_step
import streamed
import tables
import traces

pytestmark = pytest.mark.needs_no_gpu
NOTHING_KNOWN: dict[str, dict[Any, str]] = {"exact": {}, "compiled": {}, "name": {"linear": "fp8_linear"}}


class Trace:
    """A chrome trace in the making."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._calls = 0

    def call(self, name: str, at: float, us: float, thread: int = 1) -> int:
        self._calls += 1
        event = {"cat": "cuda_runtime", "name": name, "ts": at, "dur": us, "tid": thread}
        self.events.append({**event, "args": {"correlation": self._calls}})
        return self._calls

    def kernel(self, name: str, at: float, us: float, launch: int, stream: int = 7, cat: str = "kernel") -> None:
        args = {"correlation": launch, "stream": stream, "grid": [1, 1, 1], "block": [32, 1, 1]}
        self.events.append({"cat": cat, "name": name, "ts": at, "dur": us, "args": args})

    def replay(self, at: float, *kernels: tuple[str, float, float, int]) -> None:
        """A graph launched 5 us before it runs: (name, after how many us, for how many, stream)."""
        launch = self.call("cudaGraphLaunch", at - 5, 2)
        for name, after, us, stream in kernels:
            self.kernel(name, at + after, us, launch, stream)

    def write(self, folder: Path) -> Path:
        path = folder / "x-DECODE.trace.json.gz"
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": self.events}, file)
        return path

    def read(self, folder: Path) -> list[cycles.Cycle]:
        return cycles.read(self.write(folder))


TARGET = [("linear", 0.0, 40.0, 7), ("beside", 10.0, 50.0, 8), ("linear", 70.0, 20.0, 7)]
DRAFT = [("draft", 0.0, 6.0, 7), ("draft", 8.0, 6.0, 7)]


def speculating(times: int = 4, every: float = 200.0) -> Trace:
    """Verification 0 to 90, a kernel of no graph 100 to 104, the draft 120 to 134, the host waiting 20 to 95."""
    trace = Trace()
    for number in range(times):
        at = 1000 + number * every
        trace.replay(at, *TARGET)
        trace.call("cudaStreamSynchronize", at + 20, 75)
        trace.kernel("sample", at + 100, 4, trace.call("cudaLaunchKernel", at + 97, 1))
        trace.replay(at + 120, *DRAFT)
    return trace


def test_a_cycle_of_verification_and_draft(tmp_path: Path) -> None:
    found = speculating().read(tmp_path)
    assert len(found) == 3  # the last one has no end
    told = cycles.account(found, NOTHING_KNOWN, True)
    assert told["us"] == 200 and told["cycles"] == 3
    verify, draft = told["replays"]
    assert (verify["graph"], verify["launches"], verify["us"]) == ("verify", 3, 90)
    # 10 us between 60 and 70 nothing runs; 30 us two kernels do.
    assert verify["busy_us"] == 80 and verify["kernels_us"] == 110
    assert verify["ops"] == {"fp8_linear": 60, "[beside]": 50}
    assert (draft["graph"], draft["us"], draft["busy_us"]) == ("draft 1", 14, 12)
    assert told["between_us"] == 200 - 90 - 14 and told["between"] == {"[sample]": 1}
    assert told["idle_us"] == 200 - 80 - 12 - 4
    # Of the next verification's launch, before it begins, the cycle has the time too.
    assert (told["host_waits"], told["host_waits_us"]) == (1, 75)
    assert told["host_launches_us"] == 2 + 1 + 2


def test_what_runs_beside_a_graph_copies_and_other_threads(tmp_path: Path) -> None:
    """A kernel of no graph beside a verification, a copy while nothing else runs, and calls that tell nothing here."""
    trace = speculating(3)
    for at in (1000.0, 1200.0, 1400.0):
        trace.kernel("metadata", at + 5, 30, trace.call("cuLaunchKernel", at + 4, 1), stream=9)
        trace.kernel("Memcpy DtoH", at + 150, 20, trace.call("cudaMemcpyAsync", at + 140, 2), cat="gpu_memcpy")
        trace.call("cuMemcpyHtoDAsync_v2", at + 141, 2)
        trace.call("cudaEventSynchronize", at + 10, 100, thread=2)
        trace.call("cudaMemcpyAsync", at + 145, 35)
        # From memory that is not pinned: it returns when the GPU has come so far.
        trace.call("cudaMemcpyAsync", at + 160, 130)
    told = cycles.account(trace.read(tmp_path), NOTHING_KNOWN, True)
    assert told["between"] == {"[sample]": 1, "[Memcpy DtoH]": 1} and told["beside_launches"] == 1
    assert told["between_kernels_us"] == 4 + 20
    # Beside the verification's two kernels it runs while one of them does.
    assert told["idle_us"] == 200 - 80 - 12 - 4 - 20
    assert (told["host_waits"], told["host_waits_us"]) == (2, 75 + 130)


def test_another_graph_of_a_plain_server_is_no_draft(tmp_path: Path) -> None:
    told = cycles.account(speculating().read(tmp_path), NOTHING_KNOWN, False)
    assert [part["graph"] for part in told["replays"]] == ["decode", "other 1"]


def test_plain_decoding_is_one_replay_a_cycle(tmp_path: Path) -> None:
    trace = Trace()
    for number in range(3):
        trace.replay(100.0 * number, *TARGET)
    told = cycles.account(trace.read(tmp_path), NOTHING_KNOWN, False)
    assert [part["graph"] for part in told["replays"]] == ["decode"] and told["us"] == 100
    assert told["idle_us"] == 20 and told["between_launches"] == 0
    assert "cycle     100.0 us, GPU idle 20.0 us; mean of 2" in cycles.table(told)


def test_what_the_edges_cut_and_what_differs_is_left_out(tmp_path: Path) -> None:
    trace = Trace()
    trace.replay(900, *TARGET[1:])  # its first kernel ran before the profiler did
    for event in speculating().events:
        event["args"] = event["args"] | {"correlation": event["args"]["correlation"] + 100}
        trace.events.append(event)
    trace.replay(1000 + 2 * 200 + 150, ("prefill", 0.0, 9.0, 7))
    found = trace.read(tmp_path)
    assert [cycle.span.start for cycle in found] == [1000, 1200]


def test_a_trace_without_graphs_says_so(tmp_path: Path) -> None:
    trace = Trace()
    trace.kernel("eager", 0, 5, trace.call("cudaLaunchKernel", 0, 1))
    with pytest.raises(ValueError, match="no CUDA graph was launched twice among 1 kernels"):
        trace.read(tmp_path)


def test_the_picture_has_each_kernel_where_it_ran(tmp_path: Path) -> None:
    cycle = speculating().read(tmp_path)[0]
    cycles.timeline(cycle, "a <heading>", NOTHING_KNOWN, True, tmp_path / "x.svg")
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    boxes = {}
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        title = box.find("{http://www.w3.org/2000/svg}title")
        if title is not None and title.text:
            boxes.setdefault(title.text.partition(",")[0], []).append((float(box.get("x", 0)), float(box.get("y", 0))))
    scale = (cycles.WIDTH - cycles.LEFT - 20) / 200
    assert sorted(x for x, _ in boxes["fp8_linear"]) == pytest.approx([cycles.LEFT, cycles.LEFT + 70 * scale], abs=0.01)
    assert {y for _, y in boxes["fp8_linear"]} != {y for _, y in boxes["[beside]"]}
    assert [x for x, _ in boxes["cudaStreamSynchronize"]] == pytest.approx([cycles.LEFT + 20 * scale], abs=0.01)
    assert "a <heading>" in "".join(root.itertext())


def test_an_op_is_told_by_its_name_grid_or_code(tmp_path: Path) -> None:
    """`traces.ranges` on calls inside and outside of a range."""
    trace = Trace()
    inside, outside = trace.call("cudaLaunchKernel", 10, 1), trace.call("cudaLaunchKernel", 50, 1)
    trace.kernel("gemv", 12, 3, inside)
    trace.kernel("other", 52, 3, outside)
    trace.events.append({"cat": "user_annotation", "name": "op:fp8_linear", "ts": 5, "dur": 20})
    path = tmp_path / "ops.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": trace.events}, file)
    known = traces.ranges(path, "op:")
    first, second = traces.read(path)
    assert traces.op_of(first, known) == "fp8_linear" and traces.op_of(second, known) == "[other]"


class Tool:
    """`decode_step` with made-up servers, profiler and answers: two tokens a verification, 4.5 ms a token."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        self.out, self.dspark_passes = out, 2
        self.started: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}
        self.rows: list[int] = []
        self.temperatures: dict[str, set[float]] = {}
        self._patch = monkeypatch
        tool = self

        class Server:
            url = "http://127.0.0.1:1"

            def __init__(self, model: Path, *flags: str, log: Path, env: dict[str, str], **_: Any) -> None:
                target, drafter = (json.loads((model / name / "config.json").read_text()) for name in ("", "dspark"))
                assert target == {key: drafter[key] for key in target} and target["n_routed_experts"] == 128
                tool.started[log.stem] = flags, env
                count = tool.dspark_passes if "DSPARK" in flags else 1
                mode = "target_verify" if "--speculative-algorithm" in flags else "decode"
                log.write_text(f"the step takes its first {mode} pass (1 rows).\n" * count)
                self.log = log

            def __enter__(self) -> Server:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def alive(self) -> bool:
                return True

        def post(url: str, json: dict[str, Any], **_: Any) -> httpx.Response:
            speculating().read(folder := Path(json["output_dir"]))
            shutil.copy(folder / "x-DECODE.trace.json.gz", folder / "x-EXTEND.trace.json.gz")
            return httpx.Response(200, request=httpx.Request("POST", url))

        def ask(url: str, prompts: list[list[int]], tokens: int, temperature: float) -> list[list[streamed.Chunk]]:
            tool.temperatures.setdefault([*tool.started][-1], set()).add(temperature)
            return [[streamed.Chunk(0, 1, 0), streamed.Chunk(0.045, 11, 5)] for _ in prompts]

        def known(rows: list[int], *_: Any) -> dict[str, dict[Any, str]]:
            self.rows = rows
            return NOTHING_KNOWN

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(decode_step, "lower", lambda _: None)
        monkeypatch.setattr(decode_step, "LocalServer", Server)
        monkeypatch.setattr(decode_step.httpx, "post", post)
        monkeypatch.setattr(decode_step, "ask", ask)
        monkeypatch.setattr(decode_step, "known_kernels", known)

    def main(self, *words: str) -> int:
        self._patch.setattr(sys, "argv", ["decode_step", "--out", str(self.out), "--context", "1024", "2048", *words])
        return decode_step.main()

    def told(self) -> dict[str, Any]:
        return json.loads((self.out / "decode_step.json").read_text())


def test_decode_step_tells_steps_and_cycles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tool from its arguments to its table."""
    tool = Tool(tmp_path, monkeypatch, (12, 0))
    assert tool.main("--serve", "plain", "eagle", "--batch", "1") == 0
    assert ["EAGLE" in flags for flags, _ in tool.started.values()] == [False, True] and tool.rows == [1, 4, 256]
    out = capsys.readouterr().out
    assert "target 5 ms met" in out and "9.00 ms a cycle" in out and "eagle, batch 1 at 1024 tokens" in out
    written = tool.told()
    assert written["problems"] == [] and written["ready_seconds"].keys() == {"plain", "eagle"}
    assert [(row["server"], row["ms"]) for row in written["steps"]] == [("plain", 4.5)] * 2 + [("eagle", 9.0)] * 2
    assert [told["replays"][0]["graph"] for told in written["profiles"]] == ["decode", "verify"]
    assert [(told["server"], told["tokens"]) for told in written["prefills"]] == [("plain", 1024), ("eagle", 1024)]
    assert "    fp8_linear " in out.partition("plain, prefill of 1024 tokens")[2]
    assert {path.name for path in tmp_path.glob("*.svg")} == {"plain-1.svg", "eagle-1.svg"}
    told = tables.decode_step(written)
    assert "| 1 | 1024 | random | eagle | 9.00 |" in told and "| `fp8_linear` | 60.0 | 54.5% |" in told
    assert tool.temperatures == {"plain": {1.0}, "eagle": {1.0}}


def test_a_prefill_is_all_that_ran(tmp_path: Path) -> None:
    """From the first kernel to the last, those beside each other once where the GPU is busy, by op each."""
    trace = Trace()
    for name, at, us, stream in (("linear", 100, 40, 7), ("beside", 120, 40, 8), ("linear", 170, 30, 7)):
        trace.kernel(name, at, us, trace.call("cudaLaunchKernel", at - 3, 1), stream)
    trace.call("cudaStreamSynchronize", 90, 200)
    told = cycles.prefill(traces.read(trace.write(tmp_path)), NOTHING_KNOWN)
    assert (told["us"], told["idle_us"], told["launches"]) == (100, 10, 3)
    assert told["ops"] == {"fp8_linear": 70, "[beside]": 40}
    assert "fp8_linear" in cycles.prefill_table(told) and " 70%" in cycles.prefill_table(told)


@pytest.mark.parametrize("capability", [(9, 0), (12, 0)])
def test_dspark_has_a_server_for_each_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """Asked greedily when it is timed and when it is profiled; 5 rows of a block and 6 to verify for a request."""
    tool = Tool(tmp_path, monkeypatch, capability)
    assert tool.main("--serve", "dspark-static", "dspark-compact", "--batch", "1", "8") == 0
    assert tool.rows == [5, 6, 40, 48, 256]
    for mode in ("static", "compact"):
        flags, env = tool.started[f"dspark-{mode}"]
        assert env["SGLANG_RAGGED_VERIFY_MODE"] == mode and "DSPARK" in flags
        triton = "--fp8-gemm-backend" in flags and flags[flags.index("--fp8-gemm-backend") + 1] == "triton"
        assert triton == (capability == (9, 0)) and tool.temperatures[f"dspark-{mode}"] == {0.0}
    written = tool.told()
    assert [*tool.started] == ["dspark-static", "dspark-compact"] and written["problems"] == []
    assert {row["ms"] for row in written["steps"]} == {9.0} and len(written["profiles"]) == 4
    assert {tuple(part["graph"] for part in told["replays"]) for told in written["profiles"]} == {("verify", "draft 1")}


def test_a_drafter_that_the_step_does_not_serve_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = Tool(tmp_path, monkeypatch, (12, 0))
    tool.dspark_passes = 1
    assert tool.main("--serve", "dspark-static", "--batch", "1") == 1
    assert tool.told()["problems"] == ["the step served no pass of a model of dspark-static: its log says why"]


def test_an_unknown_server_is_misuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        Tool(tmp_path, monkeypatch, (12, 0)).main("--serve", "dspark")
    assert stopped.value.code == 2 and "dspark-compact" in capsys.readouterr().err
