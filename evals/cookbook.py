"""The cookbook's evaluations by SGLang's own test tools: `python -m sglang.test.run_eval` for GSM8K, GPQA and AIME25.

The tools run as child processes; their result file is read, never a score computed here. A request that failed is an
empty answer to them: it is counted here from what they print, so that a refusing server is not taken for a poor one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from client import Client, Misuse, ServerGone
from intervals import floor_for
from report import Row

CHILD = Path(__file__).with_name("cookbook_child.py")
LOAD_SECONDS = 600
THREADS = 64
QUICK_QUESTIONS = 200
THINKING_TOKENS = 131_072
"""Room for a reply with thinking; less where the server's context is shorter."""
PROMPT_TOKENS = 4096
"""Left for the prompt of a question of GPQA or AIME25; the longest has fewer."""


class Evaluation(NamedTuple):
    """One of SGLang's evaluations.

    `file` is where its questions lie below the folder of --data; `published` the Flash checkpoint's score.
    """

    name: str
    title: str
    file: str
    published: float
    thinking: bool


EVALUATIONS = {
    "gsm8k": Evaluation("gsm8k", "GSM8K, one-shot", "gsm8k.jsonl", 0.9613, False),
    "gpqa": Evaluation("gpqa", "GPQA diamond, thinking", "gpqa_diamond.csv", 0.881, True),
    "aime25": Evaluation("aime25", "AIME25, thinking", "opencompass/AIME2025", 0.95, True),
}


class Data(NamedTuple):
    """A loaded data set: how many questions it has, and its path where SGLang takes one."""

    questions: int
    path: Path | None


def load(names: Sequence[str], folder: Path | None) -> dict[str, Data]:
    """Load every data set named, so that a missing one is known before anything is asked.

    Raises:
        Misuse: one is neither below `folder` nor to be downloaded by SGLang.
    """
    paths = {name: None if folder is None else folder.resolve() / EVALUATIONS[name].file for name in names}
    missing = [f"{_short(name)} ({path} is not there)" for name, path in paths.items() if path and not path.exists()]
    found: dict[str, Data] = {}
    if names and not missing:
        with tempfile.TemporaryDirectory(prefix="accuracy-") as scratch:
            words = [f"{name}={path or ''}" for name, path in paths.items()]
            done = _child([str(CHILD), "load", *words], _place(scratch, paths.get("aime25")))
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Misuse(f"SGLang's test tools do not start ({reason[:200]}): run `make apply`.")
        for name, facts in json.loads(done.stdout.strip().splitlines()[-1]).items():
            if "error" in facts:
                how = f"{paths[name]} cannot be read" if paths[name] else "SGLang's own download failed"
                missing.append(f"{_short(name)} ({how}: {facts['error'][:160]})")
            else:
                found[name] = Data(facts["questions"], Path(facts["path"]) if facts["path"] else None)
    if missing:
        raise Misuse(
            f"No questions for {' and for '.join(missing)}: put them below the folder that --data names "
            f"({', '.join(EVALUATIONS[name].file for name in names)}), or choose other suites with --only."
        )
    return found


def _short(name: str) -> str:
    return EVALUATIONS[name].title.split(",")[0]


def _place(scratch: str, path: Path | None) -> str:
    """A working directory for a child: `datasets` finds a clone of AIME2025 by its name, relative to that."""
    if path is not None and path.name == "AIME2025":
        (Path(scratch) / "opencompass").symlink_to(path.parent)
    return scratch


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONWARNINGS": "ignore"}


def _child(words: Sequence[str], folder: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [sys.executable, *words], cwd=folder, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=LOAD_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"nothing after {LOAD_SECONDS} s")


def flags(client: Client, evaluation: Evaluation, examples: int | None) -> list[str]:
    """The flags of run_eval that make the published protocol, apart from where the questions are."""
    words = ["--base-url", client.url, "--model", client.model, "--num-threads", str(THREADS)]
    if examples is not None:
        words += ["--num-examples", str(examples)]
    if not evaluation.thinking:
        # As sglang.test.few_shot_gsm8k asks: no chat template, greedy, 512 tokens.
        return [*words, "--max-tokens", "512", "--temperature", "0"]
    room = THINKING_TOKENS
    if client.context is not None:
        room = min(room, client.context - PROMPT_TOKENS)
    sampling = ["--max-tokens", str(room), "--temperature", "1.0", "--top-p", "1.0"]
    return [*words, *sampling, "--reasoning-effort", "max", "--chat-template-kwargs", '{"thinking": true}']


def run(client: Client, name: str, data: Data, examples: int | None, floor: float | None = None) -> Row:
    """One evaluation, of the first `examples` questions or of all.

    Raises:
        ServerGone: SGLang's tool could not finish.
    """
    evaluation = EVALUATIONS[name]
    total = min(examples or data.questions, data.questions)
    row = Row(
        name,
        evaluation.title,
        floor=floor_for(evaluation.published, total) if floor is None else floor,
        published=evaluation.published,
    )
    if evaluation.thinking and client.context is not None and client.context < 4 * PROMPT_TOKENS:
        return replace(row, not_run=f"the server's context is {client.context} tokens, too few to think in")
    with tempfile.TemporaryDirectory(prefix="accuracy-") as scratch:
        words = flags(client, evaluation, examples and total)
        if name == "gpqa" and data.path is not None:
            words = [str(CHILD), "gpqa", str(data.path), *words]
        else:
            words = ["-m", "sglang.test.run_eval", "--eval-name", name, *words]
        if name == "gsm8k":
            words += ["--api", "completion", "--num-shots", "1", "--gsm8k-data-path", _with_shot(data, scratch)]
        # Its progress bar is on stderr, which stays the user's.
        done = subprocess.run(
            [sys.executable, *words], cwd=_place(scratch, data.path), env=_environment() | {"TMPDIR": scratch},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return _read(row, total, done)


def _with_shot(data: Data, scratch: str) -> str:
    """A copy of the questions with the first one before them as the shot, so that all are scored.

    So does sglang.test.few_shot_gsm8k; run_eval takes the shots out of what it scores.
    """
    assert data.path is not None
    lines = [line for line in data.path.read_text(encoding="utf-8").splitlines() if line.strip()]
    copy = Path(scratch) / "gsm8k.jsonl"
    copy.write_text("\n".join([lines[0], *lines]) + "\n", encoding="utf-8")
    return str(copy)


def _read(row: Row, total: int, done: subprocess.CompletedProcess[str]) -> Row:
    """The row with the score of SGLang's result file."""
    files = re.findall(r"^Writing results to (.+)$", done.stdout, re.MULTILINE)
    if done.returncode or not files:
        raise ServerGone(
            f"SGLang's run_eval did not finish {row.name} (exit code {done.returncode}, its messages are above): "
            "look at the server's log."
        )
    score = float(json.loads(Path(files[-1]).read_text())["score"])
    right = round(score * total)
    if abs(right - score * total) > 1e-3:
        raise ServerGone(f"SGLang's run_eval gives {row.name} {score}, which is no share of {total}: report it.")
    refused = re.findall(r"^(?:Bad Request Error|All retry attempts exhausted).*$", done.stdout, re.MULTILINE)
    wrong = [{"requests that failed": len(refused), "the first": refused[0]}] if refused else []
    return replace(row, right=right, total=total, wrong=wrong, detail={"failed_requests": len(refused)})
