"""`make soak`: the trained small model under the launcher on this machine, CPU or GPU, and everything at once.

python evals/soak.py PACKED [--seconds S] [--requests N] [--eagle] [--out DIR] [--seed N]

The server is asked `soak_load`'s greedy prompts alone, then sixteen requests at a time; beside it, two more servers of
the launcher lose a process: one is frozen, one is killed. At the end nothing may be left of any request.

Exit code: 0 all was well · 1 an answer was wrong or lost, something was left, or a server stopped · 2 misuse.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("bench", "reference")]

import httpx
import psutil
import torch

import side_by_side
import sm120_lowering
from local_server import EAGLE, PLAIN, LocalServer, ServerError
from sglang_sm120_reference.packed import unpack
from soak_load import (
    AT_ONCE,
    ENDS,
    KINDS,
    LONG,
    MIN_WITHIN,
    NEW,
    TIMEOUT_S,
    TOLERANCE,
    Answer,
    Ask,
    Figures,
    Load,
    questions,
    send,
)

ROOT = Path(__file__).parents[1]
FLAGS = ("--context-length", str(LONG + 1024), "--max-running-requests", str(AT_ONCE), "--enable-metrics")
CPU_FLAGS = ("--device", "cpu", "--max-total-tokens", "65536")
"""Three of the longest prompts: pages are taken from each other all the time."""
GPU_FLAGS = ("--mem-fraction-static", "0.5", "--max-total-tokens", "400000")
"""Three servers fit a card."""
CPU_SECONDS, GPU_SECONDS, GPU_REQUESTS = 600, 480, 10_000
READY_SECONDS = 900
"""Three servers start one after the other, on two cores that others use too."""
STALL_SECONDS = 60
"""An idle server beside a busy one, on the same cores, still makes a token in that time."""
END_SECONDS = STALL_SECONDS + 90
"""And the launcher has printed all stacks and stopped its server."""
IDLE_SECONDS = 90
"""SGLang publishes its counters every 30 s while it is idle."""
DRAIN_SECONDS = 60
NOT_USED = ("num_running_reqs", "num_queue_reqs", "num_grammar_queue_reqs", "kv_used_tokens", "swa_used_tokens")
POOLS = {"kv": "max_total_num_tokens", "swa": "max_total_num_tokens_swa"}
LOOK_SECONDS = 2.0
WARM = 0.25
"""Share of the load after which memory is expected to be flat."""
GROWTH = 0.04
"""By how much what stays may grow from then: on a CPU it differed by 3 % from fifth to fifth without a trend, while
activations came and went by 10 %."""


def launcher(checkpoint: Path) -> tuple[str, ...]:
    """What Python runs; SGLang's flags follow."""
    words = ("serve", "--model", str(checkpoint), "--watch", "--stall-limit", str(STALL_SECONDS), "--")
    return ("-m", "sglang_sm120_launch", *words)


def flags(eagle: bool) -> tuple[str, ...]:
    """SGLang's, for this machine."""
    speculation = side_by_side.EAGLE if eagle else ()
    if not torch.cuda.is_available():
        return (*FLAGS, *CPU_FLAGS, *speculation)
    # Marlin, which SGLang's draft has on a Hopper card, refuses so narrow a layer: there the step drafts too.
    lowered = ["triton" if word == "marlin" else word for word in sm120_lowering.SERVER_FLAGS]
    return (*FLAGS, *GPU_FLAGS, "--tp", "1", *(lowered if _is_hopper() else ()), *speculation)


