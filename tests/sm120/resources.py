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
TARGET = "sm_120a"
FORBIDDEN = re.compile(r"\b(?:wgmma|tcgen05|multimem|redux\.sync\.\w+(?:\.\w+)*\.f32|cvt\.rs\b)[\w.:]*|\.cta_group::\d")
"""Instructions of Hopper's and of datacenter Blackwell's tensor cores, others of sm_100a alone, NVLink multicast."""

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


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
        out = _run("cuobjdump", "-res-usage", file.name).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", out) for name in ("REG", "STACK", "LOCAL"))
    assert registers and stack and local, f"cuobjdump printed no resources: {out}"
    return Resources(int(registers[1]), int(stack[1]) + int(local[1]), shared)


def refusals(ptx: str, shared: int) -> list[str]:
    """Why an SM120 cannot run this kernel: one sentence each."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    found = []
    if target is None or target[1] != TARGET:
        found.append(f"compiled for {target[1] if target else 'no target'} and needs {TARGET}.")
    instructions = sorted(set(FORBIDDEN.findall(ptx)))
    if instructions:
        found.append(f"uses {', '.join(instructions)}, which SM120 lacks.")
    if shared > SHARED_LIMIT:
        found.append(f"needs {shared} bytes of shared memory, SM120 has {SHARED_LIMIT}.")
    return found


def races(ptx: str) -> list[str]:
    """Why this kernel may not start while the one before it runs (`ops._pdl_triton`): one sentence each."""
    before, wait, after = re.sub(r"//.*", "", ptx).partition("griddepcontrol.wait;")
    if not wait:
        return ["never waits for the kernel before it: call `wait` first."]
    found = []
    if early := re.search(r"\b(?:st|atom|red)(?:\.\w+)*\.global\b|\b(?:bra|ret|exit)\b", before):
        found.append(f"has {early[0]} before it waits for the kernel before it: wait first, in every block.")
    if "griddepcontrol.wait;" in after:
        found.append("waits twice: once is enough.")
    return found


def read_before_wait(ptx: str) -> set[int]:
    """Numbers of the parameters that addresses read before the wait for the kernel before derive from."""
    before = ptx.partition("griddepcontrol.wait;")[0]
    # Comments, directives and labels end without a semicolon.
    before = re.sub(r"//.*|^\s*(?:\..*|[$\w]+:)", "", before, flags=re.MULTILINE)
    sources: dict[str, set[int]] = {}
    found = set()
    for instruction in before.split(";"):
        opcode, _, operands = re.sub(r"^[\s{]*(?:@!?%?\w+\s)?\s*", "", instruction).partition(" ")
        names = re.findall(r"[%$\w]+", operands)
        if not names:
            continue
        # `ld.param` of a value, or `mov` of the address of a TMA descriptor.
        number = re.search(r"_param_(\d+)\b", operands)
        used = {int(number[1])} if number else set().union(*(sources.get(name, set()) for name in names))
        if re.match(r"(?:ld(?:\.\w+)*\.global|cp\.async|prefetch)\b", opcode):
            found |= used
        written = re.match(r"\s*\{([^}]*)\}", operands)
        for name in re.findall(r"[%$\w]+", written[1]) if written else names[:1]:
            # Written under a predicate, it may keep what it held.
            sources[name] = sources.get(name, set()) | used
    return found


def parameters(variant: str) -> list[tuple[str, bool]]:
    """(name, whether what it points to is read through it) of each parameter in PTX of a kernel's `variant`.

    A descriptor of a tensor is itself, then its sizes and its strides.
    """
    found = []
    for name, axes, star in re.findall(r"(\w+):(?:tensordesc<\w+\[([^]]*)\]>|(\*?))", variant):
        found += [(name, True)] + [(name, False)] * (2 * (axes.count(",") + 1)) if axes else [(name, star == "*")]
    return found


def sass(cubin: bytes) -> list[str]:
    """The instructions of a cubin with one kernel, without their predicates."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = _run("nvdisasm", "-c", file.name).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;", out)
    assert found, f"nvdisasm printed no instructions: {out}"
    return found


def assemble(ptx: str, target: str) -> tuple[bytes | None, str]:
    """The cubin ptxas makes of `ptx` for `target`, None where it refuses, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        done = _run("ptxas-blackwell", f"--gpu-name={target}", str(source), "-o", str(cubin), check=False)
        return (cubin.read_bytes() if done.returncode == 0 else None), done.stdout + done.stderr


def _run(tool: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=check)
