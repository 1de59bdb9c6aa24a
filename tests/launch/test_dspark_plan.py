"""Plans with a DSpark drafter: what it takes, where it is found, and what of it is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from golden_plans import drafted, machine

from sglang_sm120.checkpoint.config import FLASH, ReferenceConfig
from sglang_sm120.limits import MAX_DRAFT_TOKENS
from sglang_sm120_launch import cli, memory
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.fit import RATIOS
from sglang_sm120_launch.model import Model
from sglang_sm120_launch.plan import Plan, make_plan
from sglang_sm120_launch.values import Request
from sglang_sm120_reference.write import drafter_of, write_checkpoint

TWO = machine("2x-rtx-pro-6000")
PLAIN, DRAFTED = Model.load(FLASH), drafted()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "DeepSeek-V4-small"
    return write_checkpoint(folder, dspark=drafter_of(ReferenceConfig(), (1, 3)))


def planned(model: Model = DRAFTED, dspark: bool = True, **flags: Any) -> Plan:
    return make_plan(
        TWO, model, Request(dspark=dspark, flags={name.replace("_", "-"): v for name, v in flags.items()})
    )


def refused(model: Model = DRAFTED, dspark: bool = True, mtp: bool = False, **flags: Any) -> str:
    given = {name.replace("_", "-"): value for name, value in flags.items()}
    with pytest.raises(LaunchError) as found:
        make_plan(TWO, model, Request(dspark=dspark, mtp=mtp, flags=given))
    return str(found.value)


def test_what_a_drafter_takes():
    """Its stages' weights, three more windows, its logits; nothing of embedding and head, which are the target's."""
    lines, without = (dict(plan.fit.lines) for plan in (planned(), planned(PLAIN, dspark=False)))
    joined = "stages' projections joined (the step)"
    assert set(lines) - set(without) == {"draft model", "logits of drafts (SGLang's)", joined}
    assert -lines[joined] == 3 * (1024 + 512) * 4096 + 3 * (8 + 4) * 32 * 4
    draft = memory.weights(DRAFTED, 2, "cuda", mtp=True)
    stored = sum(size for name, size in DRAFTED.tensors.items() if name.startswith("mtp."))
    experts = sum(size for name, size in DRAFTED.tensors.items() if name.startswith("mtp.") and ".experts." in name)
    # An embedding and a head of the target's size, half of each, would be more than all else that a drafter has.
    assert draft["experts"] == experts // 2 and 0 < sum(draft.values()) - draft["experts"] < stored - experts < 1 << 30
    # wo_a is there in FP8 alone, in a line of its own.
    assert -lines["draft model"] == sum(draft.values()) - draft[memory.WO_A]
    assert -lines["logits of drafts (SGLang's)"] == max(planned().fit.graphs) * 5 * 129280 * 6
    pools = memory.Pools(full=1 << 16, swa=1 << 13, c4=1 << 14, c128=1 << 9, c4_state=512, c128_state=512)
    windows = [memory.pool_bytes(DRAFTED.config, pools, drafts)["window"] for drafts in (0, 1, 3)]
    assert (windows[2] - windows[0]) == 3 * (windows[1] - windows[0]) > 0
    assert -lines["cache pools"] == sum(memory.pool_bytes(DRAFTED.config, planned().fit.pools, 3).values())


@pytest.mark.parametrize("stages", [1, 3, 4])
@pytest.mark.parametrize("ratio", RATIOS)
def test_reserve_and_padding_hold_the_windows_of_the_stages(ratio: float, stages: int):
    """What SGLang counts for one more whole layer, and what is left beside for the rest of the stages' windows."""
    tokens, requests = 1 << 20, 32
    pools = memory.pool_sizes(DRAFTED.config, tokens, ratio, requests, stages)
    counted = tokens * sum(memory.bytes_per_full_token(DRAFTED.config, ratio, stages).values())
    counted += memory.request_state_bytes(DRAFTED.config, requests, stages)
    padding = memory.pool_padding(DRAFTED.config, tokens, ratio, requests, stages)
    assert 0 <= counted + padding - sum(memory.pool_bytes(DRAFTED.config, pools, stages).values()) < 400 << 20


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("place", ["2x-rtx-pro-6000", "4x-rtx-pro-6000", "8x-rtx-pro-6000", "16x-rtx-pro-6000"])
def test_a_fraction_of_the_plans_own_is_planned(place: str, ratio: float):
    """Nobody gave it, so nobody can be asked to give less."""
    request = Request(dspark=True, flags={"swa-full-tokens-ratio": ratio})
    assert make_plan(machine(place), DRAFTED, request).fit.lines[-1][1] >= 0


