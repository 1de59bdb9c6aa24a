"""The benchmark of loading: the checkpoint it writes, the disk's rate, its figures, and a server on this machine."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open

import disk
import loading
import random_checkpoint
from sglang_sm120.checkpoint.config import ReferenceConfig, model_config
from sglang_sm120.checkpoint.layout import stored
from sglang_sm120_launch.model import Model
from sglang_sm120_reference.config_file import config_json

pytestmark = pytest.mark.needs_no_gpu


@pytest.fixture(scope="module")
def source() -> dict[str, Any]:
    """The small model without its last layer and its MTP layer."""
    whole = config_json(ReferenceConfig())
    four = {**whole, "num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4], "num_nextn_predict_layers": 0}
    return random_checkpoint.cut(whole, random_checkpoint.bytes_of(four) + 1)


@pytest.fixture
def files(source: dict[str, Any], tmp_path: Path) -> list[Path]:
    return random_checkpoint.write(tmp_path / "model", source, 2)


def test_the_checkpoint_is_a_published_one(source: dict[str, Any], files: list[Path]) -> None:
    """Names, shapes, dtypes and files; every number is finite, every file full of different bytes."""
    config = ReferenceConfig.from_json(json.loads((files[0].parent / "config.json").read_text()))
    assert config.num_hidden_layers == 4 and config.compress_ratios == (0, 4, 128, 4)
    index = json.loads((files[0].parent / random_checkpoint.INDEX).read_text())
    found = {}
    for i, file in enumerate(files):
        assert file.name == f"model-{i + 1:05d}-of-00006.safetensors"
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                tensor = opened.get_tensor(name)
                found[name] = (tuple(tensor.shape), tensor.dtype)
                assert index["weight_map"][name] == file.name
                assert tensor.float().isfinite().all(), name
                assert tensor.numel() < 1000 or tensor.flatten().view(torch.uint8)[:1000].unique().numel() > 6, name
                layer = int(name.split(".")[1]) + 2 if name.startswith("layers.") else 1 if "embed" in name else 6
                assert i + 1 == layer, name
    assert found == stored(config) and found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == random_checkpoint.bytes_of(source)
    # The launcher reads it as it reads a downloaded one.
    assert Model.load(str(files[0].parent)).config == source


def test_twenty_gigabytes_are_five_layers_of_flash() -> None:
    cut = random_checkpoint.cut(model_config(), 20e9)
    sizes = [sum(random_checkpoint._bytes(*one) for one in file.values()) for file in random_checkpoint.files_of(cut)]
    assert cut["num_hidden_layers"] == 5 and sum(sizes) == random_checkpoint.bytes_of(cut)
    # As published: the first file has 1,011 MiB, those of layers 3.4 GiB.
    assert len(sizes) == 7 and sizes[0] == pytest.approx(1010 * 2**20, rel=0.01) and sizes[1] > 3.5e9
    assert random_checkpoint.cut(model_config(), 1)["num_hidden_layers"] == 1


def test_the_page_cache_is_emptied_and_filled(files: list[Path]) -> None:
    assert disk.drop(files) == "POSIX_FADV_DONTNEED"
    assert disk.resident(files) == 0
    before = disk.from_device()
    disk.fill(files[1:2])
    part, whole = files[1].stat().st_size, sum(file.stat().st_size for file in files)
    assert disk.resident(files) == pytest.approx(part / whole, rel=0.05)
    assert before is not None and (disk.from_device() or 0) - before >= part


@pytest.mark.parametrize("direct", [True, False])
def test_every_byte_is_read_once(direct: bool, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of threads; the next measurement begins where one ended that ran out of time."""
    monkeypatch.setattr(disk, "BLOCK", 1 << 20)
    read: list[tuple[str, int]] = []
    true_read = os.preadv

    def preadv(opened: int, buffers: Any, place: int) -> int:
        read.append((os.readlink(f"/proc/self/fd/{opened}"), place))
        return true_read(opened, buffers, place)

    monkeypatch.setattr(os, "preadv", preadv)
    reader = disk.Reader(files)
    monkeypatch.setattr(reader, "_takes_direct", lambda: True)
    whole = [(str(file), place) for file in files for place in range(0, file.stat().st_size, 1 << 20)]
    for threads in (1, 3):
        read.clear()
        rate = reader.rate(threads, 60, direct)
        assert rate.bytes == sum(file.stat().st_size for file in files) and sorted(read) == whole
        assert rate.direct == direct and rate.gb_s == rate.bytes / rate.seconds / 1e9
    for begin in (0, 3, 6):
        read.clear()
        # A second between two looks: three blocks' time.
        monkeypatch.setattr(disk, "time", argparse.Namespace(monotonic=iter(range(9)).__next__))
        reader.rate(1, 3.5, direct)
        assert read == whole[begin : begin + 3]


