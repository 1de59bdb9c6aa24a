"""How much memory SGLang 0.5.12.post1 needs for DeepSeek-V4 on one rank, and what its pools will hold.

The sizes of the pools follow SGLang's `DSV4PoolConfigurator` (`srt/model_executor/pool_configurator.py`) and their
bytes its `DeepSeekV4TokenToKVPool`; the weights follow its loader. Those are exact. What CUDA, NCCL and the captured
graphs take is an allowance, and says so. Bytes throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .machine import MIB
from .model import Model

PAGE = 256
"""Tokens per page; SGLang sets it for DeepSeek-V4."""
PAGES_PER_REQUEST = 2
"""Window pages a decoding request can hold: its 128-token window may straddle a page boundary."""
WINDOW_RATIO = 0.1
"""Window-pool tokens per token of context, SGLang's default for DeepSeek-V4."""

CONTEXT = 1250 * MIB
"""What NVML counts as memory and a process never gets: the driver's share and the CUDA context (H200, measured)."""
NCCL = 512 * MIB
"""Allowance for the communicators of one rank."""
GRAPHS = 512 * MIB
"""Allowance for what the first captured graph brings: the graph pool, loaded modules, library workspaces."""
GRAPH = 24 * MIB
"""Allowance for the nodes of each captured graph."""
SCRATCH = 1024 * MIB
"""Scratch of the overlay's kernels: graphs of up to 64 rows on four streams, and a prefill chunk of up to 8,192 tokens
at any context (checked against a rehearsal of the kernels)."""
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


