"""kill -9 at every step of apply and unapply: the site is clean or applied, and the next command puts it right."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from boxes import FIRST, SECOND, VERSION, Box, copy_tree, make_box, tree

import atomic
import patchset
from sglang_sm120 import startup

# What CPython audits before it changes the file system, and the lookup of renameat2 before an exchange.
CHANGES = {"os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}
CHANGES |= {"subprocess.Popen", "ctypes.dlsym"}


def _killed_at(step: int, box: Box, command: str) -> bool:
    """Run a command in a child that dies by SIGKILL before its `step`-th change of the disk; whether it died."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in CHANGES:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(count)
        os._exit(patchset.main([command, "--site", str(box.site), "--root", str(box.root)]))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def _main(box: Box, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert patchset.main([command, "--site", str(box.site), "--root", str(box.root)]) == 0, capsys.readouterr().err


def _package(site: Path) -> dict[str, bytes]:
    return _only_package(tree(site))


def _only_package(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith("sglang/")}


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange directories, as overlayfs below a container image."""

    def refuse(one: Path, two: Path) -> None:
        raise OSError(18, "Invalid cross-device link", str(two))

    monkeypatch.setattr(atomic, "_exchange", refuse)


def _start(folder: Path, case: str) -> tuple[Box, str, dict[str, bytes]]:
    """A box before the command under test, that command, and every file of the site after it."""
    box = make_box(folder / "first")
    if case != "apply":
        box.done("apply")
    if case == "apply over an older series":
        box.write_series(core_01_first=FIRST.replace("= 22", "= 222"), cpu_02_second=SECOND)
    command = case.split(" ", 1)[0]
    whole = Box(box.root, folder / "whole")
    copy_tree(box.site, whole.site)
    whole.done(command)
    return box, command, tree(whole.site)


CASES = ["apply", "unapply", "apply over an older series"]


@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_step(memory: Path, capsys: pytest.CaptureFixture[str], case: str):
    start, command, done = _start(memory, case)
    released = make_box(memory / "other")
    wholes = [_package(start.site), _package(released.site), _only_package(done)]
    seen = set()
    step = 0
    died = True
    while died:
        box = Box(start.root, memory / str(step))
        copy_tree(start.site, box.site)
        died = _killed_at(step, box, command)
        found = _package(box.site)
        assert found in wholes, f"half-way after {step} steps"
        seen.add(wholes.index(found))
        assert found == _package(released.site) or (box.site / "sglang_sm120/startup.py").is_file(), "no overlay"
        _main(box, command, capsys)
        assert tree(box.site) == done
        step += 1
    assert step > 50
    assert len(seen) > 1, "no step fell after the swap"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("no_exchange")
def test_killed_at_every_step_without_exchange(memory: Path, capsys: pytest.CaptureFixture[str], case: str):
    """The journal may leave the package mixed; then the start-up check refuses it and any command finishes it."""
    start, command, done = _start(memory, case)
    released = make_box(memory / "other")
    wholes = [_package(start.site), _package(released.site), _only_package(done)]
    mixed = step = 0
    died = True
    while died:
        box = Box(start.root, memory / str(step))
        copy_tree(start.site, box.site)
        died = _killed_at(step, box, command)
        if _package(box.site) not in wholes:
            mixed += 1
            assert "partly" in str(startup.problem_of(box.site / "sglang_sm120", box.site, VERSION))
        _main(box, "status", capsys)
        assert _package(box.site) in wholes, f"half-way after {step} steps and a status"
        _main(box, command, capsys)
        assert tree(box.site) == done
        step += 1
    assert step > 50
    assert mixed > 0, "no step fell between two files: the test does not test the journal"


@pytest.mark.usefixtures("no_exchange")
def test_a_file_changed_after_the_kill_is_not_overwritten_silently(
    box: Box, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    replace, calls = os.replace, []

    def second_fails(one: Path, two: Path) -> None:
        calls.append(two)
        if len(calls) == 3:  # the manifest, the first file, then this
            raise OSError(5, "Input/output error", str(two))
        replace(one, two)

    monkeypatch.setattr(os, "replace", second_fails)
    arguments = ["apply", "--site", str(box.site), "--root", str(box.root)]
    assert patchset.main(arguments) == 1
    first = Path(calls[1])
    first.write_text("mine = True\n")
    monkeypatch.setattr(os, "replace", replace)
    assert patchset.main(arguments) == 1
    assert str(first) in capsys.readouterr().err
    assert first.read_text() == "mine = True\n"


@pytest.mark.parametrize("code", [1, 28])
def test_no_way_to_write_leaves_the_site_as_it_was(box: Box, code: int, monkeypatch: pytest.MonkeyPatch):
    before = tree(box.site)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code), "new file")

    monkeypatch.setattr(atomic, "_write_like", refuse)
    assert patchset.main(["apply", "--site", str(box.site), "--root", str(box.root)]) == 1
    assert _package(box.site) == _only_package(before)
