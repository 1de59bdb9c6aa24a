"""Two GPUs, `pytest tests/gpu -k tp2` with the servers' tests: the all-reduce in captured graphs, and lost ranks.

Other tests' servers may run on the same cards meanwhile.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pynvml
import pytest
import torch
from running import REAL, Serve, serve
from test_server import environment
from test_whole_model import CONFIG, RANDOM_WEIGHTS

import decode_step
from local_server import free_port

REPLAYS = 1000
ROWS = (1, 4, 32, 256)
WIDTH = 4096
EXPERTS = 16
SMALL = ("--mem-fraction-static", "0.4", "--max-total-tokens", "65536")
"""Leaves the cards to others."""


@pytest.fixture(autouse=True)
def two_cards() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs, needed 2")


def _replay(rank: int, port: int, seed: int, queue: multiprocessing.Queue[tuple[int, bool, dict[int, int]]]) -> None:
    """A rank: how many values of REPLAYS replays, by rows, are not the sum of both ranks' inputs rounded once."""
    torch.cuda.set_device(rank)
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="dummy", tp_size=2), role="test", ranks=SpawnRanks(world_rank=rank))
    parallel_state.init_distributed_environment(2, rank, f"tcp://127.0.0.1:{port}", rank, "nccl")
    parallel_state.initialize_model_parallel(backend="nccl")
    group = get_parallel().attn_tp_group
    custom = group.ca_comm is not None and not group.ca_comm.disabled
    device = torch.device("cuda", rank)
    given = {rows: torch.zeros(rows, WIDTH, dtype=torch.bfloat16, device=device) for rows in ROWS}
    graphs, results = {}, {}
    with parallel_state.graph_capture() as context:
        for rows, x in given.items():
            graphs[rows] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[rows], stream=context.stream):
                # A sum in place would change what the next replay is given.
                results[rows] = group.all_reduce(x.clone())
    # Both ranks draw both inputs.
    rng = torch.Generator(device).manual_seed(seed)
    wrong = {rows: torch.zeros((), dtype=torch.int64, device=device) for rows in ROWS}
    for _ in range(REPLAYS):
        for rows in ROWS:
            both = torch.randn(2, rows, WIDTH, generator=rng, device=device).bfloat16()
            given[rows].copy_(both[rank])
            results[rows].fill_(torch.nan)
            graphs[rows].replay()
            expected = (both[0].float() + both[1].float()).bfloat16()
            wrong[rows] += (results[rows].view(torch.int16) != expected.view(torch.int16)).sum()
    queue.put((rank, custom, {rows: int(count) for rows, count in wrong.items()}))
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def test_all_reduce_in_a_replayed_graph_is_the_sum_on_tp2(seed: int) -> None:
    """Both ranks have the same bits after every replay: those of the sum, rounded once."""
    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), free_port()
    ranks = [context.Process(target=_replay, args=(rank, port, seed, queue)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    try:
        found = sorted(queue.get(timeout=300) for _ in ranks)
        for process in ranks:
            process.join(60)
    finally:
        for process in ranks:
            process.kill()
    print(f"custom all-reduce: {found[0][1]}; values that differ in {REPLAYS} replays, by rows: {found[0][2]}")
    assert found == [(rank, True, dict.fromkeys(ROWS, 0)) for rank in (0, 1)]


@contextmanager
def watched(folder: Path, *words: str) -> Iterator[Serve]:
    """`serve --watch` of all layers with few experts on two cards, ready and seen on both."""
    decode_step.write_model(folder / "model", EXPERTS)
    given = ("--config", str(CONFIG), "--gpus", "0,1", "--watch", *words)
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join((str(RANDOM_WEIGHTS), variables.get("PYTHONPATH", "")))
    flags = ("--load-format", "dummy", "--grammar-backend", "none", *SMALL)
    with serve(REAL, folder / "model", folder, *given, flags=flags, **variables) as running:
        running.wait_for("evidence for this configuration", 600)
        ranks = {running.member(f"sglang::scheduler_TP{rank}").pid for rank in (0, 1)}
        assert ranks <= on_the_cards()
        yield running


def on_the_cards() -> set[int]:
    """Processes that have memory on the first two cards."""
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(card) for card in (0, 1)]
    return {each.pid for handle in handles for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}


def assert_nothing_is_left(tree: list[psutil.Process]) -> None:
    """Nothing of the server on the cards, and nothing of a process that is no more."""
    left = on_the_cards()
    assert not left & {process.pid for process in tree}
    assert all(map(psutil.pid_exists, left))


def test_a_killed_rank_ends_the_server_on_tp2(tmp_path: Path) -> None:
    """Within a minute, with status 1, nothing left on the cards."""
    with watched(tmp_path) as running:
        tree = running.tree()
        running.member("sglang::scheduler_TP1").kill()
        assert running.ends(60, tree) == 1
    assert_nothing_is_left(tree)


def test_a_frozen_rank_ends_the_server_on_tp2(tmp_path: Path) -> None:
    """After the stall limit, with the ranks' stacks, nothing left on the cards."""
    with watched(tmp_path, "--stall-limit", "20") as running:
        tree = running.tree()
        rank = running.member("sglang::scheduler_TP1")
        rank.suspend()
        # The limit of 20 s, the stacks, 5 s of grace.
        assert running.ends(90, tree) == 1
        text = running.text()
        assert "(limit 20 s)" in text and f"--- {rank.pid} sglang::scheduler_TP1" in text
    assert_nothing_is_left(tree)
