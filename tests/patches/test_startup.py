"""The plugin SGLang calls in every server process."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from boxes import FILES, VERSION, Box

from sglang_sm120 import startup

# As SGLang's plugin loader calls a plugin: an Exception is logged and the server goes on.
LOADER = """
import sys
sys.path.insert(0, sys.argv[1])
from sglang_sm120 import startup
try:
    startup.check()
except Exception:
    pass
print("server started")
"""


def start(box: Box) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", "-c", LOADER, str(box.site)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_whole_series_starts(box: Box):
    box.done("apply")
    assert start(box).stdout == "server started\n"


@pytest.mark.parametrize("damage", ["half", "gone", "unpatched", "no lock", "bad lock", "other version"])
def test_anything_else_stops_the_server(box: Box, damage: str):
    box.done("apply")
    lock = box.site / "sglang_sm120/sglang.lock"
    if damage == "half":
        (box.site / "sglang/a.py").write_text(FILES["sglang/a.py"])
    elif damage == "gone":
        (box.site / "sglang/a.py").unlink()
    elif damage == "unpatched":
        for name, text in FILES.items():
            (box.site / name).write_text(text)
    elif damage == "no lock":
        lock.unlink()
    elif damage == "bad lock":
        lock.write_text("{")
    else:
        (box.site / "sglang/a.py").write_text("another release\n")
        (box.site / f"sglang-{VERSION}.dist-info").rename(box.site / "sglang-9.9.8.dist-info")
    result = start(box)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("sglang-sm120: ") and result.stderr.count("\n") == 1
    named = {"half": "sglang/a.py", "gone": "sglang/a.py", "no lock": str(lock)}
    named |= {"bad lock": "could not be checked", "other version": f"not {VERSION}"}
    assert named.get(damage, "is not patched") in result.stderr


def test_the_real_check_is_quick(real: Box):
    real.done("apply")
    started = time.process_time()
    assert startup.problem_of(real.site / "sglang_sm120/sglang.lock", real.site) is None
    # A server process pays this once at its start; 20 files of some 60 KB take a few milliseconds.
    assert time.process_time() - started < 0.05


# The package itself is not executed: its plugin loader is what is looked at, and importing SGLang takes long.
SGLANG_LOADER = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
sys.modules["sglang"] = importlib.util.module_from_spec(importlib.util.find_spec("sglang"))
from sglang.srt.plugins import load_plugins
load_plugins()
print("server started")
"""


def test_sglang_calls_it(real: Box):
    """SGLang's own loader finds the placed entry point, and the check's refusal goes through it."""
    real.done("apply")
    path = real.site / "sglang/srt/models/deepseek_v4.py"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"\n")
    result = subprocess.run([sys.executable, "-c", SGLANG_LOADER, str(real.site)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("sglang-sm120: ")
    assert "deepseek_v4.py" in result.stderr
