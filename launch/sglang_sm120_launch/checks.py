"""The doctor's checks of the machine: GPUs, driver, links, host limits, compilers.

Each takes what it looks at as arguments and returns one `Finding`; none imports torch or needs a GPU.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from .address import listen_problem, port_problem
from .comms import SHM_MIB as SHM_LEAST_MIB
from .machine import Machine

Status = Literal["ok", "warn", "fail"]
SERVED = (120, 121)
"""Compute capabilities that the step is made for."""
FIRST_CUDA = (12, 8)
"""The first CUDA that knows SM120: https://docs.nvidia.com/cuda/cuda-toolkit-release-notes."""
GIB = 1 << 30
SHM_MIB = 16 * 1024
"""/dev/shm that two ranks of NCCL and SGLang's broadcast buffers are known to run with; they fail below the least."""
USED_MIB = 1024
OPEN_FILES = 65535
"""What SGLang raises its own limit to, as far as the hard limit allows."""
CACHE_BYTES = 5 * GIB
CACHE_VARIABLE = "TRITON_CACHE_DIR"
NVCC_SECONDS = 5.0
"""How long a compiler may take to say what it is: one on a hanging network drive never answers."""


class Finding(NamedTuple):
    """One check's result: what was found, and what to do about it (empty when there is nothing to do)."""

    name: str
    status: Status
    found: str
    do: str = ""


def machine_checks(machine: Machine, host: str, port: int, cache: Path) -> Iterator[Finding]:
    """Every check of this module. `host` and `port` are the server's, `cache` is where compiled kernels are kept."""
    yield gpu(machine, os.environ)
    yield gpu_memory(machine)
    yield driver(machine)
    yield peer_access(machine)
    yield iommu(machine)
    yield shm(machine)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[1], machine)
    yield disk(cache)
    yield port_free(host, port)
    yield nvcc(machine, os.environ)
    yield host_compiler()


def gpu(machine: Machine, environment: Mapping[str, str]) -> Finding:
    """Cards of the right compute capability, all alike."""
    need = "use an SM120 card (RTX PRO 6000 Blackwell, RTX 5090) or SM121 (GB10)"
    if not machine.gpus:
        return Finding("gpu", "fail", _no_gpu(), f"{need}; --device cpu serves the small demo model only")
    kinds = sorted({(card.name, card.compute_capability, card.memory_mib) for card in machine.gpus})
    counts = {kind: sum((g.name, g.compute_capability, g.memory_mib) == kind for g in machine.gpus) for kind in kinds}
    found = ", ".join(f"{n} x {name} (SM {cc}, {mib} MiB)" for (name, cc, mib), n in counts.items())
    if any(card.sm not in SERVED for card in machine.gpus):
        if environment.get("SGLANG_SM120_FORCE") == "1":
            return Finding("gpu", "warn", f"{found}, SGLANG_SM120_FORCE=1", "expect a test setup; unset it on SM120")
        return Finding("gpu", "fail", found, f"{need}, or hide the others with CUDA_VISIBLE_DEVICES")
    if len(kinds) > 1:
        return Finding("gpu", "warn", found, "serve on cards that are alike: the smallest and slowest sets the pace")
    return Finding("gpu", "ok", found)


def _no_gpu() -> str:
    """Why NVML shows no card: no card, no driver, or no binding."""
    try:
        import pynvml  # noqa: F401
    except ImportError:
        return "no GPU visible, nvidia-ml-py is not installed"
    if Path("/proc/driver/nvidia/version").exists():
        return "no GPU visible, though NVIDIA's kernel driver is loaded"
    return "no NVIDIA GPU"


def gpu_memory(machine: Machine) -> Finding:
    """Cards that nobody else uses."""
    if not machine.gpus:
        return Finding("gpu-memory", "ok", "no card to look at")
    taken = [f"GPU {i}: {card.used_mib} MiB" for i, card in enumerate(machine.gpus) if card.used_mib > USED_MIB]
    if taken:
        return Finding(
            "gpu-memory", "warn", f"in use on {', '.join(taken)}", "stop what uses them (nvidia-smi lists it)"
        )
    return Finding("gpu-memory", "ok", "free on every card")


