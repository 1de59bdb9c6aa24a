"""Reading torch profiler traces: which kernels ran, which op launched them, and whose they are."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOREIGN = re.compile(
    r"deep_gemm::|sm90_(fp8|bf16|tf32)_\w*gemm|sm(90|100|xx)_\w*mqa_logits"  # DeepGEMM
    r"|tilelang|hc_split_sinkhorn_kernel|mhc_(pre|post)\w*kernel|\bmain_kernel"  # TileLang
    r"|flash_?mla::|splitkv_mla|flash_fwd_mla_combine|sparse_attn_fwd|sparse_fp8::|get_mla_metadata"  # FlashMLA
    r"|FlashAttn\w*Sm\d|flash::\w*(fwd|Fwd)|FlashAttnFwd|hopper_flash"  # FA3
)


DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what keeps the GPU busy."""


class Kernel(NamedTuple):
    """A kernel that ran, or a copy; `launch`: the API call's correlation id, `graph`: whether that launched a graph."""

    name: str
    us: float
    start: float
    launch: int
    graph: bool
    stream: int
    shape: tuple[Any, ...]

    @property
    def end(self) -> float:
        return self.start + self.us

    @property
    def exact(self) -> tuple[Any, ...]:
        """What tells two launches of shared kernel code apart: name, grid, block, registers, shared memory."""
        return (self.name, *self.shape)

    @property
    def compiled(self) -> tuple[Any, ...]:
        """The same without the grid, which follows the sizes of the step."""
        return (self.name, *self.shape[1:])


def events_of(trace: Path) -> list[dict[str, Any]]:
    """What a chrome trace (.json.gz) lists."""
    with gzip.open(trace, "rt") as file:
        return json.load(file)["traceEvents"]


def calls_of(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """CUDA API calls by correlation id."""
    api = ("cuda_runtime", "cuda_driver")
    return {e["args"]["correlation"]: e for e in events if e.get("cat") in api and "correlation" in e.get("args", {})}


def kernels_of(events: list[dict[str, Any]], calls: dict[int, dict[str, Any]]) -> list[Kernel]:
    """The kernels and copies among the events, with the calls as `calls_of` gives them."""
    found = []
    for event in events:
        if event.get("cat") not in DEVICE:
            continue
        a = event["args"]
        shape = (tuple(a.get("grid", ())), tuple(a.get("block", ())))
        launch = a.get("correlation", -1)
        graph = "GraphLaunch" in calls.get(launch, {}).get("name", "")
        resources = (a.get("registers per thread"), a.get("shared memory"))
        stream = a.get("stream", -1)
        found.append(Kernel(event["name"], event["dur"], event["ts"], launch, graph, stream, shape + resources))
    return found


def read(trace: Path) -> list[Kernel]:
    """Every kernel and copy of a chrome trace (.json.gz)."""
    events = events_of(trace)
    return kernels_of(events, calls_of(events))


def ranges(trace: Path, prefix: str) -> dict[str, dict[Any, str]]:
    """Kernels launched inside the profiler's ranges `prefix…`: {"exact" | "compiled" | "name": {kernel: its op}}.

    Where two ops launch the same, the value names both.
    """
    events = events_of(trace)
    calls = calls_of(events)
    spans = [(e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(prefix)) for e in events
             if e.get("cat") == "user_annotation" and e["name"].startswith(prefix)]  # fmt: skip
    owners: dict[str, dict[Any, set[str]]] = {level: defaultdict(set) for level in ("exact", "compiled", "name")}
    for kernel in kernels_of(events, calls):
        at = calls[kernel.launch]["ts"] if kernel.launch in calls else None
        for begin, end, op in spans:
            if at is not None and begin <= at <= end:
                for level in owners:
                    owners[level][getattr(kernel, level)].add(op)
    return {level: {key: " or ".join(sorted(ops)) for key, ops in found.items()} for level, found in owners.items()}


def op_of(kernel: Kernel, known: Mapping[str, Mapping[Any, str]]) -> str:
    """The op that launched a kernel, or SGLang's or a library's kernel by its name."""
    for level in ("exact", "compiled", "name"):
        if op := known[level].get(getattr(kernel, level)):
            return op
    name = re.sub(r"<.*|\(.*", "", kernel.name.removeprefix("void ").replace("(anonymous namespace)::", ""))
    return f"[{'cuBLAS ' if re.search('nvjet|cublas|gemm|gemv', name) else ''}{name}]"


def foreign(found: Iterable[Kernel]) -> list[str]:
    """Names of kernels that SM120 does not have."""
    return sorted({kernel.name[:160] for kernel in found if FOREIGN.search(kernel.name)})
