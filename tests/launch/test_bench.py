"""`bench` and `compare`: prompts of the right length, the picture, and both commands on a small server on CPU."""

from __future__ import annotations

import argparse
import asyncio
import http.server
import json
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_server import LocalServer
from sglang_sm120.checkpoint.config import ReferenceConfig
from sglang_sm120_launch import passes, picture
from sglang_sm120_launch.commands import bench, compare
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.stream import Stream, ask
from sglang_sm120_reference.write import write_checkpoint

SVG = "{http://www.w3.org/2000/svg}"


def run(command: Any, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    code: int = command.run(parser.parse_args(arguments))
    return code


@given(length=st.integers(1, 3000), overhead=st.integers(0, 40), longest=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_prompts_are_as_long_as_asked(length: int, overhead: int, longest: int, seed: int):
    """Whatever a word and the template take: never longer than asked, shorter by a word or 2 % at most."""
    rng = random.Random(seed)
    sizes = {word: rng.randint(1, longest) for word in bench.WORDS}

    def count(text: str) -> int:
        return overhead + sum(sizes[word] for word in text.split())

    first = random.Random(seed).choice(bench.WORDS)
    if overhead + sizes[first] > length:
        with pytest.raises(LaunchError, match="A prompt of one word"):
            bench.prompt(length, random.Random(seed), count)
        return
    text, found = bench.prompt(length, random.Random(seed), count)
    assert found == count(text) <= length
    assert found >= 0.98 * length or found > length - longest or found == count(text) == overhead + len(text.split())


@given(st.floats(1e-3, 1e6), st.floats(1, 1e4), st.booleans())
def test_ticks_enclose_what_they_show(low: float, factor: float, log: bool):
    high = low * factor
    marks = picture.ticks(low, high, log)
    assert marks[0] <= low * (1 + 1e-6) and marks[-1] >= high * (1 - 1e-6)
    assert marks == sorted(set(marks)) and 2 <= len(marks) <= 13
    assert log or marks[0] == 0


def point(prompt_tokens: int, concurrency: int, speed: float) -> dict[str, Any]:
    times = {f"{name}_ms": {"median": 1000 / speed, "mean": 1.0, "p99": 2.0} for name in ("ttft", "tpot")}
    done = {"requests": 2, "completed": 2, "output_tokens_per_s": 10 * speed}
    return {"prompt_tokens": prompt_tokens, "concurrency": concurrency, **done, **times}


def result(*points: dict[str, Any], **changes: Any) -> dict[str, Any]:
    server = {"version": "0.5.23", "tp_size": 2, "device": "cuda"}
    fixed = {"schema": bench.SCHEMA, "started": "2026-01-01T00:00:00+00:00", "model": "org/model", "server": server}
    return {**fixed, "output_tokens": 8, "rounds": 1, "seed": 1, "complete": True, "points": list(points), **changes}


def panels_in(path: Path) -> list[dict[str, list[tuple[float, float]]]]:
    """Of each panel of a picture, colour -> where its dots are, from the left; y grows downwards."""
    panels = []
    for panel in ElementTree.parse(path).getroot().findall(f"{SVG}g"):
        places: dict[str, list[tuple[float, float]]] = {}
        for dot in panel.findall(f"{SVG}circle"):
            places.setdefault(dot.attrib["fill"], []).append((float(dot.attrib["cx"]), float(dot.attrib["cy"])))
        panels.append(places)
    return panels


def test_the_picture_has_every_series_in_every_panel(tmp_path: Path):
    """Each with all its points, inside of the axes."""
    bench.picture(result(*(point(p, c, p / c) for p in (4096, 16384) for c in (1, 2, 8))), tmp_path / "a.svg")
    panels = panels_in(tmp_path / "a.svg")
    assert [panel.keys() for panel in panels] == [set(picture.COLOURS[:2])] * 3
    for places in (places for panel in panels for places in panel.values()):
        assert len(places) == 3
        assert all(picture.LEFT < x < picture.WIDTH - picture.RIGHT for x, _ in places)
        assert all(picture.TOP <= y <= picture.HEIGHT - picture.BOTTOM for _, y in places)


def test_the_picture_of_failures_only(tmp_path: Path):
    """Points at which no request succeeded are left out, and nothing is left to draw."""
    bench.picture(result({**point(4096, 1, 1.0), "completed": 0}, model="a<b"), tmp_path / "a.svg")
    assert panels_in(tmp_path / "a.svg") == [{}] * 3
    texts = [text.text for text in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}text")]
    assert str(texts[0]).startswith("a<b on SGLang") and texts.count("no data") == 3


def test_higher_is_drawn_higher(tmp_path: Path):
    picture.draw(
        "h", [picture.Panel("t", "x", "y", {"a": [(1, 10), (2, 30)], "b": [(1, 20), (2, 20)]})], tmp_path / "a.svg"
    )
    [panel] = panels_in(tmp_path / "a.svg")
    a, b = (panel[colour] for colour in picture.COLOURS[:2])
    assert a[0][0] == b[0][0] < a[1][0] == b[1][0]
    assert a[0][1] > b[0][1] == b[1][1] > a[1][1]


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(result(point(4096, 1, 10.0), point(4096, 8, 20.0), point(65536, 1, 5.0))))
    other = {"version": "0.5.23", "tp_size": 4, "device": "cuda"}
    b.write_text(json.dumps(result(point(4096, 1, 20.0), point(4096, 8, 10.0), point(16384, 1, 5.0), server=other)))
    assert run(compare, str(a), str(b)) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("4096")]
    ratios = [[word for word in row if word.endswith("x")] for row in rows]
    assert ratios == [["2.00x", "0.50x", "0.50x"], ["0.50x", "2.00x", "2.00x"]]
    assert "server differs: tp_size 2 and 4" in out
    assert "some points have 2 answers" in out
    many = [point(4096, 1, 10.0) | {"requests": 8, "completed": 8}]
    a.write_text(json.dumps(result(*many)))
    assert run(compare, str(a), str(a)) == 0 and "answers" not in capsys.readouterr().out
    assert "only in A: 65536 x 1" in out and "only in B: 16384 x 1" in out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        (json.dumps({"schema": 99, "points": []}), "schema 99"),
        (json.dumps(result(point(512, 1, 1.0))), "no point in common"),
        ("[" * 100000, "is not JSON"),
        (json.dumps(result(7)), "damaged .point 1.: run `bench` again"),
        (json.dumps(result(point(4096, 1, 1.0) | {"ttft_ms": None})), "damaged .point 1."),
        (json.dumps(result(point(4096, 1, 1.0) | {"output_tokens_per_s": float("nan")})), "damaged .point 1."),
        (json.dumps(result(point(4096, 1, 1.0) | {"completed": "2"})), "damaged .point 1."),
        (json.dumps(result(server=None)), "damaged .server."),
        (json.dumps(result(passes={"replays": "2"})), "damaged .passes."),
        (json.dumps({"schema": bench.SCHEMA, "points": []}), "damaged .complete, model"),
    ],
)
def test_compare_refuses(text: str | None, sentence: str, tmp_path: Path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(result(point(4096, 1, 10.0))))
    if text is not None:
        b.write_text(text)
    with pytest.raises(LaunchError, match=sentence):
        run(compare, str(a), str(b))


