"""What is set before the server starts: cores, environment, and that the started server is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.model_executor.cuda_graph_config import default_cuda_graph_config

from local_server import LocalServer, ServerError
from sglang_sm120.limits import MAX_DRAFT_TOKENS, require_kept
from sglang_sm120.step import cpu

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'evals'}{os.pathsep}{ROOT / 'reference'}"}
"""Of a child that imports what pytest finds by pyproject's `pythonpath`."""


@given(cpus=st.sets(st.integers(0, 255), min_size=1), ranks=st.integers(1, 8))
def test_ranks_share_the_cores_equally(cpus: set[int], ranks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: cpus)
        shares = cpu.cores_of_ranks(ranks)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert {cpu for share in shares for cpu in share} <= cpus
    if len(cpus) >= ranks:
        assert len({cpu for share in shares for cpu in share}) == sum(map(len, shares)), "a core has two ranks"


def arguments(**given: object) -> SimpleNamespace:
    """SGLang's server arguments, as far as they are read."""
    graphs = default_cuda_graph_config()
    names = (
        "max_total_tokens", "max_running_requests", "swa_full_tokens_ratio", "sleep_on_idle",
        "speculative_algorithm", "speculative_num_draft_tokens", "speculative_use_rejection_sampling",
    )  # fmt: skip
    return SimpleNamespace(**{**dict.fromkeys(names), "tp_size": 1, "cuda_graph_config": graphs, **given})


def test_the_engine_with_packed_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"SGLANG_USE_CPU_ENGINE": "1"})
    with pytest.raises(ValueError, match="^SGLANG_USE_CPU_ENGINE is 1, .*: unset it\\.$"):
        cpu.cpu_defaults(arguments())


def test_defaults_respect_what_the_user_set_and_warn_where_they_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1", "SGLANG_OPT_USE_TOPK_V2": "1"})
    defaults = cpu.cpu_defaults(arguments(max_total_tokens=4096, tp_size=2))
    assert "max_total_tokens" not in defaults and defaults["max_running_requests"] == 8
    assert defaults["cuda_graph_config"].decode.backend == "disabled"
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert "TRITON_INTERPRET" not in os.environ and "SGLANG_USE_CPU_ENGINE" not in os.environ
    assert len(os.environ["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2
    assert os.environ["SGLANG_OPT_USE_TOPK_V2"] == "0"
    (warning,) = caplog.messages
    assert warning.startswith("SGLANG_OPT_USE_TOPK_V2=1 is replaced by 0")


def test_more_drafts_than_can_be_taken_back_are_refused() -> None:
    for drafts in (None, 4, MAX_DRAFT_TOKENS):
        require_kept(drafts)
    with pytest.raises(ValueError, match="is 11, .* take back 10 tokens: use --speculative-num-steps 9 or fewer"):
        cpu.cpu_defaults(arguments(speculative_num_draft_tokens=MAX_DRAFT_TOKENS + 1))


def test_a_cpu_speculates_with_eagle_only() -> None:
    with pytest.raises(ValueError, match="speculative_algorithm is DSPARK, but a CPU serves EAGLE only"):
        cpu.cpu_defaults(arguments(speculative_algorithm="DSPARK"))
    with pytest.raises(ValueError, match="--speculative-use-rejection-sampling needs a GPU: leave it out"):
        cpu.cpu_defaults(arguments(speculative_algorithm="EAGLE", speculative_use_rejection_sampling=True))


# Stands in for the server: answers /health, has a child that ignores SIGTERM, and writes both process ids.
SERVER = """
import http.server, os, signal, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
open(os.environ["PIDS"], "w").write(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def _running(pid: int) -> bool:
    """Whether the process exists and is not a zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_whole_process_tree_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setattr(LocalServer.stop, "__defaults__", (1.0,))
    with LocalServer(
        tmp_path, log=tmp_path / "log", launcher=("-c", SERVER), env={"PIDS": str(pids)}, ready_seconds=60
    ) as server:
        assert server.alive()
        parent, child = map(int, pids.read_text().split())
        assert _running(parent) and _running(child)
    assert not _running(parent) and not _running(child)


def test_the_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from local_server import LocalServer
        server = LocalServer(Path("."), log=Path({str(tmp_path / "log")!r}), launcher=("-c", sys.argv[1]),
                             env={{"PIDS": {str(pids)!r}}}, ready_seconds=60)
        with server:
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), SERVER], env=ENVIRONMENT)
    parent, child = map(int, pids.read_text().split())
    os.kill(child, signal.SIGKILL)  # SGLang's children watch their parent; this stand-in's does not
    deadline = time.monotonic() + 10
    while _running(parent) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _running(parent)


def test_a_server_that_exits_is_reported_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no such model"):
        with LocalServer(tmp_path, log=tmp_path / "log", launcher=("-c", "raise SystemExit('no such model')")):
            pass


def test_demo_fails_with_one_sentence_when_the_server_does(tmp_path: Path) -> None:
    script = """
        import sys
        import demo
        from local_server import LocalServer
        class Broken(LocalServer):
            def __init__(self, *args, **options):
                super().__init__(*args, **options, launcher=("-c", "raise SystemExit('out of order')"))
        demo.LocalServer = Broken
        sys.exit(demo.main())
    """
    packed = ROOT / "evals/small-deepseek-v4.xz"
    command = [sys.executable, "-c", textwrap.dedent(script), str(packed)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 1
    assert result.stderr.startswith("make demo failed: The server exited")
    assert "out of order" in result.stderr and "Traceback" not in result.stderr
