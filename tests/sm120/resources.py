"""What a compiled kernel needs of an SM120, read from its PTX and cubin with the tools Triton ships."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

SHARED_LIMIT = 101_376
"""Bytes of shared memory a block may use on SM120."""
FORBIDDEN = re.compile(r"wgmma|tcgen05|\.target sm_100|cta_group|multimem")
"""Instructions of Hopper's and of datacenter Blackwell's tensor cores."""

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Resources(NamedTuple):
    """Per thread: registers, bytes spilled to local memory; per block: bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def read_resources(cubin: bytes, shared: int) -> Resources:
    """Registers and local memory of a cubin with one kernel; `shared` as Triton reports it, dynamic part included."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", out) for name in ("REG", "STACK", "LOCAL"))
    assert registers and stack and local, f"cuobjdump printed no resources: {out}"
    return Resources(int(registers[1]), int(stack[1]) + int(local[1]), shared)
