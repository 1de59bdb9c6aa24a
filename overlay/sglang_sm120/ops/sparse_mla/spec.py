"""The model's calls of `sparse_mla`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

import torch

from ...formats import kv_page
from ...spec import C4_PAGE, C128_PAGE, WINDOW_PAGE, Arguments, Calls, Inputs, Spec, nbytes


def _extra(c: dict[str, Any], context: int) -> dict[str, tuple[int, int, int]]:
    """Label: (slots per row, entries in the cache, entries per page) of each layer kind."""
    c4, c128 = max(1, context // 4), max(1, context // 128)
    return {"c4": (c["index_topk"], max(c4, c["index_topk"]), C4_PAGE), "c128": (-(-c128 // 64) * 64, c128, C128_PAGE)}


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    heads, window, head = c["num_attention_heads"] // tp, c["sliding_window"], c["head_dim"]
    tokens = rows + window
    arguments: dict[str, Any] = {
        "q": make.bf16(rows, heads, head),
        "window_pages": make.kv_pool(tokens, WINDOW_PAGE),
        "window_slots": make.distinct(rows, window, tokens),
        "window_lengths": make.integers(min(context, window), min(context, window) + 1, rows),
        "window_page_size": WINDOW_PAGE,
        "sink": make.normal(heads),
        "scale": head**-0.5,
        "freqs_cis": torch.view_as_complex(make.normal(max(rows, context), c["qk_rope_head_dim"] // 2, 2)),
        "positions": make.integers(0, max(rows, context), rows, dtype=torch.int64),
        "q_eps": c["rms_norm_eps"],
    }
    none = dict.fromkeys(("extra_pages", "extra_slots", "extra_lengths", "extra_page_size"))
    yield "window", {**arguments, **none}
    for label, (width, entries, page_size) in _extra(c, context).items():
        live = min(width, max(1, context // (4 if label == "c4" else 128)))
        yield (
            label,
            {
                **arguments,
                "extra_pages": make.kv_pool(entries, page_size),
                "extra_slots": make.distinct(rows, width, entries),
                "extra_lengths": make.integers(live, live + 1, rows),
                "extra_page_size": page_size,
            },
        )


def _traffic(a: Arguments) -> tuple[int, int]:
    entries = sum(int(a[name].sum()) for name in ("window_lengths", "extra_lengths") if a[name] is not None)
    entry = kv_page.ROW + kv_page.FOOTER
    return entries * entry + 2 * nbytes(a["q"]), 4 * entries * a["q"].shape[1] * kv_page.DIM


def _aim(a: Arguments, rows: int, context: int) -> tuple[str, float] | None:
    extra = a["extra_slots"]
    if extra is None or a["window_slots"].shape[1] + extra.shape[1] != 640:
        return None
    return {1: ("time_us", 12.0), 64: ("time_us", 60.0)}.get(rows)


SPEC = Spec(
    calls=_calls,
    traffic=_traffic,
    aim=_aim,
    served=True,
    context=2,
    synchronises=True,
    prefill="FlashInfer's sparse MLA, in FP8",
)
