"""`configs/`, and what a user is told who makes a mistake: one sentence, status 2, no traceback."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pynvml
import pytest
import yaml
from golden_plans import HERE, MACHINES, machine
from telling import refused

from sglang_sm120.checkpoint.config import FLASH
from sglang_sm120_launch import cli, request
from sglang_sm120_launch.config import Config
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.flags import Flags
from sglang_sm120_launch.machine import Gpu, Machine
from sglang_sm120_launch.model import INDEX, Model
from sglang_sm120_launch.plan import make_plan
from sglang_sm120_launch.values import Request

CONFIGS = sorted((HERE.parents[1] / "configs").glob("*.yaml"))
MADE_FOR = {
    "deepseek-v4-flash.1x-rtx-pro-6000.tp1.yaml": "1x-rtx-pro-6000",
    "deepseek-v4-flash.2x-gb10.tp2.yaml": "gb10-pair",
    "deepseek-v4-flash.2x-h200.tp2.yaml": "2x-h200",
    "deepseek-v4-flash.2x-rtx-pro-6000.tp2.yaml": "2x-rtx-pro-6000",
    "deepseek-v4-flash.4x-rtx-pro-6000.tp4.yaml": "4x-rtx-pro-6000",
    "deepseek-v4-flash.8x-rtx-5090.tp8.yaml": "8x-rtx-5090",
    "deepseek-v4-small.cpu.tp1.yaml": "no-gpu",
}
TWO = str(HERE / "machines" / "2x-rtx-pro-6000.json")
INSTALLED = Flags.installed
pytestmark = pytest.mark.usefixtures("one_flags")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint."""
    from sglang_sm120_reference.write import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("model") / "small", shard_bytes=1 << 22)


def test_every_config_is_tried():
    assert [path.name for path in CONFIGS] == sorted(MADE_FOR)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    """The plan on the machine it is for parses, has the fixed values and every decided one, and says why."""
    place = HERE / "machines" / f"{MADE_FOR[path.name]}.json"
    words = ["plan", "--json", "--config", str(path), "--machine", str(place)]
    if ".cpu." in path.name:
        words += ["--model", str(checkpoint)]
    status = cli.main(words)
    out, err = capsys.readouterr()
    if ".1x-rtx-pro-6000." in path.name:
        assert status == 2 and "use 2 such cards" in err and told(path) == gib(err)[:2]
        return
    assert status == 0, err
    plan, config = json.loads(out), yaml.safe_load(path.read_text())
    values = {entry["name"]: entry["value"] for entry in plan["settings"]}
    assert config["server"].items() <= values.items()
    assert values.keys() - {"model-path"} <= {*config["server"], *config["auto"], *config["env"], *VARIABLES}
    assert set(config["auto"]) <= values.keys() | OPTIONAL
    assert plan["evidence"] == config["evidence"]
    assert f"tp{values['tp-size']}" in path.name
    [static] = [entry["reason"] for entry in plan["settings"] if entry["name"] == "mem-fraction-static"] or [""]
    assert not told(path) or told(path) == gib(static)


def gib(text: str) -> list[str]:
    """The figures in GiB that a text has."""
    return re.findall(r"[\d.]+ GiB", text)


