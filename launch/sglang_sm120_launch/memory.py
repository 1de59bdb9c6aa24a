"""How much memory SGLang 0.5.23 needs for DeepSeek-V4 on one rank, and what its pools will hold.

The sizes of the pools follow SGLang's `DSV4PoolConfigurator` (`srt/model_executor/pool_configurator.py`) and their
bytes its `DeepSeekV4TokenToKVPool`; the weights follow its loader. Those are exact. What CUDA, NCCL, SGLang's prefill
and the captured graphs take is an allowance, and says so. Bytes throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_sm120.checkpoint.config import FP8_BLOCK, nvfp4_experts
from sglang_sm120.limits import PAGE, RING, WINDOW, page_bytes

from .machine import MIB
from .model import Model

PAGES_PER_REQUEST = 2
"""Window pages a decoding request can hold: its 128-token window may straddle a page boundary."""
WINDOW_RATIO = 0.1
"""Window-pool tokens per token of context, SGLang's default for DeepSeek-V4."""

WO_A = "wo_a bf16 (SGLang's)"
"""What a patched SGLang gives up for the step's."""
CONTEXT = 1250 * MIB
"""What NVML counts as memory and a process never gets: the driver's share and the CUDA context (H200, measured)."""
NCCL = 512 * MIB
"""Allowance for the communicators of one rank."""
GRAPHS = 512 * MIB
"""Allowance for what the first captured graph brings: the graph pool, loaded modules, library workspaces."""
GRAPH = 24 * MIB
"""Allowance for the nodes of each captured graph."""
SCRATCH = 1024 * MIB
"""Scratch of the step's kernels: graphs of up to 256 rows on four streams, and, where the step takes prefill too, a
chunk of up to 8,192 tokens at any context (checked against a rehearsal of the kernels)."""
SLACK = 1024 * MIB
"""Allowance for fragmentation and for what no line names."""


@dataclass(frozen=True)
class Pools:
    """Entries of each pool, under the names of SGLang's log line `DSV4 pool sizes`."""

    full: int
    swa: int
    c4: int
    c128: int
    c4_state: int
    c128_state: int


