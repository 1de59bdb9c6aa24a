"""An op is its folder: one in a folder that the package did not have is found by every tool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOY = {
    "__init__.py": '''
import torch

from sglang_sm120.registry import Op


@Op
def toy(x: torch.Tensor) -> torch.Tensor:
    """y int32 [T] = 2 x int32 [T]."""
    return x * 2
''',
    "triton.py": '''
import torch
import triton
import triton.language as tl

from sglang_sm120 import kernels
from sglang_sm120.ops._pdl_triton import wait
from sglang_sm120.registry import Arguments

from . import toy


@triton.jit
def _double(x, y, n, BLOCK: tl.constexpr):
    wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


@toy.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121")
def toy_triton(a: Arguments) -> torch.Tensor:
    y = torch.empty_like(a.x)
    kernels.launch(_double, (triton.cdiv(a.x.numel(), 64),), a.x, y, a.x.numel(), BLOCK=64)
    return y
''',
    "spec.py": '''
from sglang_sm120.spec import Spec, nbytes

SPEC = Spec(
    calls=lambda make, c, tp, rows, context: iter([("twice", {"x": make.integers(0, 100, rows * 100)})]),
    traffic=lambda a: (2 * nbytes(a["x"]), a["x"].numel()),
    served=True,
    exact=True,
    prefill="nothing",
)
''',
}
PATHS = ("launch", "reference", "evals", "bench", "tests/ops", "tests/sm120")
# Runs every question in one process, which imports torch once: what each prints, or how it fails.
CHILD = """
import contextlib, io, json, sys, traceback
from sglang_sm120 import compilation
compiles, folder, questions = json.load(sys.stdin)
if compiles:
    compilation.use_target(120)
from sglang_sm120 import ops
ops.__path__.append(folder)
ops.load()
found = {}
for tool, question in questions.items():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            exec(question, {"ops": ops, "compilation": compilation, "json": json})
        except Exception:
            print(json.dumps({"failed": traceback.format_exc()}))
    found[tool] = json.loads(said.getvalue())
print(json.dumps(found))
"""
COMPILING = {
    "gate and its table": (
        """
import gate, kernel_table, resources
from sglang_sm120.checkpoint.config import FLASH
(job,) = (job for job in gate.jobs(lambda op: gate.SAMPLE, [(FLASH, 1)]) if job.op == "toy")
(kernel,), _ = compilation.compile_job(job)
needs = resources.read_resources(kernel.cubin, kernel.shared)
lines = gate.lines({(kernel.op, kernel.name, kernel.variant): (kernel, needs)})
rows = [row for row in kernel_table.text(kernel_table.worst(lines)).splitlines() if row.startswith("| toy | `_double`")]
print(json.dumps([("toy", "_double") in gate.kernels_defined(), gate.uncovered(ops.registry.ops()), len(rows)]))
""",
        [True, [], 1],
    ),
    "warm-up": (
        """
from sglang_sm120 import warmup
from sglang_sm120.checkpoint.config import model_config
launches = warmup.variants(model_config(), 1, 1, 64, 8, 256, ["toy"], 188).launches
print(json.dumps(["toy" in warmup.served(), sorted({kernel.fn.__name__ for kernel, *_ in launches.values()})]))
""",
        [True, ["_double"]],
    ),
}
RUNNING = {
    "bench": (
        """
from sglang_sm120 import parity
(call,) = ops.calls("toy", {}, 1, 3, 128, "cpu")
problem = parity.worst("toy", parity.triton_result(call), parity.reference_result(call)).problem
print(json.dumps(["toy" in ops.with_triton(), ops.SPECS["toy"].traffic(call.arguments), problem]))
""",
        [True, [2400, 300], None],
    ),
    "parity": (
        """
import test_parity
(found,) = [p.values for p in test_parity.parameters() if p.values[0] == "toy"]
test_parity.test_parity(*found, 0)
print(json.dumps(found[1]))
""",
        "triton",
    ),
    "kernels": (
        """
from sglang_sm120_launch.commands import kernels
import argparse
kernels.run(argparse.Namespace(device="sm120", json=True))
""",
        {"op": "toy", "provider": "triton", "chosen": True, "why": "default on sm120", "prefill": "nothing"},
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ops")
    (folder / "toy").mkdir()
    for name, text in TOY.items():
        (folder / "toy" / name).write_text(text, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / place) for place in PATHS)}
    found: dict[str, Any] = {}
    for compiles, asked in ((True, COMPILING), (False, RUNNING)):
        given = json.dumps([compiles, str(folder), {tool: question for tool, (question, _) in asked.items()}])
        command = [sys.executable, "-c", CHILD]
        done = subprocess.run(command, input=given, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found |= json.loads(done.stdout)
    return found


@pytest.mark.parametrize("tool", [*COMPILING, *RUNNING])
def test_a_tool_finds_it(tool: str, answers: dict[str, Any]) -> None:
    _, expected = (COMPILING | RUNNING)[tool]
    found = answers[tool]
    assert not isinstance(found, dict), found["failed"]
    assert expected == found or expected in found
