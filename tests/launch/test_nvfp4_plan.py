"""A checkpoint whose experts are NVFP4: its bytes, its plan, what is refused, and the doctor's look at it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from golden_plans import HERE, machine

from sglang_sm120.checkpoint.config import FLASH, ReferenceConfig, model_config
from sglang_sm120_launch import cli, memory
from sglang_sm120_launch.checks_checkpoint import checkpoint_checks
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.flags import Flags
from sglang_sm120_launch.model import Model, _from_config
from sglang_sm120_launch.plan import make_plan
from sglang_sm120_launch.values import Request
from sglang_sm120_reference.write import write_checkpoint

TWO = machine("2x-rtx-pro-6000")


def _flash() -> Model:
    config = model_config()
    config["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16}
    return Model(FLASH, config, _from_config(config))


MODEL = _flash()
SMALL = ReferenceConfig(
    hidden_size=128, num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=0, n_routed_experts=6,
    moe_intermediate_size=128, nvfp4_experts=True,
)  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_weights_have_four_and_a_half_bits(tp: int) -> None:
    matrices = 43 * 256 * 3
    # On each rank a factor and an input's scale of every matrix.
    assert memory.weights(MODEL, tp, "cuda")["experts"] == matrices * (4096 * 2048 * 9 // 16 // tp + 2 * 4)
    # The MTP layer's stay MXFP4: 4.25.
    assert memory.weights(MODEL, tp, "cuda", mtp=True)["experts"] == 256 * 3 * 4096 * 2048 * 17 // 32 // tp
    taken = memory.step_weights(MODEL, tp, "cuda", mtp=False)
    assert taken["one layer's experts (the step)"] >= 256 * 2 * 4096 * 2048 * 9 // 16 // tp


def test_the_step_takes_every_pass(flags: Flags) -> None:
    plan = make_plan(TWO, MODEL, Request())
    flags.check(plan.arguments())
    assert plan.value("moe-runner-backend") == "flashinfer_mxfp4" and plan.value("disable-prefill-cuda-graph") is True
    assert plan.value("disable-flashinfer-autotune") is True
    assert plan.environment()["SGLANG_SM120_PREFILL"] == "overlay"
    assert not [line for line in plan.fit.lines if "SGLang's prefill" in line[0]]


OUT = "leave it out, or use a checkpoint with MXFP4."


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(mtp=True), "puts the drafts' experts in a layout for SM100: leave speculation out."),
        (Request(flags={"moe-runner-backend": "marlin"}), "--moe-runner-backend marlin does not leave them as they"),
        (Request(flags={"ep-size": 2}), "by the factors of a rank's own: leave EP out."),
        (Request(flags={"max-running-requests": 300}), "256 requests at once: give a --max-running-requests"),
        (Request(env={"SGLANG_SM120_PREFILL": "sglang"}), f"and SGLANG_SM120_PREFILL=sglang was given: {OUT}"),
        (Request(env={"SGLANG_SM120": "0"}), f"and SGLANG_SM120=0 is set: {OUT}"),
        (Request(flags={"enable-lora": True}), f"and the step does not serve --enable-lora: {OUT}"),
        (Request(flags={"pp-size": 2}), f"and the step does not serve --pp-size 2: {OUT}"),
        (Request(flags={"nnodes": 2}), f"and the step does not serve --nnodes 2: {OUT}"),
        (Request(flags={"device": "cpu"}), "SGLang 0.5.23 loads on Blackwell alone: use a checkpoint with MXFP4."),
    ],
)
def test_what_nothing_serves_is_refused(request_: Request, said: str) -> None:
    with pytest.raises(LaunchError) as refusal:
        make_plan(TWO, MODEL, request_)
    assert str(refusal.value).startswith("The model's experts are NVFP4, which ") and said in str(refusal.value)


def test_several_nodes_are_refused() -> None:
    """As `--nodes` asks for them."""
    with pytest.raises(LaunchError, match=f"the step does not serve ranks on several nodes: {OUT}$"):
        make_plan(replace(TWO, nodes=2), MODEL, Request())


def test_what_is_ignored_is_told_once(capsys: pytest.CaptureFixture[str], tmp_path: Path, one_flags: None) -> None:
    note = "The input scales of the NVFP4 experts are ignored: the step has activations in bf16."
    small = str(write_checkpoint(tmp_path / "model", SMALL))
    place = str(HERE / "machines/1x-rtx-pro-6000.json")
    assert cli.main(["plan", "--model", small, "--machine", place]) == 0
    assert capsys.readouterr().out.count(note) == 1
    assert note not in make_plan(TWO, Model.load(FLASH), Request()).notes


def test_no_other_card_loads_them() -> None:
    with pytest.raises(LaunchError, match="NVFP4, which SGLang 0.5.23 loads on Blackwell alone, and NVIDIA H200 has"):
        make_plan(machine("2x-h200"), MODEL, Request())


def _header(folder: Path, old: bytes, new: bytes) -> None:
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    assert old in data[:size] and len(old) == len(new)
    file.write_bytes(data[:size].replace(old, new, 1) + data[size:])


def _quantised(**changed: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changed
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: None, "(experts: NVFP4, input scales are ignored)"),
        (lambda folder: _header(folder, b'"U8"', b'"I8"'), "(experts: NVFP4"),
        (lambda folder: _header(folder, b'"F8_E4M3"', b'"F8_E5M2"'), " in 1 of "),
        (lambda folder: _header(folder, b"weight_scale_2", b"weight_scale_3"), "lacks layers.0.ffn.experts.0.w1.w"),
        (_quantised(moe_quant_algo="FP8"), "experts.0.w1.scale: nothing, needed F8_E8M0 [128, 4]"),
        (_quantised(group_size=32), "has group_size=32 for NVFP4 experts, which have 16"),
    ],
)
def test_the_doctor_looks_at_experts(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    folder = tmp_path / "model"
    damage(write_checkpoint(folder, SMALL))
    [finding] = checkpoint_checks(folder)
    assert said in finding.found and (finding.status == "ok") == said.startswith("(experts"), finding
