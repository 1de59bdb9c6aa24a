"""Sites to patch: a tiny one, and a copy of the real installed SGLang."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from boxes import CHECKOUT, Box, copy_tree, make_box

import series as patch_series


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
    shutil.copytree(template.root.parent, memory / "box")
    return Box(memory / "box" / template.root.name, memory / "box" / template.site.name)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released SGLang as a site of its own, proved by RECORD.

    Copied from the running interpreter's installation; when that is patched, the copy is taken back.
    """
    try:
        installed = Path(str(importlib.metadata.distribution("sglang").locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("sglang is not installed: make setup")
    site = tmp_path_factory.mktemp("pristine")
    folders = [installed / "sglang", *installed.glob("sglang-*.dist-info")]
    folders += [*installed.glob("sglang_sm120"), *installed.glob("sglang_sm120-*.dist-info")]
    for folder in folders:
        shutil.copytree(folder, site / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    Box(CHECKOUT, site).done("unapply")
    released = patch_series.Site.open(site)
    assert len(released.record) > 2000
    assert released.differing(released.record) == []
    return site


@pytest.fixture
def real(pristine: Path, tmp_path: Path) -> Box:
    """The checkout's own series and a fresh site with the released SGLang.

    Its files are hard links to `pristine`, as an installer's cache makes them: patchset must not write through one.
    """
    copy_tree(pristine, tmp_path / "site")
    return Box(CHECKOUT, tmp_path / "site")
