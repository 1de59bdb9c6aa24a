"""The checkpoint writer: the published layout, reproducible bytes, its command line, and the tokenizer."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from sglang.srt.parser import deepseek_recipe_renderer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import sglang_sm120
from sglang_sm120.checkpoint.config import PRO, ReferenceConfig, model_config
from sglang_sm120.checkpoint.layout import parameters, stored
from sglang_sm120.ops.fp8_linear.spec import shapes
from sglang_sm120_reference import tokenizer, write
from sglang_sm120_reference.config_file import config_json, load_config
from sglang_sm120_reference.write import main, write_checkpoint

REAL_CONFIG = Path(sglang_sm120.__file__).with_name("model-config.json")

# One layer without compressed entries, no MTP: a few hundred kilobytes.
TINY = ReferenceConfig(
    hidden_size=128,
    vocab_size=300,
    num_hidden_layers=1,
    num_nextn_predict_layers=0,
    compress_ratios=(0,),
    num_hash_layers=0,
    num_attention_heads=2,
    index_n_heads=2,
    n_routed_experts=6,
    moe_intermediate_size=128,
)
TINY_OPTIONS = ("--ratios", "0", "--hidden-size", "128", "--vocab-size", "300", "--n-routed-experts", "6")


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _shapes(folder: Path) -> Shapes:
    """Every tensor that lies in the files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                assert name not in found
                found[name] = (tuple(tensor.shape), tensor.dtype)
    return found


def test_equal_seeds_give_equal_bytes(tmp_path: Path, seed: int) -> None:
    first = write_checkpoint(tmp_path / "first", TINY, seed)
    again = write_checkpoint(tmp_path / "again", TINY, seed)
    assert _digests(first) == _digests(again)


def test_another_seed_gives_other_weights(tmp_path: Path, seed: int) -> None:
    one, other = (_digests(write_checkpoint(tmp_path / str(s), TINY, s)) for s in (seed, seed + 1))
    assert {name for name in one if one[name] != other[name]} == {"model-00001-of-00001.safetensors"}


def test_values_do_not_depend_on_other_tensors(tmp_path: Path, seed: int) -> None:
    wide = ReferenceConfig(**{**vars(TINY), "num_hidden_layers": 2, "compress_ratios": (0, 0)})
    folders = [write_checkpoint(tmp_path / str(i), config, seed) for i, config in enumerate((TINY, wide))]
    values = []
    for folder in folders:
        with safe_open(folder / "model-00001-of-00001.safetensors", "pt") as file:
            values.append(file.get_tensor("layers.0.attn.wkv.weight").view(torch.uint8))
    assert torch.equal(*values)


@pytest.mark.parametrize("shard_bytes", [1 << 18, 1 << 30])
def test_index_names_every_tensor(tmp_path: Path, seed: int, shard_bytes: int) -> None:
    folder = write_checkpoint(tmp_path / "out", TINY, seed, shard_bytes)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert (len(files) > 1) == (shard_bytes < 1 << 30)
    held: dict[str, str] = {}
    size = 0
    for name in files:
        with safe_open(folder / name, "pt") as file:
            held |= dict.fromkeys(file.keys(), name)
            size += sum(file.get_tensor(tensor).nbytes for tensor in file.keys())
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == size