def test_compare_says_what_a_run_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(result(point(4096, 1, 10.0), complete=False)))
    b.write_text(json.dumps(result(point(4096, 1, 10.0) | {"completed": 1}, {**point(8192, 1, 1.0), "completed": 0})))
    assert run(compare, str(a), str(b)) == 0
    out = capsys.readouterr().out
    assert "A is incomplete" in out and "B had failures: 3 of 4 requests" in out
    assert "A had failures" not in out and "B is incomplete" not in out


PAGE = """\
# TYPE sglang:cuda_graph_passes_total counter
sglang:cuda_graph_passes_total{mode="decode_cuda_graph",model_name="m"} 40.0
sglang:cuda_graph_passes_total{mode="prefill_none",model_name="m"} 3.0
# TYPE sglang_sm120:passes_total counter
sglang_sm120:passes_total{by="step",mode="target_verify",why=""} 5.0
sglang_sm120:passes_total{by="sglang",mode="extend",why="the step takes decode, not extend"} 3.0
# TYPE sglang_sm120:graphs_total counter
sglang_sm120:graphs_total{by="step",mode="decode"} 4.0
"""
EXTEND = "sglang extend: the step takes decode, not extend"


def test_whose_forward_served_the_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = passes.read(PAGE)
    assert first == {"replays": 40, "step target_verify": 5, EXTEND: 3, "graphs step": 4}
    later = passes.read(PAGE.replace(" 40.0", " 60.0").replace(" 3.0", " 4.0"))
    assert later is not None
    counted = passes.between(first, later)
    assert counted == {"replays": 20, EXTEND: 1, "graphs step": 4}
    extend = "passes outside of graphs: 1 by SGLang's forward, extend: the step takes decode, not extend"
    assert passes.lines(counted) == ["passes in CUDA graphs: 20 by the step", extend]
    (mixed, _) = passes.lines({**counted, "graphs sglang": 2})
    assert mixed == "passes in CUDA graphs: 20 by the step in 4 graphs, SGLang's forward in 2"
    assert passes.read("\n".join(PAGE.splitlines()[:3]) + "\n") is None
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(result(point(4096, 1, 10.0), passes=counted)))
    b.write_text(json.dumps(result(point(4096, 1, 10.0))))
    assert run(compare, str(a), str(b)) == 0
    out = capsys.readouterr().out
    assert f"A: {extend}" in out and "B: passes: not counted" in out


