"""The checkout's own series on the released SGLang wheel."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from boxes import CHECKOUT, PATCHSET, Box, copy_checkout, copy_tree, stamps, tree

import series as patch_series


def _state(box: Box) -> str:
    series = patch_series.Series.load(CHECKOUT / "patches")
    return patch_series.state(patch_series.Site.open(box.site), series, None)[0]


def _urlsafe_sha256(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def test_the_series_follows_its_rules():
    result = subprocess.run([sys.executable, PATCHSET, "lint"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_refresh_changes_nothing(real: Box, tmp_path: Path):
    root = tmp_path / "root"
    copy_checkout(root)
    before = tree(root)
    Box(root, real.site).done("refresh")
    assert tree(root) == before


def test_apply_then_unapply_gives_the_released_bytes(wheel: Path, tmp_path: Path):
    """On the wheel of every Python; the touched files are the same in all of them."""
    released = tree(wheel)
    copy_tree(wheel, tmp_path / "site")
    real = Box(CHECKOUT, tmp_path / "site")
    assert "applied" in real.done("apply")
    assert _state(real) == "applied"
    real.done("verify")
    assert tree(wheel) == released, "apply wrote through a hard link"
    touched = stamps(real.site)
    assert "nothing to do" in real.done("apply")
    assert stamps(real.site) == touched
    real.done("unapply")
    assert tree(real.site) == released
    assert "nothing to do" in real.done("unapply")


def _unbound(function: ast.AST) -> set[str]:
    """Names that an import of ours in one branch makes local to the function, and that others of its lines read."""
    nodes = list(ast.walk(function))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    found = set()
    for branch in (node for node in nodes if isinstance(node, ast.If)):
        imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
        ours = [alias for node in imports if node.module == "sglang_sm120.hooks" for alias in node.names]
        local = {alias.asname or alias.name for alias in ours} - stored
        inside = {id(node) for line in branch.body for node in ast.walk(line)}
        found |= {name.id for name in names if name.id in local and id(name) not in inside}
    return found


def test_patched_python_files_compile_and_find_their_names(real: Box):
    """A redirect that imports a kernel's twin by the kernel's own name would fail everywhere but on a CPU."""
    real.done("apply")
    names = patch_series.Series.load(CHECKOUT / "patches").files()
    redirected = 0
    for name in (name for name in names if name.endswith(".py")):
        tree = ast.parse((real.site / name).read_bytes())
        compile(tree, name, "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                redirected += "sglang_sm120" in ast.dump(node)
                assert not _unbound(node), (name, node.name)
    assert redirected > 12


def test_one_flipped_byte_is_refused_by_name(real: Box):
    name = patch_series.Series.load(CHECKOUT / "patches").files()[-1]
    path = real.site / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    for command in ("apply", "unapply", "verify", "status"):
        assert name in real.refused(command)


def test_the_overlay_is_an_installed_distribution(real: Box):
    real.done("apply")
    (found,) = importlib.metadata.distributions(name="sglang-sm120", path=[str(real.site)])
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    groups = {"console_scripts": project.get("scripts", {}), **project["entry-points"]}
    wanted = {(group, name, value) for group, entries in groups.items() for name, value in entries.items()}
    assert {(entry.group, entry.name, entry.value) for entry in found.entry_points} == wanted
    assert found.files
    recorded = {str(file) for file in found.files}
    for file in found.files:
        data = file.locate().read_bytes()
        assert file.hash is None or file.hash.value == _urlsafe_sha256(data), file
    placed = {name for name in tree(real.site) if name.startswith("sglang_sm120")}
    assert placed == recorded


def test_killed_at_a_random_instant(pristine: Path, tmp_path: Path, seed: int):
    chance = random.Random(seed)
    command = [sys.executable, "-I", "-S", str(PATCHSET), "apply", "--site"]
    seen = set()
    longest = 0.0
    for attempt in range(5):
        site = tmp_path / str(attempt)
        copy_tree(pristine, site)
        started = time.monotonic()
        process = subprocess.Popen([*command, str(site)], stdout=subprocess.DEVNULL)
        if attempt:
            time.sleep(chance.uniform(0, longest))
            process.send_signal(signal.SIGKILL)
        process.wait()
        longest = max(longest, time.monotonic() - started)
        box = Box(CHECKOUT, site)
        seen.add(_state(box))
        box.done("apply")
        assert _state(box) == "applied"
        box.done("verify")
        assert sorted(path.name for path in site.glob(".*")) == []
    assert seen <= {"clean", "applied"}


def test_make_apply_needs_python_and_patch_alone(real: Box, tmp_path: Path):
    """SITE=dir with nothing else on PATH, and blanks in both paths."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("patch", "make"):
        (tools / name).symlink_to(shutil.which(name) or pytest.fail(f"{name} is not on PATH"))
    (tools / "python3").write_text(f'#!/bin/bash\nexec "{sys.executable}" -I -S "$@"\n')
    (tools / "python3").chmod(0o755)
    root, site = tmp_path / "a checkout", tmp_path / "a site"
    copy_checkout(root)
    real.site.rename(site)

    def make(*goals: str) -> None:
        command = ["make", "-j4", *goals, f"SITE={site}"]
        result = subprocess.run(command, cwd=root, env={"PATH": str(tools)}, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    released = tree(site)
    make("apply", "verify")
    assert _state(Box(root, site)) == "applied"
    make("unapply")
    assert tree(site) == released
