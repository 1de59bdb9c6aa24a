"""Attention of one layer: latent queries, one key per token, compressed entries, inverse RoPE, grouped output."""

from __future__ import annotations

import torch

from .. import ops
from .metadata import INDEX_PAGE, MaybeKeys, Pass
from .weights import Attention, Compressor, Indexer


def attention(a: Attention, x: torch.Tensor, at: Pass) -> torch.Tensor:
    """This rank's part of the attention of x bf16 [T, H], to be summed over the ranks: bf16 [T, H].

        q = rope(norm(W_qb norm(W_qa x)));  k = rope(norm(W_kv x)), kept in the window's pages
        o = Σ_i softmax_i(scale q · k_i, sink) k_i  over the window and the compressed entries;  W_b W_a rope⁻¹(o)
    """
    qkv = ops.fp8_linear(x, *a.wqkv_a)
    q_latent, kv = qkv[:, : a.q_rank], qkv[:, a.q_rank :]
    window = at.window(a.layer_id)
    ops.k_norm_rope_store(
        kv, a.kv_norm, a.eps, a.freqs_cis, at.positions, at.window_slots, window.pages, window.page_size
    )
    q = ops.fp8_linear(q_latent, *a.wq_b, a.q_norm, a.eps).unflatten(-1, (a.heads, -1))
    q = ops.q_norm_rope(q, a.eps, a.freqs_cis, at.positions)
    extra: MaybeKeys = (None, None, None, None)
    if a.indexer is not None:
        choose(a.indexer, a, x, q_latent, at)
    if a.compressor is not None:
        extra = entries = at.extra(a.layer_id, a.ratio)
        compress(a.compressor, x, at, a.layer_id, entries.pages, entries.page_size)
    o = ops.sparse_mla(
        q, *window, *extra, sink=a.sink, scale=a.scale, freqs_cis=a.freqs_cis, positions=at.positions
    )
    o = ops.fp8_grouped_linear(o.view(at.rows, a.groups, -1), *a.wo_a)
    return ops.fp8_linear(o.flatten(1), *a.wo_b)


def choose(indexer: Indexer, a: Attention, x: torch.Tensor, q_latent: torch.Tensor, at: Pass) -> None:
    """Write the slots of the top-k entries by Σ_head w relu(q · k), after new entries were stored, for `extra`."""
    pages = at.index_pages(a.layer_id)
    compress(indexer.compressor, x, at, a.layer_id, pages, INDEX_PAGE, of_indexer=True)
    q = ops.fp8_linear(q_latent, *indexer.wq_b, a.q_norm, a.eps).unflatten(-1, (indexer.heads, -1))
    weights = ops.bf16_linear_fp32(x, indexer.head_weights, torch.bfloat16)
    q, weights = ops.indexer_q(q, weights, indexer.weight_scale, indexer.freqs_cis, at.positions)
    table, lengths = at.index_table()
    ops.indexer_topk(
        q, weights.squeeze(-1), pages, table, lengths, indexer.topk, INDEX_PAGE, out=at.index_slots()
    )


def compress(
    c: Compressor,
    x: torch.Tensor,
    at: Pass,
    layer_id: int,
    pages: torch.Tensor,
    page_size: int,
    of_indexer: bool = False,
) -> None:
    """Store the entries of blocks that end in this pass, Σ_i softmax_i(W_g x_i + ape_i) W_kv x_i, and keep the rest."""
    plans, is_decode, out_slots = at.plan(c.ratio)
    scores = ops.bf16_linear_fp32(x, c.projection)
    ring = at.ring(layer_id, c.ratio, of_indexer)
    entries = ops.compress(ring, scores, c.ape, plans, is_decode, c.head_dim, c.ratio)
    ops.compress_norm_rope_store(
        entries, plans[0], is_decode, c.ratio, c.norm, c.eps, c.freqs_cis, out_slots, pages, page_size
    )
