"""The model's calls of `fp8_linear`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...limits import MAX_ROWS
from ...spec import Arguments, Calls, Inputs, Spec
from .._linear_spec import others, traffic

LABELS = (
    "wqkv_a", "wq_b", "wo_b", "indexer.wq_b", "shared.w13", "shared.w2", "mtp.e_proj", "mtp.h_proj", "mtp.head"
)  # fmt: skip


def shapes(c: dict[str, Any], tp: int) -> dict[str, tuple[int, int]]:
    """(N, K) of each call on one of `tp` ranks."""
    hidden, q_lora, inter = c["hidden_size"], c["q_lora_rank"], c["moe_intermediate_size"]
    sizes = (
        (q_lora + c["head_dim"], hidden),
        (c["num_attention_heads"] * c["head_dim"] // tp, q_lora),
        (hidden, c["o_groups"] * c["o_lora_rank"] // tp),
        (c["index_n_heads"] * c["index_head_dim"], q_lora),
        (2 * inter // tp, hidden),
        (hidden, inter // tp),
        (hidden, hidden),
        (hidden, hidden),
        (-(-c["vocab_size"] // tp), hidden),
    )
    return dict(zip(LABELS, sizes, strict=True))


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    for label, (n, k) in shapes(c, tp).items():
        # SGLang keeps the scales of linear layers in fp32.
        scale = make.e8m0(-(-n // 128), -(-k // 128)).float()
        # The draft layer projects each token's residual streams, and proposes a token a request.
        inputs = {"mtp.h_proj": rows * c["hc_mult"], "mtp.head": min(rows, MAX_ROWS)}.get(label, rows)
        arguments = {"x": make.bf16(inputs, k), "w": make.fp8(n, k), "scale": scale}
        if label.endswith("wq_b"):
            # Columns of the joint projection to queries and keys, whose norm comes first.
            arguments["x"] = make.bf16(rows, k + c["head_dim"])[:, :k]
        if label.endswith("wq_b") or label in ("mtp.e_proj", "mtp.h_proj"):
            arguments |= {"norm_weight": make.bf16(k), "eps": c["rms_norm_eps"]}
        yield label, arguments


def _aim(a: Arguments, rows: int, context: int) -> tuple[str, float] | None:
    rows = a["x"].shape[0]
    if rows <= 8 and a["w"].numel() >= 16 << 20:
        return "copy_share", 0.6
    return ("mma_share", 0.6) if rows == 4096 else None


SPEC = Spec(
    calls=_calls,
    traffic=traffic,
    aim=_aim,
    tunables={"linear": others},
    served=True,
    streams=2,
    prefill="CUTLASS, activations quantised to FP8",
)
