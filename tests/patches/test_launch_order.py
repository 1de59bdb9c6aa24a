"""Which part of a layer of experts starts when, and on which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from boxes import Box

PROBE = Path(__file__).with_name("order_probe.py")
RELEASED = ["alt waits for main", "shared on main", "gate on alt", "topk on alt", "experts on alt",
            "main waits for alt"]  # fmt: skip
ROUTER_FIRST = ["gate on main", "topk on main", "alt waits for main", "shared on alt", "experts on main",
                "main waits for alt"]  # fmt: skip


def test_the_router_goes_first_at_one_row(real: Box):
    real.done("apply")
    env = os.environ | {"PYTHONPATH": str(real.site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, str(PROBE)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "False": {"1": RELEASED, "2": RELEASED},
        "True": {"1": ROUTER_FIRST, "2": RELEASED},
    }
