"""`serve`: with SGLang's own server on the small checkpoint, and with a stand-in for what takes long or goes wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from golden_plans import HERE
from running import LAUNCH, REAL, Serve, serve

from sglang_sm120_launch.child import Child
from sglang_sm120_launch.progress import Progress
from sglang_sm120_reference.write import write_checkpoint

CONFIG = HERE.parents[1] / "configs/deepseek-v4-small.cpu.tp1.yaml"
STUB = (sys.executable, str(HERE / "stub" / "serve.py"))
READY = "evidence for this configuration"
"""The last words of a start."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def real(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, thorough: bool) -> Iterator[dict[str, Serve]]:
    """Real servers that are ready, by what ends them. They start side by side: a start keeps one core busy."""
    options: dict[str, tuple[str, ...]] = {"Ctrl-C": ("--config", str(CONFIG))}
    if thorough:
        options |= {"killed": ("--watch",), "frozen": ("--watch", "--stall-limit", "20")}
    with ExitStack() as stack:
        running = {
            end: stack.enter_context(serve(REAL, checkpoint, tmp_path_factory.mktemp("real"), *words))
            for end, words in options.items()
        }
        for each in running.values():
            each.wait_for(READY, 300)
        yield running


def test_the_real_server_answers_and_ctrl_c_ends_it(real: dict[str, Serve]):
    """Ready, the first request with its throughput, the evidence word; then nothing is left within ten seconds.

    On the way the server's token counter moves with a request, and an idle server makes the token it is asked for.
    """
    running = real["Ctrl-C"]
    assert "evidence for this configuration: measured (2-core x86-64, " in running.text()
    assert f"ready: http://127.0.0.1:{running.port} after" in running.text()
    first = r"first request: (\d+) prompt tokens, 16 generated in ([\d.]+) s \(([\d.]+) tokens/s\)"
    found = re.search(first, running.text())
    assert found and abs(16 / float(found[2]) - float(found[3])) < 0.1 + 0.1 * float(found[3])
    # The plan's pools are SGLang's, as its log reports them.
    text = running.text()
    planned = re.search(r"hold (\d+) tokens of context at (\d+) bytes; the window pool (\d+) tokens", text)
    counted = re.search(r"DSV4 memory calculation: .*bytes_per_full_token=([\d.]+),", text)
    sizes = re.findall(r"DSV4 pool sizes: full=(\d+), swa=(\d+),", text)
    assert planned and counted and sizes[-1] == (planned[1], planned[3])
    assert abs(float(counted[1]) - int(planned[2])) <= 0.5
    progress = Progress(f"http://127.0.0.1:{running.port}")
    before = progress.tokens()
    assert before is not None and before >= 16
    body = {"text": "Hello", "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
    httpx.post(f"http://127.0.0.1:{running.port}/generate", json=body, timeout=120).raise_for_status()
    after = progress.tokens()
    assert after is not None and after >= before + 3
    assert progress.made_within(30)
    tree = running.tree()
    running.process.send_signal(signal.SIGINT)
    # SGLang looks every five seconds whether it shall end.
    assert running.ends(20, tree) == 128 + signal.SIGINT


def test_the_real_server_loses_its_scheduler(real: dict[str, Serve]):
    """`serve --watch` ends with status 1 within thirty seconds and leaves nothing behind."""
    if "killed" not in real:
        pytest.skip("a stand-in is killed here, the real server by make test-launch")
    running = real["killed"]
    tree = running.tree()
    running.member("sglang::scheduler").kill()
    assert running.ends(30, tree) == 1
    assert "sglang-sm120: " in running.text()


def test_the_real_server_is_frozen(real: dict[str, Serve]):
    """Its HTTP process still answers, and `serve --watch` ends with status 1, the ranks' stacks on stderr."""
    if "frozen" not in real:
        pytest.skip("a stand-in is frozen here, the real server by make test-launch")
    running = real["frozen"]
    tree = running.tree()
    scheduler = running.member("sglang::scheduler")
    scheduler.suspend()
    assert httpx.get(f"http://127.0.0.1:{running.port}/model_info", timeout=10).status_code == 200
    # The limit of 20 s, the stacks, 5 s of grace.
    assert running.ends(60, tree) == 1
    text = running.text()
    assert "has made no token for 2" in text and "(limit 20 s)" in text
    assert f"--- {scheduler.pid} sglang::scheduler" in text and "run_scheduler_process" in text


def test_a_frozen_http_process_is_noticed(checkpoint: Path, tmp_path: Path):
    """Within the stall limit and the time to stop it; an idle server is not taken for a frozen one."""
    with serve(STUB, checkpoint, tmp_path, "--watch", "--stall-limit", "3") as running:
        running.wait_for(READY, 60)
        time.sleep(5)
        assert running.process.poll() is None, "an idle server was taken for a frozen one"
        tree = running.tree()
        running.tree()[0].suspend()
        # 3 s of silence, 10 s at most for each stack, 5 s of grace.
        assert running.ends(40, tree) == 1
        text = running.text()
        assert "has made no token for" in text and "(limit 3 s)" in text
        for process in tree:
            assert f"--- {process.pid} " in text
        assert "launch_server.py" in text, "the stacks name what was running"


def test_a_lost_process_is_noticed_though_the_others_run(checkpoint: Path, tmp_path: Path):
    """SGLang ends by itself when it sees that; this is for when it does not."""
    with serve(STUB, checkpoint, tmp_path, "--watch") as running:
        running.wait_for(READY, 60)
        tree = running.tree()
        lost = running.member("sglang::scheduler")
        time.sleep(2)
        lost.kill()
        assert running.ends(30, tree) == 1
        assert f"Process {lost.pid} of the server has ended while the others run" in running.text()


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
@pytest.mark.parametrize("when", ("loading", "serving"))
def test_told_to_stop(number: signal.Signals, when: str, checkpoint: Path, tmp_path: Path):
    """At any time, by either signal."""
    with serve(STUB, checkpoint, tmp_path, stub="never-ready" if when == "loading" else None) as running:
        running.wait_for("Command:" if when == "loading" else READY, 60)
        while not any("sglang::" in (process.cmdline() or [""])[0] for process in running.tree()):
            time.sleep(0.1)
        tree = running.tree()
        running.process.send_signal(number)
        assert running.ends(10, tree) == 128 + number


def test_a_killed_launcher_takes_the_server_along(checkpoint: Path, tmp_path: Path):
    """Even by SIGKILL: Linux tells the server, which ends."""
    with serve(STUB, checkpoint, tmp_path) as running:
        running.wait_for(READY, 60)
        server = running.tree()[0]
        running.process.kill()
        running.process.wait()
        assert not psutil.wait_procs([server], timeout=10)[1]


def ask(url: str, seconds: float) -> httpx.Response:
    """A request that takes so long."""
    return httpx.post(f"{url}/generate", json={"text": "x", "seconds": seconds}, timeout=60, trust_env=False)


def test_a_request_in_flight_is_answered(checkpoint: Path, tmp_path: Path):
    """The first process is told alone, and ends when it has answered."""
    with serve(STUB, checkpoint, tmp_path) as running, ThreadPoolExecutor() as pool:
        running.wait_for(READY, 60)
        tree = running.tree()
        answer = pool.submit(ask, f"http://127.0.0.1:{running.port}", seconds=2)
        time.sleep(1)
        running.process.terminate()
        assert answer.result().status_code == 200
        assert running.ends(10, tree) == 128 + signal.SIGTERM


def test_a_second_signal_ends_the_wait(checkpoint: Path, tmp_path: Path):
    """A request that never ends holds the server up no longer than wanted."""
    with serve(STUB, checkpoint, tmp_path, "--drain-limit", "60") as running, ThreadPoolExecutor() as pool:
        running.wait_for(READY, 60)
        tree = running.tree()
        answer = pool.submit(ask, f"http://127.0.0.1:{running.port}", seconds=40)
        time.sleep(1)
        running.process.terminate()
        time.sleep(1)
        assert running.process.poll() is None, "the first signal cut the request off"
        running.process.terminate()
        assert running.ends(15, tree) == 128 + signal.SIGTERM
        assert isinstance(answer.exception(), httpx.HTTPError)


def test_draining_has_a_limit():
    """So long it waits for the first process, which here never ends by the signal."""
    child = Child.__new__(Child)
    child._process = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; sleep 60"], stdout=subprocess.PIPE)
    assert child._process.stdout is not None and child._process.stdout.readline()
    try:
        began = time.monotonic()
        child.drain(0.5)
        assert 0.5 <= time.monotonic() - began < 10 and child.status() is None
    finally:
        for process in [*psutil.Process(child.pid).children(), child._process]:
            process.kill()
        child._process.wait()


def test_another_address_and_no_tokenizer(checkpoint: Path, tmp_path: Path):
    """IPv6, everywhere: the URL that is printed, and written for the health check, answers; the first prompt is ids."""
    written = tmp_path / "url"
    flags = ("--host", "::", "--skip-tokenizer-init")
    with serve(STUB, checkpoint, tmp_path, flags=flags, SGLANG_SM120_URL_FILE=str(written)) as running:
        running.wait_for(READY, 60)
        assert written.read_text() == f"http://[::1]:{running.port}"
        assert f"Everybody who reaches port {running.port}" in running.text()
        assert f"{READY}: unverified, which is no fault of this server" in running.text()
        assert f"ready: http://[::1]:{running.port} after" in running.text()
        assert health(written) == 0
    assert health(tmp_path / "none") == 1


def health(written: Path) -> int:
    """The container's check beside the server."""
    environment = os.environ | {"PYTHONPATH": LAUNCH, "SGLANG_SM120_URL_FILE": str(written)}
    command = [sys.executable, "-m", "sglang_sm120_launch.progress"]
    return subprocess.run(command, env=environment, timeout=60).returncode


def test_tls(checkpoint: Path, tmp_path: Path):
    """With a certificate the server is asked over https, by the watchdog too."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=somewhere.example"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    flags = ("--host", "::1", "--ssl-keyfile", key, "--ssl-certfile", certificate)
    with serve(STUB, checkpoint, tmp_path, "--watch", "--stall-limit", "2", flags=flags) as running:
        running.wait_for(READY, 60)
        assert f"ready: https://[::1]:{running.port} after" in running.text()
        time.sleep(4)
        assert running.process.poll() is None, "a healthy server was stopped"


FAILURES = {
    "exits": (1, "ended with status 7 before it was ready"),
    "never-ready": (1, "not ready within --start-limit"),
    "no-answer": (1, "did not answer its first request"),
}


@pytest.mark.parametrize("manner", FAILURES)
def test_a_server_that_does_not_come_up(manner: str, checkpoint: Path, tmp_path: Path):
    """One sentence and status 1, for a supervisor."""
    with serve(STUB, checkpoint, tmp_path, "--start-limit", "3", stub=manner) as running:
        status, words = FAILURES[manner]
        assert running.process.wait(60) == status
        last = running.text().splitlines()[-1]
        assert last.startswith("sglang-sm120: ") and words in last


def test_what_serve_refuses(checkpoint: Path, tmp_path: Path):
    """A port in use, another machine's plan, a SGLang that cannot serve; `--dry-run` starts nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serve(STUB, checkpoint, tmp_path, port=port) as running:
            assert running.process.wait(60) == 2
            assert f"127.0.0.1:{port} cannot be listened on" in running.text()
    words = ("--machine", str(HERE / "machines" / "no-gpu.json"))
    with serve(STUB, checkpoint, tmp_path, *words) as running:
        assert running.process.wait(60) == 2 and "--dry-run" in running.text()
    with serve(STUB, checkpoint, tmp_path, *words, "--dry-run") as running:
        assert running.process.wait(60) == 0
        assert "Command:" in running.text() and "ready" not in running.text()
    with serve(STUB, checkpoint, tmp_path, STUB_UNPATCHED="1") as running:
        assert running.process.wait(60) == 2 and "with the patches alone: run `make apply`" in running.text()
