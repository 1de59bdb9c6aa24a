"""Why the step does not serve a configuration, a model, a pool or a pass: sentences, or None."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch

from .. import limits, registry
from ..checkpoint.config import nvfp4_experts
from ..formats import kv_page
from ..limits import MAX_ROWS

MODEL_TYPE = "deepseek_v4"

TARGET_MODES = {"decode": "decode", "target_verify": "verification"}
DRAFT_MODES = {"decode": "decode", "draft_extend_v2": "what a draft keeps of a verification"}
DSPARK_MODES = {"target_verify": "blocks of drafts"}
"""Passes of few rows a request, by SGLang's names and by ours."""


def why_left(modes: Mapping[str, str], mode: str, rows: int, kwargs: dict[str, Any]) -> str | None:
    """Why a step of `modes` does not take a pass on a GPU; None when it does. Reads host state only."""
    if mode in modes:
        if not 0 < rows <= MAX_ROWS:
            return f"a {mode} pass has no rows or more than the {MAX_ROWS} that the step takes"
    elif mode != "extend" or not takes_prefill():
        return f"the step takes {' and '.join(modes.values())}, not {mode}"
    if kwargs.get("input_embeds") is not None:
        return "the pass brings embeddings instead of tokens"
    return None


@functools.cache
def emulated() -> bool:
    """Whether SGLANG_SM120_FORCE=1 has the step serve on a card that is no SM12x.

    The experts then lie in SM120's layout, which SGLang's kernels for that card would misread: the step serves every
    pass, or raises.
    """
    return registry.forced() and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 12


def why_alone(hf_config: Any) -> str | None:
    """The first words of a sentence that says why SGLang's forward serves no pass of this model here, or None."""
    if emulated():
        return "With SGLANG_SM120_FORCE=1"
    return "With NVFP4 experts" if _nvfp4(hf_config) else None


def _nvfp4(hf_config: Any) -> bool:
    return nvfp4_experts({"quantization_config": getattr(hf_config, "quantization_config", None)})


@functools.cache
def takes_prefill() -> bool:
    """`limits.takes_prefill` of this process."""
    return limits.takes_prefill(os.environ.get("SGLANG_SM120_PREFILL"), emulated())


def config_reasons(cfg: Any, hf_config: Any) -> list[str]:
    """Sentences that say why the step cannot serve this configuration, beyond what `Requirements` states."""
    reasons = []
    if cfg.enable_deepseek_v4_fp4_indexer:
        reasons.append("the indexer's keys are FP4 (--enable-deepseek-v4-fp4-indexer) and the step reads FP8")
    try:
        limits.require_kept(cfg.speculative_num_draft_tokens)
    except ValueError as error:
        reasons.append(str(error))
    if _nvfp4(hf_config) and not takes_prefill():
        reasons.append(
            "its experts are NVFP4, which SGLang's own forward does not serve on this card: set "
            "SGLANG_SM120_PREFILL=overlay, so that the step takes prefill too"
        )
    prefill = cfg.cuda_graph_config.prefill.backend
    if prefill not in limits.prefill_graphs(takes_prefill()):
        reasons.append(
            "prefill runs in CUDA graphs of SGLang's own layers: give --disable-prefill-cuda-graph" if takes_prefill()
            else "prefill is traced by torch.compile, which has no addresses: leave --cuda-graph-backend-prefill"
        )  # fmt: skip
    return reasons


def model_reasons(model: torch.nn.Module, hf_config: Any) -> list[str]:
    """Sentences that say what the loaded model or SGLang's classes lack of what the step reads."""
    from . import weights

    reasons = missing()
    if getattr(model, "num_fused_shared_experts", 0):
        reasons.append("the shared expert is fused with the routed ones: leave out --enforce-shared-experts-fusion")
        return reasons
    try:
        for layer in weights.layers_of(model):
            weights.read(layer)
    except (AttributeError, ValueError) as error:
        reasons.append(f"the step cannot read a layer's weights: {error}")
    return reasons


POOL = (
    "get_swa_key_buffer_radix", "get_swa_key_page_size", "get_extra_key_buffer", "get_extra_key_page_size",
    "get_index_k_with_scale_buffer", "get_attention_compress_states", "get_indexer_compress_states",
)  # fmt: skip
METADATA = ("core_attn_metadata", "indexer_metadata", "c4_compress_metadata", "c128_compress_metadata")
CORE = (
    "swa_page_indices", "swa_topk_lengths", "sparse_page_indices", "sparse_topk_lengths", "c4_topk_lengths_raw",
    "c4_sparse_page_indices", "c4_out_loc", "c128_out_loc",
)  # fmt: skip
"""What `metadata.Pass` reads of SGLang's pool, of a pass's metadata and of that metadata's core."""


def missing() -> list[str]:
    """Sentences that name what SGLang's pool and metadata classes lack of what the step reads."""
    from sglang.srt.layers.attention.deepseek_v4_backend import DSV4AttnMetadata, DSV4Metadata
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    read = ((DeepSeekV4TokenToKVPool, POOL), (DSV4Metadata, METADATA), (DSV4AttnMetadata, CORE))
    return [
        f"SGLang's {owner.__name__} has no {name}, which the step reads: install the release this package is made for"
        for owner, names in read
        for name in names
        if not hasattr(owner, name) and name not in getattr(owner, "__dataclass_fields__", {})
    ]


def unusable(view: Any) -> list[str]:
    """Sentences that say what of the pools that exist now the step cannot read; empty when all is as it must be."""
    pool, metadata = view.kv_pool.pool, view.metadata
    read = ((pool, POOL), (metadata, METADATA), (getattr(metadata, METADATA[0], None), CORE))
    lacking = [
        f"SGLang's {type(owner).__name__} has no {name}, which the step reads"
        for owner, names in read
        for name in names
        if not hasattr(owner, name)
    ]
    if lacking:
        return lacking
    bytes_per_token = view.kv_pool.get_swa_key_bytes_per_token()
    if bytes_per_token != kv_page.TOKEN or view.kv_pool.request_window is not None:
        return [
            f"its keys have {bytes_per_token} bytes a token, or pages of a request's own, and the step reads pages of "
            f"V4's {kv_page.TOKEN}: leave --dsv4-attn-backend and SGLANG_DSV4_KV_LAYOUT alone"
        ]
    return []