def driver(machine: Machine) -> Finding:
    """A driver that knows SM120 and serves the CUDA that the installed torch was built for."""
    wanted = max(FIRST_CUDA, _runtime_cuda() or FIRST_CUDA)
    need = f"CUDA {wanted[0]}.{wanted[1]}"
    if machine.driver is None or machine.cuda is None:
        return Finding("driver", "fail", "no NVIDIA driver", f"install a driver that serves {need} or newer")
    found = f"{machine.driver}, serves CUDA {machine.cuda}"
    if tuple(map(int, machine.cuda.split("."))) < wanted:
        return Finding("driver", "fail", found, f"install a driver that serves {need} or newer")
    return Finding("driver", "ok", found)


def _runtime_cuda() -> tuple[int, int] | None:
    """CUDA of the runtime that was installed with torch, by its wheel's version; None when there is none."""
    from importlib.metadata import PackageNotFoundError, version

    for wheel in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        try:
            major, minor = version(wheel).split(".")[:2]
        except PackageNotFoundError:
            continue
        return int(major), int(minor)
    return None


def peer_access(machine: Machine) -> Finding:
    """Cards that read and write each other's memory."""
    if len(machine.gpus) < 2:
        return Finding("p2p", "ok", "fewer than two cards, nothing to connect")
    found = (
        f"{'every' if machine.p2p else 'not every'} pair of {len(machine.gpus)} cards, farthest link: {machine.link}"
    )
    if machine.p2p:
        return Finding("p2p", "ok", found)
    do = "go on through host memory (`plan` sets NCCL_P2P_DISABLE=1 and --disable-custom-all-reduce), or put the cards "
    return Finding("p2p", "warn", found, do + "under one root complex and turn the IOMMU and ACS off in the BIOS")


def iommu(machine: Machine) -> Finding:
    """An IOMMU between cards makes peer writes slow, or hangs NCCL's start."""
    found = {
        "off": "off",
        "passthrough": "on, passthrough",
        "translated": "on, the kernel command line does not ask for passthrough",
    }[machine.iommu]
    if machine.iommu == "translated" and len(machine.gpus) > 1:
        return Finding(
            "iommu", "warn", found, "boot with iommu=pt, or turn it off in the BIOS, if NCCL hangs or is slow"
        )
    return Finding("iommu", "ok", found)


def shm(machine: Machine) -> Finding:
    """Shared memory for NCCL and SGLang's processes."""
    found = f"/dev/shm {machine.shm_mib} MiB"
    if machine.shm_mib >= SHM_MIB:
        return Finding("shm", "ok", found)
    do = f"start the container with --shm-size={SHM_MIB // 1024}g or --ipc=host, or remount /dev/shm larger"
    return Finding("shm", "warn" if machine.shm_mib >= SHM_LEAST_MIB else "fail", found, do)


def open_files(hard: int) -> Finding:
    """The hard limit of open files. SGLang raises the soft one itself."""
    if hard == resource.RLIM_INFINITY or hard >= OPEN_FILES:
        return Finding("open-files", "ok", f"hard limit {_limit(hard)}")
    do = f"raise it to {OPEN_FILES}: ulimit -Hn, LimitNOFILE= or --ulimit nofile={OPEN_FILES}"
    return Finding("open-files", "warn", f"hard limit {hard}", do)


def locked_memory(hard: int, machine: Machine) -> Finding:
    """The hard limit of locked memory: RDMA registers its buffers against it, pinned CUDA memory does not."""
    found = f"hard limit {_limit(hard, 'KiB', 1024)}"
    if hard == resource.RLIM_INFINITY or not machine.rdma:
        return Finding("locked-memory", "ok", found + ("" if machine.rdma else ", no RDMA device needs it"))
    return Finding("locked-memory", "warn", found, "lift it: ulimit -Hl, LimitMEMLOCK=infinity or --ulimit memlock=-1")