def test_sglang_is_told_and_finds_the_rest():
    plan, spelled = planned(), planned(dspark=False, speculative_algorithm="DSPARK")
    given = {entry.name: entry.value for entry in plan.settings if entry.name.startswith("speculative-")}
    assert given == {"speculative-algorithm": "DSPARK"}
    assert spelled.fit == plan.fit
    # 64 requests' blocks of 5 and their anchors are more rows than the step takes.
    wide = planned(cuda_graph_bs_decode=(1, 64)).settings
    [reason] = [entry.reason for entry in wide if entry.name == "cuda-graph-max-bs-decode"]
    assert "more than 42 requests without the step" in reason
    assert planned(speculative_dspark_block_size=3).fit.lines != plan.fit.lines
    for block, said in ((5, "blocks of 5, as it was trained"), (8, "blocks of 8, as given, and it was trained for 5")):
        [algorithm] = [
            entry.reason for entry in planned(speculative_dspark_block_size=block).settings
            if entry.name == "speculative-algorithm"
        ]  # fmt: skip
        assert algorithm.endswith(said)


def test_drafts_that_cannot_be_served():
    assert refused(PLAIN).endswith(
        f"of {FLASH} no DSpark drafter was found here, in its files or in dspark/ beside them: download it, or leave "
        f"--dspark out."
    )
    assert "no DSpark drafter was found" in refused(PLAIN, dspark=False, speculative_algorithm="DSPARK")
    long = replace(DRAFTED, dspark=replace(DRAFTED.dspark, block_size=MAX_DRAFT_TOKENS))
    assert "A block of 10 drafts is verified as 11 tokens, and the compressor can take back 10" in refused(long)
    assert "is verified as 10" not in str(planned(long, speculative_dspark_block_size=9).notes)
    assert "--speculative-num-draft-tokens is 4, and a block of 5 drafts is verified as 6" in refused(
        speculative_num_draft_tokens=4
    )
    assert planned(speculative_num_draft_tokens=6).fit == planned().fit
    piped = refused(pp_size=2)
    assert "--pp-size is 2, and SGLang 0.5.23 pipelines DSpark in prefill servers alone" in piped
    assert planned(pp_size=1).fit == planned().fit and planned(pp_size=2, disaggregation_mode="prefill")
    assert "--speculative-num-steps is 3, and SGLang runs DSpark with 1" in refused(speculative_num_steps=3)
    assert "the drafter is the model's own" in refused(speculative_draft_model_path="elsewhere")
    with pytest.raises(LaunchError, match="has them on a GPU alone"):
        make_plan(machine("no-gpu"), DRAFTED, Request(dspark=True))


@pytest.mark.parametrize(
    "asked",
    [
        {"mtp": True},
        {"mtp": True, "dspark": False, "speculative_algorithm": "DSPARK"},
        *({"speculative_algorithm": name} for name in ("EAGLE", "NEXTN", "nextn")),
    ],
)
def test_both_kinds_of_drafts_at_once(asked: dict[str, Any]):
    assert "Drafts of the MTP layer and of DSpark were asked for: leave one of them out." == refused(**asked)


@pytest.mark.parametrize("name", ["block_size", "sps_table_path", "confidence_sts_path"])
def test_flags_of_drafts_that_dspark_does_not_make(name: str):
    given = {f"speculative_dspark_{name}": 5}
    assert "nothing drafts: add --mtp or --dspark" in refused(dspark=False, **given)
    assert "the MTP layer drafts: leave it out, or give --dspark" in refused(PLAIN, dspark=False, mtp=True, **given)


def test_the_folder_beside_the_target(checkpoint: Path):
    plain, model = Model.load(str(checkpoint)), Model.load(str(checkpoint)).with_dspark()
    assert plain.dspark is None and model.dspark is not None and model.dspark.target_layer_ids == (1, 3)
    assert {name for name in model.tensors if not name.startswith("mtp.")} == {
        name for name in plain.tensors if not name.startswith("mtp.")
    }
    assert "mtp.1.markov_head.markov_w1.weight" in model.tensors and "mtp.0.e_proj.weight" not in model.tensors
    assert Model.load(FLASH).with_dspark().dspark is None


