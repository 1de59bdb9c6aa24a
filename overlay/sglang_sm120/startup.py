"""SGLang's plugin at server start: refuse to run when the installed SGLang is not one that this package goes with.

Two are: the released one, untouched, where a wheel of this package was installed beside it, and the patched one,
which alone goes with a package that `make apply` placed (it holds a copy of the series).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

from . import __version__

VERSION = "SGLANG_SM120_VERSION"
REPAIR = "run `make apply` in the sglang-sm120 checkout"
HERE = Path(__file__).resolve().parent


def check() -> None:
    """Compare SGLang's touched files with the lock that lies beside this module.

    SGLANG_SM120_VERSION, where it is set, has to be this package's version.
    SGLang calls this in every server process (entry-point group `sglang.srt.plugins`); with `SGLANG_PLUGINS` set to
    other names it does not. Returns when every file has the hash of the applied series, or, for an installed wheel,
    of the released SGLang.

    Raises:
        SystemExit: with one sentence, in every other case. SGLang's plugin loader swallows `Exception`.
    """
    try:
        problem = other_release() or problem_of(HERE, _sglang_parent(), _sglang_version())
    except Exception as error:
        problem = f"the installed SGLang could not be checked ({type(error).__name__}: {error}): {REPAIR}"
    if problem:
        raise SystemExit(f"sglang-sm120: {problem}")


def other_release() -> str | None:
    """The sentence that says that a plan for several hosts, which sets VERSION, was made by another release."""
    wanted = os.environ.get(VERSION)
    if wanted in (None, "", __version__):
        return None
    return (
        f"{VERSION} is {wanted} and sglang-sm120 {__version__} is installed in {HERE.parent}, but servers that work "
        f"together need one release: install {wanted}, or plan again with {__version__}"
    )


def problem_of(package: Path, site: Path | None, version: str | None) -> str | None:
    """The sentence that says why SGLang does not go with `package`, None when it does.

    Args:
        package: the folder of this package, with sglang.lock and, where `make apply` placed it, the series.
        site: the folder that holds SGLang's package, None when it is not installed.
        version: of the installed SGLang, None when no metadata says it.
    """
    lock = package / "sglang.lock"
    if site is None:
        return f"sglang is not installed: {REPAIR}"
    try:
        wanted = json.loads(lock.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{lock} cannot be read ({error.strerror}): {REPAIR}"
    if version != wanted["sglang"]:
        needed = wanted["sglang"]
        return f"SGLang {version or 'of unknown version'} is installed in {site}, needed {needed}: install that version"
    files = sorted(wanted["files"].items())
    found = {file: _sha256(site / file) for file, _ in files}
    patched = [file for file, hashes in files if found[file] == hashes["after"]]
    released = [file for file, hashes in files if found[file] == hashes["before"]]
    if len(patched) == len(files):
        return None
    if len(released) == len(files):
        was_placed = (package / "series").is_dir()
        return f"the SGLang in {site} is not patched: {REPAIR}" if was_placed else None
    foreign = [file for file in found if file not in patched and file not in released]
    if foreign:
        return f"{', '.join(foreign)} in {site} is neither as released nor as patched: reinstall sglang=={version}"
    return f"the series is only partly in {site} ({', '.join(released)} is as released): {REPAIR}"


def _sglang_parent() -> Path | None:
    spec = importlib.util.find_spec("sglang")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]).resolve().parent if folders else None


def _sglang_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
