"""Sites to patch: a tiny one, and a copy of the real installed SGLang."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from boxes import CHECKOUT, Box, Environment, build_wheel, copy_tree, install_wheel, make_box, make_environment

import series as patch_series


def _installed() -> Path:
    try:
        return Path(str(importlib.metadata.distribution("sglang").locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("sglang is not installed: make setup")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return make_box(tmp_path_factory.mktemp("template"))


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsync calls wait for a disk otherwise."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


@pytest.fixture
def box(template: Box, memory: Path) -> Box:
    """The tiny checkout and site, as released."""
    shutil.copytree(template.root.parent, memory / "box", symlinks=True)
    return Box(memory / "box" / template.root.name, memory / "box" / template.site.name)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released SGLang as a site of its own, proved by RECORD.

    Copied from the running interpreter's installation; when that is patched, the copy is taken back.
    """
    installed = _installed()
    site = tmp_path_factory.mktemp("pristine")
    folders = [installed / "sglang", *installed.glob("sglang-*.dist-info")]
    folders += [*installed.glob("sglang_sm120"), *installed.glob("sglang_sm120-*.dist-info")]
    for folder in folders:
        shutil.copytree(folder, site / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    Box(CHECKOUT, site).done("unapply")
    released = patch_series.Site.open(site)
    assert len(released.record) > 5000
    assert released.differing(released.record) == []
    return site


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with an untouched SGLang and nothing of ours."""
    return make_environment(tmp_path_factory.mktemp("released") / "environment", _installed())


@pytest.fixture(scope="session")
def with_wheel(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with an untouched SGLang and our wheel."""
    folder = tmp_path_factory.mktemp("with_wheel")
    environment = make_environment(folder / "environment", _installed())
    environment.install(build_wheel(folder))
    return environment


@pytest.fixture(scope="session", params=["3.11", "3.12"])
def wheel(request: pytest.FixtureRequest, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released SGLang of each Python that the project supports: its wheels differ."""
    if request.param == f"{sys.version_info.major}.{sys.version_info.minor}":
        return pristine
    folder = tmp_path_factory.mktemp("wheel")
    install_wheel(request.param, folder / "site", folder / "requirements")
    return folder / "site"


@pytest.fixture
def real(pristine: Path, tmp_path: Path) -> Box:
    """The checkout's own series and a fresh site with the released SGLang.

    Its files are hard links to `pristine`, as an installer's cache makes them: patchset must not write through one.
    """
    copy_tree(pristine, tmp_path / "site")
    return Box(CHECKOUT, tmp_path / "site")
