"""The server with an indexer that is off by one block: the children import this file too, so all of them have it."""

from __future__ import annotations

import sys

import torch

from sglang_sm120 import ops
from sglang_sm120.registry import Arguments


@ops.indexer_topk.provider("off_by_one_block", runs_on="cpu", default_on="")
def off_by_one_block(a: Arguments) -> torch.Tensor:
    """Score every entry with the key of its predecessor."""
    logits = ops.indexer_logits(a.q, a.weights, a.pages, a.page_table, a.lengths, a.page_size)
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    return ops.topk_slots(shifted, a.lengths, a.page_table, a.k, a.page_size, a.out)


if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    launch_server(prepare_server_args(sys.argv[1:]))
