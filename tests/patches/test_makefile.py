"""The Makefile's own decisions."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from boxes import CHECKOUT, SGLANG, Box

SERIES = CHECKOUT / "patches" / SGLANG


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files `make setup` reads, in a folder with a blank in its name."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    shutil.copy(CHECKOUT / "Makefile", folder)
    shutil.copytree(SERIES, folder / "patches" / SERIES.name)
    return folder


def make(folder: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin"}
    return subprocess.run(["make", "-j4", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def python(path: Path, version: str) -> Path:
    """A stand-in interpreter: tells its version, and `-m venv DIR` and `-m pip …` leave a trace."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -c ]; then echo {version}; exit; fi\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
        'echo "$@" >> .venv/trace\n'
        'if [ "$2" = pip ] && [ -e fail ]; then exit 1; fi\n'
    )
    path.chmod(0o755)
    return path


def test_another_python_is_refused(clone: Path, tmp_path: Path):
    result = make(clone, "setup", f"PYTHON={python(tmp_path / 'py thon', '3.13')}")
    assert result.returncode == 2
    assert "is 3.13, needed Python 3.11 or 3.12" in result.stderr
    assert not (clone / ".venv").exists()


def test_a_fitting_python_on_path_is_picked(clone: Path, tmp_path: Path):
    for name, version in (("python3", "3.13"), ("python3.12", "3.12"), ("uv", "")):
        python(tmp_path / "bin" / name, version)
    (tmp_path / "bin/uv").unlink()
    result = make(clone, "setup", path=tmp_path / "bin")
    assert result.returncode == 0, result.stderr
    assert (clone / ".venv/.complete").read_text().startswith("3.12 ")


def test_setup_is_done_once_and_again_after_an_interruption(clone: Path, tmp_path: Path):
    chosen = f"PYTHON={python(tmp_path / 'python', '3.11')}"
    trace = clone / ".venv/trace"
    (clone / "fail").touch()
    assert make(clone, "setup", chosen).returncode == 2
    assert not (clone / ".venv/.complete").exists()
    (clone / "fail").unlink()
    assert make(clone, "setup", chosen).returncode == 0
    assert "--require-hashes" in trace.read_text()
    done = trace.read_text()
    (clone / ".venv/kept").touch()
    for again in ([chosen], []):
        assert make(clone, "setup", *again).returncode == 0
        assert trace.read_text() == done and (clone / ".venv/kept").exists()
    with open(clone / "patches" / SERIES.name / "requirements.lock", "a") as lock:
        lock.write("# changed\n")
    assert make(clone, "setup", chosen).returncode == 0
    assert not (clone / ".venv/kept").exists()
    python(tmp_path / "python", "3.12")
    assert make(clone, "setup", chosen).returncode == 0
    assert (clone / ".venv/.complete").read_text().startswith("3.12 ")


def test_two_places_are_refused(clone: Path):
    result = make(clone, "apply", "PYTHON=python3", "SITE=/")
    assert result.returncode == 2 and "needed one" in result.stderr


@pytest.mark.parametrize(
    ("shell", "venv", "chosen"),
    [(True, True, "python"), (True, False, "python"), (False, True, ".venv/bin/python"), (False, False, "python3")],
)
def test_apply_means_the_sglang_that_python_would_start(
    clone: Path, tmp_path: Path, shell: bool, venv: bool, chosen: str
):
    """Whether or not the demo has made a .venv: `make apply && python -m sglang.launch_server`."""

    def script(path: Path, line: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    script(tmp_path / "bin/python", f"exit {int(not shell)}")
    script(tmp_path / "bin/python3", f'exec "{sys.executable}" "$@"')
    if venv:
        script(clone / ".venv/bin/python", "exit 1")
    (clone / "patches/patchset.py").write_text("import sys\nprint(sys.argv[1:])\n")
    for goal in ("apply", "status"):
        result = make(clone, goal, path=tmp_path / "bin")
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == f"{[goal, '--python', chosen]}"


def test_port_asks_for_a_wheel():
    result = make(CHECKOUT, "port")
    assert result.returncode == 2 and result.stderr.startswith("patchset: no wheel was named, needed the path")


def test_the_lock_names_no_index_and_pins_everything():
    lines = (SERIES / "requirements.lock").read_text().splitlines()
    assert "make lock" in lines[0]
    names = [line for line in lines if not line.startswith((" ", "#"))]
    assert len(names) > 150
    for line in names:
        assert "==" in line and line.endswith("\\"), line
    for line in lines:
        assert "://" not in line and not line.lstrip().startswith("--") or line.startswith("    --hash=sha256:"), line
    [wanted] = [line for line in (SERIES / "requirements.in").read_text().splitlines() if "==" in line]
    assert wanted == f"sglang=={SGLANG}"
    assert {wanted, "torch==2.14.1", "triton==3.8.0"} <= {line.split(" ", 1)[0] for line in names}


def test_the_wheel_needs_the_release_of_the_series():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [f"sglang=={SGLANG}"]


def test_the_package_version_is_read_from_the_overlay(box: Box):
    (box.root / "overlay/sglang_sm120/__init__.py").write_text("")
    assert "__version__" in box.refused("apply")
