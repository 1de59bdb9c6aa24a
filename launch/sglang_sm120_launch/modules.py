"""Which modules SGLang and FlashInfer build with nvcc for this model, and whether that was done; imports neither."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .checks import find_nvcc
from .errors import LaunchError
from .typed import typed

PACKAGES = ("sglang", "flashinfer-python", "torch", "apache-tvm-ffi")


def listed(sm: int, file: Path | None = None) -> list[dict[str, Any]]:
    """What rebuilds each module: SGLang's by the arguments of its `load_jit`, FlashInfer's by its generator's.

    Args:
        sm: of the card, 120 for compute capability 12.0.
        file: a list that a server wrote (SGLANG_SM120_MODULES) in place of the one that comes with this package.

    Raises:
        LaunchError: the file cannot be read, or there is no list for the card.
    """
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise LaunchError(f"--modules {file} cannot be read ({error.strerror}): name another file.") from None
        entries = [typed(dict[str, Any], line, f"--modules {file}") for line in lines]
        return list({entry["name"]: entry for entry in entries}.values())
    cards = json.loads(resources.files(__package__).joinpath("modules.json").read_text(encoding="utf-8"))["cards"]
    name = f"sm{sm}"
    if name not in cards:
        known = ", ".join(cards)
        raise LaunchError(f"There is no list of modules for {name} (there is for {known}): name one with --modules.")
    found: list[dict[str, Any]] = cards[name]
    return found


def root(environment: Mapping[str, str]) -> Path:
    """Where SGLang keeps its modules."""
    return Path(environment.get("SGLANG_JIT_CACHE_DIR") or "~/.cache/sglang/jit").expanduser()


def receipt(environment: Mapping[str, str], sm: int, entries: Sequence[Mapping[str, Any]]) -> Path:
    """The file that says that these modules were built for this card, by these compilers, for these packages."""
    # SGLang keeps FlashInfer's modules below its own cache, unless told otherwise.
    places = [str(root(environment)), *map(environment.get, ("SGLANG_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"))]
    tools = [_says(str(find_nvcc(environment))), _says(environment.get("CXX", "c++"))]
    key = json.dumps([sm, places, tools, [_version(package) for package in PACKAGES], entries], sort_keys=True)
    return root(environment) / f"sglang_sm120-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def write_receipt(path: Path, libraries: Iterable[Path]) -> None:
    """Say that these files are all there."""
    path.write_text(json.dumps([str(library) for library in libraries], indent=1), encoding="utf-8")


def are_built(environment: Mapping[str, str], sm: int) -> bool:
    """Whether every listed module lies where a server with these variables finds it; a fraction of a second."""
    try:
        libraries = json.loads(receipt(environment, sm, listed(sm)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(Path(library).is_file() for library in libraries)


def _says(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
