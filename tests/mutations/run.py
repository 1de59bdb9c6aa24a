"""Make every mutation in a copy of the source, run the tests that may notice, and write `docs/mutations.md`.

    python tests/mutations/run.py [--only TEXT] [--jobs 2] [--minutes N] [--checkpoint PATH --questions FILE]

Exits 1 when a mutation is noticed by nothing or was not run, or a defect is made in the oracle alone. What is known is
kept in `build/mutations.json` until the source or the tests change, so that an interrupted run goes on; `--minutes`
ends one early, with a page that names what was not run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("tests", "overlay", "reference", "evals")]

from mutations.mutation import PACKAGES, ROOT, Mutation, Tests, mutate
from mutations.page import Row, only_in_the_oracle, page
from mutations.score import Score
from mutations.sites import mutations

from sglang_sm120_reference.packed import unpack

PAGE = ROOT / "docs/mutations.md"
KNOWN = ROOT / "build/mutations.json"
PACKED = ROOT / "evals/small-deepseek-v4.xz"
QUESTIONS = ROOT / "evals/questions-cpu.jsonl"
LIMIT = 1800
"""Seconds for one mutant: a defect may also be a loop that does not end."""

# Runs a module with the mutated packages, and nothing when others are found first: imported here, they stay, whatever
# pytest puts before them on the path. A core of it would be gigabytes.
_CHILD = """
import importlib, resource, runpy, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sources, packages, *sys.argv = sys.argv[1:]
for name in packages.split():
    file = importlib.import_module(name).__file__
    if Path(sources) not in Path(file).parents:
        sys.exit(f"{file} was imported, needed the one in {sources}.")
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_OUTCOME = re.compile(r"^(tests/\S+?\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


class Unusable(RuntimeError):
    """A run that says nothing: the tests could not be collected, or fail without a mutation."""


class Unfinished(RuntimeError):
    """Time is over; what is known is kept."""


class Outcome(NamedTuple):
    """failed: node ids in order; died: the process ended in the last of them; stopped: others might have failed too."""

    failed: list[str]
    ran: int
    died: bool
    stopped: bool


def copied(checkout: Path, to: Path) -> Path:
    """A copy of the folders that are mutated, without byte code."""
    for folder in PACKAGES:
        shutil.copytree(checkout / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def _child(sources: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m ARGUMENTS` with these sources, in the repository's root."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [*(str(sources / folder) for folder in PACKAGES), str(ROOT / "evals"), str(ROOT / "tests")]
    )
    command = [sys.executable, "-c", _CHILD, str(sources), " ".join(PACKAGES.values()), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)


def outcome_of(sources: Path, tests: Tests) -> Outcome:
    """What the tests say of these sources.

    Raises:
        Unusable: pytest itself failed.
    """
    options = ["-v", "-rN", "--tb=no", f"--maxfail={tests.most}"]
    options += ["-p", "no:cacheprovider", "-W", "ignore", "-o", "console_output_style=classic"]
    try:
        done = _child(sources, "pytest", *options, *tests.arguments)
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        done = subprocess.CompletedProcess(expired.args, -9, output, "")
    outcomes = _OUTCOME.findall(done.stdout)
    failed = [test for test, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    died = done.returncode < 0
    if died:
        failed.append(done.stdout.rstrip().rpartition("\n")[2].strip())
    elif done.returncode not in (0, 1) or not outcomes:
        raise Unusable(f"pytest {' '.join(tests.arguments)} ended with {done.returncode}: {_tail(done)}")
    return Outcome(failed, len(outcomes) + died, died, len(failed) >= tests.most)


def scored(sources: Path, checkpoint: Path, questions: Path) -> Score:
    """What the oracle of these sources answers.

    Raises:
        Unusable: it did not come to an end.
    """
    done = _child(sources, "mutations.score", str(checkpoint), str(questions))
    if done.returncode:
        raise Unusable(f"the oracle ended with {done.returncode}: {_tail(done)}")
    return Score(**json.loads(done.stdout))


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr).strip()[-2000:]


class Known:
    """What is known of mutants, by the bytes it follows from."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, Lock()
        self._facts: dict[str, list] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, key: str) -> list | None:
        return self._facts.get(key)

    def put(self, key: str, value: tuple) -> None:
        with self._lock:
            self._facts[key] = list(value)
            self._file.parent.mkdir(exist_ok=True)
            draft = self._file.with_suffix(".draft")
            draft.write_text(json.dumps(self._facts))
            draft.replace(self._file)


_SOURCES = (".py", ".json", ".safetensors")


def _digest(*parts: Path | str) -> str:
    """Of texts, files, and the sources in folders."""
    state = hashlib.sha256()
    for part in parts:
        files = [part] if isinstance(part, Path) and part.is_file() else []
        if isinstance(part, Path) and part.is_dir():
            files = sorted(path for path in part.rglob("*") if path.suffix in _SOURCES and path.is_file())
        for file in files:
            state.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
        if isinstance(part, str):
            state.update(part.encode() + b"\0")
    return state.hexdigest()


class Runner:
    """Mutants of one state of the source.

    model: checkpoint and questions, None where the accuracy suite does not run. minutes: after them only what is known.
    """

    def __init__(
        self, sources: Path, folder: Path, known: Known, model: tuple[Path, Path] | None, minutes: float
    ) -> None:
        self._sources, self._folder, self._known, self._model = sources, folder, known, model
        self._end = time.monotonic() + 60 * minutes
        tests = (ROOT / "tests" / name for name in ("conftest.py", "ops", "model", "sm120", "gpu", "launch"))
        used = ("evals/local_server.py", "evals/small-deepseek-v4-dspark.xz", "bench/decode_step.py")
        self._tests = _digest(ROOT / "patches/0.5.23/requirements.lock", *(ROOT / name for name in used), *tests)

    def units(self, sources: Path, tests: Tests) -> Outcome:
        """`outcome_of`, unless it is known."""
        key = _digest(self._tests, sources, *tests.arguments, str(tests.most))
        facts = self._known.get(key)
        if facts is None:
            self._in_time()
            facts = list(outcome_of(sources, tests))
            self._known.put(key, tuple(facts))
        return Outcome(*facts)

    def answers(self, sources: Path) -> Score | None:
        """`scored`, unless it is known; None without a model."""
        if self._model is None:
            return None
        checkpoint, questions = self._model
        overlay = sources / "overlay" / PACKAGES["overlay"]
        key = _digest(sources / "reference", overlay / "checkpoint", overlay / "formats", checkpoint, questions,
                      ROOT / "tests/mutations/score.py")  # fmt: skip
        facts = self._known.get(key)
        if facts is None:
            self._in_time()
            facts = list(scored(sources, checkpoint, questions))
            self._known.put(key, tuple(facts))
        return Score(*facts)

    def _in_time(self) -> None:
        if time.monotonic() > self._end:
            raise Unfinished

    def row(self, mutation: Mutation, good: Score | None) -> Row | None:
        """All that is to be said of a mutation, None when time is over."""
        try:
            return self._row(mutation, good)
        except Unfinished:
            return None

    def _row(self, mutation: Mutation, good: Score | None) -> Row:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            mutant = copied(self._sources, Path(folder) / "sources")
            mutate(mutation, mutant)
            outcome = self.units(mutant, mutation.tests)
            score = self.answers(mutant) if mutation.scored else None
        row = Row(mutation, outcome.failed, outcome.ran, outcome.died, outcome.stopped, score, good)
        print(f"{'caught' if row.caught else 'NOT CAUGHT':12}{len(row.failed):4} failed  {mutation.name}", flush=True)
        return row

    def sound(self) -> None:
        """Raises Unusable if a test fails without a mutation, Unfinished when time is over."""
        whole = Tests(("tests/ops",))
        for tests in dict.fromkeys(whole if m.tests.arguments[0] == "tests/ops" else m.tests for m in mutations()):
            outcome = self.units(self._sources, tests)
            if outcome.failed:
                raise Unusable(
                    f"{len(outcome.failed)} tests fail without a mutation, {outcome.failed[0]} first: mend them."
                )


def main() -> int:
    """The table; 1 if a mutation is caught by nothing or made in the oracle alone, 2 if the tests can say nothing."""
    parser = argparse.ArgumentParser(description="Which test catches which deliberate defect.")
    parser.add_argument("--only", default="", help="mutations whose name holds this text; writes no page")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--minutes", type=float, default=60, help="after which no mutant is begun")
    parser.add_argument("--checkpoint", type=Path, default=PACKED, help="trained checkpoint: a folder or a packed file")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="the accuracy suite's questions")
    options = parser.parse_args()
    chosen = [mutation for mutation in mutations() if options.only in mutation.name]
    with tempfile.TemporaryDirectory(prefix="mutations-") as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(name).resolve()
        # Taken once, so that an edit during the run concerns the next one.
        sources = copied(ROOT, folder / "sources")
        model = None
        if options.checkpoint.exists() and options.questions.exists():
            model = (_directory(options.checkpoint, folder), options.questions)
        runner = Runner(sources, folder, Known(KNOWN), model, options.minutes)
        try:
            unchanged = pool.submit(runner.sound)
            good = runner.answers(sources)
            found = list(pool.map(lambda mutation: runner.row(mutation, good), chosen))
            unchanged.result()
        except Unusable as error:
            print(error, file=sys.stderr)
            return 2
        except Unfinished:
            print("The tests of the unchanged source were not run: allow more --minutes.", file=sys.stderr)
            return 2
    rows = [row for row in found if row is not None]
    left = [mutation for mutation, row in zip(chosen, found, strict=True) if row is None]
    if not options.only:
        PAGE.write_text(page(rows, left), encoding="utf-8")
    missed = [row.mutation.name for row in rows if not row.caught]
    alone = only_in_the_oracle(mutations())
    print(f"{len(rows)} mutations: {len(missed)} caught by nothing, {len(left)} not run, {len(alone)} in the oracle")
    print("".join(f"    {name}\n" for name in [*missed, *(mutation.name for mutation in left), *alone]), end="")
    return 1 if missed or left or alone else 0


def _directory(checkpoint: Path, folder: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else unpack(checkpoint, folder / "trained")


if __name__ == "__main__":
    sys.exit(main())
