"""Place the overlay beside SGLang as an installed distribution, so that pip and importlib.metadata know it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import shutil
from pathlib import Path
from typing import Dict, List, Optional

import atomic

NAME = "sglang_sm120"
INSTALLER = "sglang-sm120-patchset"
# The launcher joins the distribution when the checkout has it.
PACKAGES = {NAME: "overlay", "sglang_sm120_launch": "launch"}
METADATA = """Metadata-Version: 2.1
Name: sglang-sm120
Version: {version}
Summary: DeepSeek-V4 in SGLang on consumer Blackwell (SM120)
License: Apache-2.0
Requires-Python: >=3.11
"""
# The shell starts the interpreter, so that its path may hold blanks and be long; Python reads a string there.
SCRIPT = """#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
# Placed by sglang-sm120-patchset.
import sys

from {module} import {function}

sys.exit({function}())
"""


class Foreign(Exception):
    """The site holds a package of our name that patchset did not place."""


def wanted(root: Path, site: Path) -> Dict[str, bytes]:
    """Every file of the distribution as the checkout `root` would place it: path relative to `site` -> bytes.

    A copy of the series is among them, which the start-up check and a later unapply read (the lock is a file of the
    overlay), and the console command where the site belongs to an interpreter with a bin directory.
    """
    source = root / PACKAGES[NAME] / NAME / "__init__.py"
    version = re.search(r'^__version__ = "(.+)"$', source.read_text(encoding="utf-8"), re.MULTILINE)
    if version is None:
        raise Foreign(f"{source} sets no __version__: restore it from the repository")
    entries = entry_points(root / "pyproject.toml")
    files: Dict[str, bytes] = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[path.relative_to(root / folder).as_posix()] = path.read_bytes()
    for path in sorted((root / "patches").glob("*/**/*")):
        if path.name == "series" or path.suffix == ".patch":
            files[f"{NAME}/series/{path.relative_to(root / 'patches').as_posix()}"] = path.read_bytes()
    info = f"{NAME}-{version.group(1)}.dist-info"
    files[f"{info}/METADATA"] = METADATA.format(version=version.group(1)).encode()
    files[f"{info}/INSTALLER"] = f"{INSTALLER}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: patchset\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = [line for group, of_group in entries.items()
             for line in (f"[{group}]", *(f"{name} = {target}" for name, target in of_group.items()))]
    files[f"{info}/entry_points.txt"] = ("\n".join(lines) + "\n").encode()
    files.update(_scripts(site, entries.get("console_scripts", {})))
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    return files


def placed(site: Path) -> Dict[str, bytes]:
    """The distribution's files as they are in the site, caches left out; empty when it is not there."""
    files = {}
    for folder in _folders(site):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[path.relative_to(site).as_posix()] = path.read_bytes()
    files.update({name: (site / name).read_bytes() for name in _placed_scripts(site)})
    return files


def place(site: Path, files: Dict[str, bytes]) -> bool:
    """Make the site hold exactly `files`; False when it already does, and then nothing is touched.

    Metadata goes first and leaves last, so that a package without metadata is never ours.
    """
    require_ours(site)
    if placed(site) == files:
        return False
    scripts = {name: data for name, data in files.items() if name.startswith("../")}
    for name in scripts:
        if (site / name).exists() and not _is_our_script(site / name):
            raise Foreign(f"{os.path.normpath(site / name)} was not placed by patchset: move it away first")
    obsolete = [name for name in _placed_scripts(site) if name not in scripts]
    stage = atomic.stage_dir(site)
    for name, data in files.items():
        if name not in scripts:
            path = stage / "new" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    names = sorted({name.split("/", 1)[0] for name in files if name not in scripts},
                   key=lambda name: not name.endswith(".dist-info"))
    for name in names:
        atomic.exchange_or_move(stage / "new" / name, site / name, stage / name)
    for folder in _folders(site):
        if folder.name not in names:
            shutil.rmtree(folder)
    # Last, when what they import is there.
    for name, data in scripts.items():
        _write_script(site / name, data)
    for name in obsolete:
        (site / name).unlink()
    atomic.discard_stage(site)
    return True


