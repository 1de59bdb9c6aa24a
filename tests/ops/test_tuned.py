"""Tables of launch configurations: what they may say, that launches follow them, and that none gives wrong results."""

from __future__ import annotations

import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_sm120 import compilation, ops, registry, tuned, warmup
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.ops._linear_config import Config as Linear
from sglang_sm120.ops.indexer_logits.triton import Config as Logits
from sglang_sm120.ops.mxfp4_moe.triton import Config as Moe
from sglang_sm120.ops.topk_slots.triton import Config as TopK
from sglang_sm120.spec import Inputs
from tune import entry_of, save

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = ("linear", (1, 256, 512, 1), 8)
MOE = (256, 4096, 1024, 6)
TABLE = {
    ("linear", (1, 16384, 1024, 1), 1): Linear("gemv", 1, 32, 1024, 1, 1, 1, 4, evict_first=True),
    ("linear", (1, 16384, 1024, 1), 8): Linear("few", 8, 32, 128, 8, 1, 2, 8),
    ("linear", (1, 4096, 4096, 1), 64): Linear("many", 64, 64, 128, 1, 16, 3, 4),
    ("linear", (1, 2048, 4096, 1), 64): Linear("tma", 64, 64, 128, 1, 2, 3, 4),
    ("mxfp4_moe.gate_up", MOE, 1): Moe(64, 4, 2, 64, 4, 3),
    ("mxfp4_moe.down", MOE, 1): Moe(32, 8, 1, 128, 4, 3),
    ("mxfp4_moe.down", MOE, 8): Moe(256, 8, 1, 32, 8, 4),
    ("nvfp4_moe.gate_up", MOE, 1): Moe(64, 4, 2, 64, 4, 3),
    ("nvfp4_moe.down", MOE, 8): Moe(256, 8, 1, 32, 8, 4),
    ("indexer_logits", (16384, 64), 1): Logits(64, 8, 2),
    ("topk_slots", (16384, 512), 1): TopK(1024, 8, 16),
    ("topk_slots", (16384, 512), 2): TopK(1024, 2, stream=True),
}


def entry(**changes: Any) -> dict[str, Any]:
    """A good entry of `linear`; a change of `config` replaces single fields of it."""
    good = entry_of(SMALL, Linear("few", 8, 16, 128, 4, 1, 2, 4))
    config = {**good["config"], **changes.pop("config", {})}
    return {**good, "config": {name: value for name, value in config.items() if value is not None}, **changes}


def test_a_saved_table_is_loaded_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "GPU.json"
    save(path, [entry_of(key, config, us=1.5) for key, config in TABLE.items()], gpu="GPU")
    assert tuned.load(path) == TABLE
    assert json.loads(path.read_text())["gpu"] == "GPU"
    assert {key[0] for key in TABLE} == set(tuned.FAMILIES), "a family without an example"