def weights(model: Model, tp: int, device: str, mtp: bool = False, ep: int = 1) -> dict[str, int]:
    """Bytes of the weights that SGLang keeps on one of `tp` ranks, by what they are.

    Args:
        device: `cuda`, where the experts' scales stay one byte each, or `cpu`, where SGLang widens them to four.
        mtp: the MTP layer alone, with the embedding and head that the draft worker has of its own until the cache is
            sized; or the DSpark drafter, which has none.
        ep: ranks that have whole experts, and the shared one.
    """
    experts = output = other = 0
    owners = {"mtp" if mtp else "layers"} | (set() if mtp and model.dspark else {"shared"})
    for kind, size in model.bytes_of.items():
        if kind.owner not in owners:
            continue
        if kind.wo_a:
            # Multiplied by its scales into bf16 while it is loaded.
            size = 0 if kind.role == "scale" else size * 2
        elif kind.role == "scale" and not (kind.expert and device == "cuda"):
            size *= 4  # SGLang widens E8M0 to fp32
        elif kind.role == "norm":
            size *= 2  # and these norms from bf16
        if kind.sharded and not (kind.shared_expert and ep > 1):
            size = -(-size // tp)
        if kind.expert:
            experts += size
        elif kind.wo_a:
            output += size
        else:
            other += size
    config = model.config
    # complex64 for each position and pair of rotated channels, with and without YaRN; the draft worker shares them.
    tables = 0 if mtp else 2 * config["max_position_embeddings"] * config["qk_rope_head_dim"] // 2 * 8
    return {"experts": experts, WO_A: output, "other weights": other, "rotation tables": tables}


def step_weights(model: Model, tp: int, device: str, mtp: bool) -> dict[str, int]:
    """Bytes of what the step takes beside SGLang's weights on one of `tp` ranks, with mtp for drafting too.

    The head that it rounds for drafts fits into the one that the draft worker gives up when the cache is sized.
    """
    owners = ("layers", "mtp") if mtp else ("layers",)
    layers = {kind: size for kind, size in model.bytes_of.items() if kind.owner in owners}
    scales = {True: 4, False: 1}
    output = sum(-(-size * scales[kind.role == "scale"] // tp) for kind, size in layers.items() if kind.wo_a)
    taken = {"wo_a FP8 (the step)": output}
    if mtp and model.dspark:
        # SGLang has a stage's two projections apart and whole on each rank; the step joins copies of them.
        config = model.config
        joined = model.dspark.stages * (config["q_lora_rank"] + config["head_dim"]) * config["hidden_size"]
        taken["stages' projections joined (the step)"] = joined + joined // FP8_BLOCK**2 * 4
    if device == "cpu" or nvfp4_experts(model.config):
        # SM120's layout takes the place of SGLang's layer by layer: one is there in both.
        experts = sum(-(-size // tp) for kind, size in layers.items() if kind.expert)
        taken["one layer's experts (the step)"] = -(-experts // model.config["num_hidden_layers"])
    return taken


def ring(ratio: int, drafts: int) -> int:
    """Slots of the compressor's state: of each page of the window for ratio 4, of each request for ratio 128."""
    return (RING if drafts else WINDOW)[ratio]


def _ratios(config: Mapping[str, Any]) -> list[int]:
    """The layers that SGLang loads as the target: not the MTP layer."""
    return list(config["compress_ratios"][: config["num_hidden_layers"]])


def bytes_per_full_token(config: Mapping[str, Any], window_ratio: float, drafts: int) -> dict[str, float]:
    """What SGLang counts for one token of context, per pool; the sum is its log's `bytes_per_full_token`.

    With drafts SGLang scales everything by (layers + 1) / layers, of however many layers the drafter is; what windows
    take beyond that is in `pool_padding`. The states of ratio 128 belong to requests: `request_state_bytes`.
    """
    ratios = _ratios(config)
    c4, c128 = ratios.count(4), ratios.count(128)
    index, head = config["index_head_dim"], config["head_dim"]
    state = window_ratio * ring(4, drafts) / PAGE * 16
    counted = {
        "window": window_ratio * page_bytes(PAGE) / PAGE * len(ratios),
        "c4": page_bytes(PAGE // 4) / PAGE * c4,
        "c128": page_bytes(PAGE // 128) / PAGE * c128,
        "indexer": (index + index // 128 * 4) / 4 * c4,
        "c4 state": state * head * c4,
        "indexer state": state * index * c4,
    }
    scale = (len(ratios) + 1) / len(ratios) if drafts else 1
    return {name: size * scale for name, size in counted.items()}


def request_state_bytes(config: Mapping[str, Any], requests: int, drafts: int) -> int:
    """Bytes of ratio 128's states, SGLang's `c128_state_fixed`: a ring for each of `requests`, one for padded rows."""
    return _state((requests + 1) * ring(128, drafts), 128, config["head_dim"], drafts) * _ratios(config).count(128)


def tokens_that_fit(config: Mapping[str, Any], available: int, window_ratio: float, requests: int, drafts: int) -> int:
    """Tokens of context that SGLang makes of `available` bytes, its log's `full_token`."""
    left = max(0, available - request_state_bytes(config, requests, drafts))
    return int(left / sum(bytes_per_full_token(config, window_ratio, drafts).values())) // PAGE * PAGE


def pool_sizes(config: Mapping[str, Any], full_tokens: int, window_ratio: float, requests: int, drafts: int) -> Pools:
    """The pools SGLang makes for `full_tokens` tokens of context and so many running requests."""
    full = full_tokens // PAGE * PAGE
    swa = int(full * window_ratio) // PAGE * PAGE
    ratios = _ratios(config)
    return Pools(
        full=full,
        swa=swa,
        c4=full // 4,
        c128=full // 128,
        c4_state=swa // PAGE * ring(4, drafts) if 4 in ratios else 0,
        c128_state=(requests + 1) * ring(128, drafts) if 128 in ratios else 0,
    )


def pool_bytes(config: Mapping[str, Any], pools: Pools, drafts: int) -> dict[str, int]:
    """What SGLang allocates for the pools; the draft worker's window layer is counted with the window pool."""
    ratios = _ratios(config)
    c4, c128 = ratios.count(4), ratios.count(128)
    index, head = config["index_head_dim"], config["head_dim"]

    def kv(entries: int, tokens: int) -> int:
        # A page of the allocator's more than asked for: slot 0 is a dummy.
        return -(-(entries + PAGE) // tokens) * page_bytes(tokens)

    indexed = -(-(pools.c128 * 32 + PAGE) // (PAGE // 4)) * (PAGE // 4)
    return {
        "window": kv(pools.swa, PAGE) * (len(ratios) + drafts),
        "c4": kv(pools.c4, PAGE // 4) * c4,
        "c128": kv(pools.c128, PAGE // 128) * c128,
        "indexer": indexed * (index + index // 128 * 4) * c4,
        "c4 state": _state(pools.c4_state, 4, head, drafts) * c4,
        "c128 state": _state(pools.c128_state, 128, head, drafts) * c128,
        "indexer state": _state(pools.c4_state, 4, index, drafts) * c4,
    }


def pool_padding(config: Mapping[str, Any], tokens: int, window_ratio: float, requests: int, drafts: int) -> int:
    """Bytes of the pools of up to `tokens` tokens that SGLang allocates and does not count.

    A dummy page and a ring in each layer's; and where the windows of `drafts` layers are larger than SGLang's reserve
    of one whole layer, as Flash's three stages' of DSpark are at a window ratio of 0.2, the rest of them.
    """
    empty = pool_bytes(config, pool_sizes(config, 0, 0, requests, drafts), drafts)
    reserve = sum(bytes_per_full_token(config, window_ratio, drafts).values()) / (len(_ratios(config)) + 1)
    beyond = max(0.0, drafts * window_ratio * page_bytes(PAGE) / PAGE - reserve)
    return sum(empty.values()) - request_state_bytes(config, requests, drafts) + math.ceil(tokens * beyond)


def _state(slots: int, ratio: int, dim: int, drafts: int) -> int:
    """Bytes of one layer's states: fp32 values and scores, twice as wide for ratio 4, whose blocks overlap."""
    rows = -(-(slots + ring(ratio, drafts) + 1) // ratio) * ratio
    return rows * (4 if ratio == 4 else 2) * dim * 4


def bookkeeping(pools: Pools, requests: int, context: int, draft_tokens: int) -> int:
    """Where each token of each request lies (int32), and where each slot of the full pool lies in the window pool
    (int64); SGLang takes both beside the pools it sized."""
    # With drafts a request's row has room for two verifications, rounded up to a page.
    row = context + (max(4 + draft_tokens, 2 * draft_tokens + PAGE - 1) if draft_tokens else 4)
    return (requests + 1) * row * 4 + (pools.full + PAGE + 1) * 8


def activations(config: Mapping[str, Any], tp: int, chunk: int, requests: int) -> int:
    """Tensors alive at the widest point of a forward pass of `chunk` tokens, without kernels' scratch.

    Per token, bf16: the residual streams before and after a layer, three hidden states, q twice and the attention's
    output for this rank's heads; then fp32 logits and three buffers of the sampler for each request.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"] // tp
    token = 2 * (2 * 4 * hidden + 3 * hidden + 3 * heads * config["head_dim"])
    return chunk * token + 4 * requests * config["vocab_size"] * 4


def prefill_workspace(config: Mapping[str, Any], tp: int, chunk: int) -> int:
    """What SGLang's CUTLASS experts take for a chunk: every token once for each of its experts.

    Per copy: FP8 values and their scales, the bf16 result, and this rank's gate and up in bf16, then FP8. tp: ranks
    that divide each expert.
    """
    hidden, inter = config["hidden_size"], config["moe_intermediate_size"] // tp
    copy = hidden + hidden // 32 + 2 * hidden + 2 * 2 * inter + inter + inter // 32
    return chunk * config["num_experts_per_tok"] * copy


def prefill_scores(chunk: int, context: int) -> int:
    """What SGLang's indexer takes on SM120 for a chunk at the end of a context: all scores at once, fp32, one for
    four tokens, and int32 tables of pages and of ratio 128's slots for every row."""
    pages = -(-context // PAGE)
    return chunk * pages * (PAGE // 4 * 4 + 4 + 2 * 4)


def split_pages(pools: Pools) -> int:
    """SGLang's copy of one layer's window pages in pages of 64 tokens, which FlashInfer's attention reads."""
    return -(-(pools.swa + PAGE) // 64) * page_bytes(64)


def graph_bytes(config: Mapping[str, Any], tp: int, sizes: tuple[int, ...], draft_tokens: int) -> int:
    """Allowance for CUDA graphs of these numbers of requests."""
    if not sizes:
        return 0
    rows = max(sizes) * max(1, draft_tokens)
    return GRAPHS + GRAPH * len(sizes) + activations(config, tp, rows, max(sizes))


def block_logits(config: Mapping[str, Any], block: int, requests: int) -> int:
    """What SGLang's DSpark keeps of a block's logits for each request of the largest graph: in bf16, and in fp32."""
    return requests * block * config["vocab_size"] * (2 + 4)


def window_tokens_needed(chunk: int, requests: int) -> int:
    """Tokens the window pool must hold, or SGLang shrinks chunks and requests wait: a chunk and two pages a request."""
    return -(-chunk // PAGE) * PAGE + PAGES_PER_REQUEST * PAGE * requests
