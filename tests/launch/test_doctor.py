"""`doctor`: each check on machines, sites and checkpoints that differ in one fact, and the report as a whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest

from sglang_sm120_launch import checks, checks_software
from sglang_sm120_launch.checks import Finding, machine_checks
from sglang_sm120_launch.checks_checkpoint import checkpoint_checks
from sglang_sm120_launch.commands import doctor
from sglang_sm120_launch.machine import Gpu, Machine
from sglang_sm120_launch.model import INDEX
from sglang_sm120_reference.write import write_checkpoint

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = (CHECKOUT / "docs/doctor.md").read_text()
CARD = Gpu("NVIDIA RTX PRO 6000 Blackwell", 97887, "12.0")
TWO = Machine(
    gpus=(CARD, CARD), cpus=32, ram_mib=262144, shm_mib=131072, link="root", p2p=True, driver="595.10", cuda="13.2"
)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host on which every check passes, whatever the machine that runs the tests: its tools folder is returned."""
    tools = tmp_path / "bin"
    tools.mkdir()
    compiler = tools / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'release 13.0, V13.0.88'; echo compute_90; echo compute_120\n")
    for name in ("c++", "ninja"):
        (tools / name).write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    for name in ("CUDA_HOME", "CUDA_PATH", "SGLANG_SM120_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 100 * checks.GIB))  # type: ignore[attr-defined]
    return tools


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def statuses(machine: Machine, tmp_path: Path) -> dict[str, str]:
    return {f.name: f.status for f in machine_checks(machine, "127.0.0.1", free_port(), tmp_path / "cache")}


def test_a_good_host_passes(host: Path, tmp_path: Path):
    assert set(statuses(TWO, tmp_path).values()) == {"ok"}


FACTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "no GPU": (
        {"gpus": (), "link": None, "p2p": None, "driver": None, "cuda": None},
        {"gpu": "fail", "driver": "fail"},
    ),
    "H200": ({"gpus": (Gpu("NVIDIA H200", 143771, "9.0"),)}, {"gpu": "fail"}),
    "one stranger": ({"gpus": (CARD, Gpu("NVIDIA H200", 143771, "9.0"))}, {"gpu": "fail"}),
    "not alike": ({"gpus": (CARD, Gpu("NVIDIA GeForce RTX 5090", 32607, "12.0"))}, {"gpu": "warn"}),
    "GB10 and this nvcc": ({"gpus": (Gpu("NVIDIA GB10", 122570, "12.1", unified=True),)}, {"nvcc": "fail"}),
    "in use": ({"gpus": (CARD, dataclasses.replace(CARD, used_mib=20000))}, {"gpu-memory": "warn"}),
    "old driver": ({"driver": "570.10", "cuda": "12.8"}, {"driver": "fail"}),
    "no P2P": ({"p2p": False}, {"p2p": "warn"}),
    "IOMMU": ({"iommu": "translated"}, {"iommu": "warn"}),
    "IOMMU, one card": ({"iommu": "translated", "gpus": (CARD,)}, {}),
    "passthrough": ({"iommu": "passthrough"}, {}),
    "container": ({"shm_mib": 64}, {"shm": "fail"}),
    "little shm": ({"shm_mib": 8192}, {"shm": "warn"}),
}


@pytest.mark.parametrize("name", FACTS)
def test_one_fact_changes_only_its_checks(name: str, host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "_runtime_cuda", lambda: (13, 0))
    facts, expected = FACTS[name]
    found = statuses(dataclasses.replace(TWO, **facts), tmp_path)
    assert {check: status for check, status in found.items() if status != "ok"} == expected


@pytest.mark.parametrize(
    ("devices", "status"), [(None, "fail"), ("0,1", "ok"), ("2", "fail"), ("GPU-5a", "fail"), ("7", "fail")]
)
def test_hidden_cards_do_not_count(devices: str | None, status: str):
    machine = dataclasses.replace(TWO, gpus=(CARD, CARD, Gpu("NVIDIA H200", 143771, "9.0")))
    assert checks.gpu(doctor.visible(machine, devices), {}).status == status