def _published_layer(p: str, ratio: int, hashed: bool) -> Shapes:
    """Tensors of one layer of the default checkpoint, written out from the published layout."""
    bf16, fp32, fp8, e8m0 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu
    tensors: Shapes = {}

    def quantised(name: str, n: int, k: int) -> None:
        tensors[name + ".weight"], tensors[name + ".scale"] = ((n, k), fp8), ((n // 128, k // 128), e8m0)

    for block in ("attn", "ffn"):
        tensors[f"{p}hc_{block}_fn"] = ((24, 1024), fp32)
        tensors[f"{p}hc_{block}_base"] = ((24,), fp32)
        tensors[f"{p}hc_{block}_scale"] = ((3,), fp32)
        tensors[f"{p}{block}_norm.weight"] = ((256,), bf16)
    quantised(p + "attn.wq_a", 128, 256)
    quantised(p + "attn.wq_b", 8192, 128)
    quantised(p + "attn.wkv", 512, 256)
    quantised(p + "attn.wo_a", 256, 4096)
    quantised(p + "attn.wo_b", 256, 256)
    tensors[p + "attn.q_norm.weight"] = ((128,), bf16)
    tensors[p + "attn.kv_norm.weight"] = ((512,), bf16)
    tensors[p + "attn.attn_sink"] = ((16,), fp32)
    compressors = [("attn.compressor.", 512)] if ratio else []
    if ratio == 4:
        compressors.append(("attn.indexer.compressor.", 128))
        quantised(p + "attn.indexer.wq_b", 2048, 128)
        tensors[p + "attn.indexer.weights_proj.weight"] = ((16, 256), bf16)
    for name, dim in compressors:
        width = 2 * dim if ratio == 4 else dim
        tensors[p + name + "wkv.weight"] = ((width, 256), bf16)
        tensors[p + name + "wgate.weight"] = ((width, 256), bf16)
        tensors[p + name + "norm.weight"] = ((dim,), bf16)
        tensors[p + name + "ape"] = ((ratio, width), fp32)
    tensors[p + "ffn.gate.weight"] = ((16, 256), bf16)
    if hashed:
        tensors[p + "ffn.gate.tid2eid"] = ((1024, 6), torch.int32)
    else:
        tensors[p + "ffn.gate.bias"] = ((16,), fp32)
    for w in ("w1", "w2", "w3"):
        quantised(f"{p}ffn.shared_experts.{w}", 256, 256)
        for e in range(16):
            tensors[f"{p}ffn.experts.{e}.{w}.weight"] = ((256, 128), torch.int8)
            tensors[f"{p}ffn.experts.{e}.{w}.scale"] = ((256, 8), e8m0)
    return tensors


def test_default_is_the_published_layout(checkpoint: Path) -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    expected: Shapes = {"embed.weight": ((1024, 256), bf16), "head.weight": ((1024, 256), bf16)}
    # All kinds of layer: window only, c4, c128; the first two by hash table, the others scored.
    for layer, ratio in enumerate((0, 4, 128, 4, 128)):
        expected |= _published_layer(f"layers.{layer}.", ratio, layer < 2)
    expected |= _published_layer("mtp.0.", 0, False)
    for p in ("", "mtp.0."):
        expected[p + "norm.weight"] = ((256,), bf16)
        expected[p + "hc_head_fn"] = ((4, 1024), fp32)
        expected[p + "hc_head_base"], expected[p + "hc_head_scale"] = ((4,), fp32), ((1,), fp32)
    for name in ("e_proj", "h_proj"):
        expected[f"mtp.0.{name}.weight"] = ((256, 256), torch.float8_e4m3fn)
        expected[f"mtp.0.{name}.scale"] = ((2, 2), torch.float8_e8m0fnu)
        expected[f"mtp.0.{name[0]}norm.weight"] = ((256,), bf16)
    assert _shapes(checkpoint) == expected
    assert stored(load_config(checkpoint)) == expected


def test_sizes_of_the_real_model() -> None:
    tensors = stored(ReferenceConfig.from_json(json.loads(REAL_CONFIG.read_text())))
    assert tensors["layers.42.attn.indexer.compressor.wkv.weight"] == ((256, 4096), torch.bfloat16)
    assert tensors["layers.41.attn.compressor.ape"] == ((128, 512), torch.float32)
    assert tensors["layers.0.attn.wo_a.weight"] == ((8192, 4096), torch.float8_e4m3fn)
    assert tensors["layers.2.ffn.gate.tid2eid"] == ((129280, 6), torch.int32)
    assert tensors["layers.3.ffn.gate.bias"] == ((256,), torch.float32)
    # 13.37 MB per routed expert: three matrices of 2,048 x 4,096 values at half a byte, a scale per 32.
    expert = [name for name in tensors if name.startswith("layers.9.ffn.experts.77.")]
    assert sum(torch.Size(tensors[name][0]).numel() for name in expert) == 3 * 2048 * 4096 * 17 // 32


def test_sizes_of_pro() -> None:
    """The values come from others' files: SGLang's list of the model's own linears has every shape that they make, and
    they add up to the 1.6 T values, 49 B of them met by a token, that its maker says."""
    from sglang.srt.layers.quantization.fp8_utils import DSV4_DENSE_MXSCALE_DEFAULT_SHAPES as theirs

    published = model_config(PRO)
    config = ReferenceConfig.from_json(published)
    for tp in (1, 8):
        ours = {shape for name, shape in shapes(published, tp).items() if not name.startswith("mtp.")}
        assert ours <= theirs
    counts = {p.name: math.prod(p.shape) for p in parameters(config) if not p.name.startswith("mtp.")}
    routed = sum(count for name, count in counts.items() if ".experts." in name)
    met = sum(counts.values()) - routed + routed * config.num_experts_per_tok // config.n_routed_experts
    # Both are rounded; whether the embedding is met is a matter of taste.
    assert 1.55e12 < sum(counts.values()) < 1.65e12 and 48.5e9 < met - 129280 * 7168 < 49.5e9
    assert config.compress_ratios[:4] == (128, 128, 4, 128) and config.compress_ratios[-3:] == (128, 4, 0)
    assert set(published) == set(json.loads(REAL_CONFIG.read_text())) - {"transformers_version"}
    with pytest.raises(ValueError, match="nobody/nothing has no config.json here"):
        model_config("nobody/nothing")


def test_default_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    published = json.loads(REAL_CONFIG.read_text())
    assert set(config) == set(published)
    sizes = {
        "hidden_size": 256,
        "vocab_size": 1024,
        "num_hidden_layers": 5,
        "num_hash_layers": 2,
        "num_attention_heads": 16,
        "q_lora_rank": 128,
        "o_lora_rank": 128,
        "o_groups": 2,
        "index_n_heads": 16,
        "n_routed_experts": 16,
        "moe_intermediate_size": 256,
        "max_position_embeddings": 65536,
        "compress_ratios": [0, 4, 128, 4, 128, 0],
    }
    assert config == published | sizes


def test_config_round_trip(checkpoint: Path) -> None:
    assert load_config(checkpoint) == ReferenceConfig()
    assert config_json(ReferenceConfig.from_json(json.loads(REAL_CONFIG.read_text()))) == json.loads(
        REAL_CONFIG.read_text()
    )


def test_generation_config(checkpoint: Path) -> None:
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)


def test_command_line_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(out), "--seed", "7", "--num-attention-heads", "4", *TINY_OPTIONS]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    config = load_config(out)
    assert (config.hidden_size, config.vocab_size, config.n_routed_experts) == (128, 300, 6)
    assert (config.num_hidden_layers, config.compress_ratios, config.num_attention_heads) == (1, (0, 0), 4)
    assert _shapes(out) == stored(config)


