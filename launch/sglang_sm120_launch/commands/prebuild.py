"""`sglang-sm120 prebuild`: build what SGLang and FlashInfer would compile with nvcc at a first start, in parallel."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock
from tqdm import tqdm

from ..checks import find_nvcc
from ..errors import LaunchError
from ..machine import Machine
from ..modules import listed, receipt, root, write_receipt

COMPILER_BYTES = 3 << 30
"""For an nvcc. Two of the 96 sources of FlashInfer's experts took 1.2 GB (CUDA 13.0, sm_120f); more may be needed."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `prebuild`."""
    parser.add_argument("--arch", metavar="sm120", help="the card to build for (default: the one that is here)")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at a time (default: by cores and memory)")
    parser.add_argument("--list", action="store_true", help="show what is built and what is not, and build nothing")
    parser.add_argument(
        "--modules", type=Path, metavar="FILE", help="modules that a server listed under SGLANG_SM120_MODULES"
    )


def run(arguments: argparse.Namespace) -> int:
    """Build what is not there; 0 when all is there then, 1 when a module cannot be built."""
    sm = _card(arguments.arch)
    entries = listed(sm, arguments.modules)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise LaunchError(f"--jobs is {arguments.jobs}: give 1 or more.")
    if find_nvcc(os.environ) is None:
        raise LaunchError("No nvcc is in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda: install the CUDA toolkit.")
    # By the variables as `serve` has them: SGLang sets some when it is imported.
    written = receipt(os.environ, sm, entries)
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{sm // 10}.{sm % 10}")
    with _sglang(sm):
        modules = [Flashinfer(entry) if "generator" in entry else Sglang(entry) for entry in entries]
        missing = [module for module in modules if module.library() is None]
        if arguments.list:
            for module in modules:
                print("missing" if module in missing else "built  ", module.name)
            return 0
        failed = _build(missing, arguments.jobs or _jobs(), len(modules)) if missing else []
        for name, log in failed:
            print(f"sglang-sm120: {name} could not be built: {log} says why.", file=sys.stderr)
        print(f"{len(modules) - len(failed)} of {len(modules)} modules are built for sm{sm}.", flush=True)
        if not failed:
            write_receipt(written, [Path(str(module.library())) for module in modules])
    return 1 if failed else 0


def _card(arch: str | None) -> int:
    if arch is not None:
        if not re.fullmatch(r"sm\d{2,3}", arch):
            raise LaunchError(f"--arch {arch} is no card: name sm120 …")
        return int(arch[2:])
    found = {gpu.sm for gpu in Machine.detect().gpus}
    if len(found) != 1:
        kinds = ", ".join(f"sm{sm}" for sm in sorted(found)) or "no GPU"
        raise LaunchError(f"{kinds} was found, and modules are built for one kind of card: name it with --arch.")
    return found.pop()


def _jobs() -> int:
    """As many compilers as there are cores, while they fit into the memory."""
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // COMPILER_BYTES))


@contextlib.contextmanager
def _sglang(sm: int) -> Iterator[None]:
    """SGLang's loader builds for that card, and does not load what it built, which without a driver nobody can."""
    from sglang.kernels.jit.utils import arch
    from sglang.kernels.jit.utils.compile import loader

    # That it cannot detect a card is why it is told which.
    logging.getLogger(arch.__name__).setLevel(logging.ERROR)
    load = loader._load
    loader._load = lambda library: library
    try:
        with arch.override_jit_cuda_arch(sm // 10, sm % 10):
            yield
    finally:
        loader._load = load


class Sglang:
    """A module of SGLang's: one source, built by its own loader."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.name, self.sources = str(entry["name"]), 1
        self._given = {
            name: [tuple(pair) for pair in value] if name.endswith("_wrappers") else value
            for name, value in entry.items() if name not in ("name", "args", "runs")
        }  # fmt: skip
        self._args = entry["args"]

    def library(self) -> Path | None:
        """Where it is built, None where it is not."""
        os.environ["SGLANG_CRASH_ON_JIT_COMPILE"] = "1"
        try:
            return Path(self.build())
        except RuntimeError:
            return None
        finally:
            del os.environ["SGLANG_CRASH_ON_JIT_COMPILE"]

    def build(self) -> str:
        from sglang.kernels.jit.utils.compile import loader

        return str(loader.load_jit(*self._args, **self._given))


class Flashinfer:
    """A module of FlashInfer's: many sources, built by ninja."""

    def __init__(self, entry: dict[str, Any]) -> None:
        module, _, function = entry["generator"].partition(":")
        self.spec = getattr(importlib.import_module(module), function)(**entry["arguments"])
        self.name, self.sources = str(entry["name"]), len(self.spec.sources) + 1

    def library(self) -> Path | None:
        """Where it is built, None where it is not."""
        return Path(self.spec.get_library_path()) if self.spec.is_compiled else None

    def build(self, jobs: int, log: Path, bar: Any) -> bool:
        """Whether ninja built it. It goes on after an error, so that `log` has them all."""
        # In the folder where FlashInfer runs it: elsewhere ninja would not find again what it knows of the sources.
        command = ["ninja", "-v", "-k", "0", "-j", str(jobs), "-f", str(self.spec.ninja_path)]
        # A server that starts meanwhile waits for what it needs.
        with FileLock(self.spec.lock_path, thread_local=False), log.open("w", encoding="utf-8") as out:
            self.spec.write_ninja()
            process = subprocess.Popen(
                command, cwd=self.spec.build_dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                out.write(line)
                bar.update(line.startswith("["))
            return process.wait() == 0


def _build(missing: Sequence[Sglang | Flashinfer], jobs: int, total: int) -> list[tuple[str, Path]]:
    """Build them with so many compilers at a time; those that failed, each with its log."""
    began, done, failed = time.monotonic(), total - len(missing), []
    print(f"{len(missing)} of {total} modules have to be built, {jobs} compilers at a time.", flush=True)
    single = [module for module in missing if isinstance(module, Sglang)]
    several = [module for module in missing if isinstance(module, Flashinfer)]
    # Shown on a terminal alone, where lines would not move.
    files = sum(module.sources for module in missing)
    with tqdm(total=files, unit="file", disable=None) as bar, ThreadPoolExecutor(jobs) as pool:

        def ended(name: str) -> None:
            nonlocal done
            done += 1
            bar.write(f"[{done}/{total}] {name}, {time.monotonic() - began:.0f} s after the start", file=sys.stdout)
            sys.stdout.flush()

        futures = {pool.submit(module.build): module for module in single}
        for future in as_completed(futures):
            bar.update()
            name = futures[future].name
            if error := future.exception():
                failed.append((name, _log(name, str(error))))
            else:
                ended(name)
        # The longest last, each with all compilers.
        for module in sorted(several, key=lambda module: module.sources):
            log = _log(module.name, "")
            if module.build(jobs, log, bar):
                ended(module.name)
            else:
                failed.append((module.name, log))
    return failed


def _log(name: str, text: str) -> Path:
    folder = root(os.environ) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name[:200]}.log"
    file.write_text(text, encoding="utf-8")
    return file
