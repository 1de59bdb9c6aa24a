"""The gate refuses what it is there to refuse: planted instructions, providers, kernels, and lines of the table."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import torch
import triton
from gate import Compiled, kernels_defined, uncovered
from hypothesis import given
from hypothesis import strategies as st
from kernel_table import Key, Table, compare, key, parse, text, worst
from resources import (
    SHARED_LIMIT,
    TARGET,
    Resources,
    assemble,
    parameters,
    races,
    read_before_wait,
    read_resources,
    refusals,
)

from sglang_sm120 import registry

# Instruction, the GPU that has it, a use of it.
LACKED = {
    "wgmma.fence.sync.aligned": ("sm_90a", ""),
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16": ("sm_90a", "{f0,f1,f2,f3}, d0, d1, p, 1, 1, 0, 0"),
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32": ("sm_100a", "[s], 32"),
    "tcgen05.mma.cta_group::1.kind::f16": ("sm_100a", "[r0], d0, d1, r1, p"),
    "tcgen05.ld.sync.aligned.32x32b.x1.b32": ("sm_100a", "{r0}, [r1]"),
    "redux.sync.max.f32": ("sm_100a", "f0, f1, 0xffffffff"),
    "cvt.rs.relu.bf16x2.f32": ("sm_100a", "r0, f0, f1, r1"),
    "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.cta_group::1": (
        "sm_100a",
        "[s], [d0, {r0}], [s]",
    ),
}
HAD = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "{f0,f1,f2,f3}, {r0,r1,r2,r3}, {r4,r5}, {f0,f1,f2,f3}",
    "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e2m1.f32.ue8m0": (
        "{f0,f1,f2,f3}, {r0,r1,r2,r3}, {r4,r5}, {f0,f1,f2,f3}, r6, {0,0}, r7, {0,0}"
    ),
    "redux.sync.max.u32": "r0, r1, 0xffffffff",
    "cvt.rn.bf16x2.f32": "r0, f0, f1",
    "add.f32x2": "d0, d1, d2",
    "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes": "[s], [d0, {r0}], [s]",
}


def planted(target: str, instruction: str, operands: str) -> str:
    """PTX of a kernel with one instruction."""
    return f""".version 8.7
