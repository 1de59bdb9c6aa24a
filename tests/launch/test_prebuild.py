"""`prebuild` with compilers that write empty files: what it builds, finds again and reports; a server finds it too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import trace_modules

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120_launch import modules
from sglang_sm120_launch.cli import main
from sglang_sm120_launch.commands import serve

CALLS, FAILS = "FAKE_COMPILER_CALLS", "FAKE_COMPILER_FAILS"
COMPILER = r"""#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;; esac
compile= out= dep= source=
while [ $# -gt 0 ]; do
    case "$1" in -c) compile=1 ;; *.cu) source="$1" ;; -o) out="$2" ;; -MF) dep="$2" ;; esac
    shift
done
if [ -n "$compile" ]; then echo "$PWD $out" >> "$FAKE_COMPILER_CALLS"; fi
for word in $FAKE_COMPILER_FAILS; do
    case "$PWD $out" in *"$word"*) echo "error: the source of $word is wrong"; exit 1 ;; esac
done
: > "$out"
read_too() { sed -n 's/^#include "\(\/.*\)"$/\1/p' "$source" | tr '\n' ' '; }
if [ -n "$dep" ] && [ -n "$source" ]; then echo "$out: $source $(read_too)" > "$dep"; fi
"""
CARD = """
import torch
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda *_: "card"
torch.cuda.device_count, torch.cuda.current_device = lambda: 1, lambda: 0
torch.cuda.get_device_capability = lambda *_: (12, 0)
import sglang
from sglang_sm120 import hooks
hooks.register()
from flashinfer.jit import core, sampling
from sglang.kernels.jit.utils.compile import loader
from sglang.kernels.ops.moe import dsv4
loader._load = core.JitSpecNvcc.load = lambda library: library
"""
SERVER = CARD + """
for _ in range(2):
    sampling.gen_sampling_module().build_and_load()
    dsv4._jit_hash_topk_module.__wrapped__()
"""
"""Asks twice for a module of each, on a card that torch seems to have; the second time both are found."""
AHEAD = CARD + """
import json, sys
from sglang_sm120.step import modules
sampling.get_sampling_module = sampling.gen_sampling_module().build_and_load
with modules.late_ones(*json.loads(sys.argv[1])):
    print("as long as others are made")
