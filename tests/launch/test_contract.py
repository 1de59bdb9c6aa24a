"""What leaves the step out of a plan, held against SGLang's probes and the step's spec; and a forced Hopper card."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from golden_plans import machine

import sm120_lowering
from sglang_sm120.checkpoint.config import FLASH
from sglang_sm120_launch import contract
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.flags import Flags
from sglang_sm120_launch.model import Model
from sglang_sm120_launch.plan import Plan, make_plan
from sglang_sm120_launch.settings import Value
from sglang_sm120_launch.values import Request

MODEL = Model.load(FLASH)
TWO, HOPPER = machine("2x-rtx-pro-6000"), machine("2x-h200")
FORCED = {"SGLANG_SM120_FORCE": "1"}
REFUSED = [(feature, name) for feature, flags in contract.FEATURES.items() for name in flags]
DETERMINISTIC = "DETERMINISTIC_INFERENCE"


@pytest.fixture
def flags(sglangs: argparse.ArgumentParser) -> Flags:
    """Those of SGLang's own parser, with the fields that they set."""
    return Flags(sglangs, "0.5.23")


def asking(name: str, flags: Flags) -> list[str]:
    """A flag as it is typed to ask for its feature: a switch, the next number, or another of its words."""
    action = flags.known._option_string_actions[f"--{name}"]
    if action.nargs == 0:
        return [f"--{name}"]
    off = next(values[name] for values in contract.FEATURES.values() if name in values)
    words = [str(off + 1)] if isinstance(off, int) else [word for word in action.choices or ("x",) if word != off]
    return [f"--{name}", words[0]]


def off(plan: Plan) -> str:
    """The note that says why SGLang's own forward serves; empty where the step does, and nothing else of it is left."""
    [*notes] = (note for note in plan.notes if note.startswith("SGLang's own forward serves every pass"))
    taken = any("(the step)" in what for what, _ in plan.fit.lines)
    assert taken == (not notes), plan.fit.lines
    return "".join(notes)


def test_every_feature_that_the_spec_lacks():
    from sglang.kernels.plugin_kernels.nvidia.spec import Feature

    from sglang_sm120.plugin import SPEC

    assert contract.FEATURES.keys() == {feature.name for feature in set(Feature) - SPEC.features}


def test_what_the_spec_requires(flags: Flags):
    """Each server argument and variable that it names is known here, with the values that it accepts."""
    from sglang_sm120.plugin import SPEC

    options = {action.dest: name.removeprefix("--") for name, action in flags.known._option_string_actions.items()}
    required = {**SPEC.requires.server_args}
    required["cuda_graph_backend_decode"] = SPEC.requires.decode_graph_backends
    for field, accepted in required.items():
        # "auto" becomes one of the others; None is a flag that was not given.
        assert {*contract.served(False, False)[options[field]]} - {"auto"} == accepted - {"auto", None}, field
    assert {*SPEC.requires.env} <= {*contract.VARIABLES}


@pytest.mark.parametrize(("feature", "name"), REFUSED)
def test_a_flag_asks_for_what_sglang_sees(feature: str, name: str, flags: Flags):
    """SGLang's probe sees the feature with the flag, none without; the plan then has nothing of the step's."""
    from sglang.srt.kernel_plugins.nvidia.binding import features_in_use

    def in_use(*words: str) -> set[str]:
        return {feature.name for feature in features_in_use(flags.known.parse_args(["--model-path", "x", *words]))}

    words = asking(name, flags)
    assert in_use() == set() and in_use(*words) == {feature}
    request = Request(flags=flags.from_words(words))
    if feature == DETERMINISTIC:
        with pytest.raises(LaunchError, match=f"{name}.* SGLang 0.5.23 refuses"):
            make_plan(TWO, MODEL, request)
        return
    assert f"the step does not serve {' '.join(words)}" in off(make_plan(TWO, MODEL, request))


