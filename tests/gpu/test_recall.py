"""What the trained small checkpoint recalls on this machine's GPUs, through every way a server can be set up.

What it is asked stands in `recall`. On a Hopper card the servers' Triton kernels are lowered as for SM120.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from fake_server import Fake
from test_server import (
    TPS,
    assert_nothing_compiled_late,
    assert_step_served,
    environment,
    flags_of_card,
)

import questions
import synthetic
from local_server import LocalServer
from recall import CONCURRENCY, COUNT, EXACT, FLAGS, GRAPHS, PACKED, many_questions, scores
from report import table
from sglang_sm120_reference.packed import unpack
from side_by_side import EAGLE
from streamed import speculation

SERVERS = {
    "plain": (),
    "mtp": EAGLE,
    # Of 16 requests: the step takes 256 rows.
    "mtp-10-tokens": (*speculation(9), *GRAPHS[:-1]),
    "no-prefix-cache-in-chunks": ("--disable-radix-cache", "--chunked-prefill-size", "1024"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(PACKED, tmp_path_factory.mktemp("trained") / "DeepSeek-V4-small")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "many.jsonl"
    questions.write(file, *many_questions())
    return file


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("tp", TPS, ids=lambda tp: f"tp{tp}")
def test_recall(tp: int, server: str, checkpoint: Path, many: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < tp:
        pytest.skip(f"{torch.cuda.device_count()} GPU, needed {tp}")
    log = Path(os.environ.get("OUT") or tmp_path) / f"recall-{server}-tp{tp}.log"
    flags = (*FLAGS, *flags_of_card(), *SERVERS[server], "--tp", str(tp))
    with LocalServer(checkpoint, *flags, log=log, env=environment(), ready_seconds=400) as running:
        rows, accepted = scores(running.url, EXACT, many)
        print(f"\n{server}, TP {tp}, MTP acceptance length {accepted}\n{table(rows)}")
        assert all(row.verdict == "pass" for row in rows)
        assert sum(row.total for row in rows if row.name.endswith(f"x{CONCURRENCY}")) >= COUNT
        speculates = server.startswith("mtp")
        assert (accepted is not None) == speculates
        assert_step_served(running, "target_verify" if speculates else "decode")
        assert_nothing_compiled_late(running)


@pytest.mark.needs_no_gpu
def test_the_oracles_misses_are_of_these_questions() -> None:
    asked, said = many_questions()
    right = [answer == question.line["answer"] for question, answer in zip(asked, said, strict=True)]
    far = [good for good, question in zip(right, asked, strict=True) if question.line["task"] == "far recall"]
    # Where the oracle has 99 % the floor is 99 % too; half a point is two of these.
    assert len(right) >= COUNT and len(far) >= 400 and sum(far) >= synthetic.RECALL * len(far)


@pytest.mark.needs_no_gpu
@pytest.mark.parametrize(("wrong", "missed"), [(0, 0), (1, 0), (4, 4), (5, 4)])
def test_scores_and_floors(wrong: int, missed: int, tmp_path: Path) -> None:
    """Of 100 questions a server may miss as many as the oracle: one more is over half a point."""
    told = {"task": "recall", "distance": 1}
    lines = [{"id": str(i), "prompt": f"q{i:03}", "answer": f"a{i}", "oracle": f"a{i}", **told} for i in range(100)]
    many = [{**line, "oracle": "" if i < missed else line["answer"]} for i, line in enumerate(lines)]
    for name, some in (("exact", lines[50:60]), ("many", many)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in some))
    fake = Fake()
    try:
        fake.answers = {line["prompt"]: line["answer"] for line in lines[wrong:]}
        rows, accepted = scores(fake.url, tmp_path / "exact", tmp_path / "many")
    finally:
        fake.close()
    assert [(row.name, row.right, row.total) for row in rows] == [
        ("recall x1", 10, 10),
        ("recall x16", 100 - wrong, 100),
    ]
    assert [row.verdict for row in rows] == ["pass", "pass" if wrong <= missed else "FAIL"]
    assert accepted is None
