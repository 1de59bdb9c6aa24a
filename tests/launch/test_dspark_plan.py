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
    assert set(lines) - set(without) == {"draft model", "logits of drafts (SGLang's)"}
    draft = memory.weights(DRAFTED, 2, "cuda", mtp=True)
    stored = sum(size for name, size in DRAFTED.tensors.items() if name.startswith("mtp."))
    experts = sum(size for name, size in DRAFTED.tensors.items() if name.startswith("mtp.") and ".experts." in name)
    assert draft["experts"] == experts // 2 and 0 < sum(draft.values()) < stored
    # wo_a is there in FP8 alone, in a line of its own.
    assert -lines["draft model"] == sum(draft.values()) - draft[memory.WO_A]
    assert -lines["logits of drafts (SGLang's)"] == max(planned().fit.graphs) * 5 * 129280 * 6
    pools = memory.Pools(full=1 << 16, swa=1 << 13, c4=1 << 14, c128=1 << 9, c4_state=512, c128_state=512)
    windows = [memory.pool_bytes(DRAFTED.config, pools, drafts)["window"] for drafts in (0, 1, 3)]
    assert (windows[2] - windows[0]) == 3 * (windows[1] - windows[0]) > 0


def test_sglangs_reserve_holds_the_windows_of_three_stages():
    """What it counts for one more whole layer, against what its pools take: `bytes_per_full_token`."""
    tokens, requests = 1 << 20, 32
    pools = memory.pool_sizes(DRAFTED.config, tokens, 0.1, requests, 3)
    counted = tokens * sum(memory.bytes_per_full_token(DRAFTED.config, 0.1, 3).values())
    counted += memory.request_state_bytes(DRAFTED.config, requests, 3)
    padding = memory.pool_padding(DRAFTED.config, requests, 3)
    assert sum(memory.pool_bytes(DRAFTED.config, pools, 3).values()) < counted + padding


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


def test_drafts_that_cannot_be_served():
    assert "has no DSpark drafter, in its files or in dspark/ beside them" in refused(PLAIN)
    assert "has no DSpark drafter" in refused(PLAIN, dspark=False, speculative_algorithm="DSPARK")
    long = replace(DRAFTED, dspark=replace(DRAFTED.dspark, block_size=MAX_DRAFT_TOKENS))
    assert "A block of 10 drafts is verified as 11 tokens, and the compressor can take back 10" in refused(long)
    assert "is verified as 10" not in str(planned(long, speculative_dspark_block_size=9).notes)
    assert "--speculative-num-draft-tokens is 4, and a block of 5 drafts is verified as 6" in refused(
        speculative_num_draft_tokens=4
    )
    assert planned(speculative_num_draft_tokens=6).fit == planned().fit
    assert "leave one of them out" in refused(mtp=True)
    assert "--speculative-num-steps is 3, and SGLang runs DSpark with 1" in refused(speculative_num_steps=3)
    assert "the drafter is the model's own" in refused(speculative_draft_model_path="elsewhere")
    assert "nothing drafts: add --mtp or --dspark" in refused(dspark=False, speculative_dspark_block_size=5)
    assert "give --dspark" in refused(PLAIN, dspark=False, mtp=True, speculative_dspark_block_size=5)
    with pytest.raises(LaunchError, match="has them on a GPU alone"):
        make_plan(machine("no-gpu"), DRAFTED, Request(dspark=True))


def test_the_folder_beside_the_target(checkpoint: Path):
    plain, model = Model.load(str(checkpoint)), Model.load(str(checkpoint)).with_dspark()
    assert plain.dspark is None and model.dspark is not None and model.dspark.target_layer_ids == (1, 3)
    assert {name for name in model.tensors if not name.startswith("mtp.")} == {
        name for name in plain.tensors if not name.startswith("mtp.")
    }
    assert "mtp.1.markov_head.markov_w1.weight" in model.tensors and "mtp.0.e_proj.weight" not in model.tensors
    assert Model.load(FLASH).with_dspark().dspark is None


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
        ({"dspark_target_layer_ids": [1, 2, 3]}, "lacks mtp.2.attn.attn_sink"),
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
