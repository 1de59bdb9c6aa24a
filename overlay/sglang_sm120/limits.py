"""Laws that the overlay and the launcher share, each stated here alone; neither torch nor SGLang is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SM12X = (120, 121)
"""Compute capabilities that the step is made for."""
MAX_ROWS = 256
"""Rows of the largest pass that the step takes on a GPU, verification included; larger ones are SGLang's."""
PAGE = 256
"""Tokens of context per page; SGLang sets it for DeepSeek-V4, whose pools hold PAGE / ratio entries a page."""
KV_ROW, KV_FOOTER = 576, 8
"""Bytes of one token's keys in a page, and of their scales (`formats.kv_page`)."""
WINDOW, RING = {4: 8, 128: 128}, {4: 16, 128: 256}
"""By ratio: tokens that one compressed entry is made of (4 overlaps with the block before), so many the compressor's
ring keeps (`formats.compress_plan.Ring`), and its slots while drafts are verified, as SGLang sizes it."""


def drafts_kept(ratio: int, slots: int) -> int:
    """Draft tokens of one verification that a ring can take back; 0 in the smallest.

    What was accepted has to be in the ring, and what was rejected must not have overwritten what is older and still
    needed. One token is always accepted, so the first that a later entry needs lies WINDOW - 2 before the
    verification's start. With more SGLang 0.5.23 reads stale ones after a rejection and says nothing.
    """
    return slots - WINDOW[ratio] + 2 if slots > WINDOW[ratio] else 0


MAX_DRAFT_TOKENS = min(drafts_kept(ratio, slots) for ratio, slots in RING.items())
EAGLE = ("EAGLE", "NEXTN")
"""SGLang's two names for drafts by the MTP layer."""
DSPARK = "DSPARK"
"""And for drafts in blocks, by a drafter of its own."""
CPU_SERVER: dict[str, Any] = {
    "max_total_tokens": 32768,
    "max_running_requests": 8,
    "swa_full_tokens_ratio": 0.4,
    "sleep_on_idle": True,
}
"""SGLang's settings on a CPU where the user gave none: a laptop's worth of cache (SGLang would size it by all free
memory), and a core that is free while no request is there."""
ENVIRONMENT: Mapping[str, Any] = {
    "SGLANG_DSV4_COMPRESS_STATE_DTYPE": "float32",
    "SGLANG_DSV4_FP4_DEQUANT": False,
    "SGLANG_OPT_FP8_WO_A_GEMM": False,
    "SGLANG_OPT_USE_ONLINE_COMPRESS": False,
    "SGLANG_SHARED_EXPERT_TP1": False,
}
"""SGLang's variables that leave the step out with any other value."""
PASSES, GRAPHS = "sglang_sm120:passes", "sglang_sm120:graphs"
"""Counters of the metrics page: passes outside of CUDA graphs, and graphs, by whose forward."""


def page_bytes(tokens: int) -> int:
    """Bytes of a KV page of so many tokens; SGLang pads it to a multiple of KV_ROW."""
    return -(-tokens * (KV_ROW + KV_FOOTER) // KV_ROW) * KV_ROW


def server_args(emulated: bool) -> Mapping[str, tuple[Any, ...]]:
    """Fields of SGLang's `ServerArgs` that leave the step out with any value but these.

    Args:
        emulated: SGLANG_SM120_FORCE=1 has the step serve on a card that is no SM12x, where it takes every pass.
    """
    return {
        "enforce_shared_experts_fusion": (False,),
        "ep_num_redundant_experts": (0,),
        "expert_distribution_recorder_mode": (None,),
        "fp8_gemm_runner_backend": ("auto", "cutlass", "triton"),
        "init_expert_location": ("trivial",),
        "moe_a2a_backend": ("none",),
        "moe_dense_tp_size": (None,),
        # What SGLang takes on SM12x for MXFP4 experts.
        "moe_runner_backend": ("triton" if emulated else "flashinfer_mxfp4",),
    }


def prefill_graphs(takes_prefill: bool) -> tuple[str, ...]:
    """Backends of SGLang's prefill graphs, of its own layers, beside which the step serves."""
    # torch.compile traces weights, whose addresses `prepare.fp8_wo_a` needs.
    return ("disabled",) if takes_prefill else ("full", "breakable", "disabled")


def takes_prefill(value: str | None, emulated: bool) -> bool:
    """Whether the step takes prefill on a GPU too, by SGLANG_SM120_PREFILL; `emulated` as in `server_args`.

    Raises:
        ValueError: the variable has another value than sglang or overlay, or sglang where the step must take prefill.
    """
    if value not in (None, "", "sglang", "overlay"):
        raise ValueError(f"SGLANG_SM120_PREFILL is {value!r}: set it to sglang or overlay.")
    if value == "sglang" and emulated:
        raise ValueError("SGLANG_SM120_PREFILL is sglang, whose prefill needs SM12x: leave out SGLANG_SM120_FORCE.")
    return value == "overlay" or emulated


def tuned_table(gpu: str, lowered: str = "") -> str:
    """The file of a GPU's tuned table, by its driver's name for it; `lowered`: for code of another one, as `sm120`."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", gpu) + (f"-{lowered}-lowering" if lowered else "") + ".json"


def require_kept(draft_tokens: int | None) -> None:
    """Raise ValueError for more `--speculative-num-draft-tokens` than a rejection can take back; None is off."""
    if draft_tokens is not None and draft_tokens > MAX_DRAFT_TOKENS:
        raise ValueError(
            f"speculative_num_draft_tokens is {draft_tokens}, but DeepSeek-V4's compressor can take back "
            f"{MAX_DRAFT_TOKENS} tokens: use --speculative-num-steps {MAX_DRAFT_TOKENS - 1} or fewer, with DSpark "
            f"--speculative-dspark-block-size {MAX_DRAFT_TOKENS - 1} or less."
        )