def remove(site: Path) -> bool:
    """Take the distribution away; False when it is not there."""
    require_ours(site)
    folders = _folders(site)
    for name in _placed_scripts(site):
        (site / name).unlink()
    for folder in sorted(folders, key=lambda folder: folder.name.endswith(".dist-info")):
        # Renamed first: a half-deleted package must not be importable.
        os.rename(folder, atomic.stage_dir(site) / folder.name)
        atomic.discard_stage(site)
    return bool(folders)


def require_ours(site: Path) -> None:
    """Raise Foreign when another installer put a package or metadata of our name into the site."""
    metadata = list(site.glob(f"{NAME}-*.dist-info"))
    for folder in metadata:
        installer = folder / "INSTALLER"
        if not installer.is_file() or installer.read_text().strip() != INSTALLER:
            raise Foreign(f"{folder} was not placed by patchset: run `pip uninstall sglang-sm120` first")
    if not metadata and (site / NAME).exists() and placed_series(site) is None:
        raise Foreign(f"{site / NAME} was not placed by patchset: move it away first")


def placed_series(site: Path) -> Optional[Path]:
    """The folder of the copied series (it has the layout of `patches/`), None when no overlay is placed."""
    folder = site / NAME / "series"
    return folder if folder.is_dir() else None


def _folders(site: Path) -> List[Path]:
    packages = [site / package for package in PACKAGES if (site / package).is_dir()]
    return packages + sorted(site.glob(f"{NAME}-*.dist-info"))


def entry_points(project: Path) -> Dict[str, Dict[str, str]]:
    """Group -> name -> `module:function`, from the quoted lines of pyproject's scripts and entry-point tables."""
    groups: Dict[str, Dict[str, str]] = {}
    entries: Optional[Dict[str, str]] = None
    for line in project.read_text(encoding="utf-8").splitlines():
        header = re.fullmatch(r'\[(?:project\.(scripts)|project\.entry-points\."(.+)")\]', line.strip())
        if header:
            entries = groups.setdefault("console_scripts" if header.group(1) else header.group(2), {})
        elif line.startswith("["):
            entries = None
        elif entries is not None:
            pair = re.fullmatch(r'"?([\w.-]+)"? = "(.+)"', line.strip())
            if pair:
                entries[pair.group(1)] = pair.group(2)
    return groups


def _bin(site: Path) -> Optional[Path]:
    """The directory of the console commands of the interpreter that `<prefix>/lib/python3.x/site-packages` serves."""
    prefix = site.parent.parent.parent
    inside = site.parent.parent.name == "lib" and site.parent.name.startswith("python")
    return prefix / "bin" if inside and (prefix / "bin" / "python3").exists() else None


def _scripts(site: Path, entries: Dict[str, str]) -> Dict[str, bytes]:
    """The console commands (name -> `module:function`), as files relative to the site."""
    folder = _bin(site)
    if folder is None:
        return {}
    files = {}
    for name, target in entries.items():
        module, _, function = target.partition(":")
        text = SCRIPT.format(python=folder / "python3", module=module, function=function)
        files[f"../../../bin/{name}"] = text.encode()
    return files


def _placed_scripts(site: Path) -> List[str]:
    folder = _bin(site)
    if folder is None:
        return []
    # Only names that can be ours: reading every program of a shared bin directory would take long.
    return sorted(f"../../../bin/{path.name}" for path in folder.glob("sglang-sm120*") if _is_our_script(path))


def _is_our_script(path: Path) -> bool:
    return path.is_file() and f"# Placed by {INSTALLER}.".encode() in path.read_bytes()


def _write_script(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(data)
    draft.chmod(0o755)
    os.replace(draft, path)


def _record(files: Dict[str, bytes], own: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name, data in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        writer.writerow([name, f"sha256={digest}", len(data)])
    writer.writerow([own, "", ""])
    return text.getvalue().encode()