def test_layers_that_a_drafter_has_none_of(checkpoint: Path, tmp_path: Path):
    """What its config.json says of them is its own matter, as its class is, and which experts it has."""
    shutil.copytree(checkpoint, folder := tmp_path / "model")
    file = folder / "dspark/config.json"
    own = {"compress_ratios": [0, 0], "num_hidden_layers": 2, "num_nextn_predict_layers": 0, "num_hash_layers": 0}
    own |= {"architectures": ["DeepseekV4ForCausalLMDSpark"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    assert Model.load(str(folder)).with_dspark().tensors == Model.load(str(checkpoint)).with_dspark().tensors


def test_a_checkpoint_that_bundles_it(checkpoint: Path, tmp_path: Path):
    """As the published one: the keys in its config.json, the stages in its index, no MTP layer."""
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(checkpoint / name, tmp_path)
    tensors = {n: t for n, t in load_file(*checkpoint.glob("*.safetensors")).items() if not n.startswith("mtp.")}
    tensors |= load_file(*(checkpoint / "dspark").glob("*.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((checkpoint / "dspark/config.json").read_text())
    model = Model.load(str(tmp_path)).with_dspark()
    assert model.dspark is not None and model.tensors.keys() == tensors.keys()
    assert "the checkpoint's own files" in next(
        s.reason for s in planned(model).settings if s.name == "speculative-algorithm"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dspark_target_layer_ids": [1, 9]}, "the target has layers 0 to 4"),
        ({"dspark_block_size": None}, "lacks dspark_block_size"),
        ({"hidden_size": 512}, "hidden_size=512, its target 256"),
        ({"num_attention_heads": 32}, "num_attention_heads=32, its target 16"),
        ({"q_lora_rank": 256}, "q_lora_rank=256, its target 128"),
        ({"moe_intermediate_size": 128}, "moe_intermediate_size=128, its target 256"),
        ({"hc_sinkhorn_iters": 3}, "hc_sinkhorn_iters=3, its target 20"),
        ({"rope_theta": 5000}, "rope_theta=5000, its target 10000"),
        ({"head_dim": 256}, "head_dim=256, this model needs 512"),
        ({"model_type": "llama"}, "is a model of type llama, needed deepseek_v4"),
        ({"architectures": ["DSparkDraftModel"]}, "architectures=['DSparkDraftModel'], needed one of"),
        ({"expert_dtype": "bf16"}, "expert_dtype='bf16'"),
        ({"dspark_target_layer_ids": [1, 2, 3]}, "mtp.0.main_proj.scale: F8_E8M0 [2, 4], needed F8_E8M0 [2, 6]"),
        ({"dspark_markov_rank": 32}, "mtp.1.confidence_head.proj.weight: F32 [1, 320], needed F32 [1, 288]"),
        ({"dspark_n_routed_experts": 8}, "mtp.0.ffn.gate.bias: F32 [16], needed F32 [8]"),
    ],
)
def test_another_models_drafter(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], said: str):
    shutil.copytree(checkpoint, folder := tmp_path / "model")
    file = folder / "dspark/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert Model.load(str(folder)).dspark is None  # a server without drafts does not look there
    with pytest.raises(LaunchError) as found:
        Model.load(str(folder)).with_dspark()
    sentence = str(found.value)
    assert said in sentence and str(folder / "dspark") in sentence and sentence.endswith(".")


def test_command_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    place = str(Path(__file__).parent / "machines/1x-rtx-pro-6000.json")
    options = ["plan", "--model", str(checkpoint), "--machine", place]
    assert cli.main([*options, "--dspark"]) == 0
    said = capsys.readouterr().out
    assert "--speculative-algorithm DSPARK" in said and "its folder dspark/" in said
    assert cli.main([*options, "--", "--speculative-algorithm", "DSPARK"]) == 0
    assert "logits of drafts" in capsys.readouterr().out
    assert cli.main(["plan", "--model", str(checkpoint), "--dspark", "--", "--device", "cpu"]) != 0
    assert "on a GPU alone" in capsys.readouterr().err
