"""The servers of `prove`, with a stand-in for SGLang: what is said of them, what time cuts off, that none is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from golden_plans import HERE, machine
from test_prove import fake, schema, written

from sglang_sm120.limits import tuned_table
from sglang_sm120_launch import cli
from sglang_sm120_launch.commands import prove
from sglang_sm120_launch.machine import Machine

ROOT = HERE.parents[1]
SERVER = r"""
import http.server, json, os, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
open(os.environ["NOTES"], "a").write(json.dumps([os.getpid(), sys.argv[1:], {n: os.environ.get(n) for n in (
    "SGLANG_SM120", "SGLANG_SM120_FORCE", "SGLANG_SM120_PREFILL", "SGLANG_SM120_PROVIDER", "PYTHONPATH",
    "SGLANG_API_KEY", "CUDA_VISIBLE_DEVICES")}]) + "\n")
small = "DeepSeek-V4-small" in " ".join(sys.argv)
step = os.environ.get("SGLANG_SM120") != "0"
overlay = step and ("SGLANG_SM120_PREFILL" in os.environ or os.environ.get("SGLANG_SM120_FORCE") == "1")
if os.environ["MANNER"] == "refuses" and small and not overlay:
    sys.exit(f"Traceback\nValueError: {os.getcwd()}/kernel.py takes no such narrow layer\nbye")
for mode in (*["decode"] * step, *["extend"] * overlay):
    print(f"[2026 TP0] sglang_sm120: the step takes its first {mode} pass (1 rows).", flush=True)
short = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200); self.end_headers()
        if os.environ["MANNER"] == "hangs" and not small:
            print("ValueError: a rank is lost", flush=True)
            time.sleep(600)
        prompts, wanted = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        if os.environ["MANNER"] == "dies" and len(prompts[0]) > 2048 and not overlay:
            print(f"Traceback\nValueError: {os.getcwd()}/kernel.py is wrong\nTraceback\nRuntimeError: a child died")
            sys.stdout.flush(); os._exit(1)
        if wanted == 1 and len(prompts[0]) == 1024:
            short.append(1)
            time.sleep(0.5 * (len(short) == 2))
        for tokens in sorted({1, *range(9, wanted, 8), wanted}):
            time.sleep(0.002 + len(prompts[0]) / 4e6)
            for index in range(len(prompts)):
                told = {"index": index, "meta_info": {"completion_tokens": tokens}}
                self.wfile.write(f"data: {json.dumps(told)}\n".encode())
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
PROOF = f"""
import functools, os, pathlib, sys
sys.path[:0] = [{str(ROOT)!r} + "/" + folder for folder in ("bench", "evals", "reference", "tests/launch")]
import proof, recall
from golden_plans import machine
from report import Row
from sglang_sm120_launch import tuned
from sglang_sm120_launch.machine import Machine
Machine.detect = lambda: machine({{name!r}})
tuned.FOLDER = pathlib.Path(os.environ["TMPDIR"])
proof.prebuild = lambda *_: None
proof.LocalServer = functools.partial(proof.LocalServer, launcher=("-c", {SERVER!r}))
proof.SHORTEST = 1
proof.SERVER_SECONDS = int(os.environ.get("LIMIT", proof.SERVER_SECONDS))
def scores(url, exact, many):
    assert exact.exists() and len(many.read_text().splitlines()) == 1000
    return [Row("synthetic", "far recall x16", right=414, total=418, floor=0.99)], 3.84
recall.scores = scores
sys.exit(proof.main())
"""


@pytest.fixture(autouse=True)
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to write to that passes for a clone, two cards, an op that passes."""
    (tmp_path / "work").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("MANNER", "")
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    for name in ("SGLANG_SM120", "SGLANG_SM120_PREFILL", "SGLANG_SM120_PROVIDER"):
        monkeypatch.setenv(name, "0" if name == "SGLANG_SM120" else "torch")
    monkeypatch.setattr(prove, "KERNELS", ("-c", fake("", "a")))
    on(monkeypatch, tmp_path, "2x-rtx-pro-6000")


def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Cards of a described machine, for the launcher and for its child."""
    monkeypatch.setattr(Machine, "detect", lambda: machine(name))
    (tmp_path / "proof.py").write_text(PROOF.replace("{name!r}", repr(name)))
    monkeypatch.setattr(prove, "SERVERS", tmp_path / "proof.py")


