"""The doctor's checks of what is installed: C library, Python, SGLang and its patches, the overlay, pins, NCCL.

They read metadata and files; nothing of SGLang or torch is imported.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from .checks import Finding

if TYPE_CHECKING:
    from packaging.specifiers import Specifier

PYTHONS = ((3, 11), (3, 12))
GLIBC = (2, 34)
"""The C library that SGLang's wheel is built for (manylinux_2_34)."""
APPLY = "run `make apply` in the sglang-sm120 checkout"
UNPATCHED = (
    f"{APPLY} for the defects that the series mends and for serving on a CPU; on SM120 `--enable-nvidia-megakernel` "
    f"serves without"
)
PINNING = ("sglang", "torch")
"""Packages whose exact requirements (`name==version`) must be what is installed."""
NCCL = "nvidia-nccl-cu13"


def software_checks() -> Iterator[Finding]:
    """Every check of this module, for the running interpreter."""
    yield glibc()
    yield python(sys.version_info[:2])
    yield patches(_folder_of("sglang"), _folder_of("sglang_sm120"))
    yield overlay(_find("sglang-sm120"), _folder_of("sglang_sm120"))
    yield pins()
    yield nccl(os.environ)


def glibc() -> Finding:
    """The C library, which decides whether SGLang's wheel can be installed."""
    name, version = platform.libc_ver()
    do = f"use a system with glibc {GLIBC[0]}.{GLIBC[1]} or newer (Ubuntu 22.04, Debian 12, RHEL 9, or the container)"
    if name != "glibc":
        return Finding("glibc", "fail", "the C library is not glibc", do)
    if tuple(map(int, version.split(".")[:2])) < GLIBC:
        return Finding("glibc", "fail", version, do)
    return Finding("glibc", "ok", version)


def python(version: tuple[int, ...]) -> Finding:
    """A Python that requirements.lock was resolved for."""
    found = ".".join(map(str, version))
    if version in PYTHONS:
        return Finding("python", "ok", found)
    return Finding("python", "fail", found, "use Python 3.11 or 3.12 (`make setup` makes a .venv with it)")


def patches(package: Path | None, overlay: Path | None) -> Finding:
    """SGLang's touched files against the overlay's lock, as every server process checks them.

    Args:
        package: SGLang's folder, None when it is not installed.
        overlay: the folder of the overlay that Python imports.
    """
    sglang = _find("sglang")
    if overlay is None:
        return Finding("patches", "fail", "not looked at", "see overlay")
    from sglang_sm120.startup import problem_of

    try:
        problem = problem_of(overlay, package.parent if package else None, sglang.version if sglang else None)
        if problem is not None:
            found, _, do = problem.rpartition(": ")
            return Finding("patches", "fail", found, do)
        assert package is not None, "problem_of has said that SGLang is not installed"
        lock = json.loads((overlay / "sglang.lock").read_text(encoding="utf-8"))
        file, hashes = next(iter(lock["files"].items()))
    except (ValueError, KeyError) as error:
        return Finding("patches", "fail", f"{overlay / 'sglang.lock'} is damaged ({error})", APPLY)
    # All files are as released or all as patched: the first one tells.
    if hashlib.sha256((package.parent / file).read_bytes()).hexdigest() == hashes["after"]:
        return Finding("patches", "ok", f"applied to {package}")
    return Finding("patches", "warn", f"SGLang {lock['sglang']} in {package} is as released", UNPATCHED)


def is_patched() -> bool:
    """Whether the series is in the SGLang of this interpreter."""
    return patches(_folder_of("sglang"), _folder_of("sglang_sm120")).status == "ok"


def overlay(placed: Distribution | None, imported: Path | None) -> Finding:
    """The installed overlay against its RECORD, and whether it is the one that Python imports."""
    if placed is None:
        return Finding("overlay", "fail", "sglang-sm120 is not installed", APPLY)
    changed = []
    for file in placed.files or ():
        if file.hash is None:
            continue
        try:
            data = Path(str(file.locate())).read_bytes()
        except OSError:
            data = b""
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        if digest != file.hash.value:
            changed.append(str(file))
    found = f"sglang-sm120 {placed.version}"
    if changed:
        shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        return Finding("overlay", "fail", f"{found}, changed since it was placed: {shown}", APPLY)
    site = Path(str(placed.locate_file(""))).resolve()
    if imported is not None and imported.parent != site:
        do = "take it off PYTHONPATH, unless you are working on it"
        return Finding("overlay", "warn", f"{found}, but Python imports {imported}", do)
    return Finding("overlay", "ok", f"{found}, as placed")


def pins() -> Finding:
    """Exact requirements of SGLang and torch against what is installed."""
    wrong, checked = [], 0
    for name in PINNING:
        found = _find(name)
        if found is None:
            return Finding("pins", "fail", f"{name} is not installed", "run `make setup`")
        for package, wanted in _exact(found):
            checked += 1
            installed = _find(package)
            if installed is None:
                wrong.append(f"{package} is missing, {name} needs {wanted.version}")
            elif not wanted.contains(installed.version, prereleases=True):
                wrong.append(f"{package} {installed.version}, {name} needs {wanted.version}")
    if wrong:
        return Finding("pins", "fail", "; ".join(wrong), "run `make setup`, or install these versions")
    return Finding("pins", "ok", f"{checked} exact requirements of {' and '.join(PINNING)} are met")


def nccl(environment: Mapping[str, str]) -> Finding:
    """The NCCL that torch loads, and variables that change how it runs."""
    found = _find(NCCL)
    if found is None:
        return Finding("nccl", "fail", f"{NCCL} is not installed", "run `make setup`: two cards need it")
    library = Path(str(found.locate_file("nvidia/nccl/lib/libnccl.so.2")))
    if not library.is_file():
        return Finding("nccl", "fail", f"{NCCL} {found.version} without {library}", f"reinstall {NCCL}")
    set_here = " ".join(f"{name}={environment[name]}" for name in sorted(environment) if name.startswith("NCCL_"))
    return Finding("nccl", "ok", f"{found.version}{', with ' + set_here if set_here else ''}")


def _exact(package: Distribution) -> Iterator[tuple[str, Specifier]]:
    """(name, `==version`) of every requirement `name==version` that holds here without extras."""
    # Not at the top: doctor runs on a bare Python too, where there is nothing to look at here.
    from packaging.requirements import Requirement

    for line in package.requires or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        for specifier in requirement.specifier:
            if specifier.operator == "==" and "*" not in specifier.version:
                yield requirement.name, specifier


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _folder_of(package: str) -> Path | None:
    """Where Python would import `package` from; None when it would not find it."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]).resolve() if folders else None