def test_fields_with_a_default_may_be_left_out() -> None:
    assert tuned.parse(entry(config={"evict_first": None}))[1].evict_first is False


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (entry(family="lineal"), "family is 'lineal'"),
        (entry(config={"tiles": 4}), "config of linear"),
        (entry(config={"bn": None}), "config of linear"),
        (entry(config={"bn": "16"}), "bn is '16' and needs to be of type int"),
        (entry(config={"evict_first": 1}), "evict_first is 1 and needs to be of type bool"),
        (entry(config={"bn": 256}), "bn is 256"),
        (entry(config={"bk": 64}), "bk is 64"),
        (entry(config={"kernel": "fast"}), "kernel is 'fast'"),
        (entry(rows=16), "bm is 8 and needs to be at least the rows"),
        (entry(rows=6), "rows are 6"),
        (entry(rows=0), "rows are 0"),
        (entry(shape={"n": 256, "k": 512}), "shape of linear"),
        (entry(shape={"groups": 1, "n": 256, "k": 512, "bytes": 0}), "shape of linear"),
        (entry(config={"bn": 128, "warps_k": 16, "stages": 5}), "shared memory"),
        (entry(config={"kernel": "gemv", "bm": 1, "bk": 256, "warps_k": 1, "stages": 1}), "bk is 256"),
        (entry(shape={"groups": 1, "n": 99999, "k": 512, "bytes": 1}, rows=4096,
               config={"kernel": "many", "bm": 128, "warps_k": 1, "split": 16}), "bytes of scratch"),
        (entry_of(("mxfp4_moe.gate_up", MOE, 1), Moe(32, 2, 4, 64, 4, 3)), "a stretch has 8 rows"),
        (entry_of(("mxfp4_moe.gate_up", MOE, 128), Moe(128, 8, 2, 64, 4, 3)), "split is 2"),
        (entry_of(("mxfp4_moe.gate_up", MOE, 1), Moe(64, 2, 2, 64, 4, 3)), "tokens times split is 4"),
        (entry_of(("mxfp4_moe.gate_up", (4, 128, 128, 6), 1), Moe(64, 4, 2, 64, 4, 3)), "split is 2"),
        (entry_of(("mxfp4_moe.down", (4, 128, 128, 8), 1), Moe(64, 4, 1, 32, 4, 3)), "tokens are 4"),
        (entry_of(("mxfp4_moe.down", (4, 128, 128, 8), 1), Moe(64, 8, 1, 64, 4, 3)), "depth is 64"),
        (entry_of(("mxfp4_moe.down", (4, 384, 128, 6), 8), Moe(256, 8, 1, 32, 4, 3)), "divide the 384 channels"),
        (entry_of(("mxfp4_moe.down", MOE, 8), Moe(128, 8, 1, 16, 4, 3)), "depth is 16"),
        (entry_of(("mxfp4_moe.down", MOE, 8), Moe(256, 8, 1, 128, 4, 5)), "shared memory"),
        # MXFP4's scales leave room for it.
        (entry_of(("nvfp4_moe.down", MOE, 8), Moe(128, 32, 1, 64, 4, 4)), "take 104448 bytes of shared memory"),
        (entry_of(("topk_slots", (131072, 512), 1), TopK(1024, 4, 4)), "at most 32768 of all"),
        (entry_of(("topk_slots", (4096, 2048), 1), TopK(1024, 4, 4)), "needs k of one"),
        (entry_of(("topk_slots", (16384, 2048), 1), TopK(512, 4, stream=True)), "k is 2048"),
        (entry_of(("topk_slots", (16384, 1024), 1), TopK(512, 1, stream=True)), "at least 2 warps"),
        (entry_of(("topk_slots", (16384, 512), 1), TopK(512, 1, 4, stream=True)), "warps_again is 4"),
        (entry_of(("indexer_logits", (16384, 64), 1), Logits(48, 4, 4)), "block is 48"),
        ("few", "no object"),
    ],
)  # fmt: skip
def test_a_bad_entry_is_refused_in_a_sentence(wrong: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / "GPU.json"
    path.write_text(json.dumps({"entries": [entry(), wrong]}))
    with pytest.raises(tuned.TableError) as refusal:
        tuned.load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}, entry 2: ") and why in message and message.count("\n") == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": {}}'])
def test_a_file_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "GPU.json"
    path.write_text(text)
    with pytest.raises(tuned.TableError, match='no JSON object with a list "entries"'):
        tuned.load(path)


def test_an_entry_may_not_be_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "GPU.json"
    path.write_text(json.dumps({"entries": [entry(), entry(config={"bn": 32})]}))
    with pytest.raises(tuned.TableError, match="at 8 rows is there twice"):
        tuned.load(path)


def test_committed_tables_can_be_loaded() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        assert tuned.load(path)