def told(path: Path) -> list[str]:
    """Those in a config's comments of weights and of what a card leaves."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return gib(" ".join(line for line in lines if "eights and scratch" in line))


VARIABLES = {"NCCL_P2P_DISABLE", "SGLANG_ENABLE_PCIE_IPC_ALLREDUCE", "SGLANG_SM120_LOADER"}
"""What the plan adds to a config's own variables on these machines."""
OPTIONAL = {
    "enable-p2p-check", "disable-custom-all-reduce", "enable-nvidia-megakernel", "disable-prefill-cuda-graph",
}  # fmt: skip
"""Decided for several cards only, where SGLang is not patched, and where the step takes prefill."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_nothing_is_measured_where_no_card_was(path: Path):
    """No SM120 or SM121 machine was available: such a config cannot claim more than emulation."""
    config = yaml.safe_load(path.read_text())
    if config["needs"].get("compute_capability", "").startswith("12."):
        assert not config["evidence"].startswith("measured")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_refused_elsewhere(path: Path, flags: Flags):
    """Every machine that has not the cards it is for, the driver or the memory."""
    config = Config.load(path, flags)
    fit = 0
    for name in MACHINES:
        try:
            config.require(machine(name))
            fit += 1
        except LaunchError as refusal:
            assert path.name in str(refusal)
    assert 1 <= fit < len(MACHINES) or config.target.gpu == "none"


def changed(make: Callable[[dict[str, Any]], object]) -> Callable[[Path], str]:
    """A config like that for two RTX PRO 6000, with a mistake."""

    def write(folder: Path) -> str:
        [source] = (path for path in CONFIGS if ".2x-rtx-pro-6000." in path.name)
        config = yaml.safe_load(source.read_text())
        make(config)
        (folder / "mine.yaml").write_text(yaml.safe_dump(config))
        return str(folder / "mine.yaml")

    return write


CONFIG_MISTAKES: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "a typo in a flag": (
        changed(lambda c: c["server"].update({"contxt-length": 1})),
        ("contxt-length", "context-length"),
    ),
    "a typo in auto": (
        changed(lambda c: c["auto"].append("cuda-graph-sb-decode")),
        ("cuda-graph-sb-decode", "cuda-graph-bs-decode"),
    ),
    "a missing key": (changed(lambda c: c.pop("needs")), ("no key 'needs'",)),
    "an unknown key": (changed(lambda c: c.update({"serverr": {}})), ("unknown key 'serverr'",)),
    "an unknown GPU": (changed(lambda c: c["for"].update({"gpu": "RTX 6090"})), ("RTX 6090", "RTX 5090")),
    "half a card": (changed(lambda c: c["for"].update({"cards": 0.5})), ("for.cards=0.5",)),
    "a flag twice": (changed(lambda c: c["auto"].append("tp-size")), ("tp-size", "both")),
    "a made-up evidence": (
        changed(lambda c: c.update({"evidence": "measured"})),
        ("evidence='measured'", r"measured) \(.+\)"),
    ),
    "a choice SGLang refuses": (
        changed(lambda c: c["server"].update({"load-format": "x"})),
        ("load-format", "choose from"),
    ),
    "a nested value": (changed(lambda c: c["server"].update({"load-format": {"a": 1}})), ("load-format",)),
    "another machine": (changed(lambda c: c["for"].update({"gpu": "H200"})), ("2 x H200", "RTX PRO 6000")),
    "an old driver": (changed(lambda c: c["needs"].update({"driver": 999})), ("999", "580.95.05")),
    "more memory": (changed(lambda c: c["needs"].update({"memory_mib": 99000})), ("99000", "97887")),
    "no YAML": (lambda folder: _write(folder / "mine.yaml", "a: [1"), ("not YAML",)),
    "no file": (lambda folder: str(folder / "absent.yaml"), ("absent.yaml", "No such file")),
}


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_what_is_in_neither_list_keeps_sglangs_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Only the model, what the config fixes and what it leaves to the plan are passed."""
    config = changed(lambda c: c.update({"auto": ["context-length"]}))(tmp_path)
    assert cli.main(["plan", "--json", "--config", config, "--machine", TWO]) == 0
    entries = json.loads(capsys.readouterr().out)["settings"]
    flags = {entry["name"] for entry in entries if entry["kind"] == "flag"}
    assert flags == {"model-path", "tp-size", "context-length"}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_mistake_in_a_config(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Names what was found and what was needed."""
    write, parts = CONFIG_MISTAKES[mistake]
    sentence = refused(["plan", "--config", write(tmp_path), "--machine", TWO], capsys)
    assert all(part in sentence for part in parts), sentence


WORD_MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a typo": (["--", "--contxt-length", "1"], ("--contxt-length", "--context-length")),
    "a missing value": (["--", "--context-length"], ("--context-length", "expected one argument")),
    "a word for a number": (["--", "--context-length", "long"], ("--context-length", "'long'")),
    "a flag of SGLang's before the dashes": (["--context-length", "8192"], ("--context-length", "come after `--`")),
    "a value for a switch": (["--", "--enable-metrics", "1"], ("'1'", "switch")),
    "a value joined to a switch": (["--", "--enable-metrics=1"], ("--enable-metrics", "'1'")),
    "two flags that begin so": (["--", "--speculative-num", "1"], ("--speculative-num", "could match")),
    "no flag": (["--", "65536"], ("'65536'",)),
    "a card that is not there": (["--gpus", "0,2"], ("0,2", "0 to 1")),
    "a card twice": (["--gpus", "1,1"], ("1,1",)),
    "a CPU device with cards": (["--", "--device", "cuda", "--tp", "16"], ("TP 16",)),
}


@pytest.mark.parametrize("mistake", WORD_MISTAKES)
def test_a_mistake_on_the_command_line(mistake: str, capsys: pytest.CaptureFixture[str]):
    """Our own words, not SGLang's usage text."""
    words, parts = WORD_MISTAKES[mistake]
    sentence = refused(["plan", "--machine", TWO, "--model", FLASH, *words], capsys)
    assert all(part in sentence for part in parts), sentence


_TWO = json.loads(Path(TWO).read_text())
MACHINE_MISTAKES: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "not JSON"),
    "no object": ([], "has []"),
    "no key": ({"gpus": [], "cpus": 1, "ram_mib": 1}, "'shm_mib'"),
    "an unknown key": ({"gpus": [], "cpus": 1, "ram_mib": 1, "shm_mib": 1, "shm": 1}, "'shm'"),
    "a word for a number": ({"gpus": [], "cpus": "many", "ram_mib": 1, "shm_mib": 1}, "'many'"),
    "an unknown link": ({"gpus": [], "cpus": 1, "ram_mib": 1, "shm_mib": 1, "link": "rope"}, "'rope'"),
    "no cores": ({**_TWO, "cpus": 0}, "cpus=0, needed 1 or more"),
    "no hosts": ({**_TWO, "nodes": 0}, "nodes=0"),
    "a capability in words": (
        {**_TWO, "gpus": [{**gpu, "compute_capability": "twelve"} for gpu in _TWO["gpus"]]}, "'twelve'",
    ),
    "CUDA without a point": ({**_TWO, "cuda": "13"}, "cuda='13'"),
    "a device without an interface": ({**_TWO, "rdma": ["mlx5_0"]}, "device:interface"),
    "cards without a link": (
        {**_TWO, "link": None, "p2p": None},
        "how they connect",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MACHINE_MISTAKES)
