"""Clean, applied, outdated, dirty, and what each command does and refuses in them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from boxes import FILES, FIRST, LATE, SECOND, VERSION, Box, copy_tree, stamps, tree

import atomic

AFTER_A = FILES["sglang/a.py"].replace("a1 = 1\n", "a1 = 11\na1b = 12\n").replace("a19 = 19\n", LATE)


def test_round_trip(box: Box):
    released = tree(box.site)
    assert ": clean (" in box.done("status")
    box.done("apply")
    assert (box.site / "sglang/a.py").read_text() == AFTER_A
    assert (box.site / "sglang/sub/b.py").read_text() == "one = 1\ntwo = 22\nthree = 3\n"
    assert ": applied (" in box.done("status")
    box.done("verify")
    box.done("unapply")
    assert tree(box.site) == released
    assert sorted(path.name for path in box.site.iterdir()) == ["sglang", f"sglang-{VERSION}.dist-info"]


@pytest.mark.parametrize("command", ["apply", "unapply", "status", "verify"])
def test_a_repeated_command_touches_nothing(box: Box, command: str):
    box.done("unapply" if command == "unapply" else "apply")
    before = stamps(box.site)
    box.done(command)
    assert stamps(box.site) == before


def test_files_outside_the_series_are_reported_and_kept(box: Box):
    (box.site / "sglang/sub/c.py").write_text("mine = True\n")
    (box.site / "sglang/new.py").write_text("mine = True\n")
    assert "sglang/sub/c.py" in box.done("status")
    box.done("apply")
    box.done("unapply")
    assert (box.site / "sglang/sub/c.py").read_text() == (box.site / "sglang/new.py").read_text() == "mine = True\n"


@pytest.mark.parametrize("command", ["apply", "unapply", "status", "verify", "refresh"])
@pytest.mark.parametrize("change", ["byte", "gone", "half"])
def test_dirty_is_refused_and_named(box: Box, command: str, change: str):
    path = box.site / "sglang/sub/b.py"
    if change == "byte":
        path.write_text(FILES["sglang/sub/b.py"].replace("one", "onE"))
    elif change == "gone":
        path.unlink()
    else:
        path.write_text("one = 1\ntwo = 22\nthree = 3\n")
    # verify names what is not patched, the others what is not released.
    assert ("sglang/a.py" if (command, change) == ("verify", "half") else "sglang/sub/b.py") in box.refused(command)


def test_an_edited_patched_file_is_dirty(box: Box):
    box.done("apply")
    (box.site / "sglang/a.py").write_text(AFTER_A + "mine = True\n")
    for command in ("apply", "unapply", "status", "verify"):
        assert "sglang/a.py" in box.refused(command)


@pytest.mark.parametrize("command", ["apply", "unapply", "status", "verify", "refresh"])
def test_another_version_is_refused(box: Box, command: str):
    (box.site / f"sglang-{VERSION}.dist-info").rename(box.site / "sglang-9.9.8.dist-info")
    message = box.refused(command)
    assert "9.9.8" in message and VERSION in message


@pytest.mark.parametrize("command", ["apply", "unapply", "status", "verify", "refresh"])
def test_a_site_without_sglang_is_refused(box: Box, command: str):
    shutil.rmtree(box.site / "sglang")
    assert "no installed sglang" in box.refused(command)


def test_an_interpreter_without_sglang_is_refused(box: Box, tmp_path: Path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    assert "no installed sglang" in box.refused("apply", "--python", str(bare))


def test_the_site_of_an_interpreter(box: Box, tmp_path: Path):
    python = tmp_path / "a python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{box.site}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    # Relative, as the Makefile gives it.
    said = box.done("apply", "--python", os.path.relpath(python)).splitlines()[-1]
    assert said == f"start it with {shlex.quote(os.path.relpath(python))} -m sglang.launch_server"
    assert (box.site / "sglang/a.py").read_text() == AFTER_A


def test_misuse_is_told_apart(box: Box, tmp_path: Path):
    assert "not a directory" in box.refused("apply", "--site", str(tmp_path / "absent"), code=2)
    assert "cannot be run" in box.refused("apply", "--python", str(tmp_path / "absent"), code=2)
    assert "not a working Python" in box.refused("apply", "--python", "/bin/false", code=2)
    both = box.run("apply", "--python", sys.executable, "--site", str(box.site))
    assert both.returncode == 2
    assert box.run("frobnicate").returncode == 2


@pytest.mark.parametrize("version", [None, "patch 2.0-12u11-Apple"])
@pytest.mark.parametrize("command", ["apply", "unapply"])
def test_no_gnu_patch_is_refused(box: Box, tmp_path: Path, command: str, version: str | None):
    if command == "unapply":
        box.done("apply")
    tools = tmp_path / "bin"
    tools.mkdir()
    if version:
        (tools / "patch").write_text(f"#!/bin/sh\necho '{version}'\n")
        (tools / "patch").chmod(0o755)
    assert "GNU patch" in box.refused(command, env={"PATH": str(tools)})


def test_no_record_is_refused(box: Box):
    (box.site / f"sglang-{VERSION}.dist-info/RECORD").unlink()
    assert "RECORD" in box.refused("apply")


def test_a_record_of_another_build_is_refused(box: Box):
    record = box.site / f"sglang-{VERSION}.dist-info/RECORD"
    lines = record.read_text().splitlines()
    record.write_text("\n".join(line.replace("sha256=", "sha256=AAAA") if "a.py" in line else line for line in lines))
    assert "sglang/a.py" in box.refused("apply")


def test_a_patch_changed_without_refresh_is_refused(box: Box):
    patch = box.series / "core/01-first.patch"
    patch.write_text(patch.read_text().replace("+a1 = 11", "+a1 = 12"))
    assert "01-first.patch" in box.refused("apply")
    assert "01-first.patch" in box.refused("verify")


def test_fuzz_is_refused(box: Box):
    patch = box.series / "core/01-first.patch"
    # One context line is wrong: GNU patch alone would take it with fuzz 1.
    patch.write_text(patch.read_text().replace(" a3 = 3", " a3 = 4"))
    message = box.refused("refresh")
    assert "01-first.patch" in message and "fuzz 0" in message


def test_hard_links_are_not_written_through(box: Box):
    cache = box.site.with_name("cache")
    copy_tree(box.site, cache)
    assert (cache / "sglang/a.py").samefile(box.site / "sglang/a.py")
    cached = tree(cache)
    for command in ("apply", "unapply"):
        box.done(command)
        assert tree(cache) == cached


def test_modes_links_and_other_caches_survive(box: Box):
    package = box.site / "sglang"
    (package / "sub/b.py").chmod(0o640)
    (package / "sub").chmod(0o750)
    (package / "link.py").symlink_to("sub/c.py")
    (package / "folder").symlink_to("sub")
    for name in ("sub/__pycache__/b.cpython-311.pyc", "sub/__pycache__/c.cpython-311.pyc"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_bytes(b"stale")
    box.done("apply")
    assert (package / "sub/b.py").stat().st_mode & 0o777 == 0o640
    assert (package / "sub").stat().st_mode & 0o777 == 0o750
    assert os.readlink(package / "link.py") == "sub/c.py"
    assert os.readlink(package / "folder") == "sub"
    assert os.listdir(package / "sub/__pycache__") == ["c.cpython-311.pyc"]


def test_a_package_behind_a_link(box: Box):
    elsewhere = box.site.with_name("other") / "package"
    elsewhere.parent.mkdir()
    (box.site / "sglang").rename(elsewhere)
    (box.site / "sglang").symlink_to(elsewhere)
    (elsewhere.parent / atomic.STAGE).mkdir()
    box.done("apply")
    assert (box.site / "sglang").is_symlink()
    assert (elsewhere / "a.py").read_text() == AFTER_A
    assert os.listdir(elsewhere.parent) == ["package"]
    box.done("unapply")
    assert (elsewhere / "a.py").read_text() == FILES["sglang/a.py"]


def test_two_runs_at_once(box: Box):
    with atomic.locked(box.site):
        assert "another patchset run" in box.refused("apply")
    box.done("apply")


class TestOverlay:
    def test_it_is_refreshed(self, box: Box):
        box.done("apply")
        source = box.root / "overlay/sglang_sm120"
        (source / "more.py").write_text("more = True\n")
        assert "sglang_sm120/more.py" in box.refused("verify")
        box.done("apply")
        assert (box.site / "sglang_sm120/more.py").read_text() == "more = True\n"
        (source / "more.py").unlink()
        box.done("apply")
        assert not (box.site / "sglang_sm120/more.py").exists()
        box.done("verify")

    def test_a_new_version_replaces_the_metadata(self, box: Box):
        box.done("apply")
        (box.root / "overlay/sglang_sm120/__init__.py").write_text('__version__ = "0.2.0"\n')
        box.done("apply")
        assert [path.name for path in box.site.glob("sglang_sm120-*")] == ["sglang_sm120-0.2.0.dist-info"]
        box.done("verify")

    def test_caches_are_not_placed(self, box: Box):
        cache = box.root / "overlay/sglang_sm120/__pycache__"
        cache.mkdir()
        (cache / "x.cpython-311.pyc").write_bytes(b"")
        box.done("apply")
        assert not (box.site / "sglang_sm120/__pycache__").exists()

    def test_caches_in_the_site_do_not_count(self, box: Box):
        box.done("apply")
        cache = box.site / "sglang_sm120/__pycache__"
        cache.mkdir()
        (cache / "x.cpython-311.pyc").write_bytes(b"")
        box.done("verify")
        box.done("unapply")
        assert not (box.site / "sglang_sm120").exists()

    @pytest.mark.parametrize("foreign", ["package", "metadata"])
    @pytest.mark.parametrize("command", ["apply", "unapply"])
    def test_another_installers_overlay_is_left_alone(self, box: Box, command: str, foreign: str):
        if foreign == "package":
            (box.site / "sglang_sm120").mkdir()
            (box.site / "sglang_sm120/__init__.py").write_text("")
        else:
            (box.site / "sglang_sm120-0.1.0.dist-info").mkdir()
            (box.site / "sglang_sm120-0.1.0.dist-info/INSTALLER").write_text("pip\n")
        assert "not placed by patchset" in box.refused(command)

    def test_after_pip_uninstall_unapply_still_works(self, box: Box):
        released = tree(box.site)
        box.done("apply")
        shutil.rmtree(box.site / "sglang_sm120")
        shutil.rmtree(box.site / "sglang_sm120-0.1.0.dist-info")
        box.done("unapply")
        assert tree(box.site) == released


class TestOutdated:
    """The checkout moved on after its series was applied."""

    @pytest.mark.parametrize("change", ["other bytes", "one patch less", "another header"])
    def test_apply_goes_to_the_new_series(self, box: Box, tmp_path: Path, change: str):
        released = tree(box.site)
        copy_tree(box.site, tmp_path / "clean")
        box.done("apply")
        if change == "other bytes":
            box.write_series(core_01_first=FIRST.replace("= 22", "= 222"), cpu_02_second=SECOND)
        elif change == "one patch less":
            # b.py, touched by the first patch alone, must come back.
            box.write_series(cpu_02_second=SECOND)
        else:
            box.write_series(core_01_first=FIRST.replace("first", "very first"), cpu_02_second=SECOND)
        assert (": applied (" if change == "another header" else ": outdated (") in box.done("status")
        box.done("apply")
        box.done("verify")
        fresh = Box(box.root, tmp_path / "clean")
        fresh.done("apply")
        assert tree(box.site) == tree(fresh.site)
        box.done("unapply")
        assert tree(box.site) == released

    def test_the_overlay_of_an_older_release_is_replaced(self, box: Box, tmp_path: Path):
        """An installer brought a new SGLang; what was placed beside the old one is still there."""
        copy_tree(box.site, tmp_path / "clean")
        box.done("apply")
        series = box.site / "sglang_sm120/series"
        (series / VERSION).rename(series / "9.9.8")
        lock = box.site / "sglang_sm120/sglang.lock"
        lock.write_text(lock.read_text().replace(VERSION, "9.9.8").replace("sglang/a.py", "sglang/gone.py"))
        for name, text in FILES.items():
            (box.site / name).write_text(text)
        assert ": clean (" in box.done("status")
        box.done("apply")
        box.done("verify")
        fresh = Box(box.root, tmp_path / "clean")
        fresh.done("apply")
        assert tree(box.site) == tree(fresh.site)

    def test_unapply_takes_the_old_series_back(self, box: Box):
        released = tree(box.site)
        box.done("apply")
        box.write_series(cpu_02_second=SECOND)
        box.done("unapply")
        assert tree(box.site) == released

    def test_unapply_does_not_need_the_checkouts_patches(self, box: Box):
        released = tree(box.site)
        box.done("apply")
        patch = box.series / "core/01-first.patch"
        patch.write_text(patch.read_text().replace("+a1 = 11", "+a1 = 12"))
        box.done("unapply")
        assert tree(box.site) == released
