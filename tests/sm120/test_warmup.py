"""The warm-up's sample of sizes stands for all: no step of a server launches a kernel that it did not compile."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import random
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sm120 import compilation, kernels, ops, registry, tuned, warmup
from sglang_sm120.checkpoint.config import PRO, model_config
from sglang_sm120.limits import MAX_ROWS
from sglang_sm120.ops._pdl_triton import SMALL_GRID
from sglang_sm120.parity import LONGEST

PREFILL_ROWS = 8192


def _trained_config() -> dict[str, Any]:
    """Of the trained small model, whose few channels lie in other classes of size."""
    with (Path(__file__).parents[2] / "evals/small-deepseek-v4.xz").open("rb") as file:
        config: dict[str, Any] = json.loads(file.readline())
    return config


def _missing(
    config: dict[str, Any], tp: int, ep: int, graph_rows: int, sms: int, context: int, steps: list[tuple[int, int]]
) -> tuple[int, list[str]]:
    """(variants, what `steps` launch or need beyond them); runs in a process whose Triton compiles for sm_120."""
    found = warmup.variants(config, tp, ep, PREFILL_ROWS, graph_rows, context, list(warmup.served()), sms)
    missing = [*found.refused]
    for op in warmup.served():
        # A rank's experts: as many as there are for each of `ep`, as wide as a part among the others.
        ranks, part = (tp // ep, config["n_routed_experts"] // ep) if ops.SPECS[op].by_experts else (tp, None)
        mine = config if part is None else {**config, "n_routed_experts": part}
        for step in steps:
            launched: list[Any] = []
            job = compilation.Job(mine, op, ranks, (step,), sms)
            scratch = compilation.rehearse_job(job, lambda *launch, to=launched: to.append(launch))
            for kernel, args, options, label in launched:
                if compilation.variant_key(kernel, args, options) not in found.launches:
                    missing.append(f"{op} {kernel.fn.__name__} {label} {options}")
            if step[0] <= graph_rows:
                missing += [f"{owner} {step} {n} B" for owner, n in scratch.items() if n > found.scratch.get(owner, 0)]
    return len(found.launches), missing


def _keys(ops: list[str]) -> set[str]:
    return set(warmup.variants(model_config(), 2, 1, 64, 8, 2048, ops, 188).launches)


def test_keys_of_kernels_do_not_depend_on_the_order_they_are_met_in() -> None:
    """Triton's on-disk cache is shared by processes that meet the kernels in different orders."""
    context = multiprocessing.get_context("spawn")
    orders = (list(warmup.served()), list(reversed(warmup.served())))
    found = []
    for order in orders:
        with ProcessPoolExecutor(1, context, compilation.use_target, (120,)) as pool:
            found.append(pool.submit(_keys, order).result())
    assert found[0] == found[1]


def _late(only: str) -> tuple[list[str], list[str]]:
    """(late compiles before, after) a kernel of `only` is compiled for the first time after `freeze`."""
    kernels.freeze()
    launch = next(iter(warmup.variants(model_config(), 2, 1, 1, 1, 256, [only], 188).launches.values()))
    before = kernels.late_compiles()
    kernel, args, options = launch
    for _ in range(2):
        kernel.run(*args, grid=(1,), warmup=True, **options)
    return before, kernels.late_compiles()


def test_a_compilation_after_freeze_is_counted() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compilation.use_target, (120,)) as pool:
        before, after = pool.submit(_late, "router_topk").result()
    assert before == []
    (line,) = after
    assert line.startswith("sglang_sm120.ops.router_topk.triton._route(logits_ptr=*fp32, ")
    assert "rows=i32" in line and "EXPERTS=256" in line and line.endswith("warps=1, stages=3)")


def _dependent(pdl: str | None) -> tuple[int, int]:
    """How many kernels are launched dependently with SGLANG_SM120_PDL set so, or unset, and how many there are."""
    os.environ.pop("SGLANG_SM120_PDL", None)
    if pdl is not None:
        os.environ["SGLANG_SM120_PDL"] = pdl
    ops = ["sparse_mla", "mxfp4_moe", "mhc_pre"]
    launches = warmup.variants(model_config(), 2, 1, 1, 1, 65_536, ops, 188).launches
    return sum(bool(options.get("launch_pdl")) for _, _, options in launches.values()), len(launches)