@pytest.mark.parametrize("feature", [feature for feature in contract.FEATURES if feature != "PARTITIONED_GPU"])
def test_no_probe_is_left_out(feature: str):
    """Of SGLang's settings that one probe reads, each has a flag here; the two without an option of their own apart."""
    from sglang.kernels.plugin_kernels.nvidia.spec import Feature
    from sglang.srt.kernel_plugins.nvidia.binding import FEATURE_PROBES

    class Read:
        def __init__(self) -> None:
            self.names: list[str] = []

        def __getattr__(self, name: str) -> Any:
            self.names.append(name)
            return None if name.startswith(("disagg", "rl_", "lora")) else 0

    read = Read()
    FEATURE_PROBES[Feature[feature]](read)
    assert {name.replace("_", "-") for name in read.names} == contract.FEATURES[feature].keys()


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "switched off": ({"env": {"SGLANG_SM120": "0"}}, "SGLANG_SM120=0"),
    "another layout of experts": ({"flags": {"moe-runner-backend": "marlin"}}, "--moe-runner-backend marlin"),
    "experts sent to others": ({"flags": {"moe-a2a-backend": "deepep"}}, "--moe-a2a-backend deepep"),
    "dense layers apart": ({"flags": {"moe-dense-tp-size": 1}}, "--moe-dense-tp-size 1"),
    "shared experts apart": ({"env": {"SGLANG_SHARED_EXPERT_TP1": "1"}}, "SGLANG_SHARED_EXPERT_TP1=1"),
    "graphs of SGLang's prefill": (
        {"flags": {"cuda-graph-backend-prefill": "full"}, "env": {"SGLANG_SM120_PREFILL": "overlay"}},
        "--cuda-graph-backend-prefill full",
    ),
    "traced prefill": ({"flags": {"cuda-graph-backend-prefill": "tc_piecewise"}}, "-prefill tc_piecewise"),
    "moved experts": ({"flags": {"init-expert-location": "x.pt"}}, "--init-expert-location x.pt"),
    "copies of experts": ({"flags": {"ep-num-redundant-experts": 2}}, "--ep-num-redundant-experts 2"),
    "recorded experts": ({"flags": {"expert-distribution-recorder-mode": "stat"}}, "-recorder-mode stat"),
    "fused shared expert": ({"flags": {"enforce-shared-experts-fusion": True}}, "--enforce-shared-experts-fusion"),
    "FP4 indexer": ({"flags": {"enable-deepseek-v4-fp4-indexer": True}}, "--enable-deepseek-v4-fp4-indexer"),
    "FP8 by another library": ({"flags": {"fp8-gemm-backend": "deep_gemm"}}, "--fp8-gemm-backend deep_gemm"),
    "breakable graphs": ({"flags": {"cuda-graph-backend-decode": "breakable"}}, "-backend-decode breakable"),
    "hasty watchdog": ({"flags": {"watchdog-timeout": 9.0}}, "--watchdog-timeout 9"),
    "dequantised experts": ({"env": {"SGLANG_DSV4_FP4_DEQUANT": "True"}}, "SGLANG_DSV4_FP4_DEQUANT=True"),
    "online compression": ({"config_env": {"SGLANG_OPT_USE_ONLINE_COMPRESS": "1"}}, "ONLINE_COMPRESS=1"),
    "narrow states": ({"env": {"SGLANG_DSV4_COMPRESS_STATE_DTYPE": "bfloat16"}}, "STATE_DTYPE=bfloat16"),
    "plugins without ours": ({"env": {"SGLANG_PLUGINS": "sm120"}}, "does not list nvidia_megakernel"),
}


@pytest.mark.parametrize("mode", ("prefill", "decode"))
def test_a_pair_keeps_the_step(mode: str):
    """What arrives from the other server lies in SGLang's pools (`test_disaggregation.py`)."""
    assert off(make_plan(TWO, MODEL, Request(flags={"disaggregation-mode": mode}))) == ""