"""


class Place:
    """A home directory with a toolkit in it."""

    def __init__(self, folder: Path) -> None:
        self.home, self.calls = folder, folder / "calls"
        for name in ("nvcc", "c++"):
            file = folder / "cuda/bin" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(COMPILER)
            file.chmod(0o755)
        self.environment = {
            **os.environ, "HOME": str(folder), "CUDA_HOME": str(folder / "cuda"), "CXX": str(folder / "cuda/bin/c++"),
            CALLS: str(self.calls), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2] / "launch"),
            # The lock has a ninja.
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        }  # fmt: skip
        places = ("SGLANG_JIT_CACHE_DIR", "SGLANG_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")
        for name in (*places, "FLASHINFER_CUDA_ARCH_LIST", "CC"):
            self.environment.pop(name, None)

    def run(self, command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], env=self.environment | variables, capture_output=True, text=True, timeout=600
        )

    def prebuild(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(("-m", "sglang_sm120_launch", "prebuild", *words), **variables)

    def compiled(self) -> list[str]:
        """What the compilers were called for since the last time."""
        found = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def shipped() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(trace_modules.LIST.read_text())
    return found


def test_the_list_is_of_the_installed_packages():
    found = shipped()
    assert {name: found[name] for name in ("sglang", "flashinfer-python")} == {
        name: version(name) for name in ("sglang", "flashinfer-python")
    }
    assert set(found["cards"]) == set(trace_modules.ARCHS)
    for entries in found["cards"].values():
        names = [entry["name"] for entry in entries]
        assert names == sorted(set(names))
        assert set().union(*(entry["runs"] for entry in entries)) == set(trace_modules.RUNS)
        assert '"/' not in json.dumps(entries), "a path of the machine that traced"
        for entry in entries:
            if "generator" in entry:
                module, _, function = entry["generator"].partition(":")
                signature(getattr(import_module(module), function)).bind(**entry["arguments"])
    assert {"fused_moe_120", "sparse_mla_sm120"} <= {entry["name"] for entry in found["cards"]["sm120"]}


def test_what_a_run_asks_for_is_in_the_list(thorough: bool):
    if not thorough:
        pytest.skip("SGLang's scheduler on a card that is not there, for some minutes: make test-launch")
    for name, run in trace_modules.RUNS.items():
        listed = {entry["name"]: entry for entry in modules.listed(120) if name in entry["runs"]}
        found = trace_modules.traced("sm120", run)
        assert found == {key: {k: v for k, v in entry.items() if k != "runs"} for key, entry in listed.items()}, name


def test_all_of_it_is_built_once(place: Place, monkeypatch: pytest.MonkeyPatch):
    names = [entry["name"] for entry in modules.listed(120)]
    first = place.prebuild("--arch", "sm120", "--jobs", "3")
    assert first.returncode == 0, first.stdout + first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].startswith(f"{len(names)} of {len(names)} modules have to be built, 3 compilers")
    assert sorted(line.split()[1].rstrip(",") for line in lines[1:-1]) == names
    assert lines[-2].startswith(f"[{len(names)}/{len(names)}] ") and lines[-1].startswith(f"{len(names)} of")
    assert sum("fused_moe_120" in call for call in place.compiled()) > 90
    second = place.prebuild("--arch", "sm120")
    assert second.returncode == 0 and len(second.stdout.splitlines()) == 1, second.stdout + second.stderr
    assert place.compiled() == []
    listing = place.prebuild("--arch", "sm120", "--list").stdout.splitlines()
    assert [line.split() for line in listing] == [["built", name] for name in names]

    # What `serve` asks before it starts a server.
    monkeypatch.setattr(Path, "home", lambda: place.home)
    monkeypatch.setenv("HOME", str(place.home))
    began = time.monotonic()
    assert modules.are_built(place.environment, 120) and time.monotonic() - began < 2
    assert not modules.are_built({**place.environment, "CXX": "gcc"}, 120)
    (library,) = place.home.rglob("sparse_mla_sm120.so")
    library.unlink()
    assert not modules.are_built(place.environment, 120)


def test_a_module_that_cannot_be_built(place: Place):
    names = {entry["name"] for entry in modules.listed(120)}
    wrong = ["sampling", "sgl_kernel_jit_dpsk_v4_hash_topk_act_sqrt_softplus_true"]
    # In the cache's folders: SGLang's module has one of its name, FlashInfer's object too.
    done = place.prebuild("--arch", "sm120", "--jobs", "4", **{FAILS: f"cached_ops/sampling {wrong[1]}"})
    assert done.returncode == 1
    sentences = done.stderr.splitlines()
    assert sorted(line.split()[1] for line in sentences if "could not be built" in line) == wrong, done.stderr
    for line in sentences:
        if "could not be built" in line:
            assert "is wrong" in Path(line.split("built: ")[1].split(" says why")[0]).read_text()
    assert f"{len(names) - 2} of {len(names)} modules are built" in done.stdout
    place.compiled()
    again = place.prebuild("--arch", "sm120")
    assert again.returncode == 0 and again.stdout.startswith("2 of "), again.stdout + again.stderr
    assert all("sampling" in call or "hash_topk" in call for call in place.compiled())


def test_what_a_server_asked_for_is_rebuilt_and_found(place: Place, tmp_path: Path):
    """The server's own cache is where `prebuild` finds it, so the server finds what `prebuild` built."""
    listed = tmp_path / "asked.jsonl"
    server = place.run(("-c", SERVER), SGLANG_SM120_MODULES=str(listed))
    assert server.returncode == 0, server.stderr
    built = [line for line in server.stderr.splitlines() if "was built with nvcc" in line]
    assert len(built) == 2 and "sampling" in built[0] and "hash_topk" in built[1], server.stderr
    assert len(listed.read_text().splitlines()) == 4 and place.compiled()
    found = place.prebuild("--arch", "sm120", "--modules", str(listed))
    assert (found.returncode, found.stdout) == (0, "2 of 2 modules are built for sm120.\n"), found.stderr
    assert place.compiled() == []

    shutil.rmtree(place.home / ".cache")
    assert place.prebuild("--arch", "sm120", "--modules", str(listed)).returncode == 0 and place.compiled()
    for file in (place.home / ".cache").rglob("*"):
        # An image's layers keep whole seconds.
        os.utime(file, (int(file.stat().st_mtime),) * 2)
    server = place.run(("-c", SERVER), SGLANG_SM120_MODULES=str(tmp_path / "again.jsonl"))
    assert "was built with nvcc" not in server.stderr and place.compiled() == []


