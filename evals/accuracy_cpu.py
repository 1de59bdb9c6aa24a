"""`make accuracy-cpu`: the suite `synthetic` on the trained small checkpoint, served by SGLang on this machine's CPU.

python evals/accuracy_cpu.py PACKED QUESTIONS.jsonl [--short] [--longest TOKENS] [--mtp] [--out FILE.json]

Exit code as of `make accuracy`: 0 every score reached its floor · 1 one did not · 2 misuse, in one sentence.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "reference")]

import accuracy
from client import Client
from local_server import EAGLE, PLAIN, LocalServer, ServerError
from questions import masked_recall
from report import Row, exit_code, table
from sglang_sm120_reference.packed import unpack

SHORT = {"far recall": 4, "call": 0}
"""Questions of a task in the short form, the shortest; one of every other task. A call is 107 tokens one by one."""
FLAGS = ("--device", "cpu", "--tool-call-parser", "deepseekv4")
DRAFT_TOKENS = 4
MTP = (
    "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", str(DRAFT_TOKENS), "--decode-log-interval", "1",
)  # fmt: skip
"""SGLang counts accepted tokens when it logs: by default after 40 passes, which the last answers may not fill."""
READY_SECONDS = 600
"""Imports alone take minutes on two cores that others use too."""
CONCURRENCY = 1
"""Questions of one conversation follow each other, so that each finds its prefix in the cache."""


def shortest(lines: Sequence[str], longest: int) -> list[str]:
    """The lines of the short form whose prompts have up to `longest` tokens, in the order of the file."""
    by_task: dict[str, list[tuple[int, int]]] = {}
    for number, line in enumerate(lines):
        question = json.loads(line)
        if len(question.get("prompt", ())) <= longest:
            by_task.setdefault(question["task"], []).append((len(line), number))
    chosen = {n for task, found in by_task.items() for _, n in sorted(found)[: SHORT.get(task, 1)]}
    return [line for number, line in enumerate(lines) if number in chosen]


def judge(checkpoint: Path, questions: Path, out: Path, log: Path, mtp: bool = False) -> int:
    """Serve the checkpoint, ask, print the table; the harness's exit code.

    With mtp the server speculates, and how many tokens a verification gave in the mean is printed too.

    Raises:
        ServerError: the server does not start, is not served by the step, or does not speculate as it should.
    """
    with LocalServer(checkpoint, *FLAGS, *(MTP if mtp else ()), log=log, ready_seconds=READY_SECONDS) as server:
        words = ["--only=synthetic", f"--synthetic={questions}", f"--concurrency={CONCURRENCY}", f"--out={out}"]
        code = accuracy.main([server.url, *words])
        # What stopped the harness was said already.
        if code != 0:
            return code
        server.require_step(EAGLE if mtp else PLAIN)
        if mtp:
            accepted = Client(server.url).accept_length()
            if accepted is None:
                raise ServerError("The server was to speculate and tells of no acceptance length.")
            print(f"mean accepted length with MTP: {accepted:.2f} of {DRAFT_TOKENS} tokens a verification")
        return 0


def main(words: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="make accuracy-cpu", description="Scores of the small model on this CPU.")
    parser.add_argument("packed", type=Path, metavar="PACKED", help="the trained checkpoint in one file")
    parser.add_argument("questions", type=Path, metavar="QUESTIONS.jsonl", help="as evals/questions.py writes")
    parser.add_argument("--short", action="store_true", help="the shortest questions, no oracle")
    parser.add_argument("--longest", type=int, metavar="TOKENS", help="with --short: of prompts up to so long")
    parser.add_argument("--mtp", action="store_true", help="with speculation by the checkpoint's MTP layer")
    parser.add_argument("--out", type=Path, default=Path("accuracy.json"), metavar="FILE.json",
                        help="result (default: %(default)s)")  # fmt: skip
    arguments = parser.parse_args(words)
    if arguments.longest is not None and not arguments.short:
        parser.error("--longest chooses among the questions of --short: add that")
    with tempfile.TemporaryDirectory(prefix="sglang-sm120-accuracy-") as scratch:
        checkpoint, log = Path(scratch) / "DeepSeek-V4-small", Path(scratch) / "server.log"
        try:
            questions, lines = arguments.questions, arguments.questions.read_text(encoding="utf-8").splitlines()
            if arguments.short:
                chosen = shortest(lines, sys.maxsize if arguments.longest is None else arguments.longest)
                questions = Path(scratch) / "short.jsonl"
                questions.write_text("".join(line + "\n" for line in chosen), encoding="utf-8")
            unpack(arguments.packed, checkpoint)
        except (OSError, ValueError) as error:
            print(f"make accuracy-cpu: {error}", file=sys.stderr)
            return 2
        rows: list[Row] = [] if arguments.short else [masked_recall(checkpoint)]
        try:
            code = judge(checkpoint, questions, arguments.out, log, arguments.mtp)
        except ServerError as error:
            print(f"make accuracy-cpu: {error}", file=sys.stderr)
            return 1
    if rows:
        print(f"\nwithout a server:\n{table(rows)}")
    return code or (exit_code(rows) if rows else 0)


if __name__ == "__main__":
    sys.exit(main())
