"""EAGLE's small kernels in torch, so that speculation runs on a CPU: one chain of drafts a request, no tree.

SGLang's worker calls kernels of Triton and CUDA between the forwards: they find cache slots, lay out the drafts for
verification, accept or sample tokens, and hand state to the next pass. Each function here does what the kernel of the
same name does, for tensors on a CPU. DeepSeek-V4 is served with `--speculative-eagle-topk 1` only, so each draft token
follows the one before it: draft `j` of request `i` is node `i * n + j` of the batch, and node 0 is the last token that
is already decided.

In the shapes B is requests, N nodes a request (draft tokens + 1), V the vocabulary. Any B works, 0 too.
"""

from __future__ import annotations

import torch
from torch import Tensor

FULL_MASK, QLEN_ONLY = 0, 1
"""Values of SGLang's TreeMaskMode: rows of the mask hold a request's whole context and its nodes, or its nodes only."""


def _table_cells(requests: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of `req_to_token` at the positions `start[i]` to `end[i] - 1` of each request, in that order."""
    start = start.long()
    lengths = end.long() - start
    before = lengths.cumsum(0) - lengths
    columns = torch.arange(int(lengths.sum())) + (start - before).repeat_interleave(lengths)
    return requests.long().repeat_interleave(lengths), columns


def assign_extend_cache_locs(req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Slots of the positions `start[i]` to `end[i] - 1` of each request, one request after the other.

    Args:
        req_pool_indices: [B] int64, rows of `req_to_token`.
        req_to_token: [requests, positions] int32, the slot of each position.
        start, end: [B] int32 or int64, positions.

    Returns:
        [sum(end - start)] int64.
    """
    return req_to_token[_table_cells(req_pool_indices, start, end)].long()


def assign_draft_cache_locs(
    req_pool_indices: Tensor, req_to_token: Tensor, seq_lens: Tensor, out_cache_loc: Tensor, width: int
) -> None:
    """Write the slots of the `width` positions behind each request's tokens into `out_cache_loc` ([B * width] int64).

    The other arguments are those of `assign_extend_cache_locs`, `seq_lens` its `start`.
    """
    out_cache_loc.copy_(assign_extend_cache_locs(req_pool_indices, req_to_token, seq_lens, seq_lens + width))


def assign_req_to_token_pool(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out_cache_loc: Tensor
) -> None:
    """Enter new slots in `req_to_token` (in place): the inverse of `assign_extend_cache_locs`.

    Args:
        out_cache_loc: [at least sum(end - start)] int64; what is behind that is not read.
    """
    cells = _table_cells(req_pool_indices, start, end)
    req_to_token[cells] = out_cache_loc[: len(cells[0])].to(req_to_token.dtype)


def build_chain_tree(
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    mask_mode: int,
) -> None:
    """Lay out one chain of N nodes a request for verification; every tensor but the first is written.

    Args:
        seq_lens: [B] int, tokens of each request before its nodes.
        tree_mask: [at least its cells] bool, which node sees which, one request after the other. FULL_MASK: N rows of
            `seq_lens[i] + N` cells, of which only the last N are written; QLEN_ONLY: N rows of N cells.
        positions: [B * N] int64.
        retrieve_index, retrieve_next_token, retrieve_next_sibling: [B, N] int64: number of the node in the batch, of
            the next node in the request (-1 behind the last), and of another node with the same parent (always -1).
        mask_mode: FULL_MASK or QLEN_ONLY.

    Raises:
        ValueError: the mask has another layout.
    """
    if mask_mode not in (FULL_MASK, QLEN_ONLY):
        raise ValueError(f"The tree mask has mode {mask_mode!r}, but a CPU writes FULL_MASK or QLEN_ONLY: use these.")
    (b, n), lengths = retrieve_index.shape, seq_lens.long()
    node = torch.arange(n)
    positions.copy_((lengths[:, None] + node).flatten())
    retrieve_index.copy_(torch.arange(b * n).view(b, n))
    retrieve_next_token.copy_(torch.where(node + 1 < n, node + 1, -1).expand(b, n))
    retrieve_next_sibling.fill_(-1)
    prefix = lengths if mask_mode == FULL_MASK else torch.zeros_like(lengths)
    row = prefix + n
    first = (row.cumsum(0) - row) * n + prefix
    cells = first[:, None, None] + node[:, None] * row[:, None, None] + node
    tree_mask[cells] = node <= node[:, None]


def verify_chain_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    target_predict: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept the drafts that are the target's own greedy tokens, up to the first that is not.

    Returns the first three, which it writes.

    Args:
        predicts: [B * N] int32, gets the target's token at each accepted node.
        accept_index: [B, W] int32, gets the accepted nodes' numbers in the batch, then -1; W - 1 drafts at most.
        accept_token_num: [B] int32, gets how many drafts were accepted.
        candidates: [B, N] int64, the nodes' tokens.
        retrieve_index: [B, N] int64 of `build_chain_tree`.
        target_predict: [B, N] int64, the target's token behind each node.
    """
    drafts = accept_index.shape[1] - 1
    accepted = _leading(candidates[:, 1 : drafts + 1] == target_predict[:, :-1][:, :drafts])
    _commit(predicts, accept_index, accept_token_num, retrieve_index, target_predict, accepted)
    return predicts, accept_index, accept_token_num


def sample_chain_target_only(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
) -> None:
    """Accept drafts and sample the token behind them, so that the tokens follow the target's distribution.

    A draft is kept with the target's probability of it. Where one is refused, the token is drawn from the rest of the
    target's distribution; behind the last draft, from all of it. Thresholds below 1 keep more drafts than that.

    Args:
        predicts, accept_index, accept_token_num, candidates, retrieve_index: as in `verify_chain_greedy`; `predicts`
            gets the draft behind each accepted node, and the sampled token at the last.
        uniform_samples: [B, N] fp32 in [0, 1), decides about the draft behind each node.
        uniform_samples_for_final_sampling: [B] fp32 in [0, 1).
        target_probs: [B, N, V] fp32, the target's distribution behind each node; each sums to 1.
        threshold_single: a draft of at least this probability is kept always.
        threshold_acc: drafts are kept with their probability divided by this.
    """
    row = torch.arange(len(candidates))
    drafts = candidates[:, 1:][:, : accept_index.shape[1] - 1].long()
    count = drafts.shape[1]
    chance = target_probs[:, :count].gather(2, drafts.unsqueeze(2)).squeeze(2)
    lucky = (uniform_samples[:, :count] < chance / max(threshold_acc, 1e-9)) | (chance >= threshold_single)
    accepted = _leading(lucky & (chance > 0))
    rest = target_probs[row, accepted].double()
    refused = accepted < count
    rest[row[refused], drafts[refused, accepted[refused]]] = 0
    tokens = torch.cat([drafts, drafts.new_zeros(len(drafts), candidates.shape[1] - count)], 1)
    tokens[row, accepted] = _draw(rest, uniform_samples_for_final_sampling)
    _commit(predicts, accept_index, accept_token_num, retrieve_index, tokens, accepted)


def _leading(good: Tensor) -> Tensor:
    """How many entries of each row come before its first False: [B] int64 of [B, …] bool."""
    return good.long().cumprod(1).sum(1)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """An index of each row by its weights ([B, V] fp64 and [B] in [0, 1) to [B] int64), never one of weight 0."""
    cumulative = weights.cumsum(1)
    # In fp64 the product stays below the total for every fp32 number below 1.
    return torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def _commit(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    retrieve_index: Tensor,
    tokens: Tensor,
    accepted: Tensor,
) -> None:
    """Write a verification's outputs: `accepted` ([B]) drafts, and `tokens` ([B, N] int64) behind the nodes."""
    kept = torch.arange(tokens.shape[1]) <= accepted[:, None]
    predicts[retrieve_index[kept]] = tokens[kept].to(predicts.dtype)
    nodes = torch.where(kept, retrieve_index, -1)[:, : accept_index.shape[1]]
    accept_index.fill_(-1)
    accept_index[:, : nodes.shape[1]] = nodes.to(accept_index.dtype)
    accept_token_num.copy_(accepted)


def top_k_renorm_prob(probs: Tensor, top_ks: Tensor) -> Tensor:
    """Keep the `top_ks[i]` largest probabilities of each row, of equal ones the first, summing to 1.

    So a greedy request, which SGLang gives a k of 1 beside sampled ones, gets the token that argmax takes.

    Args:
        probs: [rows, V] fp32.
        top_ks: [rows] int, at least 1; more than V keeps all.

    Returns:
        [rows, V] fp32.
    """
    ordered, order = probs.sort(dim=1, descending=True, stable=True)
    return _kept(ordered, order, torch.arange(probs.shape[1]) < top_ks[:, None])


def top_p_renorm_prob(probs: Tensor, top_ps: Tensor) -> Tensor:
    """Keep the fewest largest probabilities of each row that reach `top_ps[i]`, of equal ones the first, summing to 1.

    Args:
        probs: [rows, V] fp32, each row sums to 1.
        top_ps: [rows] fp32, above 0; 1 keeps all.

    Returns:
        [rows, V] fp32.
    """
    ordered, order = probs.sort(dim=1, descending=True, stable=True)
    before = ordered.double().cumsum(1) - ordered
    # A head whose sum rounds to 1 must not cut the tail of a row that keeps all.
    return _kept(ordered, order, (before < top_ps[:, None]) | (top_ps[:, None] >= 1))


def _kept(ordered: Tensor, order: Tensor, keep: Tensor) -> Tensor:
    """Sorted probabilities back in their places, those not to `keep` as 0, each row divided by its sum."""
    kept = torch.where(keep, ordered, 0.0)
    return torch.zeros_like(kept).scatter_(1, order, kept / kept.sum(1, keepdim=True))


def fill_bonus_tokens(accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, width: int) -> None:
    """Write the last token that each request's verification decided.

    Args:
        accept_tokens: [B, width] int32, decided tokens from the left.
        accept_lens: [B] int32, how many they are, at least 1.
        bonus_tokens: [B] int32, written.
    """
    last = torch.arange(len(accept_lens)) * width + accept_lens - 1
    bonus_tokens.copy_(accept_tokens.flatten()[last])


def gather_spec_extras(
    indices: Tensor, topk_p: Tensor, topk_index: Tensor, output_tokens: Tensor, hidden_states: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows `indices` ([B] int) of each buffer ([requests, …]): what the last pass left for each request."""
    i = indices.long()
    return topk_p[i], topk_index[i], output_tokens[i], None if hidden_states is None else hidden_states[i]
