"""`kernels`: the table of the registry, for this machine and for another device kind."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import sglang_sm120.ops
from sglang_sm120 import registry
from sglang_sm120_launch.commands import kernels
from sglang_sm120_launch.errors import LaunchError

CHECKOUT = Path(__file__).resolve().parents[2]
SGLANGS = {
    "compress", "compress_norm_rope_store", "hash_topk", "indexer_q", "k_norm_rope_store",
    "silu_mul_clamp",
}  # fmt: skip
"""Ops that SGLang's own CUDA kernels serve on SM12x."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """The registry reads its variables again in each test, and once more after it."""
    for name in ("SGLANG_SM120_PROVIDER", "SGLANG_SM120_FORCE", "SGLANG_SM120_PREFILL"):
        monkeypatch.delenv(name, raising=False)
    registry.reset()
    yield
    monkeypatch.undo()
    registry.reset()


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    kernels.configure(parser)
    return kernels.run(parser.parse_args(arguments))


@pytest.mark.parametrize("kind", ["cpu", "sm90", "sm120", "sm121"])
def test_every_provider_of_every_op_once(kind: str, capsys: pytest.CaptureFixture[str]):
    assert run("--device", kind, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    listed = Counter((row["op"], row["provider"]) for row in rows)
    assert listed == Counter((op.name, name) for op in registry.ops().values() for name in op.providers)
    assert {op for op, _ in listed} >= set(sglang_sm120.ops.SPECS)
    chosen = Counter(row["op"] for row in rows if row["chosen"])
    assert set(chosen.values()) == {1} and chosen.keys() == {op for op, _ in listed}
    assert all(row["why"] for row in rows)
    fast = {row["op"] for row in rows if row["chosen"] and row["provider"] != registry.TORCH}
    assert bool(fast) == (kind in ("sm120", "sm121"))
    theirs = {row["op"] for row in rows if row["chosen"] and row["provider"] == "sglang"}
    assert theirs == (SGLANGS if fast else set())

    assert run("--device", kind) == 0
    out = capsys.readouterr().out
    lines = [line.split(None, 3) for line in out.splitlines() if line.startswith("* ")]
    assert {(op, provider) for _, op, provider, _ in lines[:-1]} == {
        (row["op"], row["provider"]) for row in rows if row["chosen"]
    }
    assert ("Prefill is SGLang 0.5.23's own" in out) == (kind in ("sm120", "sm121"))


def test_what_serves_prefill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """On SM12x SGLang's own kernels, for each op one or none; nothing where the step takes prefill."""
    prefill = {name: spec.prefill for name, spec in sglang_sm120.ops.SPECS.items()}
    assert prefill.keys() == set(registry.ops()) and sum(map(bool, prefill.values())) > len(prefill) - 3

    def served(*words: str) -> dict[str, str | None]:
        assert run("--json", *words) == 0
        return {row["op"]: row["prefill"] for row in json.loads(capsys.readouterr().out) if row["chosen"]}

    assert served("--device", "sm120") == prefill
    assert set(served("--device", "cpu").values()) == set(served("--device", "sm90").values()) == {None}
    monkeypatch.setenv("SGLANG_SM120_PREFILL", "overlay")
    assert set(served("--device", "sm120").values()) == {None}
    assert run("--device", "sm120") == 0
    assert "Prefill" not in capsys.readouterr().out


def test_the_environment_is_obeyed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("SGLANG_SM120_PROVIDER", "sparse_mla=torch")
    assert run("--device", "sm120", "--json") == 0
    rows = {(row["op"], row["provider"]): row for row in json.loads(capsys.readouterr().out)}
    assert rows["sparse_mla", "torch"]["chosen"] and "SGLANG_SM120_PROVIDER" in rows["sparse_mla", "torch"]["why"]
    assert rows["mxfp4_moe", "triton"]["chosen"]


@pytest.mark.parametrize(
    ("device", "provider", "sentence"),
    [
        ("blackwell", "", "no device kind"),
        ("sm120", "sparse_mla=cuda", "lacks"),
        ("cpu", "no_such_op=torch", "names op"),
    ],
)
def test_misuse_is_one_sentence(device: str, provider: str, sentence: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGLANG_SM120_PROVIDER", provider)
    with pytest.raises(LaunchError, match=sentence):
        run("--device", device)


# What says how a run was served asks a process of its own, in which nothing else registers providers.
@pytest.mark.parametrize(
    "ask",
    {
        "kernels": "from sglang_sm120_launch.cli import main\nmain(['kernels', '--device', 'sm120', '--json'])",
        "evals": (
            "import json, types, report\nfrom sglang_sm120 import registry\n"
            "registry.device_kind = lambda device: 'sm120'\n"
            "client = types.SimpleNamespace(url='http://127.0.0.1', model='', context=0, settings={})\n"
            "print(json.dumps(report.facts(client)['providers']))"
        ),
    }.values(),
    ids=("kernels", "evals"),
)
def test_sglangs_own_kernels_are_named(ask: str):
    environment = {"PYTHONPATH": f"{CHECKOUT}/launch:{CHECKOUT}/overlay:{CHECKOUT}/evals", "PATH": "/usr/bin:/bin"}
    code = f"import sys\n{ask}\nassert 'sglang' not in sys.modules, 'SGLang takes ten seconds to import'"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {row["op"] for row in json.loads(done.stdout) if row["chosen"] and row["provider"] == "sglang"} == SGLANGS


def test_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from sglang_sm120_launch.cli import main; sys.exit(main(['kernels']))"
    )
    environment = {"PYTHONPATH": f"{CHECKOUT}/launch:{CHECKOUT}/overlay", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "make setup" in done.stderr, done.stderr