def environment() -> dict[str, str]:
    """The servers', beside this process's own."""
    found = {"HF_HUB_OFFLINE": "1", "FLASHINFER_DISABLE_VERSION_CHECK": "1"}
    path = [str(ROOT / "launch"), os.environ.get("PYTHONPATH", "")]
    if _is_hopper():
        found |= sm120_lowering.SERVER_ENVIRONMENT
        path.insert(0, str(ROOT / "bench" / "lowered_children"))
    # Pages are counted against the pools after every pass; SGLang itself does so only while it is idle.
    return found | {"PYTHONPATH": os.pathsep.join(path), "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}


def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@dataclass
class Neighbour:
    """A server of the launcher that loses its scheduler when the load is over to the share `at`.

    harm: what happens to it, "frozen" or "killed".
    """

    server: LocalServer
    harm: str
    at: float
    tree: list[psutil.Process] = field(default_factory=list)

    def look(self, share: float) -> None:
        """Do the harm when it is time."""
        if self.tree or share < self.at or not self.server.alive():
            return
        self.tree = psutil.Process(self.server.pid).children(recursive=True)
        [scheduler] = [each for each in self.tree if " ".join(each.cmdline()).startswith("sglang::scheduler")]
        scheduler.send_signal(signal.SIGSTOP if self.harm == "frozen" else signal.SIGKILL)

    def problem(self, seconds: float = END_SECONDS) -> str | None:
        """Why the launcher did not do as it should within so many more, None when it did: end with status 1 and a
        sentence, and leave no process."""
        if not self.tree:
            return f"the server that was to be {self.harm} had ended before:\n{self.server.log_tail(10)}"
        try:
            status = self.server.wait(seconds)
        except ServerError as error:
            return f"{self.harm}: {error}"
        left = psutil.wait_procs(self.tree, timeout=1)[1]
        said = f"has made no token for|{ENDED}" if self.harm == "frozen" else ENDED
        if status == 1 and not left and re.search(said, self.server.log.read_text(errors="replace")):
            return None
        tail = self.server.log_tail(10)
        return f"{self.harm}: the launcher ended with {status}, left {len(left)} processes, and says:\n{tail}"


ENDED = r"sglang-sm120: (The server ended with status|Process \d+ of the server has ended)"


@dataclass
class Memory:
    """Bytes that the server's processes have, and that its GPU has given away, by share of the load."""

    host: list[tuple[float, int]] = field(default_factory=list)
    gpu: list[tuple[float, int]] = field(default_factory=list)

    def look(self, pid: int, share: float, is_alone: bool) -> None:
        """Take note; of the GPU only while no other server of ours is there."""
        total = 0
        for process in psutil.Process(pid).children(recursive=True):
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        self.host.append((share, total))
        if is_alone and torch.cuda.is_available():
            free, capacity = torch.cuda.mem_get_info()
            self.gpu.append((share, capacity - free))

    def ends(self, seen: Sequence[tuple[float, int]]) -> tuple[float, float] | None:
        """MiB after the warm-up and at the end, each the least of a fifth: what stays when the activations of no prompt
        are there. None where too little was seen."""
        warm = [value / 2**20 for share, value in seen if share >= WARM]
        part = len(warm) // 5
        return (min(warm[:part]), min(warm[-part:])) if part else None

    def problems(self) -> list[str]:
        """A line for what grew."""
        found = []
        for name, seen in [("host", self.host), *([("GPU", self.gpu)] if torch.cuda.is_available() else [])]:
            ends = self.ends(seen)
            if ends is None:
                found.append(f"memory of the {name} was seen {len(seen)} times, needed more: let the soak run longer")
            elif ends[1] > ends[0] * (1 + GROWTH):
                found.append(f"memory of the {name} grew from {ends[0]:.0f} to {ends[1]:.0f} MiB")
        return found


def gauges(page: str) -> dict[str, float]:
    """SGLang's own counters on a /metrics page, those of several ranks added up."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^sglang:(\w+)(?:\{[^}]*\})? (\S+)$", page, re.M):
        found[name] = found.get(name, 0) + float(value)
    return found


def left_over(found: Mapping[str, float]) -> list[str]:
    """What SGLang's counters of an idle server say is still held; pages that the prefix cache could give are not."""
    left = [f"{name} is {found[name]:.0f}" for name in NOT_USED if found[name]]
    for pool, size in POOLS.items():
        free, cached = found[f"{pool}_available_tokens"], found[f"{pool}_evictable_tokens"]
        if free + cached != found[size]:
            left.append(f"{free:.0f} tokens of {size} {found[size]:.0f} are free and {cached:.0f} cached")
    return left


def left_when_idle(url: str, seconds: float = IDLE_SECONDS) -> list[str]:
    """As `left_over`, once the server is idle or `seconds` are over; then the cache must give back all it holds."""
    deadline = time.monotonic() + seconds
    while True:
        left = left_over(gauges(httpx.get(f"{url}/metrics", timeout=60).text))
        if not left or time.monotonic() > deadline:
            break
        time.sleep(LOOK_SECONDS)
    flushed = httpx.post(f"{url}/flush_cache", params={"timeout": 30}, timeout=60)
    return left if flushed.status_code == 200 else [*left, flushed.text.strip()]


def ask_alone(url: str, known: Sequence[tuple[int, ...]]) -> list[Answer]:
    """The server's answers to the greedy prompts with nothing else to do and, at first, an empty prefix cache."""
    httpx.post(f"{url}/flush_cache", params={"timeout": 30}, timeout=60).raise_for_status()
    with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
        return [send(client, url, Ask("greedy", "whole", prompt, NEW, False)) for prompt in known]


def log_problems(text: str) -> list[str]:
    """Lines of a server's log that must not be there, and the requests that its HTTP process still had at the end."""
    bad = [line for line in text.splitlines() if "Traceback (most recent call last)" in line or "memory leak" in line]
    found = [f"the log says {line[:200]!r}" for line in bad[:5]]
    remaining = re.findall(r"Remaining number of requests (\d+)", text)
    if remaining[-1:] != ["0"] or len(remaining) > 1:
        found.append(f"told to end, the server had {' then '.join(remaining) or 'no word of its'} requests left")
    return found


def table(figures: Figures, memory: Memory, problems: Sequence[str]) -> str:
    """What was asked, and what came of it."""
    lines = [f"{'requests':12s}" + "".join(f"{end:>14s}" for end in (*ENDS, "all"))]
    for kind in KINDS:
        counts = [figures.sent[kind, end] for end in ENDS]
        lines.append(f"{kind:12s}" + "".join(f"{count:14,d}" for count in (*counts, sum(counts))))
    counts = [sum(figures.sent[kind, end] for kind in KINDS) for end in ENDS]
    lines.append(f"{'all':12s}" + "".join(f"{count:14,d}" for count in (*counts, sum(counts))))
    lines += [
        f"{figures.seconds:.0f} s; prompts {figures.prompt_tokens:,} tokens, {figures.cached_tokens:,} of them cached "
        f"({figures.hits} hits, as answers told); {figures.long} prompts of {LONG:,}; answers {figures.new_tokens:,}",
        f"greedy: {figures.near:,} of {figures.compared:,} log-probabilities within {TOLERANCE} of the quiet server's",
        f"wrong {len(figures.wrong)}, lost {len(figures.lost)}",
    ]  # fmt: skip
    for name, seen in (("host", memory.host), ("GPU", memory.gpu)):
        if ends := memory.ends(seen):
            lines.append(f"memory of the {name}: {ends[0]:.0f} MiB after the warm-up, {ends[1]:.0f} at the end")
    lines += [f"PROBLEM: {one}" for one in problems] or ["nothing was left over; both neighbours' ends were noticed"]
    return "\n".join(lines)


def under_load(server: LocalServer, load: Load, neighbours: Sequence[Neighbour], memory: Memory) -> None:
    """Run the load and do the harm beside it."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        workers = [pool.submit(load.work) for _ in range(AT_ONCE)]
        while not all(worker.done() for worker in workers):
            for each in neighbours:
                each.look(load.share())
            if server.alive():
                memory.look(server.pid, load.share(), not any(each.server.alive() for each in neighbours))
            time.sleep(LOOK_SECONDS)
        for worker in workers:
            worker.result()
    finally:
        # Told to end, do not wait for answers: the servers are stopped next.
        load.stop()
        pool.shutdown(wait=False)


def at_the_end(
    server: LocalServer, known: Sequence[tuple[int, ...]], quiet: Sequence[Answer], eagle: bool
) -> list[str]:
    """What is wrong with the soaked server when the load is over; it is told to end."""
    found: list[str] = []
    try:
        if not server.alive():
            return [f"the server stopped; {server.log} ends in:\n{server.log_tail()}"]
        found += left_when_idle(server.url)
        again = ask_alone(server.url, known)
        # SGLang does not drain when its last health check was too slow, as behind a prompt of 20,000 tokens.
        httpx.get(f"{server.url}/health_generate", timeout=60).raise_for_status()
    except httpx.HTTPError as error:
        return [*found, f"the server answers no more ({error!r}); {server.log} ends in:\n{server.log_tail()}"]
    found += [
        f"alone again, prompt {number} is answered otherwise"
        for number, (before, after) in enumerate(zip(quiet, again, strict=True))
        if before.tokens != after.tokens
    ]
    server.stop(DRAIN_SECONDS)
    text = server.log.read_text(errors="replace")
    if torch.cuda.is_available():
        mode = "target_verify" if eagle else "decode"
        if f"the step takes its first {mode} pass" not in text:
            found.append(f"the step of sglang_sm120 took no {mode} pass: {server.log} says why")
    else:
        try:
            server.require_step(EAGLE if eagle else PLAIN)
        except ServerError as error:
            found.append(str(error))
    return found + log_problems(text)


def soak(checkpoint: Path, out: Path, seconds: float, requests: float, eagle: bool, seed: int) -> int:
    """Serve, load, judge, print; the exit code.

    Raises:
        ServerError: a server did not start.
        httpx.HTTPError: the soaked one did not answer the first requests.
    """
    rng, memory, problems = random.Random(seed), Memory(), list[str]()
    known = questions(rng)
    words, env, run = flags(eagle), environment(), launcher(checkpoint)

    def serve(name: str) -> LocalServer:
        # One after the other, and before there are threads: they are forked.
        log = out / f"{name}.log"
        began = time.monotonic()
        server = stack.enter_context(
            LocalServer(checkpoint, *words, log=log, launcher=run, env=env, ready_seconds=READY_SECONDS)
        )
        print(f"{name} server ready after {time.monotonic() - began:.0f} s, log {log}", flush=True)
        return server

    with ExitStack() as stack:
        server = serve("soaked")
        neighbours = [Neighbour(serve(harm), harm, at) for harm, at in (("frozen", 0.05), ("killed", 0.15))]
        quiet = ask_alone(server.url, known)
        print(f"{len(known)} greedy prompts answered alone", flush=True)
        load = Load(server.url, known, quiet, seconds, requests, rng, server.alive)
        under_load(server, load, neighbours, memory)
        figures = load.figures
        problems += figures.wrong + figures.lost
        if figures.near < MIN_WITHIN * figures.compared:
            problems.append(f"{figures.near} of {figures.compared} log-probabilities are within {TOLERANCE}")
        problems += [found for each in neighbours if (found := each.problem())]
        problems += at_the_end(server, known, quiet, eagle)
        problems += memory.problems()
    told = {"seconds": figures.seconds, "sent": {" ".join(key): n for key, n in figures.sent.items()}}
    told |= {name: value for name, value in vars(figures).items() if name not in told}
    told |= {"host": memory.host, "gpu": memory.gpu, "eagle": eagle, "seed": seed, "problems": problems}
    (out / "soak.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(table(figures, memory, problems))
    return 1 if problems else 0


def main(words: Sequence[str] | None = None) -> int:
    """Command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="make soak", description="The small model under load, on this machine.")
    parser.add_argument("packed", type=Path, metavar="PACKED", help="the trained checkpoint in one file")
    parser.add_argument("--seconds", type=float, default=GPU_SECONDS if on_gpu else CPU_SECONDS,
                        help="how long requests are sent (default on this machine: %(default)s)")  # fmt: skip
    parser.add_argument("--requests", type=int, default=GPU_REQUESTS if on_gpu else sys.maxsize,
                        help="and how many at most (default: 10,000 on a GPU)")  # fmt: skip
    parser.add_argument("--eagle", action="store_true", help="with speculation by the checkpoint's MTP layer")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("soak-logs"), metavar="DIR",
                        help="the servers' logs and soak.json (default: %(default)s)")  # fmt: skip
    arguments = parser.parse_args(words)
    for name in ("seconds", "requests"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name} is {getattr(arguments, name)}, needed more than 0")
    # An exception, unlike the signal itself, stops the servers on its way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="sglang-sm120-soak-") as scratch:
        checkpoint = Path(scratch) / "DeepSeek-V4-small"
        try:
            unpack(arguments.packed, checkpoint)
            arguments.out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            print(f"make soak: {error}", file=sys.stderr)
            return 2
        try:
            return soak(checkpoint, arguments.out, arguments.seconds, arguments.requests, arguments.eagle,
                        arguments.seed)  # fmt: skip
        except (ServerError, httpx.HTTPError) as error:
            print(f"make soak: {error}; the servers' logs are in {arguments.out}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
