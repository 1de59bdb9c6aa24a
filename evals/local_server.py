"""Starts the real SGLang HTTP server as a child process and stops exactly that process tree: for the demo and tests."""

from __future__ import annotations

import random
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

from sglang_sm120_launch.address import GRPC_OFFSET
from sglang_sm120_launch.child import SGLANG, Child

PLAIN = ("extend", "decode")
EAGLE = (*PLAIN, "extend", "target_verify", "draft_extend_v2")
"""Modes of the passes of a server on a CPU, one word for each model that has passes of it; with EAGLE the target and
the draft layer share the work, and both extend."""


class ServerError(RuntimeError):
    """The server did not come up; the message holds the end of its log."""


_claims: list[socket.socket] = []


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago; SGLang also claims the one GRPC_OFFSET above.

    No two processes that ask here get the same one as long as both live: a server binds its port late.
    """
    for port in random.sample(range(20000, 32000), 100):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0sglang-sm120 {port}")
            for number in (port, port + GRPC_OFFSET):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", number))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return port
    raise ServerError("No free TCP port was found between 20000 and 32000: stop other servers on this machine.")


class LocalServer:
    """`python -m sglang.launch_server` on a free loopback port, as a context manager.

    Args:
        checkpoint: model directory.
        args: further SGLang flags, as on the command line.
        launcher: what Python runs in SGLang's place.
        env: variables to set for the server beside this process's own.
        log: file that receives the server's stdout and stderr.
        ready_seconds: how long start-up may take before it counts as failed.

    Raises:
        ServerError: on entering, when the server exits or is not healthy in time.
    """

    def __init__(
        self,
        checkpoint: Path,
        *args: str,
        log: Path,
        launcher: Sequence[str] = SGLANG,
        env: Mapping[str, str] | None = None,
        ready_seconds: float = 240,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(log)
        arguments = ("--model-path", str(checkpoint), "--host", "127.0.0.1", "--port", str(self.port), *args)
        self._start = partial(Child, arguments, env or {}, launcher=launcher)
        self._ready_seconds = ready_seconds
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None, "LocalServer.pid is read inside `with`"
        return self._child.pid

    def __enter__(self) -> LocalServer:
        with self.log.open("wb") as log:
            self._child = self._start(output=log)
        try:
            if not self._child.is_healthy_within(self._ready_seconds, self.url):
                late = f"was not healthy after {self._ready_seconds:.0f} s; log:"
                found = late if self.alive() else "exited with its log ending in:"
                raise ServerError(f"The server {found}\n{self.log_tail()}")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def alive(self) -> bool:
        """Whether the launched process still runs."""
        return self._child is not None and self._child.status() is None

    def wait(self, seconds: float) -> int:
        """Wait until the launched process ends by itself; its exit status.

        Raises:
            ServerError: it still runs after `seconds`.
        """
        assert self._child is not None, "LocalServer.wait is called inside `with`"
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ServerError(f"The server still runs after {seconds:.0f} s, and was to end by itself.") from None

    def stop(self, grace_seconds: float = 2) -> None:
        """Terminate the process group, by force after `grace_seconds`; returns when all of it is gone."""
        if self._child is not None:
            self._child.stop(grace_seconds)

    def require_step(self, modes: Sequence[str]) -> None:
        """Whether the step of sglang_sm120 took this server's passes; on a CPU, where it is to take every one.

        Args:
            modes: `PLAIN` or `EAGLE`.

        Raises:
            ServerError: on some rank it took passes of other modes, or was not installed.
        """
        log, says = self.log.read_text(errors="replace"), r"\] sglang_sm120: the step"
        ranks = re.findall(rf"\[\S+ [^\s\]]+( [^\]]+)?{says} serves every pass of DeepseekV4ForCausalLM ", log)
        if not ranks:
            raise ServerError("The step of sglang_sm120 was not installed in the server: run `make apply`.")
        for rank in ranks:
            found = sorted(re.findall(rf"\[\S+ [^\s\]]+{re.escape(rank)}{says} takes its first (\w+) pass ", log))
            if found != sorted(modes):
                raise ServerError(
                    f"The step took passes of the modes {found}{rank and ' on' + rank}, needed {sorted(modes)}: "
                    "see which forward served the rest."
                )

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
