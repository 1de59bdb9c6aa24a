"""How the ranks talk: SGLang's own all-reduce, FlashInfer's or NCCL's, from how the cards reach each other."""

from __future__ import annotations

from collections.abc import Iterator

from .machine import Machine
from .settings import Setting, env, flag

PCIE_IPC = "SGLANG_ENABLE_PCIE_IPC_ALLREDUCE"
"""FlashInfer's all-reduce of 2, 4 or 8 ranks, which SGLang leaves out by default."""
SHM_MIB = 1024
"""/dev/shm below which NCCL cannot share memory between ranks that do not reach each other directly."""


def comms(machine: Machine, tp: int) -> Iterator[Setting]:
    """Settings of a plan with `tp` ranks on CUDA devices."""
    if tp < 2:
        return
    if machine.nodes > 1:
        yield from _between_nodes(machine)
    if tp == machine.nodes:
        yield flag("disable-custom-all-reduce", True, f"NCCL instead: {_NODES}")
        return
    if machine.link == "nvlink" and machine.p2p and machine.nodes == 1:
        yield flag("disable-custom-all-reduce", False, "every pair of cards has NVLink: SGLang's all-reduce uses it")
        return
    if not machine.p2p:
        direct, why = False, "the driver reports no peer access between the cards"
    elif machine.iommu == "translated":
        direct, why = False, "the IOMMU translates peer writes, where NCCL is known to hang: iommu=pt or off avoids it"
    else:
        direct, why = True, f"the cards reach each other by {_WORDS[machine.link or 'root']}"
    if direct and tp == 2 and machine.nodes == 1 and machine.link != "system":
        yield flag(
            "disable-custom-all-reduce", False, f"two ranks, and {why}: SGLang's all-reduce is faster than NCCL there"
        )
        yield flag("enable-p2p-check", True, "peer access is tried before it is trusted: boards may report it wrongly")
        return
    if direct and machine.nodes == 1:
        why = "is slow between CPU sockets" if tp == 2 else f"serves two ranks without NVLink, not {tp}"
        yield flag("disable-custom-all-reduce", True, f"SGLang's {why}")
        said = "by SGLang's source 5 us for 12 KiB on eight cards, with NCCL 205"
        yield env(PCIE_IPC, "1", f"FlashInfer's all-reduce over PCIe: {said}")
        return
    yield flag("disable-custom-all-reduce", True, f"NCCL instead: {_NODES if direct else why}")
    if direct:
        return
    yield env("NCCL_P2P_DISABLE", "1", why)
    if machine.shm_mib < SHM_MIB:
        yield env(
            "NCCL_SHM_DISABLE",
            "1",
            f"{machine.shm_mib} MiB of /dev/shm do not hold NCCL's buffers; sockets are slow: use --shm-size=16g",
        )


_NODES = "ranks of different nodes have no common memory"
_WORDS = {
    "nvlink": "NVLink",
    "switch": "PCIe switches",
    "root": "a PCIe root complex",
    "system": "the CPU interconnect",
}


def _between_nodes(machine: Machine) -> Iterator[Setting]:
    if not machine.rdma:
        return
    pairs = [entry.split(":", 1) for entry in machine.rdma]
    interface = pairs[0][1]
    yield env("NCCL_SOCKET_IFNAME", interface, "the nodes find each other over the fast network, not the first one")
    yield env("GLOO_SOCKET_IFNAME", interface, "as for NCCL: PyTorch's own rendezvous uses Gloo")
    yield env("NCCL_IB_HCA", ",".join(device for device, _ in pairs), "RDMA devices whose network interface is up")
