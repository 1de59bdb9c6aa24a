"""What a server on a GPU recalls of the trained small checkpoint, beside the oracle.

It is asked the CPU's questions one at a time, then 1,000 recall questions of up to 8,192 tokens with 16 in flight; of
both the oracle's answers are known.
"""

from __future__ import annotations

from pathlib import Path

import questions
import synthetic
from client import Client
from report import Row

EVALS = Path(__file__).parent
PACKED = EVALS / "small-deepseek-v4.xz"
EXACT = EVALS / "questions-cpu.jsonl"
WRONG = EVALS / "oracle-gpu.json"
COUNT = 1000
CONCURRENCY = 16
GRAPHS = ("--cuda-graph-bs-decode", "1", "2", "4", "8", "16", "32")
# Sixteen of the longest requests three times over: a token of this model costs little, and the rest stays free.
FLAGS = (
    "--mem-fraction-static", "0.5", "--max-total-tokens", "400000", "--context-length", "16384",
    "--grammar-backend", "none", "--log-level", "info", "--tool-call-parser", "deepseekv4", *GRAPHS,
)  # fmt: skip
"""Of a server for `scores`."""


def scores(url: str, exact: Path, many: Path) -> tuple[list[Row], float | None]:
    """A row for each task of both files, and the server's MTP acceptance length; floors follow the oracle's answers."""
    client = Client(url)
    rows = [row for part in synthetic.run(client, synthetic.load(exact), (1,)) for row in part]
    rows += [row for part in synthetic.run(client, synthetic.load(many), (CONCURRENCY,)) for row in part]
    return rows, client.accept_length()


def many_questions() -> tuple[list[questions.Asked], list[str]]:
    """The 1,000, with the oracle's answers."""
    asked = list(questions.ask(questions.recall_parts(COUNT)))
    return asked, questions.read_wrong(WRONG, asked)
