"""The DSpark drafter's reference: against SGLang's own on a CPU, its laws, the files that it is read from."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.kernels.ops.attention.dsv4 import attn_metadata_kernels
from sglang.srt.arg_groups.speculative_hook import _target_checkpoint_dspark_subfolder
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.attention import deepseek_v4_backend
from sglang.srt.model_executor.model_runner_components import spec_aux_hidden_state
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dspark_components import dspark_config
from sglang.srt.speculative.ragged_verify import RaggedVerifyMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.utils.hf_transformers_utils import get_config
from test_checkpoint import TINY

import decode_step
from sglang_sm120.checkpoint.config import WINDOW, DSparkConfig, ReferenceConfig, model_config
from sglang_sm120.checkpoint.layout import stored
from sglang_sm120_reference import packed
from sglang_sm120_reference.config_file import FLASH_DRAFTER, config_json, load_dspark
from sglang_sm120_reference.drafter import Drafted, Drafter
from sglang_sm120_reference.oracle import Oracle
from sglang_sm120_reference.prompts import prompt
from sglang_sm120_reference.write import drafter_of, main, write_checkpoint

REAL_TENSORS = 4705
"""Of the published drafter, as reported where FLASH_DRAFTER was."""
EVALS = Path(__file__).parents[2] / "evals"
LENGTH = 260
TOLERANCE = 2**-5
"""Of a logit: two steps of bf16 below 4, as both round the base logits and the bias to it."""
PATHS = [Path(__file__).parents[2] / "reference", os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = {
    "SGLANG_DSPARK_FAST_KERNEL": "0", "SGLANG_RAGGED_VERIFY_MODE": "compact", "TRITON_INTERPRET": "1",
    "SGLANG_OPT_USE_TILELANG_MHC_PRE": "0", "SGLANG_OPT_USE_TILELANG_MHC_POST": "0",
    "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
}  # fmt: skip
"""SGLang's drafter in torch, with its confidence head."""
ANCHORS = [1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 190, LENGTH - 1]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """The small checkpoint with a drafter of two stages, whose layers are not the first and follow no other."""
    folder = tmp_path_factory.mktemp("drafted") / "DeepSeek-V4-small"
    write_checkpoint(folder, dspark=drafter_of(ReferenceConfig(), (1, 3)))
    return Oracle(folder)


@pytest.fixture(scope="module")
def drafter(target: Oracle) -> Drafter:
    return Drafter(target)


@pytest.fixture(scope="module")
def tokens(target: Oracle) -> list[int]:
    return prompt(target.directory, LENGTH, 1)


@pytest.fixture(scope="module")
def captured(target: Oracle, drafter: Drafter, tokens: list[int]) -> dict[int, torch.Tensor]:
    return target.forward(tokens, drafter.dspark.target_layer_ids).captured