def test_kernels_are_launched_dependently_unless_told_not_to() -> None:
    found = {}
    for pdl in (None, "1", "0", "yes"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compilation.use_target, (120,)) as pool:
            found[pdl] = pool.submit(_dependent, pdl)
    dependent, all_ = found["0"].result()
    assert dependent == 0 < all_
    assert found["1"].result() == found[None].result() == (all_, all_)
    with pytest.raises(ValueError, match="SGLANG_SM120_PDL is 'yes' and needs 0 or 1"):
        found["yes"].result()


def _fewest_programs(sms: int) -> int:
    """Of the last kernel before each of SGLang's compressor kernels, in every pass that the step takes on SM12x."""
    last: list[int] = []
    kernels.launch = lambda kernel, grid, *args, **options: last.append(math.prod(grid))
    fewest = []
    for rows in range(1, MAX_ROWS + 1):
        for call in ops.calls("bf16_linear_fp32", model_config(), 2, rows, 65_536):
            if "compressor" in call.label:
                with kernels.rehearse(kernels.Rehearsal(lambda *launch: None, sms)):
                    ops.bf16_linear_fp32.by("triton", **call.arguments)
                fewest.append(last[-1])
    return min(fewest)


@pytest.mark.parametrize("sms", [188, 170, 48])
def test_nothing_starts_early_beside_the_compressors_projection(sms: int) -> None:
    """SGLang's compressor may end without having waited for it, and the kernel behind relies on its end."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compilation.use_target, (120,)) as pool:
        assert pool.submit(_fewest_programs, sms).result() > SMALL_GRID.value


@pytest.mark.parametrize("sms", [188, 132, 48])
def test_a_second_kernel_starts_early_only_where_both_find_sms(sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fewer SMs its programs would crowd. Every row count of a graph, contexts of one tile and of several."""
    launched: list[tuple[str, int, int]] = []

    def noted(kernel: Any, grid: tuple[int, ...], *args: Any, **_: Any) -> None:
        early = kernel.arg_names.index("early") if "early" in kernel.arg_names else None
        launched.append((kernel.fn.__name__, math.prod(grid), 0 if early is None else args[early]))

    monkeypatch.setattr(kernels, "launch", noted)
    told = set()
    for op, rows, context in itertools.product(("topk_slots", "mhc_post_pre"), range(1, 65), (8192, 65_536)):
        for call in ops.calls(op, model_config(), 2, rows, context):
            launched.clear()
            with kernels.rehearse(kernels.Rehearsal(lambda *launch: None, sms)):
                registry.ops()[op].by("triton", **call.arguments)
            (name, programs, early), *behind = launched
            assert early == int(bool(behind) and programs + behind[0][1] <= sms), (name, rows, context)
            told.add((name, early))
    assert told >= {("_choose", 0), ("_choose", 1), ("_mix", 0)} and (sms == 48) == (("_mix", 1) not in told)


@pytest.mark.parametrize(
    ("config", "tp", "ep", "sms", "context"),
    [
        (model_config(), 1, 1, 132, LONGEST),
        # Of the last page of these no entry is there yet: SGLang's tables have it.
        (model_config(), 2, 1, 188, 65_535 + 4),
        (model_config(), 4, 2, 48, 131_071 + 4),
        (model_config(PRO), 8, 1, 188, 1_048_575 + 4),
        (_trained_config(), 1, 1, 132, 65_536 + 259),
    ],
    ids=("tp1", "tp2", "tp4-ep2", "pro-tp8", "trained"),
)
def test_no_step_launches_a_kernel_that_was_not_compiled(
    config: dict[str, Any], tp: int, ep: int, sms: int, context: int, seed: int
) -> None:
    rng = random.Random(seed)
    graph_rows = rng.choice([32, 100, 160, 256])
    rows = [rng.choice([rng.randrange(1, 70), int(2 ** rng.uniform(0, 13))]) for _ in range(40)]
    rows += range(1, graph_rows + 1)
    steps = [(r, int(2 ** rng.uniform(0, math.log2(context)))) for r in rows]
    # In graphs a request may be as long as any.
    steps += [(r, context) for r in range(1, graph_rows + 1)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compilation.use_target, (120,)) as pool:
        count, missing = pool.submit(_missing, config, tp, ep, graph_rows, sms, context, steps).result()
    assert count > 100
    assert not missing


def _refused(context: int) -> list[str]:
    return warmup.variants(model_config(PRO), 8, 1, 8192, 8, context, ["indexer_topk"], 188).refused