def result(**loaders: list[float]) -> dict[str, Any]:
    rows = [{"threads": n, "direct": n < 9, "bytes": 8, "gb_s": n / 2, "device": 4} for n in (1, 8, 16)]
    loads = {
        name: [vars(loading.Load(one, 0.0, None, int(2e9 * one), int(5e9))) for one in seconds]
        for name, seconds in loaders.items()
    }
    about = {"bytes": 20e9, "files": 7, "file_system": "ext4", "emptied_by": "advice", "problems": ["it broke"]}
    return {**about, "disk": rows, "loaders": loads}


def test_a_loader_is_judged_by_the_disk() -> None:
    """By the median of its runs and the best rate past the page cache; from a full page cache it does not count."""
    found = result(default=[10.0, 5.0, 6.0], warm=[1.0], threads=[8.0], serial=[], ours=[5.5])
    assert loading.best(found["disk"]) == 4
    assert loading.shares(found) == pytest.approx({"default": 20 / 6 / 4, "threads": 20 / 8 / 4, "ours": 20 / 5.5 / 4})
    text = loading.table(found)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert rows["default"] == ["6.00", "±2.50", "3.33", "83%", "0%", "-", "20.0", "5.0"]
    assert rows["warm"][3] == "-" and "serial" not in rows
    assert "default, has 83% of the disk's rate: enough for 80%" in text and "problem: it broke" in text
    assert "has 62% of the disk's rate: too little for 80%" in loading.table(result(threads=[8.0]))
    for row in found["disk"]:
        row["direct"] = False
    assert loading.best(found["disk"]) == 8


def test_the_slowest_rank_counts() -> None:
    one = "[TP0] Load weight begin. avail mem=1 GB\n[TP0] Load weight end. elapsed=1.50 s, type=X\n"
    assert loading.seconds_of(one, 2) is None
    assert loading.seconds_of(one + "[TP1] Load weight end. elapsed=2.25 s, type=X\n", 2) == 2.25


def run(monkeypatch: pytest.MonkeyPatch, *words: Any) -> int:
    monkeypatch.setattr("sys.argv", ["loading.py", *map(str, words)])
    return loading.main()