@pytest.mark.parametrize("eagle", [False, True])
def test_what_requests_would_wait_for_is_built_before(place: Place, tmp_path: Path, eagle: bool):
    """With top-k, top-p or drafts; all of it is in the list, because requests of every run like it asked for it."""
    asked, vocabulary = tmp_path / "asked.jsonl", model_config()["vocab_size"]
    server = place.run(("-c", AHEAD, json.dumps([eagle, vocabulary])), SGLANG_SM120_MODULES=str(asked))
    assert server.returncode == 0 and server.stdout == "as long as others are made\n", server.stderr
    of_drafts = {"sgl_kernel_jit_speculative_tree", "sgl_kernel_jit_speculative_sampling_4_True"}
    found = {json.loads(line)["name"]: json.loads(line) for line in asked.read_text().splitlines()}
    assert set(found) == {"sampling", *(of_drafts if eagle else ())}
    listed = {entry["name"]: entry for entry in modules.listed(120)}
    assert found == {name: {k: v for k, v in listed[name].items() if k != "runs"} for name in found}
    runs = {name for name, run in trace_modules.RUNS.items() if ("EAGLE" in run.flags) == eagle}
    for name in {"sampling", *of_drafts}:
        assert runs & {*listed[name]["runs"]} == (runs if name in found else set()), name


def test_a_module_that_cannot_be_built_ends_no_server(place: Place):
    server = place.run(("-c", AHEAD, "[true, 6]"), **{FAILS: "speculative_tree"})
    assert server.returncode == 0 and "could not build SGLang's module for verification ahead" in server.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--arch", "cpu"], "--arch cpu is no card: name sm120 …"),
        (["--arch", "sm75"], "There is no list of modules for sm75 (there is for sm120): name one with --modules."),
        (["--arch", "sm120", "--jobs", "0"], "--jobs is 0: give 1 or more."),
        (["--arch", "sm120", "--modules", "nowhere"], "--modules nowhere cannot be read (No such file or directory)"),
    ],
)
def test_what_it_refuses(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    assert main(["prebuild", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert main(["prebuild", "--arch", "sm120"]) == 2
    assert "No nvcc is in CUDA_HOME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "sm", "status", "said"),
    [(True, 120, 0, ""), (False, 120, 0, ""), (False, 120, 1, "Not every module"), (False, 75, 1, "")],
)
def test_serve_builds_before_a_first_start(
    there: bool, sm: int, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    started: list[Any] = []

    class Child:
        def __init__(self, arguments: list[str], environment: dict[str, str], launcher: Sequence[str]) -> None:
            started.append((arguments, tuple(launcher)))

        def wait(self) -> int:
            return status

        def stop(self) -> None:
            started.append("stopped")

    monkeypatch.setattr(serve, "Child", Child)
    if there:
        monkeypatch.setattr(modules, "are_built", lambda *_: True)
    else:
        monkeypatch.setattr(modules, "receipt", lambda *_: Path("nowhere"))
    serve.prebuild({}, sm)
    expected = [] if there or sm == 75 else [(["--arch", "sm120"], serve.PREBUILD), "stopped"]
    assert started == expected
    err = capsys.readouterr().err
    assert err.startswith(f"sglang-sm120: {said}") if said else err == ""
