"""SGLang's plugin at server start: refuse to run when the installed SGLang is not what the series makes of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

REPAIR = "run `make apply` in the sglang-sm120 checkout"


def check() -> None:
    """Compare SGLang's touched files with the lock that was placed beside this module.

    SGLang calls this in every server process (entry-point group `sglang.srt.plugins`); with `SGLANG_PLUGINS` set to
    other names it does not. Returns when every file has the hash of the applied series.

    Raises:
        SystemExit: with one sentence, in every other case. SGLang's plugin loader swallows `Exception`.
    """
    try:
        problem = problem_of(Path(__file__).resolve().parent / "sglang.lock", _sglang_parent())
    except Exception as error:
        problem = f"the installed SGLang could not be checked ({type(error).__name__}: {error}): {REPAIR}"
    if problem:
        raise SystemExit(f"sglang-sm120: {problem}")


def problem_of(lock: Path, site: Path | None) -> str | None:
    """The sentence that says why `site` is not as `lock` (a JSON file) wants it; None when it is."""
    if site is None:
        return f"sglang is not installed: {REPAIR}"
    try:
        wanted = json.loads(lock.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{lock} cannot be read ({error.strerror}): {REPAIR}"
    found = {file: _sha256(site / file) for file in wanted["files"]}
    if all(found[file] == hashes["after"] for file, hashes in wanted["files"].items()):
        return None
    if all(found[file] == hashes["before"] for file, hashes in wanted["files"].items()):
        return f"the SGLang in {site} is not patched: {REPAIR}"
    if not (site / f"sglang-{wanted['sglang']}.dist-info").is_dir():
        return f"the SGLang in {site} is not {wanted['sglang']}: install that version and {REPAIR}"
    wrong = sorted(file for file, hashes in wanted["files"].items() if found[file] != hashes["after"])
    return f"the series is only partly in {site} ({', '.join(wrong)} differ): {REPAIR}"


def _sglang_parent() -> Path | None:
    spec = importlib.util.find_spec("sglang")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]).resolve().parent if folders else None


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
