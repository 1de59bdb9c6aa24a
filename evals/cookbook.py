"""The cookbook's evaluations by SGLang's own tools: `sglang.test.run_eval` for GSM8K, sgl-eval for GPQA and AIME25.

The tools run as child processes; their result file is read, never a score computed here. A request that failed is an
empty answer to them: it is counted here from what they tell, so that a refusing server is not taken for a poor one.
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
from importlib.util import find_spec
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


SGL_EVAL = "sgl-eval==0.1.3"
"""SGLang 0.5.23 names it for its tests; it is not in the lock."""


class Evaluation(NamedTuple):
    """One of SGLang's evaluations.

    `file` is where its questions lie below the folder of --data, None where the tool has them; `published` the Flash
    checkpoint's score. Those with thinking are sgl-eval's.
    """

    name: str
    title: str
    file: str | None
    published: float
    thinking: bool


EVALUATIONS = {
    "gsm8k": Evaluation("gsm8k", "GSM8K, one-shot", "gsm8k.jsonl", 0.9613, False),
    "gpqa": Evaluation("gpqa", "GPQA diamond, thinking", "gpqa_diamond.jsonl", 0.881, True),
    "aime25": Evaluation("aime25", "AIME25, thinking", None, 0.95, True),
}


class Data(NamedTuple):
    """A data set: how many questions it has, None where only the tool knows, and its path where there is a file."""

    questions: int | None
    path: Path | None


def has_sgl_eval() -> bool:
    """Whether SGLang's evaluation tool is installed."""
    return find_spec("sgl_eval") is not None


def load(names: Sequence[str], folder: Path | None) -> dict[str, Data]:
    """Find every data set named, so that a missing one is known before anything is asked.

    What is sgl-eval's own is fetched by it when its turn comes; without sgl-eval its questions are not looked for.

    Raises:
        Misuse: one is neither below `folder` nor to be downloaded by SGLang.
    """
    found = {name: Data(None, None) for name in names}
    missing = []
    for name in names:
        evaluation = EVALUATIONS[name]
        if folder is not None and evaluation.file and (not evaluation.thinking or has_sgl_eval()):
            path = folder.resolve() / evaluation.file
            found[name] = Data(None, path)
            if not path.exists():
                missing.append(f"{_short(name)} ({path} is not there)")
    if "gsm8k" in found and not missing:
        path = found["gsm8k"].path
        done = _child([str(CHILD), "load", str(path or "")])
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Misuse(f"SGLang's test tools do not start ({reason[:200]}): run `make apply`.")
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        if "error" in facts:
            how = f"{path} cannot be read" if path else "SGLang's own download failed"
            missing.append(f"{_short('gsm8k')} ({how}: {facts['error'][:160]})")
        else:
            found["gsm8k"] = Data(facts["questions"], Path(facts["path"]))
    if missing:
        files = ", ".join(file for name in names if (file := EVALUATIONS[name].file))
        raise Misuse(
            f"No questions for {' and for '.join(missing)}: put them below the folder that --data names "
            f"({files}), or choose other suites with --only."
        )
    return found


def _short(name: str) -> str:
    return EVALUATIONS[name].title.split(",")[0]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONWARNINGS": "ignore"}


def _child(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [sys.executable, *words], env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=LOAD_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"nothing after {LOAD_SECONDS} s")


def flags(client: Client, evaluation: Evaluation, examples: int | None) -> list[str]:
    """The flags of the evaluation's tool that make the published protocol, apart from where the questions are."""
    words = ["--model", client.model, "--num-threads", str(THREADS)]
    if examples is not None:
        words += ["--num-examples", str(examples)]
    if not evaluation.thinking:
        # As sglang.test.few_shot_gsm8k asks: no chat template, greedy, 512 tokens.
        return ["--base-url", client.url, *words, "--max-tokens", "512", "--temperature", "0"]
    room = THINKING_TOKENS
    if client.context is not None:
        room = min(room, client.context - PROMPT_TOKENS)
    sampling = ["--max-tokens", str(room), "--temperature", "1.0", "--top-p", "1.0", "--n-repeats", "1"]
    thinking = ["--reasoning-effort", "max", "--chat-template-kwarg", "thinking=true"]
    return ["--base-url", f"{client.url}/v1", *words, *sampling, *thinking]


