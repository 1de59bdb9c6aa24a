"""Laws that the launcher shares with the overlay: stated once, readable without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from golden_plans import HERE, machine

from sglang_sm120 import limits
from sglang_sm120.step import reasons
from sglang_sm120_launch import checks, model
from sglang_sm120_launch.model import Model

CHECKOUT = HERE.parents[1]
PLAN = f"""
import json, sys
sys.path[:0] = [{str(CHECKOUT / "launch")!r}, {str(CHECKOUT / "overlay")!r}]
sys.modules.update(dict.fromkeys(("torch", "triton", "sglang"), None))
from sglang_sm120 import limits
from sglang_sm120_launch import show
from sglang_sm120_launch.machine import Gpu, Machine
from sglang_sm120_launch.model import Model
from sglang_sm120_launch.plan import make_plan
from sglang_sm120_launch.values import Request
print(show.as_json(make_plan({machine("2x-rtx-pro-6000")!r}, Model(*json.load(sys.stdin)), Request())))
"""


@pytest.mark.parametrize("python", ([], ["-I", "-S"]), ids=("without torch", "bare"))
def test_a_plan_without_torch(python: list[str], flash: Model):
    """Of a model that was read before: where torch, Triton and SGLang are blocked, and with no package at all."""
    given = json.dumps([flash.path, flash.config, flash.tensors])
    command = [sys.executable, *python, "-c", PLAN]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((HERE / "golden/2x-rtx-pro-6000.json").read_text())


def test_what_doctor_says_itself():
    """It runs where the overlay is not installed, so that it has a copy of its own of two of them."""
    assert checks.SERVED == limits.SM12X
    assert model.MODEL_TYPE == reasons.MODEL_TYPE


@pytest.mark.parametrize("flag", ["--speculative-num-steps 9 or", "with DSpark --speculative-dspark-block-size 9 or"])
def test_more_drafts_than_are_kept(flag: str):
    """DSpark has one step whatever its block, which is a token shorter than what is verified."""
    with pytest.raises(ValueError, match=flag):
        limits.require_kept(limits.MAX_DRAFT_TOKENS + 1)