def test_command_line_takes_another_config(tmp_path: Path) -> None:
    like = tmp_path / "config.json"
    like.write_text(json.dumps(config_json(TINY)))
    assert main([str(tmp_path / "out"), "--like", str(like), "--vocab-size", "400"]) == 0
    assert load_config(tmp_path / "out") == ReferenceConfig(**{**vars(TINY), "vocab_size": 400})


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("option", [None, "--mtp", "--no-mtp"])
def test_command_line_mtp(tmp_path: Path, has: bool, option: str | None) -> None:
    """An MTP layer by option, otherwise as the config that is taken has it."""
    like, out = tmp_path / "config.json", tmp_path / "out"
    ratios = TINY.compress_ratios + (0,) * has
    like.write_text(json.dumps(config_json(TINY) | {"num_nextn_predict_layers": int(has), "compress_ratios": ratios}))
    assert main([str(out), "--like", str(like), *([option] if option else [])]) == 0
    wanted = option == "--mtp" or (option is None and has)
    config = load_config(out)
    assert (config.num_hidden_layers, config.num_nextn_predict_layers) == (1, int(wanted))
    assert config.compress_ratios == TINY.compress_ratios + (0,) * wanted
    assert _shapes(out) == stored(config)
    assert any(name.startswith("mtp.0.") for name in _shapes(out)) is wanted


