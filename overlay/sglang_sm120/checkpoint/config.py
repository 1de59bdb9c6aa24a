"""The part of a DeepSeek-V4 `config.json` that says what is computed, the published one, and a small default."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

HEAD_DIM = 512
ROPE_DIM = 64
INDEX_HEAD_DIM = 128
WINDOW = 128
FP8_BLOCK = 128
NVFP4_GROUP = 16
DSPARK = "dspark_"
"""What the keys of a DSpark drafter begin with."""
DSPARK_FOLDER = "dspark"
"""Where SGLang looks for a drafter beside a target that has none in its own files."""

FIXED = {
    "head_dim": HEAD_DIM,
    "qk_rope_head_dim": ROPE_DIM,
    "index_head_dim": INDEX_HEAD_DIM,
    "sliding_window": WINDOW,
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "hc_mult": 4,
}
"""What no DeepSeek-V4 has otherwise."""
_YARN = {
    "yarn_factor": "factor", "yarn_original_positions": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow",
}  # fmt: skip
"""Fields, and their keys of `rope_scaling`."""
_SIZES = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "index_n_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ReferenceConfig:
    """Dimensions and constants of one DeepSeek-V4 model, under the names of its `config.json`.

    The defaults describe the small checkpoint: every layer kind (window only, c4 with indexer, c128, hash
    routed, scored, one MTP layer) at widths that load on a laptop and still divide over two ranks.
    `compress_ratios` holds one entry per layer and one per MTP layer. `nvfp4_experts` says how the layers' routed
    experts are stored, which `config.json` has in its `quantization_config`; an MTP layer's are MXFP4 always.
    """

    hidden_size: int = 256
    vocab_size: int = 1024
    num_hidden_layers: int = 5
    num_nextn_predict_layers: int = 1
    compress_ratios: tuple[int, ...] = (0, 4, 128, 4, 128, 0)
    num_hash_layers: int = 2
    num_attention_heads: int = 16
    q_lora_rank: int = 128
    o_lora_rank: int = 128
    o_groups: int = 2
    index_n_heads: int = 16
    index_topk: int = 512
    n_routed_experts: int = 16
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 256
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000
    compress_rope_theta: float = 160000
    yarn_factor: float = 16
    yarn_original_positions: int = 65536
    yarn_beta_fast: float = 32
    yarn_beta_slow: float = 1
    max_position_embeddings: int = 65536
    nvfp4_experts: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use 1 or more")
        wanted = self.num_hidden_layers + self.num_nextn_predict_layers
        if len(self.compress_ratios) != wanted:
            raise ValueError(
                f"compress_ratios has {len(self.compress_ratios)} entries, {wanted} are needed "
                "(layers plus MTP layers): give one ratio for each"
            )
        if not set(self.compress_ratios) <= {0, 4, 128}:
            raise ValueError(f"compress_ratios is {self.compress_ratios}: use only 0, 4 and 128")
        if any(self.compress_ratios[self.num_hidden_layers :]):
            raise ValueError("the MTP layers are window only: end compress_ratios with 0 for each of them")
        if self.num_nextn_predict_layers not in (0, 1):
            raise ValueError(f"num_nextn_predict_layers is {self.num_nextn_predict_layers}: use 0 or 1")
        if self.index_topk not in (512, 1024):
            raise ValueError(f"index_topk is {self.index_topk}: use 512 or 1024")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok} of {self.n_routed_experts} experts: "
                "use at least as many experts as are chosen"
            )
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, o_groups {self.o_groups}: "
                "use a number of heads that the groups divide"
            )
        for name in ("hidden_size", "q_lora_rank", "o_lora_rank", "moe_intermediate_size"):
            if getattr(self, name) % FP8_BLOCK:
                raise ValueError(f"{name} is {getattr(self, name)}: use a multiple of {FP8_BLOCK}, the FP8 block")

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.o_groups

    @classmethod
    def from_json(cls, source: dict[str, Any]) -> ReferenceConfig:
        """Read a parsed `config.json`. Raises ValueError where it is not a DeepSeek-V4 we can compute."""
        needed = (*FIXED, *_SIZES, "index_topk", "compress_ratios", "rope_scaling")
        if missing := [key for key in needed if key not in source]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        values = {field.name: source[field.name] for field in dataclasses.fields(cls) if field.name in source}
        ratios, rope = source["compress_ratios"], source["rope_scaling"]
        if not isinstance(ratios, list) or not isinstance(rope, dict) or not set(_YARN.values()) <= rope.keys():
            raise ValueError(f"config.json has compress_ratios={ratios!r} and rope_scaling={rope!r}, of another kind")
        values |= {"compress_ratios": tuple(ratios), **{name: rope[key] for name, key in _YARN.items()}}
        values["nvfp4_experts"] = nvfp4_experts(source)
        for field in dataclasses.fields(cls):
            if field.type == "bool":
                continue
            value = values.get(field.name, field.default)
            kinds = (int, float) if field.type == "float" else (int,)
            if any(type(one) not in kinds for one in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"config.json has {field.name}={value!r}, which is of another kind")
        if values["nvfp4_experts"] and source["quantization_config"]["group_size"] != NVFP4_GROUP:
            found = source["quantization_config"]["group_size"]
            raise ValueError(f"config.json has group_size={found!r} for NVFP4 experts, which have {NVFP4_GROUP}")
        for key, fixed in FIXED.items():
            if source[key] != fixed:
                raise ValueError(f"config.json has {key}={source[key]}, this model needs {fixed}")
        return cls(**values)


_ARCHITECTURES = (["DeepseekV4ForCausalLM"], ["DeepseekV4ForCausalLMDSpark"])
"""Of a drafter: SGLang makes the second of the first where the `dspark_` keys are."""
_ANY_DRAFTERS = frozenset((
    "n_routed_experts", "num_experts_per_tok", "compress_ratios", "num_hidden_layers", "num_nextn_predict_layers",
    "num_hash_layers", "nvfp4_experts",
))  # fmt: skip
"""Fields that may differ between a drafter and its target: experts it has of its own, layers it has none of."""


@dataclass(frozen=True)
class DSparkConfig:
    """A DSpark drafter's constants, under the names of `config.json` without their `dspark_`.

    It has a stage for each of `target_layer_ids`, the target's layers after which it sees the streams, and proposes
    `block_size` tokens a pass, whose unknown ones are `noise_token_id`. `confidence`: whether it has a confidence head.
    """

    block_size: int = 5
    noise_token_id: int = 2
    target_layer_ids: tuple[int, ...] = (0, 1)
    markov_rank: int = 64
    n_routed_experts: int = 16
    num_experts_per_tok: int = 6
    confidence: bool = True

    @property
    def stages(self) -> int:
        return len(self.target_layer_ids)

    def stage(self, target: ReferenceConfig) -> ReferenceConfig:
        """A stage's dimensions: a scored layer of the target's with the drafter's experts."""
        return dataclasses.replace(
            target, n_routed_experts=self.n_routed_experts, num_experts_per_tok=self.num_experts_per_tok,
            num_hash_layers=0,
        )  # fmt: skip

    @classmethod
    def from_json(cls, source: Mapping[str, Any], target: ReferenceConfig) -> DSparkConfig:
        """Read a drafter's parsed `config.json`. Raises ValueError where it is none of a drafter for `target`."""
        needed = ("block_size", "noise_token_id", "target_layer_ids", "markov_rank")
        if missing := [f"{DSPARK}{key}" for key in needed if source.get(DSPARK + key) is None]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        if (found := source.get("architectures")) not in _ARCHITECTURES:
            raise ValueError(f"config.json has architectures={found}, needed one of {_ARCHITECTURES}")
        same = ReferenceConfig.from_json(dict(source))
        for name, has in vars(target).items():
            if name not in _ANY_DRAFTERS and (found := getattr(same, name)) != has:
                raise ValueError(f"config.json has {name}={found}, its target {has}")
        layers = source[f"{DSPARK}target_layer_ids"]
        if not isinstance(layers, list) or not layers or any(type(layer) is not int for layer in layers):
            raise ValueError(f"config.json has {DSPARK}target_layer_ids={layers!r}, needed a list of layers")
        if sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= target.num_hidden_layers:
            raise ValueError(
                f"config.json has {DSPARK}target_layer_ids={layers}, and the target has layers 0 to "
                f"{target.num_hidden_layers - 1}, each asked for once and in order"
            )
        values: dict[str, Any] = {
            "block_size": source[f"{DSPARK}block_size"],
            "markov_rank": source[f"{DSPARK}markov_rank"],
            "n_routed_experts": source.get(f"{DSPARK}n_routed_experts") or target.n_routed_experts,
            "num_experts_per_tok": source.get(f"{DSPARK}num_experts_per_tok") or target.num_experts_per_tok,
            "noise_token_id": source[f"{DSPARK}noise_token_id"],
        }
        for name, value in values.items():
            least, most = (0, target.vocab_size - 1) if name == "noise_token_id" else (1, 1 << 31)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"config.json has {DSPARK}{name}={value!r}, needed an integer of {least} to {most}")
        if source.get("sample_from_anchor", True) is not True:
            raise ValueError("config.json has sample_from_anchor=false, a block that starts behind the anchor")
        confidence = source.get("enable_confidence_head", True) is True
        return cls(**values, target_layer_ids=tuple(layers), confidence=confidence)