@pytest.mark.parametrize(
    ("arch", "name"),
    [(None, "NVIDIA_RTX_5090"), ("sm120", "NVIDIA_RTX_5090"), ("sm90", "NVIDIA_RTX_5090-sm90-lowering")],
)
def test_a_device_has_one_table_for_each_architecture_it_runs(
    arch: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX 5090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.delenv("TRITON_OVERRIDE_ARCH", raising=False)
    if arch:
        monkeypatch.setenv("TRITON_OVERRIDE_ARCH", arch)
    assert tuned.path_of(torch.device("cuda")) == tuned.FOLDER / f"{name}.json"


def test_a_device_without_a_table_follows_the_heuristics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = torch.device("cuda", 7)
    path = tmp_path / "GPU.json"
    monkeypatch.setattr(tuned, "path_of", lambda _: path)
    tuned.of_device.cache_clear()
    assert tuned.active(device) == {}
    save(path, [entry()])
    tuned.of_device.cache_clear()
    assert set(tuned.active(device)) == {SMALL}
    tuned.of_device.cache_clear()
    assert tuned.active(torch.device("cpu")) == {}


def launches(op: str, rows: int, table: tuned.Table, context: int = 65_536) -> tuple[list[Any], dict[str, int]]:
    """(kernel name, options) of every launch of the model's calls of `op` at TP 2, and the scratch."""
    found: list[Any] = []
    job = compilation.Job(model_config(), op, 2, ((rows, context),), table=table)
    scratch = compilation.rehearse_job(job, lambda kernel, _, options, __: found.append((kernel.fn.__name__, options)))
    return found, scratch


@pytest.mark.parametrize(
    ("op", "rows", "wanted"),
    [
        ("fp8_linear", 1, {"BN": 32, "POLICY": "evict_first"}),
        ("fp8_linear", 5, {"BN": 32, "KW": 8, "num_warps": 8}),
        ("fp8_linear", 40, {"BM": 64, "SPLIT": 16}),
        ("fp8_linear", 40, {"N": 2048, "BN": 64, "SPLIT": 2}),
        ("mxfp4_moe", 1, {"R": 64, "T": 4, "SPLIT": 2}),
        ("mxfp4_moe", 1, {"R": 32, "DEPTH": 128}),
        ("mxfp4_moe", 7, {"R": 256, "STAGES": 4, "num_warps": 8}),
        ("indexer_topk", 1, {"BLOCK": 64, "num_warps": 2}),
        ("indexer_topk", 1, {"TILE": 1024, "num_warps": 8}),
        ("indexer_topk", 1, {"AGAIN": 8192, "num_warps": 16}),
        ("indexer_topk", 2, {"BUFFER": 2048, "TILE": 1024, "num_warps": 2}),
    ],
)
def test_launches_follow_the_table(op: str, rows: int, wanted: dict[str, Any]) -> None:
    def has(table: tuned.Table, rows: int) -> bool:
        return any(wanted.items() <= options.items() for _, options in launches(op, rows, table)[0])

    assert has(TABLE, rows)
    assert not has({}, rows)
    assert not has(TABLE, 200), "entries reach no further than their power of two"


def test_scratch_is_counted_for_the_table_s_choice() -> None:
    split = TABLE["linear", (1, 4096, 4096, 1), 64].split
    assert launches("fp8_linear", 64, TABLE)[1]["fp8_linear"] >= split * 64 * 4096 * 4
    assert launches("fp8_linear", 64, TABLE)[1] != launches("fp8_linear", 64, {})[1]


def _unplanned(seed: int) -> tuple[int, list[str]]:
    """(launches that the table changed, launches and scratch of random steps that the warm-up did not plan for)."""
    rng = random.Random(seed)
    names = ["fp8_linear", "mxfp4_moe", "indexer_topk"]
    plain = warmup.variants(model_config(), 2, 1, 256, 64, 65_536, names, 132)
    found = warmup.variants(model_config(), 2, 1, 256, 64, 65_536, names, 132, TABLE)
    missing = []
    for name in names:
        for step in ((1, 65_536), *((rng.randrange(1, 100), rng.randrange(33_000, 65_537)) for _ in range(8))):
            launched: list[Any] = []
            job = compilation.Job(model_config(), name, 2, (step,), 132, table=TABLE)
            scratch = compilation.rehearse_job(job, lambda *launch, to=launched: to.append(launch))
            for kernel, args, options, label in launched:
                if compilation.variant_key(kernel, args, options) not in found.launches:
                    missing.append(f"{kernel.fn.__name__} {label}")
            if step[0] <= 64:
                missing += [f"{owner} {step}" for owner, size in scratch.items() if size > found.scratch[owner]]
    assert all(job.table == TABLE for job in found.jobs), "processes that compile get the table with the job"
    return len(found.launches.keys() - plain.launches.keys()), missing


def test_the_warm_up_plans_for_what_the_table_says(seed: int) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), compilation.use_target, (120,)) as pool:
        changed, missing = pool.submit(_unplanned, seed).result()
    assert changed >= len(TABLE)
    assert not missing


def _any_config(
    family: tuned.Family[Any], rng: random.Random, shape: tuned.Shape, rows: int, kernel: str | None
) -> Any:
    """A configuration that the family accepts, of one of its kernels where it has several."""
    powers = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    values: dict[str, list[Any]] = {
        "kernel": [kernel], "split": [1, 1, 1, 2, 4], "stages": [1, 2, 3],
        "evict_first": [False, True], "bk": [32, 64, 128, *[512] * 3], "tile": [1024, 2048, 4096], "warps": [2, 4, 8],
        "tokens": [2, 4, 8, 16], "rows": [32, 64, 128], "stream": [False, True], "fp8": [False, True],
        "warps_again": [0, 2, 4, 8],
    }  # fmt: skip
    while True:
        config = family.config(*(rng.choice(values.get(name, powers)) for name in family.config._fields))
        if family.refusal(shape, rows, config) is None:
            return config


