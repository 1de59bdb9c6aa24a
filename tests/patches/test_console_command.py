"""The console command: placed with the launcher where the site has a bin directory, and taken away with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from boxes import Box, stamps, tree

LAUNCHER = "def main():\n    import sys\n    print('launched', *sys.argv[1:])\n    return 3\n"


@pytest.fixture
def venv(box: Box) -> Box:
    """The box's site as that of an environment whose path has a blank, and a launcher in its checkout."""
    site = box.site.parent / "the environment" / "lib" / "python3.11" / "site-packages"
    site.parent.mkdir(parents=True)
    box.site.rename(site)
    folder = site.parents[2] / "bin"
    folder.mkdir()
    (folder / "python3").symlink_to(sys.executable)
    package = box.root / "launch" / "sglang_sm120_launch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(LAUNCHER)
    project = box.root / "pyproject.toml"
    project.write_text('[project.scripts]\nsglang-sm120 = "sglang_sm120_launch.cli:main"\n\n' + project.read_text())
    return Box(box.root, site)


def command(venv: Box) -> Path:
    return venv.site.parents[2] / "bin" / "sglang-sm120"


def test_it_runs_and_leaves_nothing_behind(venv: Box):
    """After apply it starts the launcher with its arguments and status; after unapply every byte is as before."""
    before = tree(venv.site.parents[2])
    venv.done("apply")
    venv.done("verify")
    assert "as in the checkout" in venv.done("status")
    environment = os.environ | {"PYTHONPATH": str(venv.site)}
    done = subprocess.run([command(venv), "a b", "c"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (3, "launched a b c\n", "")
    venv.done("unapply")
    assert tree(venv.site.parents[2]) == before


def test_twice_is_once(venv: Box):
    venv.done("apply")
    before = stamps(venv.site.parents[2])
    venv.done("apply")
    assert stamps(venv.site.parents[2]) == before


def test_it_is_in_the_record(venv: Box):
    """So that `pip uninstall` and importlib.metadata know it."""
    venv.done("apply")
    [record] = venv.site.glob("sglang_sm120-*/RECORD")
    assert "../../../bin/sglang-sm120,sha256=" in record.read_text()


@pytest.mark.parametrize("damage", ("gone", "edited"))
def test_a_damaged_command_is_seen_and_repaired(venv: Box, damage: str):
    venv.done("apply")
    whole = command(venv).read_bytes()
    if damage == "gone":
        command(venv).unlink()
    else:
        command(venv).write_bytes(whole + b"# edited\n")
    assert "bin/sglang-sm120" in venv.refused("verify")
    venv.done("apply")
    assert command(venv).read_bytes() == whole and os.access(command(venv), os.X_OK)


def test_another_installers_command_is_left_alone(venv: Box):
    command(venv).write_text("#!/bin/sh\n")
    assert "not placed by patchset" in venv.refused("apply")
    assert command(venv).read_text() == "#!/bin/sh\n"


def test_a_command_that_is_no_longer_wanted_goes(venv: Box):
    venv.done("apply")
    project = venv.root / "pyproject.toml"
    project.write_text(project.read_text().replace("sglang-sm120 =", "sglang-sm120-next ="))
    venv.done("apply")
    assert not command(venv).exists() and command(venv).with_name("sglang-sm120-next").exists()
    venv.done("unapply")
    assert [path.name for path in command(venv).parent.iterdir()] == ["python3"]
