"""Every Triton kernel, at the shapes of the real model, compiles for sm_120a within what the card has.

`make test` compiles a sample; `make test-sm120` all of it.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gate import SAMPLE, Compiled, Run, kernels_defined, lines, uncovered
from kernel_table import PATH, RENEW, compare, key, parse, text, worst
from resources import Resources, parameters, races, read_before_wait, read_resources, refusals, sass

from sglang_sm120 import ops, registry
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.compilation import Job, compile_job, use_target

CONSTANTS = {"w", "scale", "fn", "base", "norm_weight", "weight", "bias_ptr", "sink"}
"""Parameters that point to what no kernel writes: the model's weights, their scales and biases."""


def test_every_triton_provider_is_compiled(compiled: Compiled) -> None:
    problems = uncovered(registry.ops())
    assert not problems, "\n".join(problems)
    assert set(ops.with_triton()) == {op for op, _, _ in compiled}


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


def test_swizzles_follow_rows(compiled: Compiled) -> None:
    """Of a batch of tiles the batch is the slowest axis in shared memory: else the rows of a tile share their banks."""
    batches = [
        (kernel, layout)
        for kernel, _ in compiled.values()
        for layout in kernel.swizzles
        if re.search(r"order = \[\d, \d, \d\]", layout) and "maxPhase = 1," not in layout
    ]
    assert {kernel.name for kernel, _ in batches} == {"_few_rows"}
    wrong = [f"{kernel.op} {kernel.call}: {layout}" for kernel, layout in batches if not re.search(r", 0\]", layout)]
    assert not wrong, "\n".join(wrong)


