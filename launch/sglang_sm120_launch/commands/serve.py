"""`sglang-sm120 serve`: plan, start the server, wait until it has answered a request, watch it until it ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import httpx

from .. import modules, request, show
from ..address import HOST, PORT, URL_FILE, listen_problem, url
from ..child import Child
from ..errors import LaunchError
from ..plan import Plan, make_plan
from ..progress import Progress

LOOK_SECONDS = 2.0
PREBUILD = ("-m", "sglang_sm120_launch", "prebuild")
PROMPT = "What is 6 times 7?"
IDS = list(range(1, 9))
TOKENS = 16
REQUEST_SECONDS = 600.0
UNVERIFIED = "unverified, which is no fault of this server: no run of it is on record (CONTRIBUTING.md, Reports)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `serve`."""
    request.configure(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    parser.add_argument(
        "--no-prebuild", action="store_true",
        help="let SGLang build its modules one after another when it needs them, where `prebuild` has not run",
    )  # fmt: skip
    parser.add_argument(
        "--watch", action="store_true", help="stop with status 1 when the server makes no token or loses a process"
    )
    parser.add_argument(
        "--stall-limit", type=float, default=120.0, metavar="SECONDS",
        help="how long a server under --watch may make no token: more than its longest forward pass "
        "(default: %(default).0f)",
    )  # fmt: skip
    parser.add_argument(
        "--start-limit", type=float, default=3600.0, metavar="SECONDS",
        help="how long loading, compiling and warm-up may take (default: %(default).0f)",
    )  # fmt: skip
    parser.add_argument(
        "--drain-limit", type=float, default=30.0, metavar="SECONDS",
        help="how long requests in flight may take to end after SIGTERM or Ctrl-C; a second one ends the wait "
        "(default: %(default).0f)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Print the plan and serve it until stopped."""
    wanted = request.read(arguments)
    if wanted.flags.release is None:
        raise LaunchError("SGLang is not installed beside this launcher: run `make setup` and `make apply`.")
    if arguments.machine is not None and not arguments.dry_run:
        raise LaunchError("--machine describes another machine and serve starts on this one: use it with --dry-run.")
    if not (wanted.request.patched or arguments.dry_run or wanted.machine.gpus):
        found = "No NVIDIA GPU was found, and SGLang serves this model on a CPU with the patches alone"
        raise LaunchError(f"{found}: run `make apply`.")
    plan = wanted.check(make_plan(wanted.machine, wanted.model, wanted.request))
    print(show.as_text(plan), flush=True)
    if arguments.dry_run:
        return 0
    if arguments.watch and plan.value("enable-metrics") is not True:
        raise LaunchError("--watch reads token counters and the config leaves out enable-metrics: add it to `auto`.")
    stall = arguments.stall_limit if arguments.watch else None
    cards = {gpu.sm for gpu in wanted.machine.gpus}
    builds = len(cards) == 1 and plan.value("device") != "cpu" and not arguments.no_prebuild
    return serve(plan, arguments.start_limit, arguments.drain_limit, stall, cards.pop() if builds else None)


class Stopped(BaseException):
    """SIGINT or SIGTERM has reached the launcher; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number


class Failed(Exception):
    """The server did not come up, ended by itself or made no token; the message is one sentence."""


def serve(
    plan: Plan, start_limit: float, drain_limit: float, stall_limit: float | None, sm: int | None = None
) -> int:
    """Serve until stopped: 128 + the signal's number when told to stop, 1 when the server failed.

    Args:
        start_limit, drain_limit, stall_limit: seconds that the server may take to start, to answer what is in flight
            at its end, and to make no token; None: it is not watched.
        sm: the card whose modules are built first where they are not; None for none.
    """
    _require_free_port(plan)
    if file := os.environ.get(URL_FILE):
        Path(file).write_text(url(plan.value), encoding="utf-8")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        if sm is not None:
            prebuild(plan.environment(), sm)
        return _serve(plan, start_limit, drain_limit, stall_limit)
    except Stopped as stopped:
        return 128 + stopped.number


def prebuild(environment: Mapping[str, str], sm: int) -> None:
    """Build the modules of a first start; what cannot be built SGLang tries again, and says why."""
    try:
        if modules.are_built({**os.environ, **environment}, sm):
            return
    except LaunchError:
        # No list for these cards.
        return
    child = Child(["--arch", f"sm{sm}"], environment, launcher=PREBUILD)
    try:
        if child.wait() != 0:
            print("sglang-sm120: Not every module was built before the start: SGLang builds them.", file=sys.stderr)
    finally:
        child.stop()


def _serve(plan: Plan, start_limit: float, drain_limit: float, stall_limit: float | None) -> int:
    began = time.monotonic()
    child = Child(plan.arguments(), plan.environment())
    try:
        if plan.value("node-rank") in (None, 0):
            _wait_until_ready(child, plan, start_limit)
            print(f"ready: {url(plan.value)} after {time.monotonic() - began:.0f} s", flush=True)
            if plan.value("disaggregation-mode") in (None, "null"):
                print(first_request(plan), flush=True)
            evidence = UNVERIFIED if plan.evidence == "unverified" else plan.evidence
            print(f"evidence for this configuration: {evidence}", flush=True)
            if stall_limit is not None:
                watch(child, plan, stall_limit)
        raise Failed(f"The server ended with status {child.wait()}: its last lines above say why.")
    except Failed as failure:
        print(f"sglang-sm120: {failure}", file=sys.stderr)
        return 1
    except Stopped:
        # A second signal ends the wait.
        with contextlib.suppress(Stopped):
            child.drain(drain_limit)
        raise
    finally:
        # A further Ctrl-C must not leave processes behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        child.stop()


def first_request(plan: Plan) -> str:
    """Ask for a few tokens; a sentence that says how long they took.

    Raises:
        Failed: the server answered with an error, or not at all.
    """
    # A server without a tokenizer takes token ids alone.
    prompt = {"input_ids": IDS} if plan.value("skip-tokenizer-init") is True else {"text": PROMPT}
    body = {**prompt, "sampling_params": {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}}
    key = plan.value("api-key")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    began = time.monotonic()
    response = None
    try:
        response = httpx.post(
            f"{url(plan.value)}/generate", json=body, headers=headers, timeout=REQUEST_SECONDS, trust_env=False,
            verify=False,
        )  # fmt: skip
        response.raise_for_status()
        meta = response.json()["meta_info"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        found = f"status {response.status_code}" if response is not None else type(error).__name__
        raise Failed(f"The server is up and did not answer its first request ({found}): its log says why.") from None
    generated, seconds = meta["completion_tokens"], time.monotonic() - began
    return (
        f"first request: {meta['prompt_tokens']} prompt tokens, {generated} generated in {seconds:.2f} s "
        f"({generated / seconds:.1f} tokens/s)"
    )


def watch(child: Child, plan: Plan, stall_limit: float) -> None:
    """Look at the server until it fails.

    Raises:
        Failed: a process of it is gone, or for `stall_limit` seconds it made no token although it was asked; then
            the stacks of all its processes have been printed.
    """
    key = plan.value("api-key")
    progress = Progress(url(plan.value), str(key) if key else None)
    child.remember()
    while True:
        if child.status() is not None:
            raise Failed(f"The server ended with status {child.status()}: its last lines above say why.")
        if lost := child.lost():
            raise Failed(f"Process {lost} of the server has ended while the others run: its last lines above say why.")
        if (silence := progress.silence()) > stall_limit:
            print(child.stacks(), file=sys.stderr, flush=True)
            raise Failed(
                f"The server has made no token for {silence:.0f} s although it was asked (limit {stall_limit:.0f} s): "
                f"it is stopped, the stacks of its processes are above."
            )
        time.sleep(LOOK_SECONDS)


def _wait_until_ready(child: Child, plan: Plan, seconds: float) -> None:
    if child.is_healthy_within(seconds, url(plan.value)):
        return
    if child.status() is not None:
        raise Failed(f"The server ended with status {child.status()} before it was ready: its log above says why.")
    raise Failed("The server was not ready within --start-limit seconds: its log above says what it was doing.")


def _require_free_port(plan: Plan) -> None:
    host, port = str(plan.value("host") or HOST), int(str(plan.value("port") or PORT))
    if problem := listen_problem(host, port):
        raise LaunchError(f"{host}:{port} cannot be listened on ({problem}): stop what uses it or give another --port.")


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