def weights(model: Model, tp: int, overlay: bool, mtp: bool = False) -> dict[str, int]:
    """Bytes of the weights on one of `tp` ranks: `experts`, `other weights`, `rotation tables`.

    Args:
        overlay: whether the experts' scales stay one byte each; upstream widens them to four.
        mtp: the MTP layer alone, with the embedding and head that the draft worker loads before it shares them.
    """
    experts = other = 0
    for kind, size in model.bytes_of.items():
        if kind.owner not in (("mtp", "shared") if mtp else ("layers", "shared")):
            continue
        if kind.role == "scale" and not (kind.expert and overlay):
            size *= 4  # SGLang widens E8M0 to fp32
        elif kind.role == "norm":
            size *= 2  # and these norms from bf16
        if kind.sharded:
            size = -(-size // tp)
        if kind.expert:
            experts += size
        else:
            other += size
    config = model.config
    # complex64 for each position and pair of rotated channels, with and without YaRN; the draft worker shares them.
    tables = 0 if mtp else 2 * config["max_position_embeddings"] * config["qk_rope_head_dim"] // 2 * 8
    return {"experts": experts, "other weights": other, "rotation tables": tables}


def ring(ratio: int, mtp: bool) -> int:
    """Slots of the compressor's state that a page of the window keeps."""
    return (8 if ratio == 4 else 128) * (2 if mtp else 1)


def bytes_per_full_token(config: Mapping[str, Any], window_ratio: float, mtp: bool) -> dict[str, float]:
    """What SGLang counts for one token of context, per pool; the sum is its log's `bytes_per_full_token`.

    SGLang counts a window layer for each entry of `compress_ratios`, also for the MTP layer it does not load, and
    with MTP scales everything by (layers + 1) / layers.
    """
    ratios = config["compress_ratios"]
    c4, c128 = ratios.count(4), ratios.count(128)
    rope, index, window = config["qk_rope_head_dim"], config["index_head_dim"], config["sliding_window"]
    head = config["head_dim"]
    entry = head - rope + 2 * rope + 8
    per_window = window_ratio / window
    counted = {
        "window": window_ratio * entry * len(ratios),
        "c4": entry / 4 * c4,
        "c128": entry / 128 * c128,
        "indexer": (index + index // 128 * 4) / 4 * c4,
        "c4 state": per_window * ring(4, mtp) * 16 * head * c4,
        "c128 state": per_window * ring(128, mtp) * 8 * head * c128,
        "indexer state": per_window * ring(4, mtp) * 16 * index * c4,
    }
    scale = (len(ratios) + 1) / len(ratios) if mtp else 1
    return {name: size * scale for name, size in counted.items()}


def pool_sizes(config: Mapping[str, Any], full_tokens: int, window_ratio: float, mtp: bool) -> Pools:
    """The pools SGLang makes for `full_tokens` tokens of context."""
    full = full_tokens // PAGE * PAGE
    swa = int(full * window_ratio) // PAGE * PAGE
    windows = swa // config["sliding_window"]
    return Pools(full, swa, full // 4, full // 128, windows * ring(4, mtp), windows * ring(128, mtp))


def pool_bytes(config: Mapping[str, Any], pools: Pools, mtp: bool) -> dict[str, int]:
    """What SGLang allocates for the pools; the draft worker's window layer is counted with the window pool."""
    layers = config["num_hidden_layers"]
    ratios = config["compress_ratios"][:layers]
    c4, c128 = ratios.count(4), ratios.count(128)
    rope, index, head = config["qk_rope_head_dim"], config["index_head_dim"], config["head_dim"]
    entry = head - rope + 2 * rope + 8

    def kv(entries: int, page: int) -> int:
        # One page more than asked for (slot 0 is a dummy); SGLang pads a page to a multiple of 576 bytes.
        return (entries + page + 1) // page * (-(-page * entry // 576) * 576)

    def state(slots: int, ratio: int, dim: int) -> int:
        rows = -(-(slots + ring(ratio, mtp) + 1) // ratio) * ratio
        return rows * (4 if ratio == 4 else 2) * dim * 4

    pages = (pools.c128 * 32 + PAGE // 4 + 1) // (PAGE // 4)
    return {
        "window": kv(pools.swa, PAGE) * (layers + mtp),
        "c4": kv(pools.c4, PAGE // 4) * c4,
        "c128": kv(pools.c128, PAGE // 128) * c128,
        "indexer": pages * PAGE // 4 * (index + index // 128 * 4) * c4,
        "c4 state": state(pools.c4_state, 4, head) * c4,
        "c128 state": state(pools.c128_state, 128, head) * c128,
        "indexer state": state(pools.c4_state, 4, index) * c4,
    }


def bookkeeping(pools: Pools, requests: int, context: int, draft_tokens: int) -> int:
    """Where each token of each request lies (int32), and where each slot of the full pool lies in the window pool
    (int64); SGLang takes both beside the pools it sized."""
    return (requests + 1) * (context + 4 + draft_tokens) * 4 + (pools.full + pools.swa + 1) * 8


def activations(config: Mapping[str, Any], tp: int, chunk: int, requests: int) -> int:
    """Tensors alive at the widest point of a forward pass of `chunk` tokens, without the overlay's scratch.

    Per token, bf16: the residual streams before and after a layer, three hidden states, q twice and the attention's
    output for this rank's heads; then fp32 logits and three buffers of the sampler for each request.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"] // tp
    token = 2 * (2 * 4 * hidden + 3 * hidden + 3 * heads * config["head_dim"])
    return chunk * token + 4 * requests * config["vocab_size"] * 4


def graph_bytes(config: Mapping[str, Any], tp: int, sizes: tuple[int, ...], draft_tokens: int) -> int:
    """Allowance for CUDA graphs of these numbers of requests."""
    if not sizes:
        return 0
    rows = max(sizes) * max(1, draft_tokens)
    return GRAPHS + GRAPH * len(sizes) + activations(config, tp, rows, max(sizes))


def window_tokens_needed(chunk: int, requests: int) -> int:
    """Tokens the window pool must hold, or SGLang waits without a word: a chunk and two pages for each request."""
    return -(-chunk // PAGE) * PAGE + PAGES_PER_REQUEST * PAGE * requests
