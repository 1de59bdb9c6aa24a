"""A model's `config.json`: read from a checkpoint, and written with exactly the keys of the published one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sglang_sm120.checkpoint.config import DSPARK, FIXED, FP8_BLOCK, NVFP4_GROUP, DSparkConfig, ReferenceConfig

FLASH_DRAFTER: dict[str, Any] = {
    f"{DSPARK}block_size": 5, f"{DSPARK}noise_token_id": 128799, f"{DSPARK}target_layer_ids": [40, 41, 42],
    f"{DSPARK}markov_rank": 256,
}  # fmt: skip
"""What the `config.json` of the drafter published for Flash has beside Flash's: kvcache-ai/ktransformers#2118."""

_NVFP4 = {"quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": NVFP4_GROUP, "ignore": []}


def load_config(checkpoint: str | Path) -> ReferenceConfig:
    """Read `config.json` of a checkpoint directory."""
    return ReferenceConfig.from_json(_read(checkpoint))


def load_dspark(checkpoint: str | Path, target: ReferenceConfig) -> DSparkConfig:
    """Read `config.json` of a DSpark drafter's directory. Raises ValueError when it is none for `target`."""
    return DSparkConfig.from_json(_read(checkpoint), target)


def _read(checkpoint: str | Path) -> Any:
    return json.loads((Path(checkpoint) / "config.json").read_text())


def config_json(config: ReferenceConfig, dspark: DSparkConfig | None = None) -> dict[str, Any]:
    """The `config.json` of this model, with exactly the keys of the published one, or of one with NVFP4 experts.

    With `dspark` that of its drafter, which has the target's keys beside its own.
    """
    if dspark is not None:
        same = {name for name in vars(dspark) if getattr(config, name, None) == getattr(dspark, name)}
        keys = {f"{DSPARK}{name}": value for name, value in vars(dspark).items() if name not in {*same, "confidence"}}
        keys[f"{DSPARK}target_layer_ids"] = list(dspark.target_layer_ids)
        # SGLang 0.5.23 first takes it for a DFlash drafter, which without this key needs a target of 4 layers or more.
        keys["target_layer_ids"] = list(dspark.target_layer_ids)
        return config_json(config) | keys | {"enable_confidence_head": dspark.confidence}
    own = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.name.startswith("yarn_") and field.name != "nvfp4_experts"
    }
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "deepseek_v4",
        "norm_topk_prob": True,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            **(_NVFP4 if config.nvfp4_experts else {}),
        },
        "rope_scaling": {
            "beta_fast": config.yarn_beta_fast,
            "beta_slow": config.yarn_beta_slow,
            "factor": config.yarn_factor,
            "original_max_position_embeddings": config.yarn_original_positions,
            "type": "yarn",
        },
        "scoring_func": "sqrtsoftplus",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        **FIXED,
        **own,
        "compress_ratios": list(config.compress_ratios),
    }
