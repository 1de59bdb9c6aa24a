"""What the plan knows about a machine: its GPUs, how they reach each other, and what the host gives them.

`Machine.detect()` reads NVML, /proc and /sys, and needs neither torch nor a GPU. `Machine.from_json` reads the same
facts from a file, so that a plan can be made on one machine for another. Sizes are MiB.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from .errors import LaunchError
from .typed import typed

MIB = 1 << 20
EXACT = {"extra": "forbid"}
"""How `typed` reads a description: no further keys."""
Link = Literal["nvlink", "switch", "root", "system"]
"""How two GPUs reach each other, nearest first: NVLink, PCIe switches, a PCIe root complex, the CPU interconnect."""
LINKS: tuple[Link, ...] = get_args(Link)
_VERSION = re.compile(r"\d+\.\d+")
_RDMA = re.compile(r"[^\s:]+:[^\s:]+")
Iommu = Literal["off", "passthrough", "translated"]
"""`translated` also stands for a host whose kernel command line does not say: peer writes then go through the IOMMU."""


@dataclass(frozen=True)
class Gpu:
    """One card. `used_mib` is what other processes hold; `unified` means that the memory is the host's."""

    __pydantic_config__ = EXACT

    name: str
    memory_mib: int
    compute_capability: str
    used_mib: int = 0
    power_limit_w: int | None = None
    unified: bool = False

    @property
    def sm(self) -> int:
        """`120` for compute capability 12.0."""
        major, minor = self.compute_capability.split(".")
        return int(major) * 10 + int(minor)


@dataclass(frozen=True)
class Machine:
    """A host, or `nodes` hosts alike that serve one model together.

    Attributes:
        gpus: in PCI bus order, as NVML counts them.
        link: the farthest of all pairs of GPUs, one of `LINKS`; None with fewer than two.
        p2p: whether every pair of GPUs can read and write each other's memory; None with fewer than two.
        driver: version of NVIDIA's driver, None without one.
        cuda: the newest CUDA the driver serves, None without one.
        shm_mib: size of /dev/shm.
        rdma: RDMA devices that are up, as `device:interface` (`rocep1s0f0:enp1s0f0np0`).
    """

    __pydantic_config__ = EXACT

    gpus: tuple[Gpu, ...]
    cpus: int
    ram_mib: int
    shm_mib: int
    link: Link | None = None
    p2p: bool | None = None
    iommu: Iommu = "off"
    driver: str | None = None
    cuda: str | None = None
    arch: str = "x86_64"
    container: bool = False
    rdma: tuple[str, ...] = ()
    nodes: int = 1

    @classmethod
    def detect(cls) -> Machine:
        """This machine. Without NVIDIA's driver it has no GPUs; nothing here raises for what is missing."""
        ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB
        host: dict[str, Any] = {
            "cpus": len(os.sched_getaffinity(0)),
            "ram_mib": ram,
            "shm_mib": _shm_mib(),
            "iommu": _iommu(),
            "arch": platform.machine(),
            "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
            "rdma": tuple(_rdma()),
        }
        with _nvml() as nvml:
            if nvml is None:
                return cls(gpus=(), **host)
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            pairs = [(a, b) for i, a in enumerate(handles) for b in handles[:i]]
            cuda = nvml.nvmlSystemGetCudaDriverVersion()
            return cls(
                gpus=tuple(_gpu(nvml, handle, ram) for handle in handles),
                link=max((_link(nvml, a, b) for a, b in pairs), key=LINKS.index, default=None),
                p2p=all(_p2p(nvml, a, b) for a, b in pairs) if pairs else None,
                driver=nvml.nvmlSystemGetDriverVersion(),
                cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
                **host,
            )

    @classmethod
    def from_json(cls, path: Path) -> Machine:
        """Read a description that `to_json` wrote, or a person.

        Raises:
            LaunchError: the file cannot be read, or a key is missing, unknown or of the wrong kind.
        """
        try:
            text = path.read_bytes()
        except OSError as error:
            raise LaunchError(
                f"{path} cannot be read ({error.strerror}): give a machine description as JSON."
            ) from None
        machine: Machine = typed(cls, text, str(path))
        if problem := _problem(machine):
            raise LaunchError(f"{path} has {problem}: correct it.")
        if len(machine.gpus) > 1 and (machine.link is None or machine.p2p is None):
            raise LaunchError(f"{path} has {len(machine.gpus)} GPUs but no `link` or no `p2p`: say how they connect.")
        return machine

    def to_json(self) -> str:
        """The description as `from_json` reads it, values that are defaults left out."""
        from pydantic import TypeAdapter

        return TypeAdapter(Machine).dump_json(self, indent=2, exclude_defaults=True).decode() + "\n"


