"""A `serve` that runs, real or with a stand-in for SGLang, and what it says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from local_server import free_port

REAL = (sys.executable, "-m", "sglang_sm120_launch")
LAUNCH = str(Path(__file__).parents[2] / "launch")


@dataclass
class Serve:
    """A running `serve`, what it has printed, and its port."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, seconds: float) -> None:
        """Until it has printed `words`."""
        deadline = time.monotonic() + seconds
        while words not in self.text():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text()[-3000:]}"
            assert time.monotonic() < deadline, f"no {words!r} within {seconds} s:\n{self.text()[-3000:]}"
            time.sleep(0.2)

    def tree(self) -> list[psutil.Process]:
        """The server's processes."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def member(self, title: str) -> psutil.Process:
        """The server's process of a title."""
        [found] = [process for process in self.tree() if process.cmdline()[0].startswith(title)]
        return found

    def ends(self, seconds: float, tree: list[psutil.Process]) -> int:
        """Its exit status, within `seconds`, with nothing of `tree` and nothing on the port left."""
        began = time.monotonic()
        status = self.process.wait(seconds)
        assert not psutil.wait_procs(tree, timeout=max(0.1, began + seconds - time.monotonic()))[1], "left running"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))
        return status


@contextmanager
def serve(
    command: tuple[str, ...],
    model: Path,
    folder: Path,
    *words: str,
    port: int | None = None,
    stub: str | None = None,
    flags: tuple[str, ...] = (),
    **variables: str,
) -> Iterator[Serve]:
    """`serve` on a free port, killed with all its processes at the end if it still runs."""
    port = port or free_port()
    # One thread each: two servers whose threads wait for each other on shared cores would take minutes.
    environment = (
        os.environ | {"PYTHONPATH": LAUNCH, "OMP_NUM_THREADS": "1"} | ({"STUB": stub} if stub else {}) | variables
    )
    log = folder / f"serve-{port}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "serve", "--model", str(model), *words, "--", "--port", str(port), *flags],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    running = Serve(process, log, port)
    try:
        yield running
    finally:
        if process.poll() is None:
            for each in [*running.tree(), process]:
                # A child may end between being listed and being killed.
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()