def notes(tmp_path: Path) -> list[tuple[int, str, dict[str, str]]]:
    """Process, words and variables of every server that was started."""
    lines = (tmp_path / "notes").read_text().splitlines() if (tmp_path / "notes").exists() else []
    return [(pid, " ".join(words), variables) for pid, words, variables in map(json.loads, lines)]


def nothing_left(tmp_path: Path) -> None:
    """No server runs, and no folder of theirs is there."""
    assert not [pid for pid, _, _ in notes(tmp_path) if psutil.pid_exists(pid)]
    assert not [path.name for path in (tmp_path / "tmp").iterdir() if path.name.startswith("sglang-sm120-prove-")]


def test_every_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What each was told and gave. SGLang's own prefill refuses the small model, which decides nothing.

    Nor does what a table of the card has chosen before.
    """
    (tmp_path / "tmp" / tuned_table(machine("2x-rtx-pro-6000").gpus[0].name)).write_text('{"prefill": {"by": "mxfp8"}}')
    monkeypatch.setenv("MANNER", "refuses")
    assert cli.main(["prove"]) == 0
    kept = "prove.recall-prefill-sglang.log"
    found, page = written("prove.table.json", kept), schema()["properties"]
    assert f"`{kept}`" in Path("prove.md").read_text() and str(tmp_path) in Path(kept).read_text()
    server = page["servers"]["items"]["properties"]
    for one in found["servers"]:
        assert one.keys() == server.keys()
        assert all(point.keys() == server["points"]["items"]["properties"].keys() for point in one["points"])
    assert found["choice"].keys() == page["choice"]["properties"].keys()
    assert not [path for path in (str(tmp_path), str(ROOT)) if path in Path("prove.json").read_text()]
    by = {one["server"]: one for one in found["servers"]}
    assert list(by) == ["model", "recall", "recall, EAGLE", "recall, prefill=sglang",
                        "recall, prefill=mxfp8", "model, prefill=overlay", "model, prefill=mxfp8"]  # fmt: skip
    assert found["verdict"] == "pass" and found["left_out"] is None
    model = {(p["what"], p["requests"], p["tokens"]): p for p in by["model"]["points"]}
    assert [*model] == [("ready", None, None), *(("decode", n, 1024) for n in (1, 8, 32)),
                        *(("prefill", None, n) for n in (1024, 2048, 4096, 8192, 32768))]  # fmt: skip
    # As docs/launcher.md has them for these cards.
    assert [round(model["decode", n, 1024]["predicted"], 1) for n in (1, 8, 32)] == [7.1, 12.4, 28.1]
    assert model["prefill", None, 1024]["value"] > 3000, "one slow answer of three decided"
    assert by["model"]["about"] == "256 experts a layer, random weights, TP 2" and by["model"]["modes"] == ["decode"]
    assert by["model, prefill=mxfp8"]["modes"] == ["decode", "extend"]
    assert [p["what"] for p in by["model, prefill=mxfp8"]["points"]] == ["ready", *["prefill"] * 5]
    (recalled,) = (p for p in by["recall, EAGLE"]["points"] if p["what"].startswith("recall"))
    assert (recalled["value"], recalled["of"], recalled["requests"], recalled["problem"]) == (414, 418, 16, None)
    refused = by["recall, prefill=sglang"]
    assert refused["verdict"] == "fail" and refused["ended"].endswith("ValueError: … takes no such narrow layer")
    assert set(found["choice"]["tokens_per_s"]) == {"sglang", "overlay", "mxfp8"}
    copied = "nothing was changed: `cp prove.table.json overlay/sglang_sm120/tuned/A_card.json`"
    out = capsys.readouterr().out
    assert copied in out and "SGLang's modules are built where they are not" in out
    assert re.search("^model +256 experts .*; a server starts, which may take minutes\nmodel +pass ", out, re.MULTILINE)
    told = notes(tmp_path)
    assert len(told) == 7
    for _, words, variables in told:
        assert "api-key" not in words and variables["SGLANG_API_KEY"] is None, "no request here has a key"
        assert variables["SGLANG_SM120"] is None, "the user's own value was not dropped"
        small = "DeepSeek-V4-small" in words
        assert small or "--load-format dummy" in words and "random_weights" in variables["PYTHONPATH"]
        assert (variables["SGLANG_SM120_PREFILL"] is None) == ("--disable-prefill-cuda-graph" not in words)
    assert [variables["SGLANG_SM120_PROVIDER"] for _, _, variables in told] == [
        *[None] * 4, "mxfp8", None, "mxfp8"]  # fmt: skip
    assert sum("--speculative-algorithm EAGLE" in words for _, words, _ in told) == 1
    nothing_left(tmp_path)


def test_a_server_that_dies_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By SGLang's own prefill: what its log names first is told, decode and a prefill are found without it."""
    monkeypatch.setenv("MANNER", "dies")
    assert cli.main(["prove"]) == 1
    found = written("prove.table.json", "prove.model.log")
    by = {one["server"]: one for one in found["servers"]}
    assert by["model"]["verdict"] == "fail" and by["model"]["ended"].endswith("; its log: ValueError: … is wrong")
    assert "a child died" in Path("prove.model.log").read_text()
    decode = [p["requests"] for p in by["model, prefill=overlay"]["points"] if p["what"] == "decode"]
    assert decode == [1, 8, 32] and by["model, prefill=overlay"]["points"][1]["predicted"] > 7
    assert set(found["choice"]["tokens_per_s"]) == {"overlay", "mxfp8"} and found["choice"]["by"] != "sglang"


