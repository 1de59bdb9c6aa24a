"""`plan --topology 1p1d` started for real: a prefill server, a decode server and SGLang's router, on this CPU.

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from sglang_sm120_launch import cli
from sglang_sm120_reference.packed import unpack

ROOT = Path(__file__).parents[2]
PACKAGES = ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "sglang-router==0.3.2")
LIBRARIES = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")
CONFIG = ROOT / "configs/deepseek-v4-small.cpu.tp1.yaml"
HOSTS = ("127.0.0.1", "127.0.0.2")
LONGEST = 4000
"""Tokens of a question: two servers share the cores."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, thorough: bool) -> dict[str, str]:
    """Variables with which the packages can be imported."""
    if not thorough:
        pytest.skip("two servers and a router: make test-launch starts them")
    folder = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target"]
    subprocess.run([*pip, str(folder / "site"), *PACKAGES], check=True)
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
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(url: str, prompt: list[int], tokens: int) -> httpx.Response:
    sampling = {"max_new_tokens": tokens, "temperature": 0}
    return httpx.post(f"{url}/generate", json={"input_ids": prompt, "sampling_params": sampling}, timeout=300)


def answers(url: str) -> bool:
    """Whether the router has found both servers: before that it is healthy and refuses."""
    try:
        return ask(url, [0, 300], 1).status_code == 200
    except httpx.HTTPError:
        return False


def test_prefill_and_decode_apart_answer_rightly(
    environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = unpack(ROOT / "evals/small-deepseek-v4.xz", tmp_path / "model")
    machine = ROOT / "tests/launch/machines/no-gpu.json"
    words = ["plan", "--model", str(model), "--machine", str(machine), "--config", str(CONFIG), "--json"]
    assert cli.main([*words, "--topology", "1p1d", "--hosts", ",".join(HOSTS)]) == 0
    nodes = json.loads(capsys.readouterr().out)
    logs = [tmp_path / f"{node['name']}.log" for node in nodes]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(running(node["command"], host, environment, log))
            for node, host, log in zip(nodes, (*HOSTS, HOSTS[0]), logs, strict=True)
        ]
        router = f"http://{HOSTS[0]}:8000"
        deadline = time.monotonic() + 300
        while not answers(router):
            for process, log in zip(processes, logs, strict=True):
                assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, logs[-1].read_text(errors="replace")[-3000:]
            time.sleep(1)
        lines = (ROOT / "evals/questions-cpu.jsonl").read_text().splitlines()
        questions = [question for question in map(json.loads, lines) if len(question["prompt"]) < LONGEST]
        questions = sorted(questions, key=lambda question: len(question["prompt"]))[::6]
        assert len(questions[-1]["prompt"]) > 2048
        for question in questions:
            reply = ask(router, question["prompt"], question["max_tokens"])
            assert reply.status_code == 200, reply.text
            assert reply.json()["text"] == question["answer"], f"{question['task']}, {len(question['prompt'])} tokens"
    prefill, decode = (log.read_text(errors="replace") for log in logs[:2])
    assert "Prefill batch" in prefill and "Decode batch" not in prefill
    assert "Prefill batch" not in decode