@pytest.mark.parametrize("reason", OTHERS)
@pytest.mark.parametrize("patched", (True, False))
def test_what_else_leaves_the_step_out(reason: str, patched: bool):
    """A note says why, the budget has nothing of the step's, and the flag that would be refused is absent."""
    values, words = OTHERS[reason]
    plan = make_plan(TWO, MODEL, Request(**values, patched=patched))
    assert words in off(plan) and plan.value("enable-nvidia-megakernel") is None


def test_several_nodes_are_named_once():
    for request, nodes in ((Request(flags={"nnodes": 2}), 1), (Request(), 2), (Request(config_flags={"nnodes": 2}), 2)):
        note = off(make_plan(machine("gb10-pair" if nodes == 2 else "2x-rtx-pro-6000"), MODEL, request))
        assert note.count("does not serve") == 1 and ("--nnodes 2" in note or "ranks on several nodes" in note), note


SERVED: list[dict[str, Any]] = [
    {"flags": {name: value}} for flags in contract.FEATURES.values() for name, value in flags.items()
    if value is not None and value != ()
]  # fmt: skip
SERVED += [{"flags": {name: value}} for name, values in contract.served(False, False).items() for value in values]
SERVED += [
    {"flags": {"cuda-graph-backend-prefill": "full"}},
    {"flags": {"offload-group-size": -1}}, {"flags": {"watchdog-timeout": 10.0}}, {"flags": {"ep-size": 2}},
    {"env": {"SGLANG_PLUGINS": "sm120, nvidia_megakernel"}}, {"env": {"SGLANG_DSV4_FP4_DEQUANT": "false"}},
    {"env": {"SGLANG_DSV4_COMPRESS_STATE_DTYPE": "float32"}}, {"env": {"SGLANG_OPT_FP8_WO_A_GEMM": "1"}},
]  # fmt: skip


@pytest.mark.parametrize("values", SERVED, ids=str)
def test_what_does_not_leave_the_step_out(values: dict[str, Any]):
    """The same flags with the values that they have anyway."""
    assert make_plan(TWO, MODEL, Request(**values)).notes == ()


def test_the_flag_by_hand_keeps_sglangs_refusal():
    """With --enable-nvidia-megakernel SGLang does not start where its contract refuses: nor does the plan."""
    flags: dict[str, Value] = {"enable-nvidia-megakernel": True, "enable-lora": True}
    with pytest.raises(LaunchError, match="--enable-nvidia-megakernel was given, and .*--enable-lora"):
        make_plan(TWO, MODEL, Request(flags=flags))


@pytest.mark.parametrize("where", ("SM120", "CPU"))
def test_deterministic_inference_is_refused(where: str):
    """By SGLang itself, for this model on any device, and so by the plan."""
    place = TWO if where == "SM120" else machine("no-gpu")
    with pytest.raises(LaunchError, match="SGLang 0.5.23 refuses it for DeepSeek-V4"):
        make_plan(place, MODEL, Request(flags={"enable-deterministic-inference": True}))


@pytest.mark.parametrize("where", ("SM120", "CPU"))
def test_weights_that_are_not_mapped_are_refused(where: str):
    """SGLang 0.5.23 hands whole files to a function of safetensors that does not know the model's block scales."""
    held = safetensors.torch.save({"scale": torch.ones(4).to(torch.float8_e8m0fnu)})
    with pytest.raises(KeyError, match="F8_E8M0"):
        safetensors.torch.load(held)
    place = TWO if where == "SM120" else machine("no-gpu")
    with pytest.raises(LaunchError, match="^--weight-loader-disable-mmap was given, .*F8_E8M0.*: leave it out.$"):
        make_plan(place, MODEL, Request(flags={"weight-loader-disable-mmap": True}))
    make_plan(TWO, MODEL, Request(flags={"weight-loader-disable-mmap": False}))


