"""The part of `sglang-sm120 prove` that needs a clone: servers, one after another, and what each gave.

`python bench/proof.py --scratch DIR [--seconds N] [SERVER …]` says what it finds as JSON objects, one a line, as
`sglang_sm120.parity` does: first the servers, or that there is none; then each one's name and why it is not run, and
its figures, in the form of docs/prove.md.

`model` is Flash at full width with random weights and as many experts as the plans of all its servers find room for,
set as `sglang-sm120 plan` sets it; `recall` is the trained small checkpoint, prefilled by the step. What differs stands
behind a comma. On SM12x the prefill of `model` is SGLang's own; on a Hopper card (SGLANG_SM120_FORCE=1) it is the
step's, and SGLang's own is that of a server without the step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("evals", "reference")]

import httpx

import questions
import recall
import sm120_lowering
from client import Misuse, ServerGone
from decode_step import step_ms, write_model
from local_server import LocalServer, ServerError
from sglang_sm120 import ops, registry
from sglang_sm120.limits import SM12X
from sglang_sm120_launch import predict, proved, request, tuned
from sglang_sm120_launch.commands.doctor import visible
from sglang_sm120_launch.commands.serve import prebuild
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.machine import Machine
from sglang_sm120_launch.plan import Plan, make_plan
from sglang_sm120_reference.packed import unpack
from streamed import ask, drawn, speculation

CONTEXT = 1024
"""Tokens of context of a decode step: the prediction leaves out what reading more takes."""
PREFILL = (1024, *tuned.CHUNKS, 32_768)
"""Tokens of the prompts: the next to the last are one chunk each, the last several of the longest."""
EXPERTS = (256, 128, 64, 32, 16, 8)
FLAGS = (
    "--load-format", "dummy", "--context-length", str(max(PREFILL) + 1024), "--max-running-requests",
    str(max(predict.TOLD)), "--cuda-graph-bs-decode", *map(str, predict.TOLD), "--chunked-prefill-size",
    str(max(tuned.CHUNKS)),
)  # fmt: skip
OVERLAY, MXFP8 = tuned.PREFILLS["overlay"], tuned.PREFILLS["mxfp8"]
DROPPED = ("SGLANG_SM120", *tuned.VARIABLES, *request.KEYS)
"""The user's own values of what the servers are told here, and keys, which no request here has."""
SERVER_SECONDS = 1800
"""A server that takes longer, with what is asked of it, hangs."""
READY_SECONDS = SERVER_SECONDS + 60
"""Later than that, so that one limit is met alone."""
BUILD_SECONDS = 3600
"""For the modules of a first start."""
SHORTEST = 20
"""Seconds in which a server can give something."""


@dataclass(frozen=True)
class Served:
    """How a server differs from the first of its model, and on which cards it is one of them."""

    env: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    small: bool = False
    decodes: bool = False
    needs: str = ""