def run(client: Client, name: str, data: Data, examples: int | None, floor: float | None = None) -> Row:
    """One evaluation, of the first `examples` questions or of all.

    Raises:
        ServerGone: SGLang's tool could not finish.
    """
    evaluation = EVALUATIONS[name]
    row = Row(name, evaluation.title, published=evaluation.published)
    if evaluation.thinking:
        if not has_sgl_eval():
            return replace(row, not_run=f"sgl-eval is not installed: pip install {SGL_EVAL}")
        if client.context is not None and client.context < 4 * PROMPT_TOKENS:
            return replace(row, not_run=f"the server's context is {client.context} tokens, too few to think in")
    with tempfile.TemporaryDirectory(prefix="accuracy-") as scratch:
        words = flags(client, evaluation, examples)
        if evaluation.thinking:
            words = [str(CHILD), "sgl-eval", name, *words, "--out-dir", scratch, "--no-dump-predictions"]
            if data.path is not None:
                words += ["--from-dataset", str(data.path)]
        else:
            words = ["-m", "sglang.test.run_eval", "--eval-name", name, *words]
            words += ["--api", "completion", "--num-shots", "1", "--gsm8k-data-path", _with_shot(data, scratch)]
        # Its progress bar is on stderr, which stays the user's.
        done = subprocess.run(
            [sys.executable, *words], cwd=scratch, env=_environment() | {"TMPDIR": scratch},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if evaluation.thinking:
            row = read_sgl_eval(row, done)
        else:
            assert data.questions is not None
            row = _read(row, min(examples or data.questions, data.questions), done)
    return replace(row, floor=floor_for(evaluation.published, row.total) if floor is None else floor)


def _with_shot(data: Data, scratch: str) -> str:
    """A copy of the questions with the first one before them as the shot, so that all are scored.

    So does sglang.test.few_shot_gsm8k; run_eval takes the shots out of what it scores.
    """
    assert data.path is not None
    lines = [line for line in data.path.read_text(encoding="utf-8").splitlines() if line.strip()]
    copy = Path(scratch) / "gsm8k.jsonl"
    copy.write_text("\n".join([lines[0], *lines]) + "\n", encoding="utf-8")
    return str(copy)


def read_sgl_eval(row: Row, done: subprocess.CompletedProcess[str]) -> Row:
    """The row with the score of sgl-eval's metrics.json, which its output names.

    Raises:
        ServerGone: it did not finish, or judged only a part.
    """
    files = re.findall(r"^Metrics: (.+)$", done.stdout, re.MULTILINE)
    if done.returncode or not files:
        raise ServerGone(
            f"sgl-eval did not finish {row.name} (exit code {done.returncode}, its messages are above): "
            "look at the server's log."
        )
    metrics = json.loads(Path(files[-1]).read_text())
    if metrics.get("partial"):
        raise ServerGone(f"sgl-eval judged only a part of {row.name}: start it again.")
    total, found = metrics["num_examples"], metrics["aggregate"]
    right, failed = _count(row, found["score"], total), round(found.get("error_rate", 0) * total)
    wrong = [{"requests that failed": failed}] if failed else []
    return replace(row, right=right, total=total, wrong=wrong, detail={"failed_requests": failed})


def _count(row: Row, score: float, total: int) -> int:
    right = round(score * total)
    if abs(right - score * total) > 1e-3:
        raise ServerGone(f"SGLang's tool gives {row.name} {score}, which is no share of {total}: report it.")
    return right


def _read(row: Row, total: int, done: subprocess.CompletedProcess[str]) -> Row:
    """The row with the score of run_eval's result file."""
    files = re.findall(r"^Writing results to (.+)$", done.stdout, re.MULTILINE)
    if done.returncode or not files:
        raise ServerGone(
            f"SGLang's run_eval did not finish {row.name} (exit code {done.returncode}, its messages are above): "
            "look at the server's log."
        )
    right = _count(row, float(json.loads(Path(files[-1]).read_text())["score"]), total)
    refused = re.findall(r"^(?:Bad Request Error|All retry attempts exhausted).*$", done.stdout, re.MULTILINE)
    wrong = [{"requests that failed": len(refused), "the first": refused[0]}] if refused else []
    return replace(row, right=right, total=total, wrong=wrong, detail={"failed_requests": len(refused)})
