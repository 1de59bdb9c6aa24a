"""A server as a child process: it ends with its parent, and stopping it stops exactly its process group."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import httpx
import psutil

SGLANG = ("-m", "sglang.launch_server")
"""What Python runs."""
PR_SET_PDEATHSIG = 1
STACK_SECONDS = 10.0


def _end_with_parent() -> None:
    """Ask Linux to terminate this process when its parent dies, even by SIGKILL; SGLang then stops its own children."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Child:
    """A server with these arguments and, beside this process's own, these variables.

    Args:
        output: takes its stdout and stderr, which else are this process's.
        launcher: runs in SGLang's place.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None = None,
        launcher: Sequence[str] = SGLANG,
    ) -> None:  # fmt: skip
        # A session of its own: Ctrl-C reaches its parent alone, and the processes that it spawns stay in its group.
        self._process = subprocess.Popen(
            [sys.executable, *launcher, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output and subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self._ranks: list[psutil.Process] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self) -> int | None:
        """The exit status of the server; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float | None = None) -> int:
        """Wait until the server ends by itself; its exit status. Raises `subprocess.TimeoutExpired`."""
        return self._process.wait(seconds)

    def is_healthy_within(self, seconds: float, url: str) -> bool:
        """Whether the server, which is reached at `url`, serves within `seconds`; False at once when it has ended."""
        deadline = time.monotonic() + seconds
        while self.status() is None and time.monotonic() < deadline:
            try:
                # SGLang answers 503 until its own warm-up request has been served.
                if httpx.get(f"{url}/health", timeout=30, trust_env=False, verify=False).status_code == 200:
                    return True
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        return False

    def remember(self) -> None:
        """Take note of the server's own processes (ranks, detokenizer), to see later whether one is gone."""
        self._ranks = [process for process in self._members() if _title(process).startswith("sglang::")]

    def lost(self) -> int | None:
        """The id of a remembered process that has ended, None when all are there."""
        for process in self._ranks:
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    continue
            except psutil.NoSuchProcess:
                pass
            return process.pid
        return None

    def stacks(self) -> str:
        """What every process of the server is doing: Python stacks by py-spy, else the kernel's state and why."""
        parts = []
        for process in [psutil.Process(self.pid), *self._members()] if self.status() is None else []:
            title = _title(process)
            if title:
                parts.append(f"--- {process.pid} {title[:100]}\n{_stack(process)}")
        return "\n".join(parts)

    def drain(self, seconds: float) -> None:
        """Tell the first process alone to end, and wait so long: SGLang then answers what is in flight.

        Its ranks and detokenizer would die of the same signal, and with them every stream.
        """
        if self.status() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Terminate the process group, by force after `grace_seconds`; returns when all of it is gone.

        SGLang's children end at once; its first process then sleeps five seconds, for crash reports, and kills itself.
        """
        for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                break
            if self._gone_within(seconds):
                break
        self._process.wait()

    def _members(self) -> list[psutil.Process]:
        """The server's processes below the first."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._process.poll()
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.1)
        return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _stack(process: psutil.Process) -> str:
    beside = Path(sys.executable).with_name("py-spy")
    tool = str(beside) if beside.exists() else shutil.which("py-spy")
    problem = "py-spy is not installed"
    if tool is not None:
        # Without --nonblocking py-spy would first wait for a stopped process to run again.
        command = [tool, "dump", "--nonblocking", "--pid", str(process.pid)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=STACK_SECONDS)
        except subprocess.TimeoutExpired:
            problem = f"py-spy took more than {STACK_SECONDS:.0f} s"
        else:
            if done.returncode == 0:
                return done.stdout.strip()
            problem = (done.stderr.strip().splitlines() or ["py-spy failed"])[-1]
    try:
        waiting = Path(f"/proc/{process.pid}/wchan").read_text().strip("\0 0") or "nothing in the kernel"
        state = process.status()
    except (OSError, psutil.Error):
        return "gone"
    return f"no Python stack ({problem}); {state}, waits for {waiting}"
