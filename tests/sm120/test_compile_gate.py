"""Every Triton kernel, at the shapes of the real model, compiles for sm_120a within what the card has.

`make test` compiles a sample; `make test-sm120` all of it.
"""

from __future__ import annotations

import warnings

from gate import Compiled, Run, kernels_defined, lines, triton_ops, uncovered
from kernel_table import PATH, RENEW, compare, key, parse, text, worst
from resources import parameters, races, read_before_wait, refusals

from sglang_sm120 import registry

CONSTANTS = {"w", "scale", "fn", "base", "norm_weight", "weight", "bias_ptr", "sink"}
"""Parameters that point to what no kernel writes: the model's weights, their scales and biases."""


def test_every_triton_provider_is_compiled(compiled: Compiled) -> None:
    problems = uncovered(registry.ops())
    assert not problems, "\n".join(problems)
    assert set(triton_ops()) == {op for op, _, _ in compiled}


def test_sm120_can_run_every_kernel(compiled: Compiled) -> None:
    refused = [
        f"{kernel.op} {kernel.name} by {kernel.call} {why}"
        for kernel, _ in compiled.values()
        for why in refusals(kernel.ptx, kernel.shared)
    ]
    assert not refused, "\n".join(refused)


def test_every_kernel_waits_for_the_one_before(compiled: Compiled) -> None:
    wrong = {f"{kernel.op} {kernel.name} {why}" for kernel, _ in compiled.values() for why in races(kernel.ptx)}
    for kernel, _ in compiled.values():
        known = parameters(kernel.variant)
        names = {known[number][0] for number in read_before_wait(kernel.ptx) if known[number][1]}
        wrong |= {f"{kernel.op} {kernel.name} reads {name} before it waits" for name in names - CONSTANTS}
    assert not wrong, "\n".join(sorted(wrong))


def test_no_kernel_needs_more_than_its_line_says(compiled: Compiled, all_shapes: bool, renewing: bool) -> None:
    found = worst(lines(compiled))
    if renewing:
        PATH.write_text(text(found), encoding="utf-8")
    table = parse(PATH.read_text(encoding="utf-8"))
    problems = compare(table, found, complete=all_shapes)
    assert not problems, "\n".join([*problems, RENEW])
    better = sum(table[name] != use for name, use in found.items())
    if better:
        warnings.warn(f"{better} kernels need less than their lines say: `make test-sm120 RENEW=1`", stacklevel=1)


def test_every_kernel_of_the_overlay_has_a_line() -> None:
    table = parse(PATH.read_text(encoding="utf-8"))
    named = {(line.op, line.kernel) for line in table} | {("", line.kernel) for line in table}
    missing = kernels_defined() - named
    assert not missing, (
        f"no model call launches {sorted(missing)}: delete them, or add the call and run `make test-sm120 RENEW=1`."
    )


def test_steps_in_between_need_no_other_kernel(whole_run: Run) -> None:
    missing = sorted(
        " ".join([*key(*name)[:2], "by", whole_run.found[name][0].call, key(*name).constants])
        for name in whole_run.between - whole_run.steps
    )
    assert not missing, "\n".join(["gate.ROWS or gate.CONTEXTS leave out a size class:", *missing])