def test_what_no_graph_could_hold_is_told_when_kernels_are_listed() -> None:
    """Or a torch reference would wait for the GPU in a capture, which ends the server with no reason that says so."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compilation.use_target, (120,)) as pool:
        assert pool.submit(_refused, LONGEST).result() == []
        found = pool.submit(_refused, 4 * LONGEST).result()
    assert found[-1].startswith(f"indexer_topk of 8 rows with requests of {4 * LONGEST} tokens: there are ")


def _block(context: int) -> int:
    """Rows that Flash's indexer scores at once in a pass of 128, by what it launches."""
    kernels.launch = lambda kernel, grid, *args, **options: seen.append((kernel.fn.__name__, args))
    seen: list[Any] = []
    (call,) = ops.calls("indexer_topk", model_config(), 1, 128, context)
    with kernels.rehearse(kernels.Rehearsal(lambda *launch: None, 188)):
        ops.indexer_topk.by("triton", **call.arguments)
    return 128 // sum(name == "_score" for name, _ in seen)


def test_drafts_do_not_halve_a_block() -> None:
    """SGLang's tables are a page or two wider than a million tokens."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compilation.use_target, (120,)) as pool:
        contexts = (1 << 20, (1 << 20) + 4, (1 << 20) + 263, LONGEST)
        assert [pool.submit(_block, context).result() for context in contexts] == [32] * 4
        assert pool.submit(_block, 5 << 18).result() == 16


def test_what_no_graph_could_hold_ends_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ["indexer_topk of 1 rows: too many.", "indexer_topk of 2 rows: too many."]
    monkeypatch.setattr(warmup, "variants", lambda *_: warmup.Variants(refused=refused))
    monkeypatch.setattr(registry, "device_kind", lambda _: "sm120")
    monkeypatch.setattr(kernels, "sms", lambda _: 188)
    monkeypatch.setattr(tuned, "of_device", lambda _: tuned.EMPTY)
    with pytest.raises(ValueError) as refusal:
        warmup.warm_up(model_config(), 2, 1, 256, 64, 9_999_999, torch.device("cuda", 0))
    assert str(refusal.value) == (
        "The step cannot serve requests of 9999999 tokens of this model: indexer_topk of 2 rows: too many. Give a "
        "smaller --context-length, or the variable SGLANG_SM120=0, with which SGLang's own forward serves."
    )


def _own_rows(chosen: str) -> tuple[set[str], set[str]]:
    """Kernels of an op that a warm-up with this provider compiles; what steps of other rows would miss."""
    op, provider = ops.named(chosen)
    given = (model_config(), 2, 1, 8192, 64, 4096, [chosen], kernels.SM120_SMS)
    found, missing = warmup.variants(*given), set()
    rng = random.Random(chosen)
    job = compilation.Job(model_config(), op, 2, tuple((rng.randrange(1, 8193), 4096) for _ in range(60)))
    compilation.rehearse_job(
        replace(job, provider=provider),
        lambda kernel, args, options, _: missing.add(compilation.variant_key(kernel, args, options)),
    )
    return {kernel.fn.__name__ for kernel, _, _ in found.launches.values()}, missing - set(found.launches)


def test_a_provider_that_was_asked_for_is_compiled() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compilation.use_target, (120,)) as pool:
        default, missing = pool.submit(_own_rows, "mxfp4_moe").result()
        assert not missing and "_gate_up_mxfp8" not in default
        own, missing = pool.submit(_own_rows, "mxfp4_moe=mxfp8").result()
        linears, others = pool.submit(_own_rows, "fp8_linear=mxfp8").result()
    assert not others and linears > {"_linear_mxfp8", "quantise_rows", "_gemv"}
    # Few rows are the default's.
    assert not missing and own > {"_gate_up_mxfp8", "_down_mxfp8", "quantise_rows", "gate_up", "down_row"}


NVFP4 = {"quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16}


@pytest.mark.parametrize(("nvfp4", "speculates"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("asked", ["", "mxfp4_moe=mxfp8", "mxfp4_moe=torch"])
def test_the_warm_up_compiles_what_is_chosen(
    asked: str, nvfp4: bool, speculates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found(Exception):
        pass

    def variants(*given: Any) -> None:
        raise Found(given[6])

    monkeypatch.setenv("SGLANG_SM120_PROVIDER", asked)
    monkeypatch.setattr(warmup, "variants", variants)
    monkeypatch.setattr(registry, "device_kind", lambda _: "sm120")
    monkeypatch.setattr(kernels, "sms", lambda _: 188)
    monkeypatch.setattr(tuned, "of_device", lambda _: tuned.EMPTY)
    registry.reset()
    try:
        with pytest.raises(Found) as found:
            config = model_config()
            config["quantization_config"] |= NVFP4 if nvfp4 else {}
            warmup.warm_up(config, 2, 1, 256, 64, 4096, torch.device("cuda", 0), speculates=speculates)
    finally:
        monkeypatch.undo()
        registry.reset()
    (names,) = found.value.args
    experts = "" if asked.endswith("torch") else asked or "mxfp4_moe=triton"
    # The published model has no NVFP4.
    others = set(warmup.served()) - {"mxfp4_moe"} - (set() if nvfp4 else {"nvfp4_moe"})
    others -= set() if speculates else {"clear_draft_states"}
    expected = {f"{op}=triton" for op in others} | {experts} - {""}
    assert set(names) == expected and len(names) == len(expected)


def test_the_warm_up_covers_the_ops_that_the_step_calls() -> None:
    overlay = Path(warmup.__file__).parent
    sources = overlay.glob("step/*.py")
    called = {op for path in sources for op in re.findall(r"\bops\.(\w+)\(", path.read_text(encoding="utf-8"))}
    assert called & set(ops.with_triton()) == set(warmup.served())


def test_the_op_that_sglangs_prefill_shares_is_ready_for_its_rows() -> None:
    """Compiled, and with scratch for graphs, up to a chunk; the other ops up to the step's rows."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compilation.use_target, (120,)) as pool:
        step, shared, missing, scratch = pool.submit(_lent_rows, model_config(), 4, 2048).result()
    assert step < shared
    assert not missing
    # At 300 rows K is split where eight groups are shared by four ranks.
    assert scratch