SERVERS = {
    "model": Served(decodes=True),
    "recall": Served(OVERLAY, small=True),
    "recall, EAGLE": Served(OVERLAY, speculation(3), small=True),
    "recall, prefill=sglang": Served(small=True, needs="SM12x"),
    "recall, prefill=mxfp8": Served(MXFP8, small=True, needs="SM12x"),
    # Decode once more, for where SGLang's own prefill fails.
    "model, prefill=overlay": Served(OVERLAY, decodes=True, needs="SM12x"),
    "model, prefill=mxfp8": Served(MXFP8, needs="SM12x"),
    "model, prefill=sglang": Served(
        {"SGLANG_SM120": "0", "SGLANG_SM120_FORCE": "0", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"},
        ("--moe-runner-backend", "marlin"), needs="Hopper",
    ),
}  # fmt: skip


class Late(RuntimeError):
    """The time of a server is up."""


def say(**found: Any) -> None:
    # On a line of its own, whatever a library may have left on the last.
    print(f"\n{json.dumps(found)}", flush=True)


def point(
    what: str, value: float, unit: str, *, requests: int | None = None, tokens: int | None = None,
    of: int | None = None, predicted: float | None = None, problem: str | None = None,
) -> None:  # fmt: skip
    """Say a figure of the server that was named last.

    Raises:
        ValueError: it is no finite number.
    """
    if not math.isfinite(value):
        raise ValueError(f"{what} gave {value} {unit}, needed a finite number")
    sizes = {"requests": requests, "tokens": tokens, "of": of}
    figures = {"value": round(value, 3), "unit": unit, "predicted": predicted and round(predicted, 3)}
    say(what=what, **figures, **sizes, problem=problem)


class Kit:
    """What the servers are made from, in a folder that somebody else removes."""

    def __init__(self, scratch: Path, machine: Machine) -> None:
        self._scratch, self._machine = scratch, machine
        self.sm = machine.gpus[0].sm
        self._plans: dict[str, Plan] = {}
        # A server ends with the thread that started it.
        self._pool = ThreadPoolExecutor(2)
        self._started: dict[str, tuple[LocalServer, Future[LocalServer]]] = {}
        self._packed: Path | None = None
        self._questions: Path | None = None
        self.experts = 0
        self.predicted: dict[int, float] = {}

    def names(self) -> list[str]:
        """The servers of this card."""
        return [name for name, served in SERVERS.items() if served.needs != "Hopper" or self.sm not in SM12X]

    def why_not(self, name: str) -> str | None:
        """Why a server is not run here, or None."""
        if self.sm not in SM12X and not registry.forced():
            return f"sm{self.sm} is none of SM12x: with SGLANG_SM120_FORCE=1 the step serves there, for tests"
        served = SERVERS[name]
        if served.needs == "SM12x" and self.sm not in SM12X:
            return "needs SM12x: on another card the step takes every pass"
        if name.endswith("=mxfp8"):
            kinds = (registry.ops()[op].providers[provider] for op, provider in map(ops.named, ops.with_own()))
            return next(filter(None, (registry.refusal(one, f"sm{self.sm}") for one in kinds)), None)
        return None

    def plan(self, name: str) -> Plan:
        """What `sglang-sm120 plan` sets for a server of `model`.

        Raises:
            LaunchError: fewer experts do not help.
        """
        wanted = [one for one in self.names() if not SERVERS[one].small and self.why_not(one) is None]
        for experts in () if self._plans else EXPERTS:
            write_model(self._scratch / f"model-{experts}", experts)
            try:
                self._plans = {one: self._planned(one, experts) for one in wanted}
            except LaunchError:
                if experts == EXPERTS[-1]:
                    raise
            else:
                self.experts = experts
                break
        return self._plans[name]

    def _planned(self, name: str, experts: int) -> Plan:
        served, folder = SERVERS[name], self._scratch / f"model-{experts}"
        parser = argparse.ArgumentParser()
        request.configure(parser)
        words = parser.parse_args(["--model", str(folder), "--", *FLAGS, *served.flags])
        wanted = request.read(words, os.environ | served.env)
        plan = wanted.check(make_plan(wanted.machine, wanted.model, replace(wanted.request, measured={})))
        if served.decodes and plan.prediction is not None:
            tp = plan.value("tp-size")
            by = predict.way(plan.settings, tp) if isinstance(tp, int) else None
            # As in the plan, the poorest of cards that are nearly alike.
            card = min(self._machine.gpus, key=lambda gpu: gpu.memory_mib)
            assert isinstance(tp, int) and by is not None, "a plan that predicts knows how its ranks sum"
            self.predicted = predict.step_ms(wanted.model, card.name, tp, by)
        return plan

    def log(self, name: str) -> Path:
        """The log of a server."""
        return self._scratch / proved.log_name(name)

    def start(self, name: str) -> tuple[LocalServer, Future[LocalServer]]:
        """A server that is started in the background, or was before, and what comes when it is ready."""
        if name not in self._started:
            server = self._server(name)
            self._started[name] = server, self._pool.submit(server.__enter__)
        return self._started[name]

    def is_started(self, name: str) -> bool:
        """Whether a server runs, or is to."""
        return name in self._started

    def stop(self, name: str) -> None:
        """Stop a server; returns when all of it is gone."""
        # It is forgotten last: a signal inside leaves it to `close`.
        self._started[name][0].stop()
        del self._started[name]

    def close(self) -> None:
        """Stop what still runs."""
        for name in list(self._started):
            self.stop(name)
        self._pool.shutdown()

    def about(self, name: str) -> str:
        """What a server serves, in words."""
        if SERVERS[name].small:
            return "trained, 10 MB, TP 1"
        plan = self.plan(name)
        return f"{self.experts} experts a layer, random weights, TP {plan.value('tp-size')}"

    def _server(self, name: str) -> LocalServer:
        served, log = SERVERS[name], self.log(name)
        if served.small:
            self._packed = self._packed or unpack(recall.PACKED, self._scratch / "DeepSeek-V4-small")
            hopper = self.sm not in SM12X
            flags = (*recall.FLAGS, *(sm120_lowering.SERVER_FLAGS if hopper else ()), *served.flags)
            if "SGLANG_SM120_PREFILL" in served.env and not hopper:
                flags += ("--disable-prefill-cuda-graph",)
            env = {**(sm120_lowering.SERVER_ENVIRONMENT if hopper else {}), **served.env}
            return LocalServer(self._packed, *flags, log=log, env=env, ready_seconds=READY_SECONDS)
        plan = self.plan(name)
        weights = str(Path(__file__).parent / "random_weights")
        path = os.pathsep.join(filter(None, (weights, os.environ.get("PYTHONPATH"))))
        env = {**served.env, **plan.environment(), "PYTHONPATH": path}
        folder = self._scratch / f"model-{self.experts}"
        return LocalServer(folder, *plan.arguments(), log=log, env=env, ready_seconds=READY_SECONDS)

    def asked(self) -> Path:
        """The recall questions of a GPU."""
        if self._questions is None:
            self._questions = self._scratch / "questions.jsonl"
            questions.write(self._questions, *recall.many_questions())
        return self._questions


def modes(log: Path) -> list[str]:
    """Of which modes the step took passes, by a server's log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return sorted(set(re.findall(r"sglang_sm120: the step takes its first (\w+) pass", text)))


def measure(url: str, name: str, kit: Kit) -> None:
    """Say what a server gives."""
    served, rng = SERVERS[name], random.Random(0)
    if served.small:
        rows, accepted = recall.scores(url, recall.EXACT, kit.asked())
        for row in rows:
            task, _, width = row.name.rpartition(" x")
            problem = None if row.verdict == "pass" else f"needed {row.floor:.1%}"
            point(f"recall: {task}", row.right, "answers", requests=int(width), of=row.total, problem=problem)
        if accepted is not None:
            point("accepted", accepted, "tokens")
        return
    ask(url, [drawn(CONTEXT, rng)], 8)
    for requests in predict.TOLD if served.decodes else ():
        ms = step_ms(url, requests, CONTEXT, rng)
        point("decode", ms, "ms", requests=requests, tokens=CONTEXT, predicted=kit.predicted.get(requests))
    for length in PREFILL:
        # The first one may compile kernels of its length. One short prompt's time differs much from the next one's.
        _, *times = (ask(url, [drawn(length, rng)], 1)[0][0].seconds for _ in range(2 if length >= proved.LONG else 4))
        point("prefill", length / statistics.median(times), "tokens/s", tokens=length)


def why_ended(error: Exception, log: Path) -> str:
    """An error in a sentence, with the first one that the server's log names: SGLang's processes repeat others'."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)][:1]
    if isinstance(error, ServerError):
        return f"{str(error).splitlines()[0]} {(named or lines[-1:] or ['nothing'])[0]}"[:400]
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    return f"{said}; its log: {named[0]}"[:800] if named else said


@contextlib.contextmanager
def limited(seconds: float, stop: Callable[[], None]) -> Iterator[None]:
    """Inside, for so long; then `stop` is called first, since who waits for a server waits until it is gone.

    Raises:
        Late: the time is up.
    """

    def late(number: int, frame: FrameType | None) -> None:
        stop()
        raise Late

    signal.signal(signal.SIGALRM, late)
    signal.alarm(max(1, round(seconds)))
    try:
        yield
    finally:
        signal.alarm(0)


def run(name: str, kit: Kit, seconds: float, then: str | None) -> None:
    """Serve for so long at most, and say what came of it; `then` is started when it is ready.

    Raises:
        Late: the time is up.
    """
    say(about=kit.about(name))
    began, is_ahead = time.monotonic(), kit.is_started(name)
    say(doing=f"{kit.about(name)}; a server {'is started already' if is_ahead else 'starts'}, which may take minutes")
    server, started = kit.start(name)
    try:
        with limited(seconds, server.stop):
            started.result()
            if not is_ahead:
                point("ready", time.monotonic() - began, "s")
            if then is not None:
                kit.start(then)
            measure(server.url, name, kit)
    finally:
        kit.stop(name)
        say(modes=modes(kit.log(name)))


def serve(names: Sequence[str], kit: Kit, deadline: float) -> None:
    """Run the servers that are named."""
    slow = None
    for number, name in enumerate(names):
        left = deadline - time.monotonic()
        why = kit.why_not(name)
        if why is None and left < SHORTEST:
            why = "the time of --seconds was up"
        if why is None and not SERVERS[name].small:
            why = slow
        say(server=name, not_run=why, about=None, modes=[])
        if why is not None:
            continue
        # Recall is not timed: the next small model may start beside it.
        beside = [one for one in names[number + 1 :][:1] if SERVERS[name].small and SERVERS[one].small]
        then = next((one for one in beside if kit.why_not(one) is None), None)
        try:
            run(name, kit, min(left, SERVER_SECONDS), then)
        except Late:
            if left < SERVER_SECONDS:
                say(not_run="the time of --seconds was up before its end")
            else:
                took = f"took more than {SERVER_SECONDS} s"
                say(ended=why_ended(TimeoutError(f"it {took}"), kit.log(name)))
                slow = slow if SERVERS[name].small else f"{name} {took}"
        except (ServerError, LaunchError, Misuse, ServerGone, RuntimeError, ValueError, OSError, httpx.HTTPError) as e:
            say(ended=why_ended(e, kit.log(name)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", metavar="SERVER", help="default: all of this card")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no server runs longer than that from now")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    # An exception, unlike the signal itself, stops the server on its way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for name in DROPPED:
        os.environ.pop(name, None)
    machine = visible(Machine.detect(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not machine.gpus:
        say(none="NVML sees no GPU, needed one")
        return 0
    kit = Kit(arguments.scratch, machine)
    names = arguments.servers or kit.names()
    say(servers=names)
    try:
        with contextlib.suppress(Late), limited(min(arguments.seconds, BUILD_SECONDS), lambda: None):
            say(doing="SGLang's modules are built where they are not, which takes many minutes at a first start")
            prebuild({}, kit.sm)
        serve(names, kit, deadline)
    finally:
        kit.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
