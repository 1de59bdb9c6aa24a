"""What SGLang's argument resolution decides: the patched SGLang, the released one, and the released one with our wheel.

Devices are simulated, in child processes: the decision is made on the host, from what torch says about the GPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from boxes import CHECKOUT, LOAD_PLUGINS, SGLANG, Environment

from sglang_sm120_reference.config_file import FLASH_DRAFTER

PROBE = Path(__file__).with_name("resolution_probe.py")
FLAG = "--enable-nvidia-megakernel"
FLAG_FIELD = "enable_nvidia_megakernel"
OFF = "sglang-sm120 is off, SGLang's own forward serves DeepSeek-V4: "
LORA = "LoRA is in use and sglang-sm120 does not accept it"
SM120, SM121, H200, B200, ADA = [12, 0], [12, 1], [9, 0], [10, 0], [8, 9]
# Defaults of DeepSeek-V4 on SM12x with a feature that the plugin's contract refuses, and SGLang's reason.
REFUSED = {
    "lora": (["--enable-lora"], LORA),
    "marlin": (["--moe-runner-backend", "marlin"], "moe_runner_backend 'marlin' is not one of ['flashinfer_mxfp4']"),
    "fused": (["--enforce-shared-experts-fusion"], "enforce_shared_experts_fusion True is not one of ['False']"),
    "v4.1": ([], "config.model_type 'deepseek_v41' is not 'deepseek_v4'"),
}
ROLES = ("prefill", "decode")
RAGGED = ("static", "compact")
# Where nothing of ours may be seen.
INACTIVE = {
    "other model": ("llama", SM120, []),
    "other model with the flag": ("llama", SM120, [FLAG]),
    "other model on cpu": ("llama", None, ["--device", "cpu"]),
    "h200": ("v4", H200, []),
    "b200": ("v4", B200, []),
    "ada": ("v4", ADA, []),
    "h200 with lora": ("v4", H200, ["--enable-lora"]),
    "no gpu": ("v4", None, [FLAG]),
    "deterministic": ("v4", SM120, ["--enable-deterministic-inference"]),
    "turned off": ("v4", SM120, []),
    "turned off with lora": ("v4", SM120, ["--enable-lora"]),
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    v4 = json.loads((CHECKOUT / "overlay/sglang_sm120/model-config.json").read_text())
    for name, config in {"v4": v4, "v4.1": v4 | {"model_type": "deepseek_v41"}, "llama": LLAMA}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "v4", folder / "drafted")
    (folder / "drafted/dspark").mkdir()
    (folder / "drafted/dspark/config.json").write_text(json.dumps(v4 | FLASH_DRAFTER))

    def case(
        name: str, model: str, capability: list[int] | None, *arguments: str, declared: Any = None, **env: str
    ) -> dict[str, Any]:
        device = [] if "--device" in arguments else ["--device", "cuda"]
        line = ["--model-path", str(folder / model), "--tp", "2", *device, *arguments]
        return {"name": name, "arguments": line, "capability": capability, "env": env, "declared": declared or {}}

    made = [case("sm120", "v4", SM120), case("sm121", "v4", SM121), case("flag", "v4", SM120, FLAG)]
    made += [case(role, "v4", SM120, "--disaggregation-mode", role) for role in ROLES]
    drafts = ("--speculative-algorithm", "DSPARK")
    made += [case(mode, "drafted", SM120, *drafts, SGLANG_RAGGED_VERIFY_MODE=mode) for mode in RAGGED]
    made += [
        case(name, "v4.1" if name == "v4.1" else "v4", SM120, *arguments) for name, (arguments, _) in REFUSED.items()
    ]
    made += [
        case(name, model, capability, *arguments, **({"SGLANG_SM120": "0"} if name.startswith("turned off") else {}))
        for name, (model, capability, arguments) in INACTIVE.items()
    ]
    made.append(case("flag with lora", "v4", SM120, FLAG, "--enable-lora"))
    made.append(case("flag on h200", "v4", H200, FLAG))
    made.append(case("plugin not listed", "v4", SM120, SGLANG_PLUGINS="sm120"))
    deterministic = {FLAG_FIELD: False, "enable_deterministic_inference": True}
    made.append(case("deterministic accepted by SGLang", "v4", SM120, declared=deterministic))
    path = folder / "cases.json"
    path.write_text(json.dumps(made))
    return path


@dataclass(frozen=True)
class Answers:
    """What the probe said of each case."""

    upstream: dict[str, Any]
    patched: dict[str, Any]
    """By the SGLang of this interpreter: `make test` applies the series first."""
    zero_patch: dict[str, Any]
    inactive: tuple[dict[str, Any], dict[str, Any]]
    """What functions of touched files return for another model, and for a card's tensors: upstream, patched."""