def _lent_rows(config: dict[str, Any], tp: int, rows: int) -> tuple[int, int, set[str], bool]:
    """Variants without and with SGLang's prefill; what calls in between would miss; whether 300 rows find scratch."""
    lent = [name for name, spec in ops.SPECS.items() if spec.lent]
    given = (config, tp, 1, 256, 256, 4096, lent, kernels.SM120_SMS)
    step, shared = warmup.variants(*given), warmup.variants(*given, lent_rows=rows)
    found: set[str] = set()
    job = compilation.Job(config, *lent, tp, tuple((r, 4096) for r in (257, 300, 700, 1500, 2047)))
    needed = compilation.rehearse_job(
        job, lambda kernel, args, options, _: found.add(compilation.variant_key(kernel, args, options))
    )
    return len(step.launches), len(shared.launches), found - set(shared.launches), all(
        0 < size <= shared.scratch.get(op, 0) for op, size in needed.items()
    )  # fmt: skip


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is taken from a GPU's allocator, which a CPU stands in for."""
    empty, found = torch.empty, []

    def take(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        found.append(empty(size, dtype=dtype))
        return found[-1]

    for name in ("_reserved", "_spare", "_parts"):
        monkeypatch.setattr(kernels, name, {})
    monkeypatch.setattr(kernels.torch, "empty", take)
    return found


def test_scratch_of_a_graph_must_be_reserved_before_it_is_used(taken: list[torch.Tensor]) -> None:
    device = torch.device("cuda", 0)
    kernels.reserve("op", 1000, device)
    kernels.reserve("op", 3000, device)
    kernels.reserve("op", 2000, device)
    assert kernels._reserved["op", device] == 3072
    kernels._parts["op", device, 0] = taken[-1]
    kernels.reserve("op", 3072, device)
    with pytest.raises(kernels.ScratchError, match="asks for 4096 bytes"):
        kernels.reserve("op", 4000, device)


def test_a_reservation_names_the_device_as_tensors_do(
    taken: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    kernels.reserve("op", 1000, torch.device("cuda"))
    assert kernels._reserved == {("op", torch.device("cuda", 3)): 1024}


def test_scratch_is_taken_when_it_is_reserved(taken: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sizes a cache after that sees what is left; a third stream takes its own."""
    device = torch.device("cuda", 0)
    kernels.reserve("op", 1000, device)
    assert [len(memory) for memory in taken] == [1024] * kernels.STREAMS
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    got = []
    for stream in (7, 8, 7, 9):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, n=stream: SimpleNamespace(cuda_stream=n))
        got.append(kernels.scratch("op", device, ((10,), torch.float32))[0].data_ptr())
    assert got[0] == got[2] and len(set(got)) == 3
    assert {memory.data_ptr() for memory in taken} == set(got)
    assert len(taken) == kernels.STREAMS + 1