.target {target}
.address_size 64
.visible .entry planted()
{{
    .reg .b32 r<8>;
    .reg .b64 d<3>;
    .reg .f32 f<4>;
    .reg .pred p;
    .shared .align 128 .b8 s[1024];
    {instruction} {operands};
    ret;
}}
"""


@pytest.mark.parametrize("instruction", LACKED)
def test_an_instruction_sm120_lacks_is_refused(instruction: str) -> None:
    owner, operands = LACKED[instruction]
    cubin, log = assemble(planted(owner, instruction, operands), owner)
    assert cubin, f"the plant is no PTX of {owner}: {log}"
    foreign = planted(TARGET, instruction, operands)
    assert assemble(foreign, TARGET)[0] is None
    assert len(refusals(foreign, 0)) == 1
    assert f"compiled for {owner}" in refusals(planted(owner, instruction, operands), 0)[0]


@pytest.mark.parametrize("instruction", HAD)
def test_an_instruction_sm120_has_is_not_refused(instruction: str) -> None:
    ptx = planted(TARGET, instruction, HAD[instruction])
    cubin, log = assemble(ptx, TARGET)
    assert cubin, log
    assert not refusals(ptx, SHARED_LIMIT)


def test_multicast_is_refused_though_it_assembles() -> None:
    ptx = planted(TARGET, "multimem.red.relaxed.gpu.global.add.u32", "[d0], r0")
    assert assemble(ptx, TARGET)[0]
    assert refusals(ptx, 0)


def test_one_byte_of_shared_memory_too_many_is_refused() -> None:
    (why,) = refusals(planted(TARGET, "add.f32x2", "d0, d1, d2"), SHARED_LIMIT + 1)
    assert f"{SHARED_LIMIT + 1} bytes" in why


WAIT = "griddepcontrol.wait;"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("ld.global.b32 r0, [d0];", "never waits"),
        (f"st.global.b32 [d0], r0; {WAIT}", "st.global before"),
        (f"@p atom.global.add.u32 r0, [d0], r1; {WAIT}", "atom.global before"),
        (f"@p bra $L; {WAIT} $L: ret;", "bra before"),
        (f"{WAIT} st.global.b32 [d0], r0; {WAIT}", "waits twice"),
    ],
)
def test_a_kernel_that_could_race_is_seen(body: str, why: str) -> None:
    (found,) = races(body)
    assert why in found


def test_reading_constants_before_the_wait_is_allowed() -> None:
    assert not races(f"ld.global.b32 r0, [d0]; st.shared.b32 [s], r0; {WAIT} st.global.b32 [d0], r0; ret;")


def test_what_is_read_before_the_wait_is_seen() -> None:
    ptx = f"""
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1, .param .u32 k_param_2, .param .u64 k_param_3)
{{
\t.reg .b64 \t%rd<9>;
$L__func_begin0:
\t.loc\t1 20 0
\tld.param.b64 \t%rd1, [k_param_0];
\tld.param.b64 \t%rd2, [k_param_1];
\tld.param.b32 \t%r1, [k_param_2];
\tld.param.b64 \t%rd3, [k_param_3];
$L__tmp0:
\tmad.wide.s32 \t%rd4, %r1, 4, %rd2;
\t// begin inline asm
\tmov.u32 %r2, 0x0;
\t@%p1 ld.global.L1::evict_first.v2.b32 {{ %r2, %r3 }}, [ %rd4 + 0 ];
\t// end inline asm
\tmul.wide.s32 \t%rd5, %r3, 8;
\tst.shared.b64 \t[%r9], %rd3;
@BEFORE@
\t{WAIT} // dummy %r8
\tld.global.b32 \t%r4, [%rd3];
"""
    assert read_before_wait(ptx.replace("@BEFORE@", "")) == {1, 2}
    through = "\tadd.s64 \t%rd6, %rd5, %rd1;\n\tcp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10;"
    assert read_before_wait(ptx.replace("@BEFORE@", through)) == {0, 1, 2}
    assert read_before_wait(ptx.replace("@BEFORE@", "\tprefetch.global.L2 [%rd3];")) == {1, 2, 3}
    described = """\tmov.b64 \t%rd6, k_param_0;
\tcvta.param.u64 \t%rd7, %rd6;
\t@%p2 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r5], [%rd7, {%r6, %r7}], [%r8];"""
    assert read_before_wait(ptx.replace("@BEFORE@", described)) == {0, 1, 2}


def test_parameters_are_counted_as_ptx_has_them() -> None:
    found = parameters("x:tensordesc<bf16[64, 128]>, scale:*fp32/16, rows:i32, G=1, BM=64, warps=8, stages=3")
    assert found == [("x", True), *[("x", False)] * 4, ("scale", True), ("rows", False)]


def test_spills_are_seen(compiled: Compiled) -> None:
    kernel, use = max(compiled.values(), key=lambda found: found[1].registers)
    ptx = re.sub(r"\.maxnreg \d+", "", kernel.ptx)
    cubin, log = assemble(re.sub(r"(\.reqntid [\d, ]+)", r"\1 .maxnreg 32", ptx), TARGET)
    assert cubin, log
    squeezed = read_resources(cubin, kernel.shared)
    assert squeezed.registers <= 32 < use.registers
    assert squeezed.spilled > use.spilled


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers a provider for the length of a test."""

    def register(op: str, name: str, accepts: Callable[..., str | None] | None = None) -> None:
        known = registry.ops()
        monkeypatch.setattr(registry, "_ops", known)
        if op in known:
            reference = known.pop(op).reference
        else:

            def reference(x: torch.Tensor) -> torch.Tensor:
                return x

            reference.__name__ = op
        registry.Op(reference).provider(name, runs_on="sm80+", accepts=accepts)(reference)

    return register


def test_the_registry_is_covered_before_anything_is_planted() -> None:
    assert not uncovered(registry.ops())


@pytest.mark.parametrize(
    ("op", "name", "accepts", "why"),
    [
        ("planted", "triton", None, "no calls in its spec"),
        ("hash_topk", "triton", None, "no calls in its spec"),
        ("mhc_post", "cutlass", None, "provider cutlass"),
        ("mhc_post", "triton", lambda _: "not today.", "not today."),
    ],
)
def test_a_provider_that_is_not_compiled_fails_the_gate(
    op: str, name: str, accepts: Callable[..., str | None] | None, why: str, plant: Callable[..., None]
) -> None:
    plant(op, name, accepts)
    problems = uncovered(registry.ops())
    assert problems and all(problem.startswith(f"op {op} ") and why in problem for problem in problems)


def test_a_provider_with_arithmetic_of_its_own_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.ops()["mxfp4_moe"]
    refusing = op.providers["mxfp8"]._replace(accepts=lambda _: "not today.")
    monkeypatch.setitem(op.providers, "mxfp8", refusing)
    problems = uncovered(registry.ops())
    assert problems and all(problem.startswith("op mxfp4_moe ") and "not today." in problem for problem in problems)


@triton.jit
def _helper(x: object) -> object:
    return x


@triton.jit
def _kernel(x: object) -> None:
    _helper(x)


def test_a_kernel_nobody_launches_is_found() -> None:
    assert kernels_defined([sys.modules[__name__]]) == {("", "_kernel")}


KEYS = st.builds(
    Key,
    st.sampled_from(["mhc_post", "fp8_linear"]),
    st.sampled_from(["_gemv", "sort_pairs"]),
    st.lists(st.builds("{}={}".format, st.sampled_from("ABC"), st.integers(-1, 10**5) | st.booleans())).map(" ".join),
)
TABLES = st.dictionaries(KEYS, st.builds(Resources, *[st.integers(0, 10**6)] * 3), max_size=8)


@given(TABLES)
def test_a_table_is_read_as_it_was_written(table: Table) -> None:
    assert parse(text(table)) == table
    assert text(parse(text(table))) == text(table)
    assert compare(table, table, complete=True) == []


@given(TABLES, st.data())
def test_each_figure_that_gets_worse_is_named(table: Table, data: st.DataObject) -> None:
    line = data.draw(KEYS)
    field = data.draw(st.sampled_from(Resources._fields))
    more = data.draw(st.integers(1, 100))
    table = {**table, line: table.get(line, Resources(32, 0, 1024))}
    old = getattr(table[line], field)
    (problem,) = compare(table, {**table, line: table[line]._replace(**{field: old + more})}, complete=True)
    assert f"{field} {old} → {old + more}" in problem
    assert not compare({**table, line: table[line]._replace(**{field: old + more})}, table, complete=True)


def test_a_new_kernel_and_a_stale_line_are_named() -> None:
    line, use = Key("mhc_post", "_exit", "R=8 warps=4"), Resources(32, 0, 1024)
    assert compare({}, {line: use}, complete=False) == ["mhc_post _exit (R=8 warps=4) has no line."]
    assert compare({line: use}, {}, complete=False) == []
    (stale,) = compare({line: use}, {}, complete=True)
    assert "no longer compiled" in stale


def test_a_broken_line_is_an_error() -> None:
    with pytest.raises(ValueError, match="RENEW=1"):
        parse("| mhc_post | `_exit` | R=8 | 32 | none | 0 |")


def test_variants_of_the_same_constants_share_the_worst_figures() -> None:
    lines = [key("mhc_post", "_exit", f"x:*{kind}/16, R=8, n:i32, warps=4") for kind in ("fp32", "bf16")]
    assert lines == [Key("mhc_post", "_exit", "R=8 warps=4")] * 2
    assert worst(zip(lines, (Resources(40, 0, 9), Resources(32, 8, 9)), strict=True)) == {lines[0]: (40, 8, 9)}