def test_few_layers_of_the_real_model_with_mtp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command that the GPU tests write their checkpoint with, up to the writing."""
    written: list[ReferenceConfig] = []
    monkeypatch.setattr(write, "write_checkpoint", lambda out, config, seed, **_: written.append(config))
    options = ["--ratios", "0,0,4,128,4,128", "--n-routed-experts", "16", "--vocab-size", "4096", "--mtp"]
    assert main([str(tmp_path), "--like", str(REAL_CONFIG), *options]) == 0
    (config,) = written
    assert (config.num_hidden_layers, config.num_nextn_predict_layers) == (6, 1)
    tensors = stored(config)
    assert tensors["mtp.0.e_proj.weight"] == tensors["mtp.0.h_proj.weight"] == ((4096, 4096), torch.float8_e4m3fn)
    assert tensors["mtp.0.e_proj.scale"] == ((32, 32), torch.float8_e8m0fnu)
    assert tensors["mtp.0.ffn.experts.15.w1.weight"] == ((2048, 2048), torch.int8)
    assert tensors["mtp.0.hc_head_fn"] == ((4, 16384), torch.float32)
    # Its layer is window only and routed by score: no compressor, no table.
    assert not [name for name in tensors if name.startswith("mtp.") and ("compressor" in name or "tid2eid" in name)]
    # SGLang shares the embedding and the head with the target, and loads them from there.
    assert "mtp.0.emb.tok_emb.weight" not in tensors and "mtp.0.head.weight" not in tensors


MISUSE = {
    "no directory": ([], "required: out"),
    "a ratio that does not exist": (["OUT", "--ratios", "0,5"], "only 0, 4 and 128"),
    "ratios that are no numbers": (["OUT", "--ratios", "a,b"], "invalid"),
    "no file to be like": (["OUT", "--like", "absent.json"], "absent.json"),
    "fewer experts than chosen": (["OUT", "--n-routed-experts", "2"], "6 of 2 experts"),
    "a width of no FP8 blocks": (["OUT", "--hidden-size", "200"], "hidden_size is 200"),
    "a vocabulary without all bytes": (["OUT", "--vocab-size", "100"], "use at least 271"),
    "more experts than channels": (["OUT", "--n-routed-experts", "255"], "255 experts need 257 channels"),
    "no heads": (["OUT", "--num-attention-heads", "0"], "num_attention_heads is 0"),
}


@pytest.mark.parametrize(("arguments", "named"), MISUSE.values(), ids=MISUSE.keys())
def test_misuse_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        main([str(out) if a == "OUT" else a for a in arguments])
    assert exit_.value.code == 2
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_another_models_config_is_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like = tmp_path / "config.json"
    like.write_text(json.dumps(config_json(TINY) | {"head_dim": 128}))
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "out"), "--like", str(like)])
    assert exit_.value.code == 2
    assert "head_dim=128" in capsys.readouterr().err


def test_a_directory_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert main([str(tmp_path), *TINY_OPTIONS]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", write.__name__, str(tmp_path / "out"), *TINY_OPTIONS]
    # As a user runs it, who gives the folder that pytest has from pyproject.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(write.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 1 and "Traceback" not in again.stderr


@pytest.fixture(scope="module")
def tokens(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@given(st.text())
def test_text_survives_a_round_trip(tokens: Tokenizer, text: str) -> None:
    assert tokens.decode(tokens.encode(text).ids, skip_special_tokens=False) == text


def test_common_words_are_one_token(tokens: Tokenizer) -> None:
    assert len(tokens.encode(" the people").ids) == 2
    assert tokens.encode("").ids == []


def test_every_id_is_a_token(tokens: Tokenizer) -> None:
    assert tokens.get_vocab_size() == ReferenceConfig().vocab_size
    assert all(tokens.id_to_token(i) is not None for i in range(ReferenceConfig().vocab_size))


def _encoding_markers() -> list[str]:
    """Every marker that SGLang's DeepSeek-V4 encoding writes or parses."""
    module = deepseek_recipe_renderer
    named = [module.ASSISTANT_TOKEN, module.THINK_START_TOKEN, module.THINK_END_TOKEN, *module.TASK_TOKENS.values()]
    # What deepseek-recipe writes without a name in SGLang.
    unnamed = ["begin▁of▁sentence", "end▁of▁sentence", "User", "latest_reminder"]
    return [*named, "｜DSML｜", *(f"<｜{name}｜>" for name in unnamed)]


@pytest.mark.parametrize("marker", _encoding_markers())
def test_marker_is_one_token(tokens: Tokenizer, marker: str) -> None:
    ids = tokens.encode(marker).ids
    assert len(ids) == 1
    assert tokens.encode(f"a{marker}b").ids == tokens.encode("a").ids + ids + tokens.encode("b").ids


def test_markup_stays_in_visible_text(tokens: Tokenizer) -> None:
    text = tokens.encode("<｜User｜>a<think>b</think>c<｜end▁of▁sentence｜>").ids
    assert tokens.decode(text, skip_special_tokens=True) == "a<think>b</think>c"


def test_transformers_loads_it(checkpoint: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(checkpoint)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert loaded.model_max_length == ReferenceConfig().max_position_embeddings
    # SGLang's encoding writes the BOS itself.
    assert loaded.encode("hello") == tokenizer.build(1024).encode("hello").ids
    recipe = deepseek_recipe_renderer.DeepSeekRecipe.from_hf_tokenizer("dsv4", loaded)
    ids = recipe.encode({"messages": [{"role": "user", "content": "Say é."}], "thinking": False})
    assert ids[0] == 0 and ids.count(0) == 1
    assert loaded.encode(loaded.decode(ids)) == ids