def test_a_server_loads_the_checkpoint(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command: two servers started together, from the disk and from the page cache; nothing is left."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(source))
    words = ("--out", tmp_path / "out", "--folder", tmp_path / "new", "--config", config, "--runs", 1, "--ahead", 2)
    others = set(psutil.Process().children())
    assert run(monkeypatch, *words, "--loader", "prefetch", "warm") == 0
    kept = json.loads((tmp_path / "out/loading.json").read_text())
    (cold,), (warm,) = kept["loaders"].values()
    assert cold["cached"] == 0 and warm["cached"] == 1 and kept["bytes"] == random_checkpoint.bytes_of(source)
    assert kept["flags"]["prefetch"][0] == "--weight-loader-prefetch-checkpoints" and not kept["flags"]["warm"]
    assert warm["device"] < kept["bytes"] <= cold["device"]
    assert all(one["seconds"] > 0 and one["peak"] > kept["bytes"] for one in (cold, warm))
    assert "Some weights are not initialized" not in (tmp_path / "out/warm-0.log").read_text()
    assert not (tmp_path / "new").exists() and set(psutil.Process().children()) <= others
    assert "SGLang's best, prefetch, has" in capsys.readouterr().out


def test_a_server_that_dies_while_another_loads_costs_its_own_turn_alone(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[str] = []

    class Server:
        def __init__(self, turn: loading.Turn, *_: Any) -> None:
            self.turn = turn

        def wait_at_gate(self) -> None:
            if self.turn.loader == "prefetch":
                raise loading.ServerError("it ended")

        def stop(self) -> None:
            stopped.append(str(self.turn))

    monkeypatch.setattr(loading, "Server", Server)
    monkeypatch.setattr(loading, "loaded", lambda *_: loading.Load(1.0, 0.0, 1, 1, 1))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(source))
    words = ("--out", tmp_path / "out", "--folder", tmp_path / "new", "--config", config, "--runs", 2, "--ahead", 3)
    assert run(monkeypatch, *words, "--loader", "default", "prefetch", "warm", "--disk-seconds", 0.1) == 1
    kept = json.loads((tmp_path / "out/loading.json").read_text())
    assert {name: len(loads) for name, loads in kept["loaders"].items()} == {"default": 2, "prefetch": 0, "warm": 2}
    assert kept["problems"] == ["prefetch-0: it ended", "prefetch-1: it ended"]
    assert sorted(stopped) == ["default-0", "default-1", "prefetch-0", "prefetch-1", "warm-0", "warm-1"]


def test_memory_is_what_loading_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From when the log says that it begins: the most that two processes have together, mapped files left out."""
    monkeypatch.setattr(loading, "Child", lambda *_, **__: argparse.Namespace(status=lambda: None, pid=1))
    monkeypatch.setattr(loading.psutil, "Process", lambda _: argparse.Namespace(children=lambda recursive: [one, two]))
    monkeypatch.setattr(loading, "LOOK", 0)
    monkeypatch.setattr(disk, "from_device", lambda _: 0)
    one, two = (argparse.Namespace(pid=pid) for pid in (1, 2))
    end = f"{loading.BEGIN}\nLoad weight end. elapsed=1.50 s, type=X\n"
    logs = iter(["", loading.BEGIN, loading.BEGIN, loading.BEGIN, end])
    anonymous, shared = ({1: iter(row), 2: iter([10] * 4)} for row in ((100, 5, 60, 20), (0, 0, 7, 0)))
    peaks = iter([300, 9, 400, 9, 500, 600, 9, 9])
    monkeypatch.setattr(loading.Server, "_text", lambda _: next(logs))
    monkeypatch.setattr(loading, "_memory", lambda pid: {
        "RssAnon": next(anonymous[pid]), "RssShmem": next(shared[pid]), "VmHWM": next(peaks)
    })  # fmt: skip
    args = argparse.Namespace(tp=1, ready=60.0, out=tmp_path, folder=tmp_path)
    load = loading.Server(loading.Turn("default", 0), tmp_path, args).load(0.0)
    # 5 + 10 + 0 + 10 when it began, 60 + 10 + 7 + 10 at most.
    assert (load.host, load.peak, load.seconds) == (62, 600, 1.5)


def test_a_server_that_ends_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "Child", lambda *_, **__: argparse.Namespace(status=lambda: 1, stop=lambda _: None))
    args = argparse.Namespace(tp=1, ready=60.0, out=tmp_path, folder=tmp_path)
    server = loading.Server(loading.Turn("default", 0), tmp_path, args)
    with pytest.raises(loading.ServerError, match="ended and had to import"):
        server.wait_at_gate()


def test_bad_input_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--out", tmp_path / "out", "--folder", tmp_path) == 2
    assert "is there, needed a new folder" in capsys.readouterr().err and tmp_path.exists()