def _problem(machine: Machine) -> str | None:
    """What of a description, whose kinds are right, cannot be."""
    for name in ("cpus", "ram_mib", "nodes"):
        if getattr(machine, name) < 1:
            return f"{name}={getattr(machine, name)}, needed 1 or more"
    for gpu in machine.gpus:
        if not _VERSION.fullmatch(gpu.compute_capability) or gpu.memory_mib < 1:
            found = f"compute_capability={gpu.compute_capability!r}, memory_mib={gpu.memory_mib}"
            return f"a GPU of {found}, needed the like of '12.0' and 1 or more"
    if machine.cuda is not None and not _VERSION.fullmatch(machine.cuda):
        return f"cuda={machine.cuda!r}, needed the like of '13.0'"
    if odd := next((entry for entry in machine.rdma if not _RDMA.fullmatch(entry)), None):
        return f"rdma={odd!r}, needed device:interface"
    return None


@contextmanager
def _nvml() -> Iterator[ModuleType | None]:
    """NVML, initialised; None where the driver or its Python binding is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError):
        yield None
        return
    except Exception as error:
        # pynvml makes its exception classes at run time, so that they cannot be named here before the import.
        if not isinstance(error, pynvml.NVMLError):
            raise
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: ModuleType, handle: Any, ram_mib: int) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, used, unified = memory.total // MIB, memory.used // MIB, False
    except nvml.NVMLError_NotSupported:
        # GB10 has no memory of its own.
        total, used, unified = ram_mib, 0, True
    try:
        power = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) // 1000
    except nvml.NVMLError_NotSupported:
        power = None
    return Gpu(nvml.nvmlDeviceGetName(handle), total, f"{major}.{minor}", used, power, unified)


def _link(nvml: ModuleType, a: Any, b: Any) -> Link:
    if _p2p_by(nvml, a, b, nvml.NVML_P2P_CAPS_INDEX_NVLINK):
        return "nvlink"
    try:
        level = nvml.nvmlDeviceGetTopologyCommonAncestor(a, b)
    except nvml.NVMLError:
        return "system"
    if level <= nvml.NVML_TOPOLOGY_MULTIPLE:
        return "switch"
    return "root" if level <= nvml.NVML_TOPOLOGY_NODE else "system"


def _p2p(nvml: ModuleType, a: Any, b: Any) -> bool:
    # nvmlGpuP2PCapsIndex_t: nvidia-ml-py has a tuple where the first of its constants should be 0.
    read, write = 0, 1
    return all(_p2p_by(nvml, a, b, way) for way in (read, write))


def _p2p_by(nvml: ModuleType, a: Any, b: Any, way: int) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetP2PStatus(a, b, way) == nvml.NVML_P2P_STATUS_OK)
    except nvml.NVMLError:
        # Some drivers cannot say; the plan then does without.
        return False


def _shm_mib() -> int:
    try:
        return shutil.disk_usage("/dev/shm").total // MIB
    except OSError:
        return 0


def _iommu() -> Iommu:
    units = Path("/sys/class/iommu")
    if not units.is_dir() or not any(units.iterdir()):
        return "off"
    words = Path("/proc/cmdline").read_text().split()
    return "passthrough" if "iommu=pt" in words or "iommu.passthrough=1" in words else "translated"


def _rdma() -> Iterator[str]:
    """`device:interface` of every RDMA device whose network interface is up."""
    for device in sorted(Path("/sys/class/infiniband").glob("*")):
        for interface in sorted((device / "device" / "net").glob("*")):
            state = interface / "operstate"
            if state.is_file() and state.read_text().strip() == "up":
                yield f"{device.name}:{interface.name}"