def _limit(value: int, unit: str = "", scale: int = 1) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // scale} {unit}".rstrip()


def disk(cache: Path) -> Finding:
    """Space for compiled kernels."""
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    try:
        # Tried, not asked: permission bits say nothing about root, a read-only mount or a file in the way.
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"0")
            probe.flush()
    except OSError as error:
        do = f"set HOME, or {CACHE_VARIABLE} for Triton's kernels, to a folder that the server may write to"
        return Finding("disk", "fail", f"{place} is not writable ({error.strerror})", do)
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free for {cache}"
    if free < CACHE_BYTES:
        return Finding("disk", "warn", found, f"free {CACHE_BYTES // GIB} GiB: compiled kernels are kept there")
    return Finding("disk", "ok", found)


def port_free(host: str, port: int) -> Finding:
    """The server's port."""
    if problem := port_problem(port):
        return Finding("port", "fail", f"{port} is out of range", problem)
    if problem := listen_problem(host, port):
        return Finding("port", "fail", f"{host}:{port} cannot be bound ({problem})", "choose another --port or --host")
    return Finding("port", "ok", f"{host}:{port} is free")


def nvcc(machine: Machine, environment: Mapping[str, str]) -> Finding:
    """A CUDA compiler for SGLang's own JIT kernels, one that knows the cards."""
    compiler = find_nvcc(environment)
    do = f"install the CUDA toolkit {FIRST_CUDA[0]}.{FIRST_CUDA[1]} or newer and set CUDA_HOME"
    if compiler is None:
        return Finding("nvcc", "fail", "not in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda", do)
    until = time.monotonic() + NVCC_SECONDS
    release = re.search(r"release (\d+\.\d+)", _output(until, str(compiler), "--version"))
    listed = _output(until, str(compiler), "--list-gpu-arch") if release is not None else ""
    if release is None or time.monotonic() >= until:
        late = f" within {NVCC_SECONDS:.0f} s" if time.monotonic() >= until else ""
        return Finding("nvcc", "fail", f"{compiler} does not run{late}", do)
    known = {int(number) for number in re.findall(r"compute_(\d+)", listed)}
    missing = sorted({card.sm for card in machine.gpus if card.sm in SERVED} or set(SERVED[:1]))
    found = f"{release.group(1)} ({compiler})"
    if not known.issuperset(missing):
        names = ", ".join(f"sm_{number}" for number in missing if number not in known)
        return Finding("nvcc", "fail", f"{found}, does not know {names}", do)
    return Finding("nvcc", "ok", found)


def find_nvcc(environment: Mapping[str, str]) -> Path | None:
    """Where SGLang's JIT (tvm_ffi) looks, in its order."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home:
        candidate = Path(home) / "bin" / "nvcc"
        return candidate if candidate.is_file() else None
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    if on_path:
        return Path(on_path)
    default = Path("/usr/local/cuda/bin/nvcc")
    return default if default.is_file() else None


def host_compiler() -> Finding:
    """A C++ compiler and Ninja: nvcc and Triton's launcher need the first, SGLang's JIT both."""
    missing = [names for names in (("c++", "g++", "clang++"), ("ninja",)) if not any(map(shutil.which, names))]
    if missing:
        found = f"missing: {', '.join(names[0] for names in missing)}"
        return Finding("host-compiler", "fail", found, "install them (Debian and Ubuntu: build-essential, ninja-build)")
    return Finding("host-compiler", "ok", "a C++ compiler and ninja are on PATH")


def _output(until: float, *command: str) -> str:
    """Standard output of a command, empty when it fails or has not ended at that time of `time.monotonic`."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
    except OSError:
        return ""
    try:
        return process.communicate(timeout=max(0.0, until - time.monotonic()))[0]
    except subprocess.TimeoutExpired:
        # What it has started holds the pipe open as well.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return ""
