"""Attention of one layer: latent queries, one key per token, compressed entries, inverse RoPE, grouped output."""

from __future__ import annotations

import torch

from .. import ops
from ..streams import ENTRIES, INDEX_KEYS, INDEX_QUERIES, KEYS, Mark
from .metadata import INDEX_PAGE, MaybeKeys, Pass
from .weights import Attention, Compressor, Indexer, Linear


def attention(a: Attention, x: torch.Tensor, at: Pass) -> torch.Tensor:
    """This rank's part of the attention of x bf16 [T, H], to be summed over the ranks: bf16 [T, H].

        q = rope(norm(W_qb norm(W_qa x)));  k = rope(norm(W_kv x)), kept in the window's pages
        o = Σ_i softmax_i(scale q · k_i, sink) k_i  over the window and the compressed entries;  W_b W_a rope⁻¹(o)
    """
    beside, start, window = at.beside, at.beside.mark(), at.window(a.layer_id)
    qkv = ops.fp8_linear(x, *a.wqkv_a)
    q_latent, kv = qkv[:, : a.q_rank], qkv[:, a.q_rank :]
    latent = beside.mark()
    q = ops.fp8_linear(q_latent, *a.wq_b, a.q_norm, a.eps).unflatten(-1, (a.heads, -1))
    if a.indexer is not None:
        choose(a.indexer, a, x, q_latent, at, start, latent)
    with beside.on(KEYS, latent):
        ops.k_norm_rope_store(
            kv, a.kv_norm, a.eps, a.freqs_cis, at.positions, at.window_slots, window.pages, window.page_size
        )
    extra: MaybeKeys = (None, None, None, None)
    if a.compressor is not None:
        extra = entries = at.extra(a.layer_id, a.ratio)
        with beside.on(ENTRIES, start):
            compress(a.compressor, x, at, a.layer_id, entries.pages, entries.page_size)
    beside.join()
    o = ops.sparse_mla(
        q, *window, *extra, sink=a.sink, scale=a.scale, freqs_cis=a.freqs_cis, positions=at.positions, q_eps=a.eps
    ).view(at.rows, a.groups, -1)
    if isinstance(a.wo_a, Linear):
        o = ops.fp8_grouped_linear(o, *a.wo_a)
    else:
        o = torch.einsum("tgk,gnk->tgn", o, a.wo_a)
    return ops.fp8_linear(o.flatten(1), *a.wo_b)


def choose(
    indexer: Indexer, a: Attention, x: torch.Tensor, q_latent: torch.Tensor, at: Pass, start: Mark, latent: Mark
) -> None:
    """Write the slots of the top-k entries by Σ_head w relu(q · k), after new entries were stored, for `extra`."""
    pages, beside = at.index_pages(a.layer_id), at.beside
    # The keys take longest: nothing comes before them on their stream, and but for the choice nothing waits for them.
    with beside.on(INDEX_KEYS, start):
        compress(indexer.compressor, x, at, a.layer_id, pages, INDEX_PAGE, of_indexer=True)
        stored = beside.mark()
    with beside.on(INDEX_QUERIES, start):
        weights = ops.bf16_linear_fp32(x, indexer.head_weights, torch.bfloat16)
    with beside.on(INDEX_QUERIES, latent):
        q = ops.fp8_linear(q_latent, *indexer.wq_b, a.q_norm, a.eps).unflatten(-1, (indexer.heads, -1))
        q, weights = ops.indexer_q(q, weights, indexer.weight_scale, indexer.freqs_cis, at.positions)
    with beside.on(INDEX_QUERIES, stored):
        table, lengths = at.index_table()
        ops.indexer_topk(
            q, weights.squeeze(-1), pages, table, lengths, indexer.topk, INDEX_PAGE, out=at.index_slots()
        )


def compress(
    c: Compressor, x: torch.Tensor, at: Pass, layer: int, pages: torch.Tensor, page_size: int, of_indexer: bool = False
) -> None:
    """Store the entries of blocks that end in this pass, Σ_i softmax_i(W_g x_i + ape_i) W_kv x_i, and keep the rest."""
    plans, is_decode, out_slots = at.plan(c.ratio)
    scores = ops.bf16_linear_fp32(x, c.projection)
    ring = at.ring(layer, c.ratio, of_indexer)
    entries = ops.compress(ring, scores, c.ape, plans, is_decode, c.head_dim, c.ratio)
    ops.compress_norm_rope_store(
        entries, plans[0], is_decode, c.ratio, c.norm, c.eps, c.freqs_cis, out_slots, pages, page_size
    )