@pytest.fixture(scope="session")
def answers(cases: Path, released: Environment, with_wheel: Environment) -> Answers:
    command, llama = [sys.executable, PROBE, cases], cases.with_name("llama")
    here = subprocess.Popen([*command, llama], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    prefixes = {Path(sys.prefix): here, released.folder: released.start(PROBE, cases, llama)}
    prefixes[with_wheel.folder] = with_wheel.start(PROBE, cases)
    found = {}
    for prefix, process in prefixes.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        found[prefix] = json.loads(out.splitlines()[-1])
        assert Path(found[prefix]["sglang"]).is_relative_to(prefix), found[prefix]["sglang"]
    patched, upstream, zero_patch = (found[prefix]["answers"] for prefix in prefixes)
    inactive = found[released.folder]["inactive"], found[Path(sys.prefix)]["inactive"]
    return Answers(upstream, patched, zero_patch, inactive)


@pytest.fixture
def upstream(answers: Answers) -> dict[str, Any]:
    return answers.upstream


@pytest.fixture
def patched(answers: Answers) -> dict[str, Any]:
    return answers.patched


@pytest.fixture
def zero_patch(answers: Answers) -> dict[str, Any]:
    return answers.zero_patch


@pytest.mark.parametrize("mode", RAGGED)
def test_dspark_keeps_it_on(patched: dict[str, Any], mode: str):
    """With the drafter of the folder beside the target, and a token more than its block to verify."""
    resolved = patched[mode]["resolved"]
    assert resolved[FLAG_FIELD] == "True" and resolved["speculative_draft_model_path"].endswith("drafted/dspark'")
    assert resolved["speculative_num_draft_tokens"] == "6"


@pytest.mark.parametrize("name", ["sm120", "sm121", "flag"])
def test_it_is_on_by_default(patched: dict[str, Any], name: str):
    """As with the flag: the same arguments and the same lines of SGLang's, and none of ours."""
    assert patched[name]["resolved"][FLAG_FIELD] == "True"
    assert patched[name]["resolved"] == patched["flag"]["resolved"]
    isa = "sm_121" if name == "sm121" else "sm_120"
    assert patched[name]["log"][-1] == f"{FLAG}: sglang-sm120 on {isa}"
    assert not any(line.startswith(OFF) for line in patched[name]["log"])


@pytest.mark.parametrize("role", ROLES)
def test_it_is_on_where_prefill_and_decode_are_apart(patched: dict[str, Any], role: str):
    """On both sides, as the plugin's spec accepts the feature."""
    assert patched[role]["error"] is None and patched[role]["resolved"][FLAG_FIELD] == "True"
    assert patched[role]["log"][-1] == f"{FLAG}: sglang-sm120 on sm_120"


@pytest.mark.parametrize("name", REFUSED)
def test_where_the_contract_refuses_stock_sglang_starts(patched: dict[str, Any], upstream: dict[str, Any], name: str):
    """Upstream's arguments, and one more line in the log, which says why."""
    answer = patched[name]
    assert answer["error"] is None and answer["resolved"] == upstream[name]["resolved"]
    assert answer["resolved"][FLAG_FIELD] == "False"
    assert answer["log"] == [*upstream[name]["log"], OFF + REFUSED[name][1]]


def test_deterministic_inference(patched: dict[str, Any]):
    """0.5.23 refuses it for this model by itself (see "deterministic" below); were it not to, the contract does."""
    answer = patched["deterministic accepted by SGLang"]
    assert answer["log"] == [OFF + "deterministic inference is in use and sglang-sm120 does not accept it"]
    assert answer["resolved"][FLAG_FIELD] == "False"


def test_a_plugin_that_may_not_load(patched: dict[str, Any]):
    [line] = [line for line in patched["plugin not listed"]["log"] if "sglang-sm120" in line]
    assert line == OFF + "SGLANG_PLUGINS='sm120' does not list the 'nvidia_megakernel' plugin"


OTHER = """
from sglang.kernels.plugin_kernels.nvidia import spec
from sglang_sm120 import plugin
import msgspec
requires = msgspec.structs.replace(plugin.SPEC.requires, isas=frozenset({"sm_100"}))
SPEC = msgspec.structs.replace(plugin.SPEC, name="other", requires=requires)
def register():
    spec.register(architecture="DeepseekV4ForCausalLM", path="other:SPEC")
"""
TAKES_THE_NAME = """
import sys
sys.path.append(sys.argv[1])
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.kernels.plugin_kernels.nvidia import spec
from sglang.srt.kernel_plugins.nvidia import binding
from sglang_sm120.step import default_on
found = spec.find_spec(architectures=["DeepseekV4ForCausalLM"], isa="sm_120")
default_on.logger.warning = lambda *said: print("said", said[1])
print(found[0], default_on.settle_default(None, [found[1]]), binding.plugin_reasons())
"""


def test_another_package_that_takes_the_plugins_name(tmp_path: Path):
    """SGLang keeps one plugin of a name: by the other's spec, for other cards, its own forward serves, and says why."""
    (tmp_path / "other.py").write_text(OTHER)
    (tmp_path / "other-1.dist-info").mkdir()
    (tmp_path / "other-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (tmp_path / "other-1.dist-info" / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nnvidia_megakernel = other:register\n"
    )
    command = [sys.executable, "-c", TAKES_THE_NAME, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["said other:SPEC supports ['sm_100'], not sm_120", "None False []"]


def test_the_flag_by_hand_keeps_sglangs_refusal(patched: dict[str, Any], zero_patch: dict[str, Any]):
    for answer in (patched["flag with lora"], zero_patch["flag with lora"]):
        assert answer["error"] == f"ValueError: {FLAG} cannot run this setup:\n  - {LORA}"
        assert not any(line.startswith(OFF) for line in answer["log"])
    assert "not sm_90" in patched["flag on h200"]["error"]


@pytest.mark.parametrize("name", INACTIVE)
def test_inactive_is_upstream(patched: dict[str, Any], upstream: dict[str, Any], name: str):
    """Arguments, log and error are the released SGLang's, but for what the flag says when no plugin is installed."""
    expected, found = upstream[name], patched[name]
    assert expected["resolved"] or expected["error"]
    if FLAG in INACTIVE[name][2]:
        assert f"{FLAG} cannot run this setup" in found["error"]
        assert "plugin is not installed" in expected["error"]
        expected, found = expected | {"error": None}, found | {"error": None}
    assert found == expected


ON_A_CARD = ["drafts", "slots", "between passes", "process groups", "deepseek v4"]


@pytest.mark.parametrize("what", ON_A_CARD)
def test_a_card_gets_upstreams_results(answers: Answers, what: str):
    """What speculation and DeepSeek-V4's classes compute for tensors that are not on a CPU, on a simulated sm_90."""
    expected, found = (results[f"{what} on a card"] for results in answers.inactive)
    assert expected and found == expected


@pytest.mark.parametrize("what", ["prompts", "first request", "longest prompt"])
def test_another_model_gets_upstreams_results(answers: Answers, what: str):
    expected, found = (results[what] for results in answers.inactive)
    assert found == expected
    # The probe reached what it asks: no error that both have in common.
    assert expected and "Error: " not in str(expected).replace("ValueError: The input (4096 tokens) is longer", "")


class TestZeroPatch:
    """An untouched SGLang with our wheel."""

    def test_without_the_flag_nothing_changes(self, upstream: dict[str, Any], zero_patch: dict[str, Any]):
        with_flag = {name for name in upstream if "flag" in name or name == "no gpu"}
        assert len(upstream) - len(with_flag) > 12
        for name in upstream.keys() - with_flag:
            assert zero_patch[name] == upstream[name], name

    def test_the_plugin_is_registered_and_serves_sm120(self, zero_patch: dict[str, Any]):
        assert zero_patch["flag"]["error"] is None
        assert zero_patch["flag"]["log"][-1] == f"{FLAG}: sglang-sm120 on sm_120"

    def test_without_a_gpu_sglang_says_so(self, zero_patch: dict[str, Any]):
        assert zero_patch["no gpu"]["error"] == f"ValueError: {FLAG} cannot run this setup:\n  - no GPU is visible"

    def test_the_wheel_holds_what_a_server_needs(self, with_wheel: Environment):
        [path] = with_wheel.folder.parent.glob("*.whl")
        assert path.stat().st_size < 400_000
        names = zipfile.ZipFile(path).namelist()
        tops = {name.split("/", 1)[0].partition("-")[0] for name in names}
        assert tops == {"sglang_sm120", "sglang_sm120_launch"}
        assert "sglang_sm120/sglang.lock" in names and not any("series" in name for name in names)
        kinds = {Path(name).suffix for name in names if ".dist-info/" not in name}
        assert kinds == {".py", ".json", ".lock"}

    def test_another_sglang_is_refused(self, with_wheel: Environment):
        [metadata] = with_wheel.site.glob("sglang-*.dist-info/METADATA")
        original = metadata.read_text()
        metadata.unlink()
        metadata.write_text(original.replace(f"\nVersion: {SGLANG}\n", "\nVersion: 0.5.22\n"))
        try:
            done = with_wheel.run("-c", LOAD_PLUGINS, with_wheel.site)
        finally:
            metadata.write_text(original)
        assert (done.returncode, done.stdout) == (1, "")
        found = f"SGLang 0.5.22 is installed in {with_wheel.site}, needed {SGLANG}: install that version"
        assert done.stderr.splitlines()[-1] == f"sglang-sm120: {found}"
