"""Every Triton kernel, at the shapes of the real model, compiles for sm_120a within what the card has.

`make test` compiles a sample; `make test-sm120` all of it.
"""

from __future__ import annotations

import importlib

import pytest
from resources import FORBIDDEN, SHARED_LIMIT, Resources, read_resources

from sglang_sm120 import ops, registry
from sglang_sm120.compilation import Job, Kernel, compile_jobs
from sglang_sm120.model_calls import _CALLS
from sglang_sm120.ops._cases import model_config

TPS = (1, 2, 4)
ROWS = (1, 2, 4, 8, 16, 33, 64, 65, 256, 4096)
CONTEXTS = (2600, 65_536, 1_048_576)
SAMPLE = [(1, 65_536)]
ALL = [(rows, CONTEXTS[1]) for rows in ROWS] + [(1, context) for context in CONTEXTS]


def triton_ops() -> list[str]:
    return sorted(name for name in ops.__all__ if "triton" in registry.ops()[name].providers)


def kernels_of(op: str) -> set[str]:
    """Names of the kernels an op's module defines: jit functions that no other jit function calls."""
    module = importlib.import_module(f"sglang_sm120.ops.{op}.triton")
    return {name for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "fn")}


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> dict[str, tuple[Kernel, Resources]]:
    """Every specialisation by op, kernel and variant."""
    steps, tps = (ALL, TPS) if request.config.getoption("all_shapes") else (SAMPLE, (2,))
    jobs = [Job(model_config(), op, tp, tuple(steps)) for op in triton_ops() for tp in tps]
    found: dict[str, tuple[Kernel, Resources]] = {}
    for _, kernels, _ in compile_jobs(jobs, capability=120):
        for kernel in kernels:
            name = f"{kernel.op} {kernel.name} {kernel.variant}"
            if name not in found:
                found[name] = (kernel, read_resources(kernel.cubin, kernel.shared))
    return found


def test_every_triton_provider_is_compiled(compiled: dict[str, tuple[Kernel, Resources]]) -> None:
    assert set(triton_ops()) <= set(_CALLS), "an op has a Triton provider and no model call"
    for op in triton_ops():
        names = {kernel.name for kernel, _ in compiled.values() if kernel.op == op}
        assert kernels_of(op) <= names, f"the gate compiles not every kernel of {op}"


def test_shared_memory_fits(compiled: dict[str, tuple[Kernel, Resources]]) -> None:
    too_much = {name: use.shared for name, (_, use) in compiled.items() if use.shared > SHARED_LIMIT}
    assert not too_much


def test_no_instruction_sm120_lacks(compiled: dict[str, tuple[Kernel, Resources]]) -> None:
    for name, (kernel, _) in compiled.items():
        assert ".target sm_120a" in kernel.ptx, name
        assert not FORBIDDEN.search(kernel.ptx), name


def test_the_gate_sees_what_it_forbids() -> None:
    assert FORBIDDEN.search("wgmma.mma_async.sync.aligned.m64n64k16")
    assert FORBIDDEN.search("tcgen05.mma.cta_group::1.kind::f16")
    assert not FORBIDDEN.search("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