def test_a_mistake_in_a_machine(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A description is checked key by key."""
    content, part = MACHINE_MISTAKES[mistake]
    file = _write(tmp_path / "m.json", content if isinstance(content, str) else json.dumps(content))
    assert part in refused(["plan", "--machine", file, "--model", FLASH], capsys)


@pytest.mark.parametrize("name", MACHINES)
def test_machines_survive_json(name: str, tmp_path: Path):
    """`to_json` writes what `from_json` reads."""
    file = tmp_path / "m.json"
    file.write_text(machine(name).to_json())
    assert Machine.from_json(file) == machine(name)


def test_this_machine_is_described(tmp_path: Path):
    """Detection needs no GPU and its result survives JSON."""
    found = Machine.detect()
    assert found.cpus >= 1 and found.ram_mib > 1000
    (tmp_path / "m.json").write_text(found.to_json())
    assert Machine.from_json(tmp_path / "m.json") == found


class FakeNvml:
    """NVML as two cards answer it, with its library's own constants; `silent` names functions that say they are not
    supported."""

    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = pynvml.NVML_P2P_CAPS_INDEX_NVLINK, pynvml.NVML_P2P_STATUS_OK
    NVML_P2P_CAPS_INDEX_READ = pynvml.NVML_P2P_CAPS_INDEX_READ
    NVML_P2P_CAPS_INDEX_WRITE = pynvml.NVML_P2P_CAPS_INDEX_WRITE
    NVML_TOPOLOGY_MULTIPLE, NVML_TOPOLOGY_NODE = pynvml.NVML_TOPOLOGY_MULTIPLE, pynvml.NVML_TOPOLOGY_NODE

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, level: int = 10, p2p: bool = True, nvlink: bool = False, silent: tuple[str, ...] = ()) -> None:
        self.level, self.p2p, self.nvlink, self.silent = level, p2p, nvlink, silent

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answers = {
            "nvmlDeviceGetCount": 2, "nvmlDeviceGetHandleByIndex": 0, "nvmlSystemGetCudaDriverVersion": 13000,
            "nvmlSystemGetDriverVersion": "580.95.05", "nvmlDeviceGetCudaComputeCapability": (12, 0),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=97887 << 20, used=5 << 20),
            "nvmlDeviceGetEnforcedPowerLimit": 600000, "nvmlDeviceGetName": "NVIDIA RTX PRO 6000",
            "nvmlDeviceGetTopologyCommonAncestor": self.level,
        }  # fmt: skip

        def call(*arguments: Any) -> Any:
            if name in self.silent:
                raise self.NVMLError_NotSupported
            if name == "nvmlDeviceGetP2PStatus":
                ctypes.c_int(arguments[2])  # the library converts it so
                return 0 if (self.nvlink if arguments[2] == self.NVML_P2P_CAPS_INDEX_NVLINK else self.p2p) else 3
            return answers[name]

        return call


@pytest.mark.parametrize(
    ("nvml", "expected"),
    {
        "switch": (FakeNvml(), ("switch", True)),
        "root ports": (FakeNvml(level=30), ("root", True)),
        "sockets, no access": (FakeNvml(level=50, p2p=False), ("system", False)),
        "NVLink": (FakeNvml(nvlink=True), ("nvlink", True)),
        "a silent driver": (
            FakeNvml(silent=("nvmlDeviceGetP2PStatus", "nvmlDeviceGetTopologyCommonAncestor")),
            ("system", False),
        ),
    }.values(),
)
def test_cards_are_detected(nvml: FakeNvml, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch):
    """Names, memory, driver and links as NVML gives them."""
    monkeypatch.setattr("sglang_sm120_launch.machine._nvml", lambda: contextlib.nullcontext(nvml))
    found = Machine.detect()
    assert (found.link, found.p2p) == expected
    assert (found.driver, found.cuda) == ("580.95.05", "13.0")
    assert found.gpus == (Gpu("NVIDIA RTX PRO 6000", 97887, "12.0", 5, 600),) * 2


def test_unified_memory_is_the_hosts(monkeypatch: pytest.MonkeyPatch):
    """GB10 has none of its own, and NVML says so."""
    nvml = FakeNvml(silent=("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetEnforcedPowerLimit"))
    monkeypatch.setattr("sglang_sm120_launch.machine._nvml", lambda: contextlib.nullcontext(nvml))
    found = Machine.detect()
    assert all(gpu.unified and gpu.memory_mib == found.ram_mib and gpu.power_limit_w is None for gpu in found.gpus)


def test_index_and_config_agree_on_the_weights(checkpoint: Path):
    """What the shards' headers say is what config.json lets expect."""
    from_index = Model.load(str(checkpoint))
    (checkpoint / INDEX).rename(checkpoint / "aside")
    try:
        from_config = Model.load(str(checkpoint))
    finally:
        (checkpoint / "aside").rename(checkpoint / INDEX)
    assert from_index.tensors == from_config.tensors


@pytest.fixture
def no_sglang(one_flags: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no SGLang, and so no package data of it."""
    monkeypatch.setattr(Flags, "installed", INSTALLED)
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))


@pytest.mark.usefixtures("no_sglang")
def test_without_sglang_the_table_checks_the_flags(capsys: pytest.CaptureFixture[str]):
    """A plan can be made there, and a mistake is told; a server cannot be started."""
    words = ["plan", "--model", FLASH, "--machine", TWO, "--"]
    assert cli.main([*words, "--context-length", "65536"]) == 0
    assert "--context-length 65536" in capsys.readouterr().out
    assert "choose from" in refused([*words, "--load-format", "x"], capsys)
    assert "SGLang is not installed" in refused(["serve", *words[1:]], capsys)


@pytest.mark.parametrize("patched", (True, False))
def test_an_unpatched_sglang_is_noticed(
    patched: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The step needs its flag on a GPU, and a CPU the series."""
    monkeypatch.setattr("sglang_sm120_launch.request.is_patched", lambda: patched)
    assert cli.main(["plan", "--model", FLASH, "--machine", TWO]) == 0
    assert ("--enable-nvidia-megakernel" in capsys.readouterr().out) != patched
    place = str(HERE / "machines" / "no-gpu.json")
    assert cli.main(["plan", "--model", str(checkpoint), "--machine", place]) == 0
    assert ("make apply" in capsys.readouterr().out) != patched


@pytest.mark.usefixtures("no_sglang")
def test_where_sglang_is_not_installed_it_will_be_patched(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["plan", "--model", FLASH, "--machine", TWO]) == 0
    assert "--enable-nvidia-megakernel" not in capsys.readouterr().out


def test_a_config_does_not_hide_mtp(capsys: pytest.CaptureFixture[str]):
    """Asked for on the command line: its flags are passed though the config does not list them."""
    [path] = (path for path in CONFIGS if ".2x-rtx-pro-6000." in path.name)
    words = ["plan", "--json", "--config", str(path), "--machine", TWO]
    drafts = []
    for extra in ([], ["--mtp"]):
        assert cli.main([*words, *extra]) == 0
        names = {entry["name"] for entry in json.loads(capsys.readouterr().out)["settings"]}
        drafts.append({name for name in names if name.startswith("speculative-")})
    assert drafts[0] == set() and len(drafts[1]) == 4


def test_drafts_on_a_cpu(checkpoint: Path, flags: Flags, capsys: pytest.CaptureFixture[str]):
    """SGLang 0.5.23 speculates there too; its flags parse, and the draft model is in the budget."""
    place = str(HERE / "machines" / "no-gpu.json")
    assert cli.main(["plan", "--model", str(checkpoint), "--machine", place, "--mtp", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    values = {entry["name"]: entry["value"] for entry in plan["settings"]}
    assert values["speculative-algorithm"] == "EAGLE"
    assert {"draft model", "wo_a FP8 (the step)"} <= {line["what"] for line in plan["budget_bytes"]}
    flags.check(plan["command"][plan["command"].index("sglang.launch_server") + 1 :])


def test_the_environment_counts_on_this_machine_only(monkeypatch: pytest.MonkeyPatch):
    """CUDA_VISIBLE_DEVICES limits the cards, a variable the user has set stays."""
    four = machine("4x-rtx-pro-6000")
    monkeypatch.setattr(Machine, "detect", classmethod(lambda cls: four))
    parser = argparse.ArgumentParser()
    request.configure(parser)
    environment = {"CUDA_VISIBLE_DEVICES": "2,3", "NCCL_P2P_DISABLE": "1", "HOME": "/"}
    wanted = request.read(parser.parse_args(["--model", FLASH]), environment)
    plan = make_plan(wanted.machine, wanted.model, wanted.request)
    assert plan.value("tp-size") == 2 and plan.environment()["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert plan.environment()["NCCL_P2P_DISABLE"] == "1" and "HOME" not in plan.environment()
    other = request.read(parser.parse_args(["--model", FLASH, "--machine", TWO]), environment)
    assert other.request == replace(Request())
