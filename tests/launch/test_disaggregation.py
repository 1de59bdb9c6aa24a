"""`plan --role all` and `plan --nodes 2` started for real on this CPU: prefill, decode and SGLang's router; two nodes.

The packages that move the cache are not in the project's lock, as a single server needs none of them; they are
installed into a temporary folder here, the transfer engine in the build that needs no CUDA.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_sm120_launch import cli
from sglang_sm120_reference.packed import unpack

ROOT = Path(__file__).parents[2]
PACKAGES = [line for line in (ROOT / "launch/requirements-pd.txt").read_text().splitlines() if "==" in line]
"""Of these NIXL stays out: SGLang registers the cache with it as a GPU's memory, which UCX refuses on a CPU."""
LIBRARIES = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")
HOSTS = ("127.0.0.1", "127.0.0.2")
LONGEST = 3000
"""Tokens of a question: two servers share the cores."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, thorough: bool) -> dict[str, str]:
    """Variables with which the packages can be imported."""
    if not thorough:
        pytest.skip("two servers and a router: make test-launch starts them")
    folder = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target"]
    packages = [one.replace("-cuda13", "-non-cuda") for one in PACKAGES if not one.startswith("nixl")]
    subprocess.run([*pip, str(folder / "site"), *packages], check=True)
    found = {"PYTHONPATH": f"{folder / 'site'}", "OMP_NUM_THREADS": "1"}
    if ctypes.util.find_library("ibverbs") is None:
        subprocess.run(["apt-get", "download", "--quiet", *LIBRARIES], check=True, cwd=folder)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(folder / "libraries")], check=True)
        found["LD_LIBRARY_PATH"] = ":".join(
            sorted({str(library.parent) for library in folder.glob("libraries/**/*.so*")})
        )
    return found


@contextmanager
def running(command: list[str], host: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A planned command, listening on `host` alone; it and its children are gone afterwards."""
    words = [{"python": sys.executable, "0.0.0.0": host}.get(word, word) for word in command]
    variables = os.environ | environment | {"SGLANG_HOST_IP": host}
    with log.open("ab") as out:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    try:
        yield process
    finally:
        # One that failed has ended by itself, with its group.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class Running:
    """What answers at `url`, and the logs of its processes by name."""

    url: str
    logs: dict[str, Path]
    kill: Callable[[str], None]
    start: Callable[[str], object]

    def ask(self, prompt: list[int], tokens: int, timeout: float = 300, **more: Any) -> dict[str, Any]:
        endless = more.pop("ignore_eos", tokens > 1 and "return_logprob" in more)
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": endless}
        body = {"input_ids": prompt, "sampling_params": sampling, **more}
        reply = httpx.post(f"{self.url}/generate", json=body, timeout=timeout)
        reply.raise_for_status()
        return reply.json()

    def log(self, name: str) -> str:
        return self.logs[name].read_text(errors="replace")