def nvfp4_experts(config: Mapping[str, Any]) -> bool:
    """Whether the routed experts of a model, those of its MTP layer apart, are NVFP4, by its parsed `config.json`.

    As SGLang 0.5.23 tells it (`configs/model_config.py`), which knows no other hybrid of this model.
    """
    quantised = config.get("quantization_config")
    if not isinstance(quantised, Mapping):
        return False
    algorithms = [str(quantised.get(key)).upper() for key in ("quant_algo", "moe_quant_algo")]
    return algorithms == ["MIXED_PRECISION", "NVFP4"] and quantised.get("group_size") is not None


FLASH = "deepseek-ai/DeepSeek-V4-Flash"
PRO = "deepseek-ai/DeepSeek-V4-Pro"
PUBLISHED = {FLASH: (1, 2, 4), PRO: (8,)}
"""Models whose `config.json` is known here, and the tensor parallelism at which tools look at them: of fewer than eight
ranks each has more of Pro's experts than a card holds."""
RANKS = tuple((model, tp) for model, sizes in PUBLISHED.items() for tp in sizes)


def model_config(model: str = FLASH) -> dict[str, Any]:
    """The `config.json` of one of PUBLISHED.

    Flash's is the published file. Of Pro's, `model-config-pro.json` has the values that differ from Flash's, null where
    no source says one, and under `sources` what says each, the equal ones too.
    """
    config = _read("model-config.json")
    if model == PRO:
        config |= _read("model-config-pro.json")
        del config["sources"]
    elif model != FLASH:
        raise ValueError(f"{model} has no config.json here: name one of {', '.join(PUBLISHED)}.")
    return {key: value for key, value in config.items() if value is not None}


def _read(name: str) -> dict[str, Any]:
    return json.loads(resources.files("sglang_sm120").joinpath(name).read_text(encoding="utf-8"))