def _nibble_problems(instructions: list[str], tiles: tuple[int, ...]) -> list[str]:
    """What is not as `grouped._nibble` means it: its steps in pairs of nibbles, for every register of weights once.

    tiles: tokens by stretches of each tile in the kernel; an mma has 16 x 16 weights, four registers of a thread, and 8
    columns.
    """

    def count(pattern: str) -> int:
        return sum(re.match(pattern, instruction) is not None for instruction in instructions)

    pairs = count(r"HMMA\.16816\.F32\.BF16 ") * 4 * len(tiles) // (sum(tiles) // 8)
    found = {
        "chosen, even": (count(r"LOP3\.LUT .* 0xf000f,"), pairs // 2),
        "chosen, odd": (count(r"LOP3\.LUT .* 0xf000f0,"), pairs // 2),
        "copied, even": (count(r"IMAD .* 0x1040,"), pairs // 2),
        "copied, odd": (count(r"IMAD .* 0x104,"), pairs // 2),
        "cut out": (count(r"LOP3\.LUT .* 0x81c081c0,"), pairs),
        "scaled": (count(r"H(?:MUL2|FMA2)\.BF16_V2 "), pairs),
    }
    problems = [f"{step} {is_} times, needed {needed}" for step, (is_, needed) in found.items() if is_ != needed]
    return problems if pairs else ["no mma of bf16"]


def test_experts_expand_their_nibbles_as_their_ptx_says(compiled: Compiled) -> None:
    checked, wrong = set(), []
    for kernel, _ in compiled.values():
        constants = dict(word.split("=") for word in kernel.variant.split(", ") if "=" in word)
        if "ASM" in constants:
            checked.add(kernel.name)
            columns = int(constants["T"]) * int(constants.get("SPLIT", 1))
            # By expert, there is one for what is left of an expert's tokens as well.
            tiles = (columns, columns // 2) if constants.get("SORTED") == "True" else (columns,)
            problems = _nibble_problems(sass(kernel.cubin), tiles)
            wrong += [f"{kernel.name} ({kernel.variant}): {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong)
    assert {"gate_up", "down_row"} <= checked


def test_mxfp8_runs_on_the_block_scaled_tensor_cores(compiled: Compiled) -> None:
    """And each register of experts is expanded where it is multiplied, for as many tiles of 16 tokens as a warp has."""
    checked, wrong = set(), []
    for kernel, _ in compiled.values():
        if not kernel.name.endswith("_mxfp8"):
            continue
        constants = dict(word.split("=") for word in kernel.variant.split(", ") if "=" in word)
        tokens, rows, instructions = int(constants["T"]), int(constants["R"]), sass(kernel.cubin)
        checked.add((kernel.name, tokens))

        def count(pattern: str, lines: list[str] = instructions) -> int:
            return sum(re.match(pattern, line) is not None for line in lines)

        # A step of 128 channels. An mma has 16 tokens, 8 rows, 32 channels; a warp four tiles of tokens, if there are.
        mmas, tiles = tokens // 16 * (rows // 8) * 4 // int(constants["warps"]), min(tokens // 16, 4)
        expands = kernel.op == "mxfp4_moe"
        found = {
            "block-scaled mma": (count(r"QMMA\.SF\.16832\.F32\.E4M3\.E4M3\.E8 "), mmas),
            "any mma": (count(r"\w*MMA\b"), mmas),
            "expanded": (count(r"LOP3\.LUT .* 0x9c9c9c9c,"), mmas * 2 // tiles if expands else 0),
            # Packed weights are half as many; in another order of channels other instructions would load them.
            "ldmatrix": (count(r"LDSM\.16\.M88\.4 "), tiles * 4 + (4 if expands else 8)),
            "clamp that loses a NaN": (count(r"\s*(?:min|max)\.f32", kernel.ptx.splitlines()), 0),
        }
        asked = "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0" in kernel.ptx
        problems = [] if asked else ["no kind::mxf8f6f4 in its PTX"]
        problems += [f"{what} {is_} times, needed {needed}" for what, (is_, needed) in found.items() if is_ != needed]
        wrong += [f"{kernel.name} ({kernel.variant}): {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong)
    experts = {(name, tokens) for name in ("_gate_up_mxfp8", "_down_mxfp8") for tokens in (32, 64, 128)}
    assert checked == experts | {("_linear_mxfp8", 64), ("_linear_mxfp8", 128)}


def _alone() -> dict[str, list[str]]:
    """SASS of each of `tests/gpu/ptx_kernels.py`; runs in a process whose Triton compiles for sm_120."""
    sys.path.append(str(Path(__file__).parents[1] / "gpu"))
    import ptx_kernels

    def on_meta(*kinds: torch.dtype) -> list[torch.Tensor]:
        return [torch.empty(ptx_kernels.BLOCK, dtype=kind, device="meta") for kind in kinds]

    fp32, bf16 = torch.float32, torch.bfloat16
    launches: list[tuple[Any, list[torch.Tensor], dict[str, int]]] = [
        (ptx_kernels.nibbles, on_meta(torch.int16, torch.int32, bf16), {"COUNT": 1 << 16}),
        (ptx_kernels.split, on_meta(fp32, bf16, bf16, fp32), {}),
        (ptx_kernels.arithmetic, on_meta(fp32, fp32, fp32, bf16, fp32, fp32), {}),
    ]
    return {
        kernel.fn.__name__: sass(
            kernel.run(*args, grid=(1,), warmup=True, BLOCK=ptx_kernels.BLOCK, **constants).asm["cubin"]
        )
        for kernel, args, constants in launches
    }


def test_inline_ptx_becomes_the_instructions_it_is_written_for() -> None:
    """Two values to an instruction, one rounding to a sum, and a reciprocal without a division."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), use_target, (120,)) as pool:
        found = pool.submit(_alone).result()
    # 1,024 values on 4 warps: 8 a thread, of which a thread of `nibbles` makes 32 weights.
    wanted = {
        "nibbles": {r"LOP3\.LUT .* 0x81c081c0,": 16, r"H(?:MUL2|FMA2)\.BF16_V2 ": 16, "PRMT": 0},
        # A pair each of high and low; rounded is the first again.
        "split": {r"F2FP\.BF16\.F32\.PACK_AB ": 8, r"F2F\.": 0},
        "arithmetic": {r"F2FP\.BF16\.F32\.PACK_AB ": 4, r"MUFU\.RCP ": 8, "FFMA2": 0, "CALL": 0, r"F2F\.": 0},
    }
    for name, patterns in wanted.items():
        counted = {pattern: sum(re.match(pattern, line) is not None for line in found[name]) for pattern in patterns}
        assert counted == patterns, "\n".join(found[name])


def _scored_in(fp8: bool) -> tuple[list[str], Resources]:
    """SASS of the index scores' kernel, and what it needs; runs in a process whose Triton compiles for sm_120."""
    call = next(ops.calls("indexer_logits", model_config(), 2, 1, 65_536))
    (table,) = ops.SPECS["indexer_logits"].trials(call.arguments).values()
    job = Job(model_config(), "indexer_logits", 2, SAMPLE, table=table if fp8 else {})
    ((kernel,), _) = compile_job(job)
    return sass(kernel.cubin), read_resources(kernel.cubin, kernel.shared)


def test_fp8_operands_reach_the_tensor_cores_as_they_are() -> None:
    """Half the instructions of fp16 operands, none that converts, and no more shared memory or spilled registers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), use_target, (120,)) as pool:
        (fp16, fp16_use), (fp8, fp8_use) = pool.map(_scored_in, (False, True))

    def count(lines: list[str], pattern: str) -> int:
        return sum(re.match(pattern, line) is not None for line in lines)

    products, conversions = count(fp8, r"QMMA\.16832\.F32\.E4M3\.E4M3 "), r"F2FP?\.|HADD2|I2F"
    assert 2 * products == count(fp16, r"HMMA\.16816\.F32 ") > 0
    assert count(fp8, "HMMA") == count(fp8, conversions) == 0 < count(fp16, conversions)
    assert fp8_use.spilled == 0 and fp8_use.shared < fp16_use.shared


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