@pytest.fixture(scope="module")
def context(drafter: Drafter, captured: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    return drafter.context(captured)


def test_proposals_are_sglangs_and_the_steps(
    target: Oracle, drafter: Drafter, tokens: list[int], captured: dict[int, torch.Tensor],
    context: list[torch.Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    """SGLang's class loads every tensor of the folder and no other; behind a tie that fell otherwise rows differ."""
    # As SGLang's target hands them over.
    features = torch.cat([captured[layer].mean(1).bfloat16() for layer in drafter.dspark.target_layer_ids], 1)
    torch.save({"tokens": tokens, "anchors": ANCHORS, "features": features}, tmp_path / "in.pt")
    child = [sys.executable, Path(__file__).with_name("sglang_drafter.py"), target.directory]
    done = subprocess.run(
        [*child, tmp_path / "in.pt", tmp_path / "out.pt"], env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    assert found["warned"] == [] and found["missed"] == []
    ours = drafter.drafts(context, tokens, ANCHORS)
    best = ours.logits.topk(2).values
    for whose in ("sglang", "step"):
        theirs = Drafted(**found[whose])
        agree = theirs.tokens == ours.tokens
        compared = torch.cat((torch.ones(len(ANCHORS), 1, dtype=torch.bool), agree.cumprod(1)[:, :-1].bool()), 1)
        error = (theirs.logits - ours.logits).abs().amax(-1)[compared]
        print(f"{whose}: {len(error)} of {compared.numel()} rows compared, logits off by at most {error.max():.4f}")
        assert len(error) >= 0.8 * compared.numel() and error.max() <= TOLERANCE
        assert agree[compared & (best[..., 0] - best[..., 1] > 2 * TOLERANCE)].all()
        assert (theirs.confidence - ours.confidence).abs()[compared].max() <= TOLERANCE
    # Or all blocks would say the same whatever they see.
    assert len({tuple(block) for block in ours.tokens.tolist()}) > len(ANCHORS) // 2


@given(st.integers(1, LENGTH - 1), st.data())
def test_what_a_block_sees(
    drafter: Drafter, tokens: list[int], context: list[torch.Tensor], anchor: int, data: st.DataObject
) -> None:
    """The 128 tokens before the anchor and the anchor, nothing else."""
    changed = data.draw(st.integers(0, LENGTH - 1))
    seen = max(0, anchor - WINDOW) <= changed < anchor
    before = drafter.drafts(context, tokens, [anchor]).logits
    others = [keys.clone() for keys in context]
    for keys in others:
        keys[changed] *= -3
    assert torch.equal(drafter.drafts(others, tokens, [anchor]).logits, before) != seen
    spelled = [*tokens]
    spelled[changed] = (tokens[changed] + 1) % drafter.config.vocab_size
    assert torch.equal(drafter.drafts(context, spelled, [anchor]).logits, before) == (changed != anchor)


def test_every_row_of_a_block_sees_every_other(
    drafter: Drafter, tokens: list[int], context: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key of the last row reaches the first: no mask lies within a block."""
    before = drafter.drafts(context, tokens, ANCHORS).logits
    keys = type(drafter._attention(0)).keys

    def last_key_is_another(self: Any, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        found = keys(self, x, turn)
        found[drafter.dspark.block_size - 1 :: drafter.dspark.block_size] *= -3
        return found

    monkeypatch.setattr(type(drafter._attention(0)), "keys", last_key_is_another)
    after = drafter.drafts(context, tokens, ANCHORS).logits
    assert (after[:, 0] != before[:, 0]).any(-1).all()


def test_blocks_do_not_see_each_other(drafter: Drafter, tokens: list[int], context: list[torch.Tensor]) -> None:
    together = drafter.drafts(context, tokens, ANCHORS)
    alone = [drafter.drafts(context, tokens, [anchor]) for anchor in ANCHORS]
    # Sums of other lengths differ in fp32 (3e-8, 2-core x86-64); one rounded to the next bf16 moves a logit by 2^-7.
    for name, part in vars(together).items():
        torch.testing.assert_close(part, torch.cat([vars(one)[name] for one in alone]), rtol=0, atol=1e-2)
    assert torch.equal(together.tokens, together.logits.argmax(-1))


def test_features_are_means_after_the_layers_asked_for(
    drafter: Drafter, captured: dict[int, torch.Tensor], context: list[torch.Tensor]
) -> None:
    spread = {layer: x.roll(1, 1) for layer, x in captured.items()}
    for keys, same in zip(drafter.context(spread), context, strict=True):
        torch.testing.assert_close(keys, same)  # the mean does not tell streams apart
    swapped = drafter.context(dict(zip(captured, reversed(captured.values()), strict=True)))
    one = drafter.context({layer: x[:, :1] for layer, x in captured.items()})
    for other in (swapped, one):
        assert all((a - b).abs().max() > 0.1 for a, b in zip(other, context, strict=True))


@pytest.mark.parametrize(
    ("proposed", "expected"),
    [
        # The answer is 1 2 3 4 5 6 7: its first token is the prefill's.
        ({0: [2, 3, 4], 4: [6, 7, 0]}, [4, 2]),
        ({0: [2, 0, 4], 2: [0, 0, 0], 3: [5, 6, 7]}, [2, 1, 3]),
        ({at: [0, 0, 0] for at in range(6)}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_replay_by_hand(
    drafter: Drafter, monkeypatch: pytest.MonkeyPatch, proposed: dict[int, list[int]], expected: list[int]
) -> None:
    def drafts(context: Any, tokens: list[int], anchors: list[int]) -> Drafted:
        return Drafted(torch.tensor([proposed[anchors[0] - 2]]), torch.empty(0), torch.empty(0))

    monkeypatch.setattr(drafter, "drafts", drafts)
    assert drafter.replay([8, 9, 1, 2, 3, 4, 5, 6, 7], 2) == expected


def test_replay_commits_the_answer(target: Oracle, drafter: Drafter, tokens: list[int]) -> None:
    answer = target.greedy(tokens[:40], 12)
    lengths = drafter.replay([*tokens[:40], *answer], 40)
    assert sum(lengths) == len(answer) - 1 and all(1 <= n <= drafter.dspark.block_size + 1 for n in lengths)


@pytest.mark.parametrize("anchors", [[], [0], [LENGTH], [5, LENGTH + 1]])
def test_anchors_out_of_reach(
    drafter: Drafter, tokens: list[int], context: list[torch.Tensor], anchors: list[int]
) -> None:
    with pytest.raises(ValueError, match="need a token each and context before it"):
        drafter.drafts(context, tokens, anchors)


def test_the_published_layout() -> None:
    real = ReferenceConfig.from_json(model_config())
    source = model_config() | FLASH_DRAFTER
    dspark = DSparkConfig.from_json(source, real)
    tensors = stored(real, dspark)
    assert len(tensors) == REAL_TENSORS
    assert tensors["mtp.0.main_proj.weight"] == ((4096, 3 * 4096), torch.float8_e4m3fn)
    assert tensors["mtp.0.main_proj.scale"] == ((32, 96), torch.float8_e8m0fnu)
    assert tensors["mtp.2.ffn.experts.255.w2.weight"] == ((4096, 1024), torch.int8)
    assert tensors["mtp.1.ffn.gate.bias"] == ((256,), torch.float32)
    assert tensors["mtp.2.markov_head.markov_w2.weight"] == ((129280, 256), torch.bfloat16)
    assert tensors["mtp.2.confidence_head.proj.weight"] == ((1, 4096 + 256), torch.float32)
    of_the_last = {name.split(".", 2)[2] for name in tensors if name.startswith("mtp.2.")}
    of_the_middle = {name.split(".", 2)[2] for name in tensors if name.startswith("mtp.1.")}
    assert {name.split(".")[0] for name in of_the_last - of_the_middle} == {
        "norm", "hc_head_fn", "hc_head_base", "hc_head_scale", "markov_head", "confidence_head"
    }  # fmt: skip
    assert of_the_middle <= of_the_last
    unsure = DSparkConfig.from_json(source | {"enable_confidence_head": False}, real)
    assert tensors.keys() - stored(real, unsure).keys() == {"mtp.2.confidence_head.proj.weight"}


def test_sglang_finds_it(target: Oracle, drafter: Drafter) -> None:
    found = _target_checkpoint_dspark_subfolder(str(target.directory), None, None)
    assert found == str(target.directory / "dspark")
    config = get_config(found, trust_remote_code=False)
    assert dspark_config.checkpoint_bundles_dspark_draft(config)
    read = dspark_config.parse_dspark_draft_config(draft_hf_config=config)
    assert (read.gamma, read.mask_token_id) == (drafter.dspark.block_size, drafter.dspark.noise_token_id)
    assert (read.target_layer_ids, read.markov_rank) == ([1, 3], drafter.dspark.markov_rank)
    assert not dspark_config.checkpoint_bundles_dspark_draft(get_config(str(target.directory), trust_remote_code=False))


def test_sglang_finds_the_drafter_that_is_profiled(tmp_path: Path) -> None:
    """That of `bench/decode_step.py`, without weights: three stages with the target's experts, and rows as timed."""
    target = decode_step.write_model(tmp_path, 128)
    decode_step.write_drafter(tmp_path)
    found = _target_checkpoint_dspark_subfolder(str(tmp_path), None, None)
    assert found == str(tmp_path / "dspark")
    model = ModelConfig(found, is_draft_model=True, speculative_algorithm="DSPARK")
    assert model.hf_config.architectures == ["DeepseekV4ForCausalLMDSpark"] and model.vocab_size == target.vocab_size
    read = dspark_config.parse_dspark_draft_config(draft_hf_config=model.hf_config)
    ours = load_dspark(found, target)
    assert (read.gamma, read.mask_token_id, read.markov_rank) == (5, 128799, 256) and ours.n_routed_experts == 128
    assert (read.gamma, read.target_layer_ids) == (ours.block_size, [40, 41, 42])
    for mode in RaggedVerifyMode.STATIC, RaggedVerifyMode.COMPACT:
        served = decode_step.SERVERS[f"dspark-{mode.value}"]
        assert served.env["SGLANG_RAGGED_VERIFY_MODE"] == mode.value and served.rows == (read.gamma, read.gamma + 1)


def test_a_target_of_two_layers_hands_over_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed drafter's layers, as SGLang finds them; DFlash's choice, which it makes first, needs four."""
    target = packed.unpack(EVALS / "small-deepseek-v4.xz", tmp_path / "model")
    drafter = packed.unpack(EVALS / "small-deepseek-v4-dspark.xz", target / "dspark")
    spec = SimpleNamespace(speculative_draft_model_path=str(drafter), speculative_draft_model_revision=None)
    monkeypatch.setattr(spec_aux_hidden_state, "get_spec", lambda: spec)
    features = SimpleNamespace(aux_hidden_state_capture=None)
    monkeypatch.setattr(spec_aux_hidden_state, "get_exec", lambda: SimpleNamespace(features=features))
    found = spec_aux_hidden_state.resolve_spec_aux_hidden_state_config(
        server_args=ServerArgs(model_path=str(target), device="cpu"), model_config=ModelConfig(str(target)),
        spec_algorithm=SpeculativeAlgorithm.DSPARK, is_draft_worker=False,
    )  # fmt: skip
    assert (found.dflash_target_layer_ids, found.dspark_num_stages, found.is_dspark) == ([0, 1], 2, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dspark_target_layer_ids": [1, 5]}, "the target has layers 0 to 4"),
        ({"dspark_target_layer_ids": [3, 1]}, "each asked for once and in order"),
        ({"dspark_target_layer_ids": []}, "needed a list of layers"),
        ({"dspark_target_layer_ids": None}, "lacks dspark_target_layer_ids"),
        ({"dspark_block_size": None, "dspark_markov_rank": None}, "lacks dspark_block_size, dspark_markov_rank"),
        ({"dspark_block_size": 0}, "dspark_block_size=0"),
        ({"dspark_markov_rank": "64"}, "dspark_markov_rank='64'"),
        ({"dspark_noise_token_id": 1024}, "dspark_noise_token_id=1024, needed an integer of 0 to 1023"),
        ({"sample_from_anchor": False}, "sample_from_anchor=false"),
        ({"hidden_size": 512}, "hidden_size=512, its target 256"),
    ],
)
def test_another_models_drafter(target: Oracle, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    source = json.loads((target.directory / "dspark/config.json").read_text()) | changes
    for name in ("model.safetensors.index.json", *(p.name for p in (target.directory / "dspark").glob("*.safeten*"))):
        (tmp_path / name).write_bytes((target.directory / "dspark" / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(source))
    with pytest.raises(ValueError, match=said):
        Drafter(target, tmp_path)


def test_an_experts_number_of_its_own(tmp_path: Path, seed: int) -> None:
    """Keys that stages may have beside the target's; the drafter's files differ from the MTP layer's of one seed."""
    dspark = DSparkConfig(target_layer_ids=(0,), n_routed_experts=8, num_experts_per_tok=2, confidence=False)
    folder = write_checkpoint(tmp_path / "model", seed=seed, dspark=dspark)
    assert DSparkConfig.from_json(json.loads((folder / "dspark/config.json").read_text()), ReferenceConfig()) == dspark
    drafter = Drafter(Oracle(folder))
    assert drafter.config.n_routed_experts == 8
    context = drafter.context(Oracle(folder).forward(range(20, 30), (0,)).captured)
    drafted = drafter.drafts(context, range(20, 30), [9])
    assert drafted.logits.isfinite().all() and drafted.confidence.isnan().all()
    of_target = Oracle(folder)._w("mtp.0.attn.wkv.weight")
    assert not torch.equal(drafter._w("mtp.0.attn.wkv.weight"), of_target)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ratios", "0", "--hidden-size", "128", "--vocab-size", "300", "--n-routed-experts", "6"]
    assert main([str(tmp_path / "model"), *arguments, "--dspark", "0"]) == 0
    written = json.loads((tmp_path / "model/dspark/config.json").read_text())
    assert written["dspark_target_layer_ids"] == [0] and written["enable_confidence_head"] is True
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "other"), *arguments, "--dspark", "1"])
    assert stopped.value.code == 2 and "the target has layers 0 to 0" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_packed_is_bit_for_bit(tmp_path: Path, seed: int) -> None:
    dspark = drafter_of(TINY, (0,))
    folder = write_checkpoint(tmp_path / "model", TINY, seed, dspark=dspark) / "dspark"
    size = packed.pack(folder, tmp_path / "packed.xz")
    again = packed.unpack(tmp_path / "packed.xz", tmp_path / "again")
    assert size == (tmp_path / "packed.xz").stat().st_size < packed.stored_bytes(TINY, dspark)
    read = json.loads((again / "config.json").read_text())
    assert read == config_json(TINY, dspark)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.iterdir()}
        for place in (folder, again)
    ]
    assert digests[0] == digests[1]