class TestForcedOnHopper:
    """SGLANG_SM120_FORCE=1 on a card that is no SM12x."""

    def test_without_the_variable_nothing_is_the_steps(self):
        plan = make_plan(HOPPER, MODEL, Request())
        assert "none of SM12x" in off(plan)
        assert "moe-runner-backend" not in plan.arguments() and not plan.environment()

    def test_the_plan_has_what_the_emulated_server_needs(self):
        """Flags and variables are those that the server under lowering is started with; every pass is the step's."""
        plan = make_plan(HOPPER, MODEL, Request(env=FORCED, mtp=True))
        assert not off(plan)
        assert sm120_lowering.SERVER_ENVIRONMENT.items() <= plan.environment().items()
        needed = list(sm120_lowering.SERVER_FLAGS)
        while needed:
            name, *value = needed[: 2 if len(needed) > 1 and not needed[1].startswith("--") else 1]
            assert plan.value(name[2:]) == (value[0] if value else True)
            del needed[: 1 + len(value)]
        assert not any("SGLang's prefill" in what and "wo_a" not in what for what, _ in plan.fit.lines)
        # The draft's experts are kept as the target's.
        assert plan.value("speculative-moe-runner-backend") is None

    @pytest.mark.parametrize(
        "flags",
        (
            {"moe-runner-backend": "auto"},
            {"disable-prefill-cuda-graph": False},
            {"cuda-graph-backend-prefill": "full"},
        ),
        ids=lambda flags: next(iter(flags)),
    )
    def test_what_hoppers_own_kernels_would_run(self, flags: dict[str, Value]):
        assert next(iter(flags)) in off(make_plan(HOPPER, MODEL, Request(env=FORCED, flags=flags)))

    def test_fp8_wo_a_is_refused_there_alone(self):
        asked = {**FORCED, "SGLANG_OPT_FP8_WO_A_GEMM": "1"}
        assert "FP8_WO_A" in off(make_plan(HOPPER, MODEL, Request(env=asked)))
        assert not off(make_plan(TWO, MODEL, Request(env=asked)))

    def test_as_the_steps_own_reasons_say(self, monkeypatch: pytest.MonkeyPatch):
        """What `reasons.py` asks of a server there is what the plan passes."""
        from sglang_sm120.step import reasons

        monkeypatch.setattr(reasons, "emulated", lambda: True)
        monkeypatch.setattr(reasons, "takes_prefill", lambda: True)
        plan = make_plan(HOPPER, MODEL, Request(env=FORCED, mtp=True))

        def found(**changed: Any) -> list[str]:
            given = {
                "moe_runner_backend": plan.value("moe-runner-backend"),
                "prefill": "disabled" if plan.value("disable-prefill-cuda-graph") else "full",
                "speculative_algorithm": plan.value("speculative-algorithm"),
                "speculative_num_draft_tokens": plan.value("speculative-num-draft-tokens"),
                "enable_deepseek_v4_fp4_indexer": False,
            } | changed
            graphs = SimpleNamespace(prefill=SimpleNamespace(backend=given.pop("prefill")))
            return reasons.config_reasons(SimpleNamespace(cuda_graph_config=graphs, **given), None)

        assert found() == []
        assert found(prefill="full")


def test_prefill_by_the_step_needs_no_graphs_of_sglangs():
    plan = make_plan(TWO, MODEL, Request(env={"SGLANG_SM120_PREFILL": "overlay"}))
    assert not off(plan) and plan.value("disable-prefill-cuda-graph") is True
    assert make_plan(TWO, MODEL, Request()).value("disable-prefill-cuda-graph") is None


@pytest.mark.parametrize(
    ("place", "value", "env"), ((TWO, "yes", {}), (HOPPER, "sglang", FORCED)), ids=("unknown", "forced")
)
def test_prefill_as_the_server_reads_it(place: Any, value: str, env: dict[str, str]):
    """A value that ends the server is refused here too."""
    with pytest.raises(LaunchError, match=f"SGLANG_SM120_PREFILL is '?{value}'?"):
        make_plan(place, MODEL, Request(env={**env, "SGLANG_SM120_PREFILL": value}))
