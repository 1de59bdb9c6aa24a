"""What a server's log says of the step, read without a server."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE

import pytest

from local_server import EAGLE, PLAIN, LocalServer, ServerError, free_port

ONE, TWO = ("",), (" TP0 EP0", " TP1 EP1")


def server_of(folder: Path, ranks: Sequence[str], modes: Sequence[str]) -> LocalServer:
    """A server that was never started, with lines as SGLang 0.5.23 writes them on each rank."""
    lines = ["[2026-11-29 08:43:51] The step takes its first pass in a prompt."]
    for rank in ranks:
        own = f"[2026-11-29 08:43:53{rank}] sglang_sm120: the step"
        lines += [f"{own} serves every pass of DeepseekV4ForCausalLM{draft} on this CPU." for draft in ("", "NextN")]
        lines += [f"{own} takes its first {mode} pass (22 rows)." for mode in modes]
    (folder / "server.log").write_text("\n".join(lines))
    return LocalServer(folder, log=folder / "server.log")


@pytest.mark.parametrize("modes", [PLAIN, EAGLE], ids=["plain", "eagle"])
@pytest.mark.parametrize("ranks", [ONE, TWO], ids=["one rank", "two ranks"])
def test_the_modes_of_a_server_are_found(tmp_path: Path, modes: Sequence[str], ranks: Sequence[str]) -> None:
    server_of(tmp_path, ranks, modes).require_step(modes)


@pytest.mark.parametrize("missing", range(len(EAGLE)))
def test_a_model_whose_passes_went_elsewhere_is_found(tmp_path: Path, missing: int) -> None:
    left = [*EAGLE[:missing], *EAGLE[missing + 1 :]]
    with pytest.raises(ServerError, match="see which forward served the rest"):
        server_of(tmp_path, ONE, left).require_step(EAGLE)


def test_a_rank_without_the_step_is_found(tmp_path: Path) -> None:
    server = server_of(tmp_path, TWO, PLAIN)
    lines = server.log.read_text().splitlines()
    server.log.write_text("\n".join(line for line in lines if "TP1 EP1] sglang_sm120: the step takes" not in line))
    with pytest.raises(ServerError, match=r"modes \[\] on TP1 EP1, needed"):
        server.require_step(PLAIN)


def test_a_server_without_the_step_is_found(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="was not installed"):
        server_of(tmp_path, (), ()).require_step(PLAIN)


def test_a_port_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to another process either, before a server has bound it."""
    code = "import local_server; print(local_server.free_port(), flush=True); input()"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True, env=path) as other:
        assert other.stdin and other.stdout
        taken = int(other.stdout.readline())
        numbers = [taken, *random.sample(range(20000, 32000), 100)]
        monkeypatch.setattr(random, "sample", lambda *_: numbers)
        given = {free_port(), free_port()}
        other.stdin.close()
    assert len({taken, *given}) == 3