@contextmanager
def deployed(
    words: list[str], port: int, environment: dict[str, str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Running]:
    """The small model, planned with `words` and answering at the first host's `port`."""
    model = unpack(ROOT / "evals/small-deepseek-v4.xz", folder / "model")
    machine = ROOT / "tests/launch/machines/no-gpu.json"
    plan = ["plan", "--model", str(model), "--machine", str(machine), "--hosts", ",".join(HOSTS), "--json"]
    assert cli.main([*plan, *words]) == 0
    processes = json.loads(capsys.readouterr().out)
    logs = {one["name"]: folder / f"{one['name']}.log" for one in processes}
    with ExitStack() as stack:
        started: dict[str, subprocess.Popen[bytes]] = {}

        def start(name: str) -> None:
            (one,) = (one for one in processes if one["name"] == name)
            started[name] = stack.enter_context(running(one["command"], one["host"], environment, logs[name]))

        def kill(name: str) -> None:
            os.killpg(started[name].pid, signal.SIGKILL)
            started[name].wait()

        for one in processes:
            start(one["name"])
        found = Running(f"http://{HOSTS[0]}:{port}", logs, kill, start)
        deadline = time.monotonic() + 300
        while not answers(found):
            for name, process in started.items():
                assert process.poll() is None, found.log(name)[-3000:]
            assert time.monotonic() < deadline, found.log(processes[-1]["name"])[-3000:]
            time.sleep(1)
        yield found


def answers(found: Running) -> bool:
    """Whether it serves: a router is healthy before it has found both servers, and refuses."""
    try:
        return bool(found.ask([0, 300], 1))
    except httpx.HTTPError:
        return False


def questions(every: int) -> list[dict[str, Any]]:
    """Some recall questions, the shortest first, with what the oracle answered."""
    lines = (ROOT / "evals/questions-cpu.jsonl").read_text().splitlines()
    found = [one for one in map(json.loads, lines) if len(one.get("prompt", "x" * LONGEST)) < LONGEST]
    return sorted(found, key=lambda one: len(one["prompt"]))[::every]


@pytest.mark.parametrize("more", ((), ("--mtp",)), ids=("plain", "mtp"))
def test_prefill_and_decode_apart_answer_rightly(
    more: tuple[str, ...], environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recall as the oracle's, and tokens decoded from what was handed over are as probable as a prefill of them finds.

    Answers of 140 tokens cross where an entry of 128 tokens is made of states from both servers, wherever the prompt
    ends; 0.05 is the agreement that the plugin states with SGLang's forward, of which both servers run the same.
    """
    with deployed(["--role", "all", *more], 8000, environment, tmp_path, capsys) as pair:
        asked = questions(6)
        assert len(asked[-1]["prompt"]) > 2048
        for one in asked:
            found = pair.ask(one["prompt"], one["max_tokens"])
            assert found["text"] == one["oracle"], f"{one['task']}, {len(one['prompt'])} tokens"
        for one in asked[:3]:
            decoded = pair.ask(one["prompt"], 140, return_logprob=True)["meta_info"]["output_token_logprobs"]
            whole = [*one["prompt"], *(token for _, token, _ in decoded)]
            first = len(one["prompt"])
            again = pair.ask(whole, 1, return_logprob=True, logprob_start_len=first - 1)
            prefilled = again["meta_info"]["input_token_logprobs"][-len(decoded) :]
            assert [token for _, token, _ in prefilled] == whole[first:]
            worst = max(abs(a - b) for (a, *_), (b, *_) in zip(decoded, prefilled, strict=True))
            print(f"{first} tokens: log-probabilities of {len(decoded)} decoded tokens within {worst:.4f}")
            assert worst < 0.05
        prefill, decode = pair.log("prefill0"), pair.log("decode0")
    assert "Prefill batch" in prefill and "Decode batch" not in prefill
    assert "Decode batch" in decode and "Prefill batch" not in decode


def test_a_lost_decode_server(
    environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 requests, eight at a time, as the oracle's; then decode is killed: errors that say so, and it comes back."""
    asked = [one for one in questions(1) if len(one["prompt"]) < 1500]

    def right(one: dict[str, Any]) -> bool:
        return bool(pair.ask(one["prompt"], one["max_tokens"])["text"] == one["oracle"])

    with deployed(["--role", "all"], 8000, environment, tmp_path, capsys) as pair, ThreadPoolExecutor(8) as pool:
        assert len(asked) > 20 and all(pool.map(right, (asked * 20)[:200]))
        cut = pool.submit(pair.ask, [0, 300, 301], 2000, ignore_eos=True)
        time.sleep(3)
        assert not cut.done()
        pair.kill("decode0")
        with pytest.raises(httpx.HTTPError) as broken:
            cut.result(60)
        print(f"the request that decoded: {broken.value!r}")
        lost = time.monotonic()
        while True:
            try:
                pair.ask([0, 300], 1, timeout=5)
            except httpx.HTTPStatusError as error:
                told = error.response
                assert told.status_code == 503 and "decode" in told.text
                break
            except httpx.TimeoutException:
                # Until the router has missed it; prefill waits for it longer.
                assert time.monotonic() < lost + 40
        print(f"told after {time.monotonic() - lost:.0f} s: {told.text}")
        pair.start("decode0")
        deadline = time.monotonic() + 300
        while not answers(pair):
            assert time.monotonic() < deadline, pair.log("decode0")[-3000:]
            time.sleep(1)
        assert all(pool.map(right, asked[:20]))


def test_two_nodes_serve_one_model(
    environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TP 2, a rank on each, over gloo: the oracle's answers."""
    with deployed(["--nodes", "2"], 30000, environment, tmp_path, capsys) as server:
        for one in questions(12):
            found = server.ask(one["prompt"], one["max_tokens"])
            assert found["text"] == one["oracle"], f"{one['task']}, {len(one['prompt'])} tokens"
        assert "TP1" in server.log("server-node1") and "TP1" not in server.log("server-node0")


def test_a_host_with_another_release_does_not_start(environment: dict[str, str], tmp_path: Path) -> None:
    """What every process of a deployment is told is looked at before anything is loaded."""
    words = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(tmp_path), "--device", "cpu"]
    told = os.environ | environment | {"SGLANG_SM120_VERSION": "9.9.9"}
    found = subprocess.run(words, env=told, capture_output=True, text=True)
    assert found.returncode == 1 and "9.9.9" in found.stderr.splitlines()[-1], found.stderr
