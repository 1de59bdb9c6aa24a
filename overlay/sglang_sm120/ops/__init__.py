"""The ops: each is a contract with a torch reference, and has room for providers."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

from .. import kernels
from .bf16_linear_fp32 import bf16_linear_fp32
from .compress import compress
from .compress_decode_plan import compress_decode_plan
from .compress_norm_rope_store import compress_norm_rope_store
from .compress_prefill_plan import compress_prefill_plan
from .fp8_grouped_linear import fp8_grouped_linear
from .fp8_linear import fp8_linear
from .gather_dequant_kv import gather_dequant_kv
from .hash_topk import hash_topk
from .indexer_logits import indexer_logits
from .indexer_q import indexer_q
from .indexer_topk import indexer_topk
from .k_norm_rope_store import k_norm_rope_store
from .mhc_head import mhc_head
from .mhc_post import mhc_post
from .mhc_post_pre import mhc_post_pre
from .mhc_pre import mhc_pre
from .mxfp4_moe import mxfp4_moe
from .router_topk import router_topk
from .silu_mul_clamp import silu_mul_clamp
from .sinkhorn import sinkhorn
from .sparse_mla import sparse_mla
from .topk_slots import topk_slots

__all__ = [
    "bf16_linear_fp32",
    "compress",
    "compress_decode_plan",
    "compress_norm_rope_store",
    "compress_prefill_plan",
    "fp8_grouped_linear",
    "fp8_linear",
    "gather_dequant_kv",
    "hash_topk",
    "indexer_logits",
    "indexer_q",
    "indexer_topk",
    "k_norm_rope_store",
    "mhc_head",
    "mhc_post",
    "mhc_post_pre",
    "mhc_pre",
    "mxfp4_moe",
    "router_topk",
    "silu_mul_clamp",
    "sinkhorn",
    "sparse_mla",
    "topk_slots",
]

# Beside a reference lies `triton.py` where the op has a Triton provider; importing it registers it.
for _name in __all__:
    if find_spec(f"{__name__}.{_name}.triton"):
        import_module(f"{__name__}.{_name}.triton")

for _module in [module for name, module in sys.modules.items() if name.startswith(f"{__name__}.")]:
    kernels.fix_cache_keys(_module)