def streamed(*events: Any, done: bool = True, asked: int = 2) -> Stream:
    """A stream of these events, as the lines of an answer."""
    found = Stream(asked)
    for event in events:
        found.take(f"data: {json.dumps(event)}\n".encode())
        found.take(b"\n")
    if done:
        found.take(b"data: [DONE]\n")
    return found


def said(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


THOUGHT = {"choices": [{"delta": {"reasoning_content": "ab"}}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 5}}


@pytest.mark.parametrize(
    ("stream", "tokens", "problem"),
    {
        "whole": (streamed(said("ab"), said("c", "length"), usage(2)), 2, ""),
        "two tokens in an event": (streamed(said("abc", "length"), usage(2)), 2, ""),
        "thinking": (streamed(THOUGHT, said("", "length"), usage(2)), 2, ""),
        "not counted by the server": (streamed(said("a"), said("b", "length")), 2, ""),
        "not counted, and short": (streamed(said("a", "stop")), 1, ""),
        "an error": (streamed(said("a"), {"error": {"message": "boom"}}), 1, "an error: boom"),
        "an error and an end": (streamed({"error": "boom"}, said("ab", "length"), usage(2)), 2, "an error: boom"),
        "aborted": (streamed(said("ab", "abort"), usage(2)), 2, "ended by abort"),
        "no end": (streamed(said("a"), said("b"), done=False), 2, "ended early, after 2 of 2"),
        "no last event": (streamed(said("a"), said("b", "length"), done=False), 2, "ended early"),
        "nothing": (streamed(done=False), 0, "ended early, after 0 of 2"),
        "fewer than asked": (streamed(said("a", "stop"), usage(1)), 1, "1 of 2 tokens"),
        "fewer than said": (streamed(said("a", "length"), usage(2)), 2, "says 2 tokens and holds 1 bytes"),
        "no object": (streamed([]), 0, "has the event '[]'"),
    }.values(),
)  # fmt: skip
def test_a_stream_is_whole_or_a_failure(stream: Stream, tokens: int, problem: str):
    """Tokens are those of the server's count or of the stream, never those that were asked for."""
    assert stream.tokens() == tokens
    assert problem in stream.problem() and bool(problem) == bool(stream.problem())


class Streaming(http.server.BaseHTTPRequestHandler):
    """Answers every request with the same events."""

    events: tuple[Any, ...] = ()
    status = 200

    def do_POST(self) -> None:  # noqa: N802  named by http.server
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.end_headers()
        for event in self.events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("events", "status", "error"),
    [
        ((said("ab"), said("c", "length"), usage(2)), 200, ""),
        ((said("ab"), {"error": {"message": "boom"}}), 200, "boom"),
        ((said("a"),), 200, "ended early, after 1 of 2"),
        ((), 503, "503 Service Unavailable"),
    ],
)
def test_the_benchmark_asks_so(events: tuple[Any, ...], status: int, error: str, monkeypatch: pytest.MonkeyPatch):
    """As SGLang's benchmark calls it; what is no answer is no success."""
    from sglang.benchmark import serving

    monkeypatch.setattr(serving, "args", argparse.Namespace(header=None), raising=False)
    kind = type("Now", (Streaming,), {"events": events, "status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as stub:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        call = serving.RequestFuncInput(
            prompt="x", api_url=f"http://127.0.0.1:{stub.server_address[1]}/v1/chat/completions", prompt_len=1,
            output_len=2, model="m", lora_name="", image_data=None, extra_request_body={},
        )  # fmt: skip
        output = asyncio.run(ask(request_func_input=call, pbar=None))
        stub.shutdown()
    assert output.success == (not error) and error in output.error
    if not error:
        assert (output.output_len, output.prompt_len, output.generated_text) == (2, 5, "abc")
        assert len(output.itl) == len(output.text_chunks) == 1 and 0 < output.ttft <= output.latency


def test_the_picture_names_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    headings = []
    monkeypatch.setattr(bench, "draw", lambda heading, panels, path: headings.append(heading))
    bench.picture(result({**point(4096, 1, 1.0), "completed": 1}), tmp_path / "a.svg")
    bench.picture(result(point(4096, 1, 1.0)), tmp_path / "a.svg")
    assert "1 of 2 requests failed" in headings[0] and "failed" not in headings[1]


@pytest.mark.parametrize("text", ["", "0", "4K,4096", "1,x", "-1", "1.5"])
def test_lists_that_are_none(text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        bench._numbers(text)


def test_lists():
    assert bench._numbers("4K,16k,100") == [4096, 16384, 100]


def test_no_server(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "no url"):
        with pytest.raises(LaunchError, match="No SGLang server answers"):
            run(bench, "--base-url", url, "--out", str(tmp_path / "a.json"))
    for out in ("a.txt", "nowhere/a.json"):
        with pytest.raises(LaunchError, match="--out"):
            run(bench, "--out", str(tmp_path / out))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pages", "sentence"),
    [
        ({}, "is not SGLang"),
        ({"/v1/models": {"data": []}}, "is not SGLang"),
        ({"/v1/models": {"data": [{"id": "m"}]}, "/server_info": []}, "is not SGLang"),
        *(
            ({"/v1/models": {"data": [{"id": "m"}]}, "/model_info": {"tokenizer_path": path}}, "to be found from here")
            for path in ("/not/here", "../not-here", "./not-here")
        ),
    ],
)
def test_other_servers(pages: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "_get", lambda url, path: pages.get(path, {}))
    with pytest.raises(LaunchError, match=sentence):
        bench.find_server("http://x")


def test_the_server_s_keys(monkeypatch: pytest.MonkeyPatch):
    """The user's for its requests, the administrator's to empty the cache; a refusal names the variable."""
    asked: list[tuple[str, str | None]] = []

    class Locked(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key = self.headers.get("Authorization")
            asked.append((self.path.partition("?")[0], key))
            wanted = "Bearer admin" if self.path.startswith("/flush_cache") else "Bearer user"
            self.send_response(200 if key == wanted else 401)
            self.end_headers()
            self.wfile.write(b"{}" if key == wanted else b"")

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Locked) as locked:
        threading.Thread(target=locked.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{locked.server_port}"
        for name in (*bench.KEYS, bench.ADMIN):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(LaunchError, match="wants its key: set SGLANG_API_KEY"):
            bench.find_server(url)
        monkeypatch.setenv("SGLANG_API_KEY", "user")
        assert bench._get(url, "/v1/models") == {}
        with pytest.raises(bench._Stopped, match="set SGLANG_ADMIN_API_KEY"):
            bench._flush(url)
        monkeypatch.setenv("SGLANG_ADMIN_API_KEY", "admin")
        bench._flush(url)
        monkeypatch.setenv("OPENAI_API_KEY", "of another service")
        assert bench._key() == {"Authorization": "Bearer user"}
        monkeypatch.delenv("SGLANG_API_KEY")
        assert bench._key() == {"Authorization": "Bearer of another service"}
        locked.shutdown()
    assert ("/flush_cache", "Bearer admin") in asked


def outcome(completed: int) -> dict[str, Any]:
    """What SGLang's benchmark returns; means over nothing are NaN."""
    value = 1.5 if completed else float("nan")
    names = ("ttft", "tpot", "itl", "e2e_latency")
    times = {f"{kind}_{name}_ms": value for kind in ("median", "mean", "p99") for name in names}
    rates = dict.fromkeys(("input_throughput", "output_throughput", "request_throughput"), 1.0)
    totals = {"duration": 2.0, "total_input_tokens": 8, "total_output_tokens": 4, "completed": completed}
    return {**times, **rates, **totals, "accept_length": None, "errors": ["", "Traceback\n  ...\nTimeoutError: late\n"]}


@pytest.mark.parametrize("second", ["fails", "is interrupted", "stops"])
def test_a_run_that_does_not_end_well(
    second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Exit status 1; the file has what was measured and is valid JSON, and says whether it is complete."""

    def measure(prompt_tokens: int, concurrency: int) -> dict[str, Any]:
        if concurrency == 2 and second == "is interrupted":
            raise KeyboardInterrupt
        if concurrency == 2 and second == "stops":
            raise bench._Stopped("The server is gone.")
        return bench._point(prompt_tokens, concurrency, 2, outcome(2 if concurrency == 1 else 0))

    server = bench.Server("http://x", "org/model", "/nowhere", None, {"version": "1", "tp_size": 1, "device": "cpu"})
    monkeypatch.setattr(bench, "find_server", lambda *_: server)
    monkeypatch.setattr(bench, "_measure", lambda *_: measure)
    out = tmp_path / "a.json"
    assert run(bench, "--concurrency", "1,2", "--prompt-tokens", "64", "--rounds", "2", "--out", str(out)) == 1
    printed = capsys.readouterr()
    found = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["complete"] == (second == "fails") == out.with_suffix(".svg").exists()
    assert found["points"][0]["ttft_ms"]["median"] == 1.5
    if second == "fails":
        assert found["points"][1]["ttft_ms"] is None
        assert found["points"][1]["error"] == "TimeoutError: late"
        assert "2 requests failed" in printed.out
    else:
        assert len(found["points"]) == 1 and f"Kept in {out}: 1 of 2 points" in printed.err


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("bench")
    # Two layers of the small model: what is measured does not matter here, only that it is measured rightly.
    config = ReferenceConfig(num_hidden_layers=2, num_hash_layers=1, compress_ratios=(4, 128, 0))
    write_checkpoint(folder / "DeepSeek-V4-small", config)
    # The trap for a benchmark that formats prompts itself.
    assert "chat_template" not in (folder / "DeepSeek-V4-small/tokenizer_config.json").read_text()
    arguments = ["--device", "cpu", "--context-length", "2000", "--enable-metrics"]
    with LocalServer(folder / "DeepSeek-V4-small", *arguments, log=folder / "server.log") as running:
        yield running


def test_lengths_are_the_server_s(server: LocalServer):
    """What a prompt was cut to is what the server says that it read, its chat template included."""
    text, length = bench.prompt(64, random.Random(1), bench.counter(bench.find_server(server.url)))
    body = {"model": "x", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    usage = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()["usage"]
    assert usage["prompt_tokens"] == length
    plain = httpx.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=60).json()["count"]
    assert plain < length <= 64


def test_two_runs_and_their_ratios(server: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A point with a page of prompt, one with two requests at once, one too long; a second run of the first point."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    common = ["--base-url", server.url, "--output-tokens", "3", "--rounds", "1"]
    assert run(bench, *common, "--concurrency", "2", "--prompt-tokens", "300,2K", "--out", str(a)) == 0
    printed = capsys.readouterr()
    assert "left out: prompts of 2048 tokens" in printed.out and "2/2" in printed.err
    found = json.loads(a.read_text())
    # Two answers of three tokens, whose first comes from the prompt; and the warm-up request's.
    assert 2 <= found["passes"]["step decode"] <= 6 and found["passes"]["step extend"] >= 1
    assert f"passes outside of graphs: {found['passes']['step decode']:g} by the step, decode" in printed.out
    assert found["complete"] and found["too_long"] == [2048] and found["server"]["device"] == "cpu"
    (measured,) = found["points"]
    assert (measured["prompt_tokens"], measured["concurrency"]) == (300, 2)
    assert measured["requests"] == measured["completed"] == 2 and measured["error"] is None
    assert 0.9 * 600 <= measured["input_tokens"] <= 600
    assert measured["output_tokens"] == 6
    assert measured["output_tokens_per_s"] == pytest.approx(6 / measured["duration_s"])
    assert 0 < measured["tpot_ms"]["median"] < measured["e2e_latency_ms"]["median"]
    assert 0 < measured["ttft_ms"]["median"] < 1000 * measured["duration_s"]
    # The warm-up request is the first prompt again: nothing of it may be left in the prefix cache.
    prefills = [line for line in server.log.read_text().splitlines() if "Prefill batch" in line]
    assert len(prefills) >= 3 and all("#cached-token: 0," in line for line in prefills)
    assert [panel.keys() for panel in panels_in(a.with_suffix(".svg"))] == [{picture.COLOURS[0]}] * 3

    assert run(bench, *common, "--concurrency", "2", "--prompt-tokens", "300", "--out", str(b), "--seed", "2") == 0
    capsys.readouterr()
    assert run(compare, str(a), str(b)) == 0
    ratio = json.loads(b.read_text())["points"][0]["output_tokens_per_s"] / measured["output_tokens_per_s"]
    assert f"{ratio:.2f}x" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.svg", "b.json", "b.svg"}