def test_one_that_hangs_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other servers of the same model are left out; those of the small one run."""
    monkeypatch.setenv("MANNER", "hangs")
    monkeypatch.setenv("LIMIT", "12")
    assert cli.main(["prove"]) == 1
    by = {one["server"]: one for one in written("prove.model.log")["servers"]}
    assert by["model"]["ended"] == "TimeoutError: it took more than 12 s; its log: ValueError: a rank is lost"
    left_out = {name: one["not_run"] for name, one in by.items() if one["not_run"]}
    assert left_out == dict.fromkeys(("model, prefill=overlay", "model, prefill=mxfp8"), "model took more than 12 s")
    assert all(one["verdict"] == "pass" for name, one in by.items() if name.startswith("recall"))
    nothing_left(tmp_path)


def test_the_cards_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of three cards those two that a plan takes, for kernels and servers, in the file and on the page."""
    on(monkeypatch, tmp_path, "mixed-cards")
    monkeypatch.setattr(prove, "KERNELS", ("-c", fake("call['call'] = os.environ['CUDA_VISIBLE_DEVICES']", "a")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cli.main(["prove"]) == 0
    found = json.loads(Path("prove.json").read_text())
    assert [card["memory_mib"] for card in found["cards"]] == [97887] * 2
    assert found["ops"][0]["calls"][0]["call"] == "0,2" and "RTX 5090" not in Path("prove.md").read_text()
    assert {variables["CUDA_VISIBLE_DEVICES"] for _, _, variables in notes(tmp_path)} == {"0,2"}


def test_a_signal_while_a_server_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is stopped again at the end."""
    import proof

    class Server:
        stopped = 0

        def stop(self) -> None:
            self.stopped += 1
            if self.stopped == 1:
                raise SystemExit(143)

    kit, server = proof.Kit(tmp_path, machine("2x-rtx-pro-6000")), Server()
    kit._started["model"] = server, None
    with pytest.raises(SystemExit):
        kit.stop("model")
    kit.close()
    assert server.stopped == 2


def test_a_figure_that_is_no_number():
    import proof

    with pytest.raises(ValueError, match="decode gave nan ms, needed a finite number"):
        proof.point("decode", float("nan"), "ms")


def test_another_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without SGLANG_SM120_FORCE=1 nothing is served."""
    on(monkeypatch, tmp_path, "2x-h200")
    assert cli.main(["prove"]) == 0
    servers = written()["servers"]
    assert len(servers) == 8 and all("none of SM12x" in one["not_run"] for one in servers) and not notes(tmp_path)


def test_a_rehearsal_on_a_hopper_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The step serves every pass there, and SGLang's own prefill is that of a server without the step."""
    on(monkeypatch, tmp_path, "2x-h200")
    monkeypatch.setenv("SGLANG_SM120_FORCE", "1")
    assert cli.main(["prove"]) == 0
    by = {one["server"]: one for one in written("prove.table.json")["servers"]}
    served = {name: one["modes"] for name, one in by.items() if one["not_run"] is None}
    both = ["decode", "extend"]
    assert served == {"model": both, "recall": both, "recall, EAGLE": both, "model, prefill=sglang": []}
    assert {one["not_run"] for one in by.values()} == {None, "needs SM12x: on another card the step takes every pass"}
    assert set(json.loads(Path("prove.json").read_text())["choice"]["tokens_per_s"]) == {"sglang", "overlay"}
    *stepped, (_, words, variables) = notes(tmp_path)
    assert (variables["SGLANG_SM120"], variables["SGLANG_SM120_FORCE"]) == ("0", "0") and "marlin" in words
    for _, words, variables in stepped:
        assert variables["SGLANG_SM120_FORCE"] == "1" and "--moe-runner-backend triton" in words
        assert "--disable-prefill-cuda-graph" in words
    nothing_left(tmp_path)


@contextlib.contextmanager
def after(tmp_path: Path, words: str) -> Iterator[None]:
    """Inside, SIGTERM when a server with these words runs: what Ctrl-C does too."""
    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.2):
            if any(words in told for _, told, _ in notes(tmp_path)):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped with two servers running, one of them ahead: none is left, and the first is not started again."""
    with after(tmp_path, "--speculative-algorithm EAGLE"):
        assert cli.main(["prove"]) == 130
    nothing_left(tmp_path)
    assert [path.name for path in Path().iterdir()] == ["prove.json.part"]
    before = len(notes(tmp_path))
    assert cli.main(["prove"]) == 0
    assert len(written("prove.table.json")["servers"]) == 7
    again = [words for _, words, _ in notes(tmp_path)[before:]]
    assert not any("model-256" in words and "--disable-prefill-cuda-graph" not in words for words in again)
    nothing_left(tmp_path)


def test_time_that_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server that hangs is ended, what comes after it is left out, each with its reason, and nothing fails."""
    monkeypatch.setenv("MANNER", "hangs")
    began = time.monotonic()
    assert cli.main(["prove", "--seconds", "20"]) == 0
    assert time.monotonic() - began < 40
    first, *others = written()["servers"]
    assert first["verdict"] == "not run" and first["not_run"] == "the time of --seconds was up before its end"
    assert [point["what"] for point in first["points"]] == ["ready"]
    assert {one["not_run"] for one in others} == {"the time of --seconds was up"}
    assert len(notes(tmp_path)) == 1
    nothing_left(tmp_path)


def test_a_child_that_dies_loses_one_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    code = """
import json, os, signal, sys
def say(**found): print("\\n" + json.dumps(found), flush=True)
names = [word for word in sys.argv[1:] if len(word) == 1] or ["a", "b", "c"]
say(servers=names)
for name in names:
    say(server=name, not_run=None, about=None, modes=[])
    if name == "b": os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "proof.py").write_text(code)
    assert cli.main(["prove"]) == 1
    servers = written()["servers"]
    assert [(one["server"], one["verdict"]) for one in servers] == [("a", "pass"), ("b", "fail"), ("c", "pass")]
    assert "SIGKILL" in servers[1]["ended"]
