"""The plugin SGLang calls in every server process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest
from boxes import FILES, LOAD_PLUGINS, SGLANG, VERSION, Box

import sglang_sm120
from sglang_sm120 import startup

# As SGLang's plugin loader calls a plugin: an Exception is logged and the server goes on.
LOADER = """
import sys
sys.path.insert(0, sys.argv[1])
import sglang_sm120
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


def test_a_wheel_beside_an_untouched_sglang_starts(box: Box):
    """What pip installs holds the lock and no series: the released SGLang is as good as the whole series."""
    box.done("apply")
    shutil.rmtree(box.site / "sglang_sm120/series")
    assert start(box).stdout == "server started\n"
    for name, text in FILES.items():
        (box.site / name).write_text(text)
    assert start(box).stdout == "server started\n"
    (box.site / "sglang/a.py").write_text("mine = True\n")
    assert "sglang/a.py in " in start(box).stderr and "reinstall sglang==9.9.9" in start(box).stderr


DAMAGES = ["half", "gone", "foreign", "unpatched", "no lock", "bad lock", "other version", "no metadata", "no sglang"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_anything_else_stops_the_server(box: Box, damage: str):
    box.done("apply")
    lock = box.site / "sglang_sm120/sglang.lock"
    if damage == "half":
        (box.site / "sglang/a.py").write_text(FILES["sglang/a.py"])
    elif damage == "gone":
        (box.site / "sglang/a.py").unlink()
    elif damage == "foreign":
        (box.site / "sglang/a.py").write_text("mine = True\n")
    elif damage == "unpatched":
        for name, text in FILES.items():
            (box.site / name).write_text(text)
    elif damage == "no lock":
        lock.unlink()
    elif damage == "bad lock":
        lock.write_text("{")
    elif damage == "no metadata":
        shutil.rmtree(box.site / f"sglang-{VERSION}.dist-info")
    elif damage == "no sglang":
        shutil.rmtree(box.site / "sglang")
    else:
        metadata = box.site / f"sglang-{VERSION}.dist-info/METADATA"
        metadata.write_text(metadata.read_text().replace(VERSION, "9.9.8"))
    result = start(box)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("sglang-sm120: ") and result.stderr.count("\n") == 1
    named = {
        "half": f"only partly in {box.site} (sglang/a.py is as released)",
        "gone": "sglang/a.py in",
        "foreign": "sglang/a.py in",
        "unpatched": "is not patched",
        "no lock": str(lock),
        "bad lock": "could not be checked",
        "other version": f"SGLang 9.9.8 is installed in {box.site}, needed {VERSION}",
        "no metadata": f"SGLang of unknown version is installed in {box.site}, needed {VERSION}",
        "no sglang": "sglang is not installed",
    }
    assert named[damage] in result.stderr


def test_the_real_check_is_quick(real: Box):
    real.done("apply")
    started = time.process_time()
    assert startup.problem_of(real.site / "sglang_sm120", real.site, SGLANG) is None
    # A server process pays this once at its start; 20 files of some 60 KB take a few milliseconds.
    assert time.process_time() - started < 0.05


def test_sglang_calls_it(real: Box):
    """SGLang's own loader finds the placed entry point, and the check's refusal goes through it."""
    real.done("apply")
    path = real.site / "sglang/srt/kernel_plugins/nvidia/binding.py"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"\n")
    result = subprocess.run([sys.executable, "-c", LOAD_PLUGINS, str(real.site)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("sglang-sm120: ")
    assert "nvidia/binding.py" in result.stderr


def import_sglang(box: Box) -> str:
    """Import the patched SGLang with nothing else installed; the one line in which it refuses to start."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import sglang"
    command = [sys.executable, "-I", "-S", "-c", code, str(box.site)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    return done.stderr


@pytest.mark.parametrize("what", ["all", "hooks"])
def test_a_patched_sglang_without_its_overlay_refuses(real: Box, what: str):
    """Gone, or of the release that had no hooks."""
    real.done("apply")
    package = real.site / "sglang_sm120"
    if what == "all":
        shutil.rmtree(package)
    else:
        (package / "hooks.py").unlink()
    assert "the package sglang_sm120 is missing or older: run `make apply` again" in import_sglang(real)


def test_a_patched_sglang_with_another_overlay_refuses(real: Box):
    real.done("apply")
    source = real.site / "sglang_sm120/__init__.py"
    text = source.read_text()
    source.unlink()
    source.write_text(text.replace(f'"{sglang_sm120.__version__}"', '"9.9.9"'))
    refusal = import_sglang(real)
    assert f"patches of sglang-sm120 {sglang_sm120.__version__}, but the package sglang_sm120 is 9.9.9" in refusal


def test_hooks_are_light():
    """SGLang imports them first of all, in every process."""
    code = "import sys, sglang_sm120.hooks; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "sglang_sm120" in loaded and not loaded & {"torch", "sglang", "triton", "numpy"}