def _close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (got.double() - expected.double()).square().mean().sqrt()
    return bool(error <= 1e-2 * expected.double().square().mean().sqrt())


@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        *(("fp8_linear", kernel) for kernel in ("gemv", "few", "many", "tma")),
        *((op, None) for op in ("mxfp4_moe", "nvfp4_moe", "topk_slots", "indexer_logits")),
    ],
)
def test_no_accepted_configuration_gives_wrong_results(op: str, kernel: str | None, turn: int, seed: int) -> None:
    """At small sizes, without a GPU in the interpreter."""
    rng, make = random.Random(seed), Inputs(DEVICE, seed)
    rows = rng.choice([1, 2, 5] if kernel == "few" else [1, 2, 5, 17])
    arguments: dict[str, Any]
    if op == "fp8_linear":
        n, k = rng.choice([(200, 512), (384, 512)] if kernel == "tma" else [(200, 500), (384, 512)])
        scale = make.e8m0(-(-n // 128), -(-k // 128)).float()
        arguments = {"x": make.bf16(rows, k), "w": make.fp8(n, k), "scale": scale}
    elif op in ("mxfp4_moe", "nvfp4_moe"):
        experts, hidden, inter, rows = 6, 256, 128, min(rows, 5)
        arguments = {
            "x": make.bf16(rows, hidden), "topk_ids": make.distinct(rows, 3, experts),
            "topk_weights": make.normal(rows, 3).abs(), "w13": make.integers(0, 256, experts, 2 * inter, hidden // 2),
            "s13": make.e8m0(experts, 2 * inter, hidden // 32, around=-7), "limit": 1.0,
            "w2": make.integers(0, 256, experts, hidden, inter // 2),
            "s2": make.e8m0(experts, hidden, inter // 32, around=-7),
        }  # fmt: skip
        arguments |= {name: arguments[name].to(torch.uint8) for name in ("w13", "w2")}
        if op == "nvfp4_moe":
            arguments["s13"] = make.fp8(experts, 2 * inter, hidden // 16)
            arguments["s2"] = make.fp8(experts, hidden, inter // 16)
            arguments |= {"g13": make.normal(experts, 2, scale=0.01), "g2": make.normal(experts, scale=0.01)}
    else:
        pages = 40
        table = {"page_table": make.distinct(rows, pages, pages), "lengths": make.integers(0, 64 * pages + 1, rows)}
        arguments = {"logits": make.normal(rows, 64 * pages), **table, "k": 300, "page_size": 64}
        if op == "indexer_logits":
            pool = make.indexer_pool(64 * pages)
            arguments = {"q": make.fp8(rows, 16, 128), "weights": make.normal(rows, 16), "pages": pool, **table}
    expected = registry.ops()[op].reference(**arguments)
    recorder = Recorder(rng, kernel)
    with tuned.using(recorder):
        got = registry.ops()[op].by("triton", **arguments)
    assert recorder.given, "no table was asked"
    if op == "topk_slots":
        assert torch.equal(got, expected), recorder.given
    elif op == "indexer_logits":
        live = expected.isfinite()
        assert torch.equal(live, got.isfinite()) and _close(got[live], expected[live]), recorder.given
    else:
        assert _close(got, expected), recorder.given


class Recorder(dict[tuned.Key, Any]):
    """A table with a random accepted configuration, of `kernel` if given, for whatever is asked."""

    def __init__(self, rng: random.Random, kernel: str | None) -> None:
        super().__init__()
        self.rng, self.kernel = rng, kernel
        self.given: list[Any] = []

    def get(self, key: tuned.Key, default: Any = None) -> Any:
        name, shape, rows = key
        self.given.append(_any_config(tuned.FAMILIES[name], self.rng, shape, rows, self.kernel))
        return self.given[-1]


def test_every_family_is_registered_by_the_ops() -> None:
    assert {family for spec in ops.SPECS.values() for family in spec.tunables} == set(tuned.FAMILIES)
    experts = {f"{op}.{kernel}" for op in ("mxfp4_moe", "nvfp4_moe") for kernel in ("gate_up", "down")}
    assert set(tuned.FAMILIES) == {"linear", "indexer_logits", "topk_slots"} | experts