class OnCard(torch.Tensor):
    """Says that it lies on a card, and fails where the host would have to wait for its values."""

    is_cuda = True

    def tolist(self) -> Any:
        raise AssertionError("the host waits for lengths")

    cpu = item = __int__ = __bool__ = tolist


def test_a_blocks_metadata_waits_for_no_length() -> None:
    """`speed/60`: on a card the lengths stay there, as a capture needs it; on a CPU its twin reads them."""
    handed: dict[str, Any] = {}
    backend = SimpleNamespace(
        page_size=256, _draft_block_extend_lens=lambda lens: torch.tensor(lens),
        init_forward_metadata_prefill=lambda **arguments: handed.update(arguments),
    )  # fmt: skip
    lengths = torch.tensor([700, 1, 33])
    for seq_lens in lengths.as_subclass(OnCard), lengths:
        deepseek_v4_backend.DeepseekV4AttnBackend.init_forward_metadata_dspark_draft_block(
            backend, max_seq_len=1024, req_pool_indices=torch.arange(3), seq_lens=seq_lens, seq_lens_cpu=None,
            out_cache_loc=torch.arange(15), block_size=5,
        )  # fmt: skip
        assert torch.Tensor.tolist(handed["seq_lens"]) == [705, 6, 38] and handed["num_tokens"] == 15
        assert handed["need_compress"] is False
    assert handed["seq_lens_cpu"] == [705, 6, 38]
    # What takes lists on a card has the tensors alone.
    taken = inspect.signature(attn_metadata_kernels.expand_prefill_causally_triton).parameters
    assert {"seq_lens", "extend_seq_lens"} < taken.keys() and not [name for name in taken if name.endswith("_cpu")]
