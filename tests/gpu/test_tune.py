"""The sweep behind `make tune`, as far as it goes without a GPU."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import bench
import tune
from candidates import OF_THE_MODEL, OPS, ROWS, Case, cases
from sglang_sm120 import compilation, kernels, ops, tuned
from sglang_sm120.checkpoint.config import model_config

pytestmark = pytest.mark.needs_no_gpu
SMS = 132


@pytest.fixture(scope="module")
def wanted() -> list[Case]:
    return cases(OF_THE_MODEL, 2, ROWS, [65_536], SMS)


def test_candidates_are_accepted_and_start_with_the_heuristic_s(wanted: list[Case]) -> None:
    for case in wanted:
        for key, tried in case.tried.items():
            family = tuned.FAMILIES[key[0]]
            assert len(set(tried)) == len(tried)
            assert 8 <= len(tried) <= 60
            for config in tried:
                assert family.refusal(key[1], key[2], config) is None, (key, config)
                assert tuned.parse(tune.entry_of(key, config)) == (key, config)
                # Read once, weights must not push out of L2 what the rest of a step keeps there.
                assert key[2] > 1 or getattr(config, "kernel", None) != "gemv" or config.evict_first
    (moe,) = (c for c in wanted if (c.op, c.rows) == ("mxfp4_moe", 1))
    assert [tried[0].rows for tried in moe.tried.values()] == [128, 64]


def test_the_most_valuable_calls_come_first(wanted: list[Case]) -> None:
    order = [(case.label, case.rows) for case in wanted]
    assert sorted(order[:2]) == [("experts", 1), ("experts", 8)]
    assert {label for label, _ in order[2:12]} == {"mtp.head", "mtp.h_proj", "wq_b", "wo_b", "wo_a", "compressor.c4"}
    few = [rows in (1, 8) for _, rows in order]
    assert few == sorted(few, reverse=True) and order.index(("experts", 64)) == sum(few)
    assert order.index(("c4", 1)) < sum(few)


def test_calls_that_share_their_keys_are_swept_once(wanted: list[Case]) -> None:
    keys = [frozenset(case.tried) for case in wanted]
    assert len(set(keys)) == len(keys)
    assert any(case.op == "fp8_linear" and case.rows == 32 for case in wanted)
    assert not any(case.label == "mtp.e_proj" for case in wanted), "wo_b has its shape at TP 2"


def _most_staged(tried: list[Any]) -> Any:
    return max(tried, key=lambda c: getattr(c, "stages", 0) * getattr(c, "depth", 1) * getattr(c, "bn", 1))


def _compiled() -> tuple[Any, ...]:
    """(plan, launched keys without a job, what is said of one candidate of each family, and of one's kernels where
    shared memory is short).

    Runs in a process whose Triton compiles for sm_120.
    """
    import triton.backends.nvidia.driver

    # It loads a CUDA driver.
    triton.backends.nvidia.driver.CudaLauncher = lambda *_: None
    chosen = [
        next(case for case in cases(OPS, 2, [rows], [65_536], SMS) if case.op == op)
        for op, rows in (("fp8_linear", 8), ("mxfp4_moe", 1), ("indexer_topk", 1))
    ]
    planned = tune.plan(chosen, SMS)
    orphans = set().union(*planned.needs.values()) - planned.jobs.keys()
    some = [(key, _most_staged(tried)) for case in chosen for key, tried in case.tried.items()]
    variants = sorted(set().union(*(planned.needs[pair] for pair in some)))
    said = [tune.attempt(planned.jobs[variant]) for variant in variants]
    tuned.SHARED_LIMIT = 1000
    refused = [tune.attempt(planned.jobs[variant]) for variant in planned.needs[some[0]]]
    return len(planned.jobs), planned.scratch, orphans, said, refused


def test_candidates_compile_and_fit() -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, compilation.use_target, (120,)) as pool:
        jobs, scratch, orphans, said, refused = pool.submit(_compiled).result()
    assert jobs > 80
    assert scratch["topk_slots"] >= 16384 // 1024 * 512 * 8
    assert not orphans
    assert len(said) >= 6
    assert not any(said)
    assert any("bytes of shared memory" in why for why in refused if why)


def sweep_of(
    case: Case, monkeypatch: pytest.MonkeyPatch, cost: Any, wrong: Callable[[tuned.Table], bool] = lambda _: False
) -> tune.Found:
    """`tune.sweep` on meta tensors, with `cost(table)` for microseconds."""
    call = list(ops.calls(case.op, model_config(), case.tp, case.rows, case.context))[case.position]
    monkeypatch.setattr(bench, "nth_call", lambda *_: call)
    monkeypatch.setattr(bench, "rotation", lambda call, _: [call.arguments] * 3)
    spec = dataclasses.replace(ops.SPECS[case.op], traffic=lambda _: (1_000_000, 0))
    monkeypatch.setitem(ops.SPECS, case.op, spec)
    table = lambda: tuned.active(bench.DEVICE)  # noqa: E731
    monkeypatch.setattr(bench, "microseconds", lambda functions: cost(table()) if len(functions) == 3 else 0)
    monkeypatch.setattr(tune, "checker", lambda _: lambda _: "off" if wrong(table()) else None)
    with kernels.rehearse(kernels.Rehearsal(lambda *_: None, SMS)):
        return tune.sweep(case, lambda *_: True, float("inf"))


@pytest.fixture
def moe(wanted: list[Case]) -> Case:
    return next(case for case in wanted if (case.op, case.rows) == ("mxfp4_moe", 1))


def cost(better: dict[Any, float], table: tuned.Table) -> float:
    return 20.0 - sum(better.get(config, -1.0) for config in table.values())


def test_a_sweep_combines_the_best_of_each_kernel(moe: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    (up, ups), (down, downs) = moe.tried.items()
    found = sweep_of(moe, monkeypatch, partial(cost, {ups[3]: 2.0, ups[5]: 1.0, downs[4]: 3.0}))
    assert found.table == {up: ups[3], down: downs[4]}
    assert (found.heuristic_us, found.us) == (20.0, 15.0)
    assert found.tried == len(ups) + len(downs) - 2
    line = list(tune.report([found], 4e12))[1]
    assert "20.00    15.00" in line and "2%" in line


def test_what_is_wrong_or_hardly_faster_is_not_kept(moe: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ups = next(iter(moe.tried.items()))
    found = sweep_of(moe, monkeypatch, partial(cost, {ups[3]: 5.0}), wrong=lambda table: ups[3] in table.values())
    assert found.table == {} and "mxfp4_moe experts 1 rows" in found.wrong[0]
    found = sweep_of(moe, monkeypatch, partial(cost, {ups[3]: 0.5}))
    assert found.table == {} and found.us == found.heuristic_us == 20.0


def test_a_wrong_heuristic_ends_the_case(moe: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sweep_of(moe, monkeypatch, partial(cost, {}), wrong=lambda _: True)
    assert found.tried == 0 and len(found.wrong) == 1 and found.table == {}


@pytest.fixture
def two(wanted: list[Case]) -> Iterator[list[tune.Found]]:
    yield [
        tune.Found(case, {key: tried[1] for key, tried in case.tried.items()}, 20.0, 15.0, 1, 9, [])
        for case in wanted[:2]
    ]


def test_a_file_keeps_the_entries_of_calls_that_were_not_swept(two: list[tune.Found], tmp_path: Path) -> None:
    path = tmp_path / "tables" / "GPU.json"
    tune.write(path, two, 4e12)
    assert tuned.load(path) == two[0].table | two[1].table
    # As `prove` leaves it.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prefill": {"by": "overlay"}}))
    two[1].table = {}
    tune.write(path, two[1:], 4e12)
    assert tuned.load(path) == two[0].table and json.loads(path.read_text())["prefill"] == {"by": "overlay"}
    known = {"family", "shape", "rows", "config", "call", "us", "heuristic_us", "date", "triton"}
    assert known == tuned.entries(path)[0].keys()