def test_forced_onto_another_gpu(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGLANG_SM120_FORCE", "1")
    machine = dataclasses.replace(TWO, gpus=(Gpu("NVIDIA H200", 143771, "9.0"),) * 2)
    assert statuses(machine, tmp_path)["gpu"] == "warn"


@pytest.mark.parametrize(
    "damage", ["no nvcc", "nvcc that fails", "old nvcc", "CUDA_HOME without it", "no ninja", "no c++"]
)
def test_compilers(damage: str, host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(host))
    expected = "nvcc"
    if damage == "no nvcc":
        (host / "nvcc").unlink()
        # The last place looked at belongs to this machine.
        monkeypatch.setattr(checks.Path, "is_file", lambda self: False)
    elif damage == "nvcc that fails":
        (host / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    elif damage == "old nvcc":
        (host / "nvcc").write_text("#!/bin/sh\necho 'release 12.4, V12.4.1'; echo compute_90\n")
    elif damage == "CUDA_HOME without it":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    else:
        expected = "host-compiler"
        (host / damage.removeprefix("no ")).unlink()
    found = statuses(TWO, tmp_path)
    assert {check: status for check, status in found.items() if status != "ok"} == {expected: "fail"}


def test_a_compiler_that_hangs(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whichever of its two answers never comes: a failure in time, and what it started is gone."""
    monkeypatch.setattr(checks, "NVCC_SECONDS", 0.5)
    for text in ("sleep 61", "case $1 in --version) echo release 13.0;; *) sleep 61;; esac"):
        (host / "nvcc").write_text(f"#!/bin/sh\n{text}\n")
        began = time.monotonic()
        finding = checks.nvcc(TWO, os.environ)
        assert finding.status == "fail" and "does not run within" in finding.found
        assert time.monotonic() - began < 5
    assert not [one for one in psutil.process_iter(["cmdline"]) if one.info.get("cmdline") == ["sleep", "61"]]


def test_host_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rdma = dataclasses.replace(TWO, rdma=("rocep1s0f0:enp1s0f0np0",))
    assert checks.open_files(65535).status == checks.open_files(resource.RLIM_INFINITY).status == "ok"
    assert checks.open_files(4096).status == "warn"
    assert checks.locked_memory(8 << 20, TWO).status == "ok"
    assert checks.locked_memory(8 << 20, rdma).status == "warn"
    assert checks.locked_memory(resource.RLIM_INFINITY, rdma).status == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, checks.GIB))  # type: ignore[attr-defined]
    assert checks.disk(tmp_path / "not/there/yet").status == "warn"
    (tmp_path / "file").write_text("")
    for unwritable in (Path("/proc/kernels"), tmp_path / "file", tmp_path / "file/deeper"):
        finding = checks.disk(unwritable)
        assert finding.status == "fail" and "not writable" in finding.found and "TRITON_CACHE_DIR" in finding.do


def test_ports():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert checks.port_free("127.0.0.1", server.getsockname()[1]).status == "fail"
    for port in (0, 65536, 70000):
        assert "out of range" in checks.port_free("127.0.0.1", port).found
    assert checks.port_free("127.0.0.1", free_port()).status == "ok"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("damage", "status", "found"),
    [
        ("none", "ok", "applied"),
        ("released", "warn", "as released"),
        ("clean", "fail", "is not patched"),
        ("half", "fail", "only partly"),
        ("foreign", "fail", "neither as released nor as patched"),
        ("other version", "fail", "SGLang 0.5.12.post1 is installed"),
        ("no lock", "fail", "cannot be read"),
        ("bad lock", "fail", "damaged"),
    ],
)
def test_patch_state(damage: str, status: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beside a placed overlay SGLang has to be patched, beside a wheel of it as released or patched."""
    overlay = tmp_path / "sglang_sm120"
    files = {"sglang/a.py": ("a", "A"), "sglang/b.py": ("b", "B")}
    hashes = {n: {"before": sha256(b), "after": sha256(a)} for n, (b, a) in files.items()}
    for folder in ("sglang", "sglang_sm120"):
        (tmp_path / folder).mkdir()
    if damage != "released":
        (overlay / "series").mkdir()
    (overlay / "sglang.lock").write_text(json.dumps({"sglang": "0.5.23", "files": hashes}))
    for name, (before, after) in files.items():
        (tmp_path / name).write_text(before if damage in ("clean", "released") else after)
    if damage == "half":
        (tmp_path / "sglang/a.py").write_text("a")
    elif damage == "foreign":
        (tmp_path / "sglang/a.py").write_text("?")
    elif damage == "no lock":
        (overlay / "sglang.lock").unlink()
    elif damage == "bad lock":
        (overlay / "sglang.lock").write_text("{")
    version = "0.5.12.post1" if damage == "other version" else "0.5.23"
    monkeypatch.setattr(checks_software, "_find", {"sglang": Fake(version, [])}.get)
    finding = checks_software.patches(tmp_path / "sglang", overlay)
    assert (finding.status, found in finding.found) == (status, True), finding
    assert bool(finding.do) == (status != "ok")
    assert ("--enable-nvidia-megakernel" in finding.do) == (damage == "released")


def test_without_sglang(tmp_path: Path):
    finding = checks_software.patches(None, tmp_path)
    assert finding.status == "fail" and "not installed" in finding.found and "make apply" in finding.do
    assert checks_software.patches(None, None).status == "fail"


@pytest.fixture
def placed(tmp_path: Path) -> Distribution:
    """A distribution of one package with two files, as patchset places it."""
    info = tmp_path / "sglang_sm120-0.1.0.dist-info"
    (tmp_path / "sglang_sm120").mkdir()
    info.mkdir()
    lines = []
    for name in ("sglang_sm120/__init__.py", "sglang_sm120/ops.py"):
        (tmp_path / name).write_text(name)
        digest = checks_software.base64.urlsafe_b64encode(hashlib.sha256(name.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(name)}")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-sm120\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("\n".join([*lines, f"{info.name}/RECORD,,"]) + "\n")
    return PathDistribution(info)


def test_overlay(placed: Distribution, tmp_path: Path):
    package = tmp_path / "sglang_sm120"
    assert checks_software.overlay(placed, package).status == "ok"
    assert checks_software.overlay(None, None).status == "fail"
    assert checks_software.overlay(placed, tmp_path / "elsewhere/sglang_sm120").status == "warn"
    (package / "ops.py").write_text("edited")
    finding = checks_software.overlay(placed, package)
    assert finding.status == "fail" and "sglang_sm120/ops.py" in finding.found
    (package / "ops.py").unlink()
    assert checks_software.overlay(placed, package).status == "fail"


class Fake(Distribution):
    """A distribution that exists in a test only."""

    def __init__(self, version: str, requires: list[str]) -> None:
        self.text = f"Name: x\nVersion: {version}\n" + "".join(f"Requires-Dist: {line}\n" for line in requires)

    def read_text(self, filename: str) -> str | None:
        return self.text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return Path("/nowhere") / path


@pytest.mark.parametrize(
    ("triton", "status"),
    [("3.8.0", "ok"), ("3.8.0+git1", "ok"), ("3.8", "ok"), ("3.8.0.0", "ok"), ("3.6.0", "fail"), (None, "fail")],
)
def test_pins(triton: str | None, status: str, monkeypatch: pytest.MonkeyPatch):
    installed = {
        "sglang": Fake(
            "0.5.23", ["torch==2.14.1", "tqdm", "av==1; extra == 'video'", "decord2==1; sys_platform == 'x'"]
        ),
        "torch": Fake("2.14.1", ["triton==3.8.0", "sympy>=1.13", "networkx==2.*"]),
    } | ({"triton": Fake(triton, [])} if triton else {})
    monkeypatch.setattr(checks_software, "_find", installed.get)
    finding = checks_software.pins()
    assert finding.status == status, finding
    assert ("2 exact" in finding.found) if status == "ok" else ("triton" in finding.found and "3.8.0" in finding.found)


def test_software_of_this_environment():
    """The environment the tests run in has what it needs; NCCL's variables are shown."""
    assert checks_software.pins().status == "ok"
    assert checks_software.nccl({}).status == "ok"
    assert "NCCL_P2P_DISABLE=1" in checks_software.nccl({"NCCL_P2P_DISABLE": "1", "HOME": "/"}).found
    for version, status in (((3, 10), "fail"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "fail")):
        assert checks_software.python(version).status == status


@pytest.mark.parametrize(
    ("library", "status", "found"),
    [
        (("glibc", "2.34"), "ok", "2.34"),
        (("glibc", "2.41"), "ok", "2.41"),
        (("glibc", "2.31"), "fail", "2.31"),
        (("", ""), "fail", "not glibc"),
    ],
)
def test_glibc(library: tuple[str, str], status: str, found: str, monkeypatch: pytest.MonkeyPatch):
    """SGLang's wheel is manylinux_2_34; Python names no other."""
    assert checks_software.glibc().status == "ok", "SGLang is installed here"
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    finding = checks_software.glibc()
    assert finding.status == status and found in finding.found
    assert ("2.34 or newer" in finding.do) == (status == "fail")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    write_checkpoint(folder, shard_bytes=8 << 20)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def header_replaced(path: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    assert old in data[:size]
    path.write_bytes(data[:size].replace(old, new, 1) + data[size:])


def first_expert(folder: Path) -> tuple[Path, str]:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    name = "layers.0.ffn.experts.0.w1.weight"
    return folder / weight_map[name], name


def test_a_whole_checkpoint(checkpoint: Path):
    findings = list(checkpoint_checks(checkpoint))
    assert [(f.name, f.status) for f in findings] == [("checkpoint", "ok")], findings


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "is missing"),
    "shard cut short": (lambda f: os.truncate(first_expert(f)[0], 100_000), "bytes, its header says"),
    "shard empty": (lambda f: os.truncate(first_expert(f)[0], 0), "no readable safetensors header"),
    "tensor renamed": (
        lambda f: header_replaced(first_expert(f)[0], b"experts.0.w1.weight", b"experts.0.w9.weight"),
        "lacks layers.0.ffn.experts.0.w1.weight",
    ),
    "not in the index": (
        lambda f: edit(f / INDEX, lambda v: v["weight_map"].pop("norm.weight")),
        "does not have norm.weight",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), "cannot be read"),
    "index without map": (lambda f: edit(f / INDEX, lambda v: v.pop("weight_map")), "no weight_map"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "another model": (
        lambda f: edit(f / "config.json", lambda v: v.update(model_type="llama")),
        "type llama, needed deepseek_v4",
    ),
    "a weight of another dtype": (lambda f: header_replaced(first_expert(f)[0], b'"F8_E4M3"', b'"F8_E5M2"'), "F8_E5M2"),
    "an expert too few": (
        lambda f: edit(f / "config.json", lambda v: v.update(n_routed_experts=v["n_routed_experts"] + 1)),
        "nothing, needed",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint(name: str, checkpoint: Path):
    damage, sentence = DAMAGES[name]
    damage(checkpoint)
    [finding] = checkpoint_checks(checkpoint)
    assert finding.name == "checkpoint" and finding.status == "fail" and sentence in finding.found and finding.do


def schema() -> dict[str, Any]:
    block = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    found: dict[str, Any] = json.loads(block.group(1))
    return found


BARE = """
import sys
sys.path[:0] = {paths!r}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import argparse
from sglang_sm120_launch.commands import doctor
parser = argparse.ArgumentParser()
doctor.configure(parser)
code = doctor.run(parser.parse_args(sys.argv[1:]))
assert not {{"torch", "sglang", "triton"}} & sys.modules.keys()
sys.exit(code)
"""


@pytest.mark.parametrize("python", ["bare", "without torch and NVML"])
def test_on_a_poor_python(python: str, whole: Path):
    """No site-packages at all, and the project's environment without torch, triton and NVML: a report, exit 1 here."""
    paths = [str(CHECKOUT / "launch"), str(CHECKOUT / "overlay")]
    code = BARE.format(paths=paths, blocked=("torch", "triton", "pynvml"))
    command = [sys.executable, *(["-I", "-S"] if python == "bare" else []), "-c", code, "--json", "--model", str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    jsonschema.validate(report, schema())
    found = {check["name"]: check for check in report["checks"]}
    assert found["gpu"]["status"] == "fail" and "nvidia-ml-py is not installed" in found["gpu"]["found"]
    assert found["checkpoint"]["status"] == "ok"
    wanted = "fail" if python == "bare" else "ok"
    assert {found[name]["status"] for name in ("pins", "nccl")} == {wanted}, found


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    parser = doctor.argparse.ArgumentParser()
    doctor.configure(parser)
    code = doctor.run(parser.parse_args(arguments))
    return code, capsys.readouterr().out


def test_report_of_this_machine(whole: Path, capsys: pytest.CaptureFixture[str]):
    """The JSON fits its schema, and its checks are those of the page; the table says the same."""
    port = str(free_port())
    code, text = run("--json", "--port", port, "--model", str(whole), capsys=capsys)
    report = json.loads(text)
    jsonschema.validate(report, schema())
    assert code == (1 if report["status"] == "fail" else 0)
    names = [check["name"] for check in report["checks"]]
    assert names == re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, re.MULTILINE)
    _, table = run("--port", port, capsys=capsys)
    for check in report["checks"]:
        if check["name"] != "checkpoint":
            assert f"{check['status']:<4}  {check['name']:<13}  " in table


@pytest.mark.skipif("Machine.detect().gpus", reason="this machine has a GPU")
def test_this_machine_lacks_a_gpu(capsys: pytest.CaptureFixture[str]):
    code, text = run("--json", capsys=capsys)
    failed = {check["name"] for check in json.loads(text)["checks"] if check["status"] == "fail"}
    assert code == 1 and {"gpu", "driver"} <= failed


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r.update(schema=2), "1 was expected"),
        (lambda r: r["checks"][0].pop("do"), "'do' is a required property"),
        (lambda r: r["checks"][0].update(do=""), "non-empty|too short"),
        (lambda r: r["checks"][0].update(status="skip"), "is not one of"),
        (lambda r: r.update(extra=1), "Additional properties"),
    ],
)
def test_the_schema_rejects(change: Callable[[Any], object], problem: str):
    report = doctor.report([Finding("gpu", "fail", "none", "buy one")] * 18)
    jsonschema.validate(report, schema())
    change(report)
    with pytest.raises(jsonschema.ValidationError, match=problem):
        jsonschema.validate(report, schema())


@pytest.mark.parametrize(("kinds", "status"), [("ok", "ok"), ("ok warn", "warn"), ("warn fail ok", "fail"), ("", "ok")])
def test_the_worst_check_decides(kinds: str, status: str):
    assert doctor.worst([Finding("x", kind, "y") for kind in kinds.split()]) == status  # type: ignore[arg-type]
