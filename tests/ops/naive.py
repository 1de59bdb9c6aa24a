"""Each op a second time: float64 loops that decode bytes by hand and share no code with the references.

The function of an op's name takes the op's arguments and returns, or writes in place, what the op does.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import torch
from naive_bytes import (
    E2M1,
    E4M3,
    Array,
    e8m0,
    indexer_fp8,
    indexer_store,
    indexer_vector,
    kv_store,
    kv_vector,
)


def bf16(x: Array) -> Array:
    return torch.from_numpy(np.asarray(x, np.float64)).bfloat16().double().numpy()


def f64(t: torch.Tensor) -> Array:
    return t.detach().double().cpu().numpy()


def raw(t: torch.Tensor) -> Array:
    return t.contiguous().view(torch.uint8).cpu().numpy()


def out(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x, np.float64))


def rounded(x: Any) -> torch.Tensor:
    return out(x).bfloat16()


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return np.where(x >= 0, x / (1 + np.exp(-np.abs(x))), x * np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def norm(x: Array, weight: Array | None, eps: float) -> Array:
    y = x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + eps)
    return y if weight is None else y * weight


def turned(x: Array, table: torch.Tensor, position: int, inverse: bool = False) -> Array:
    """The last 64 channels of x rotated."""
    y = x.copy()
    for i in range(32):
        z = complex(x[-64 + 2 * i], x[-63 + 2 * i])
        f = complex(table[position, i])
        z *= f.conjugate() if inverse else f
        y[-64 + 2 * i], y[-63 + 2 * i] = z.real, z.imag
    return y


def hadamard(x: Array) -> Array:
    n = len(x)
    signs = np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)])
    return signs @ x / math.sqrt(n)


def sinkhorn(mixes, scale, base, iters, eps):
    m, s, b = f64(mixes), f64(scale), f64(base)
    pre, post, comb = np.zeros((len(m), 4)), np.zeros((len(m), 4)), np.zeros((len(m), 4, 4))
    for t in range(len(m)):
        for j in range(4):
            pre[t, j] = sigmoid(m[t, j] * s[0] + b[j]) + eps
            post[t, j] = 2 * sigmoid(m[t, 4 + j] * s[1] + b[4 + j])
        c = [[m[t, 8 + 4 * j + k] * s[2] + b[8 + 4 * j + k] for k in range(4)] for j in range(4)]
        for j in range(4):
            e = [math.exp(v - max(c[j])) for v in c[j]]
            c[j] = [v / sum(e) + eps for v in e]
        for step in range(iters):
            if step:
                c = [[v / (sum(row) + eps) for v in row] for row in c]
            columns = [sum(c[j][k] for j in range(4)) + eps for k in range(4)]
            c = [[c[j][k] / columns[k] for k in range(4)] for j in range(4)]
        comb[t] = c
    return out(pre), out(post), out(comb)


def mixes_of(x, fn, rms_eps):
    v = f64(x.flatten(1))
    return out((v @ f64(fn).T) / np.sqrt((v * v).mean(-1, keepdims=True) + rms_eps))


def mhc_pre(x, fn, scale, base, *, iters=20, rms_eps=1e-6, hc_eps=1e-6, norm_weight=None, norm_eps=1e-6):
    pre, post, comb = sinkhorn(mixes_of(x, fn, rms_eps), scale, base, iters, hc_eps)
    streams = f64(x)
    y = np.zeros((len(streams), x.shape[2]))
    for t in range(len(y)):
        y[t] = bf16(sum(float(pre[t, j]) * streams[t, j] for j in range(4)))
        if norm_weight is not None:
            y[t] = bf16(norm(y[t], f64(norm_weight), norm_eps))
    return rounded(y), post, comb


def mhc_post(f, x, post, comb):
    y = np.zeros(x.shape)
    for t in range(len(y)):
        for k in range(4):
            y[t, k] = float(post[t, k]) * f64(f[t])
            for j in range(4):
                y[t, k] += float(comb[t, j, k]) * f64(x[t, j])
    return rounded(y)


def mhc_post_pre(f, x, post, comb, fn, scale, base, **options):
    streams = mhc_post(f, x, post, comb)
    return streams, *mhc_pre(streams, fn, scale, base, **options)


def mhc_head(x, fn, scale, base, *, rms_eps=1e-6, hc_eps=1e-6):
    weight = sigmoid(f64(mixes_of(x, fn, rms_eps)) * f64(scale) + f64(base)) + hc_eps
    return rounded(np.einsum("tj,tjh->th", weight, f64(x)))


def block_weight(w, scale):
    values = E4M3[raw(w)]
    if scale.dtype == torch.float32:
        scales = f64(scale)
    else:
        scales = np.vectorize(e8m0, otypes=[float])(raw(scale))
    rows, columns = np.indices(values.shape)
    return values * scales[rows // 128, columns // 128]


def fp8_linear(x, w, scale, norm_weight=None, eps=0.0):
    values = f64(x)
    if norm_weight is not None:
        rows = [bf16(norm(row, f64(norm_weight), eps)) for row in values]
        values = np.stack(rows) if rows else values
    return rounded(values @ block_weight(w, scale).T)


def fp8_grouped_linear(o, w, scale):
    y = [f64(o[:, g]) @ block_weight(w[g], scale[g]).T for g in range(w.shape[0])]
    return rounded(np.stack(y, 1))


def bf16_linear_fp32(x, w, dtype=torch.float32):
    y = f64(x) @ f64(w).T
    return out(y) if dtype == torch.float32 else rounded(y)


def swizzled(row, column, columns):
    """Where SM120 keeps the scale byte of a row and column."""
    tile, inside = row // 128 * 128 * columns + column // 4 * 512, row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return tile + inside


def unpacked(packed):
    data = raw(packed)
    values = np.zeros((data.shape[0], 2 * data.shape[1]))
    values[:, 0::2], values[:, 1::2] = E2M1[data & 15], E2M1[data >> 4]
    return values


def unswizzled(scale):
    rows, columns = np.indices(scale.shape)
    return raw(scale).reshape(-1)[swizzled(rows, columns, scale.shape[1])]


def mxfp4_moe(x, topk_ids, topk_weights, w13, s13, w2, s2, limit):
    def weight(packed, scale):
        exponents = unswizzled(scale).astype(int).repeat(32, -1)
        return unpacked(packed) * np.where(exponents > 191, 0.0, 2.0 ** np.minimum(exponents - 127, 64))

    return experts_of(x, topk_ids, topk_weights, limit, lambda e: (weight(w13[e], s13[e]), weight(w2[e], s2[e])))


def nvfp4_moe(x, topk_ids, topk_weights, w13, s13, g13, w2, s2, g2, limit):
    def weight(packed, scale):
        return unpacked(packed) * np.nan_to_num(E4M3[unswizzled(scale)]).repeat(16, -1)

    def matrices(e):
        first, (gate, up) = weight(w13[e], s13[e]), f64(g13[e])
        half = len(first) // 2
        return np.concatenate((first[:half] * up, first[half:] * gate)), weight(w2[e], s2[e]) * f64(g2[e])

    return experts_of(x, topk_ids, topk_weights, limit, matrices)


def experts_of(x, topk_ids, topk_weights, limit, matrices):
    tokens = f64(x)
    y = np.zeros_like(tokens)
    experts = {e: matrices(e) for e in set(topk_ids.flatten().tolist()) - {-1}}
    for t, ids in enumerate(topk_ids.tolist()):
        for slot, e in enumerate(ids):
            if e < 0:
                continue
            first, second = experts[e]
            up, gate = np.split(first @ tokens[t], 2)
            if limit is not None:
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            y[t] += float(topk_weights[t, slot]) * (second @ bf16(silu(gate) * up))
    return rounded(y)


def sparse_mla(
    q,
    window_pages,
    window_slots,
    window_lengths,
    window_page_size,
    extra_pages,
    extra_slots,
    extra_lengths,
    extra_page_size,
    sink,
    scale,
    freqs_cis=None,
    positions=None,
    q_eps=None,
):
    y = np.zeros(q.shape)
    for t in range(q.shape[0]):
        queries = f64(q[t])
        if q_eps is not None:
            queries = [turned(norm(head, None, q_eps), freqs_cis, int(positions[t])) for head in queries]
            queries = f64(torch.from_numpy(np.array(queries)).bfloat16())
        found = [(window_pages, window_slots[t, : window_lengths[t]].tolist(), window_page_size)]
        if extra_pages is not None:
            found.append((extra_pages, extra_slots[t, : extra_lengths[t]].tolist(), extra_page_size))
        keys = [kv_vector(pages, slot, size) for pages, slots, size in found for slot in slots if slot >= 0]
        for head in range(q.shape[1]):
            weights = [math.exp(scale * float(queries[head] @ k)) for k in keys]
            total = sum(weights) + math.exp(float(sink[head]))
            for weight, key in zip(weights, keys, strict=True):
                y[t, head] += weight / total * key
            if freqs_cis is not None:
                y[t, head] = turned(y[t, head], freqs_cis, int(positions[t]), True)
    return rounded(y)


def indexer_logits(q, weights, pages, page_table, lengths, page_size=64):
    y = np.full((q.shape[0], page_table.shape[1] * page_size), -np.inf)
    for t, length in enumerate(lengths.tolist()):
        queries = E4M3[raw(q[t])]
        for s in range(length):
            slot = int(page_table[t, s // page_size]) * page_size + s % page_size
            key, scale = indexer_vector(pages, slot, page_size)
            y[t, s] = scale * float(f64(weights[t]) @ np.maximum(queries @ key, 0))
    return out(y)


def topk_slots(logits, lengths, page_table, k, page_size=64, out=None):
    rows = logits.shape[0]
    slots = np.full((rows, k if out is None else out.shape[1]), -1)
    for t, length in enumerate(lengths.tolist()):
        order = sorted(range(length), key=lambda i: (-float(logits[t, i]), i))
        for i, entry in enumerate(sorted(order[:k])):
            slots[t, i] = int(page_table[t, entry // page_size]) * page_size + entry % page_size
    result = torch.from_numpy(slots).int()
    return result if out is None else out.copy_(result)


def indexer_topk(q, weights, pages, page_table, lengths, k, page_size=64, out=None):
    logits = indexer_logits(q, weights, pages, page_table, lengths, page_size)
    return topk_slots(logits, lengths, page_table, k, page_size, out)


def k_norm_rope_store(kv, weight, eps, freqs_cis, positions, slots, pages, page_size):
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k = turned(norm(f64(kv[t]), f64(weight), eps), freqs_cis, int(positions[t]))
            kv_store(pages, slot, page_size, k)


def indexer_q(q, weight, weight_scale, freqs_cis, positions):
    codes = torch.zeros(q.shape, dtype=torch.uint8)
    folded = torch.zeros((*q.shape[:2], 1), dtype=torch.float64)
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            values, scale = indexer_fp8(hadamard(turned(f64(q[t, head]), freqs_cis, int(positions[t]))))
            codes[t, head] = torch.tensor(values, dtype=torch.uint8)
            folded[t, head, 0] = float(weight[t, head]) * weight_scale * scale
    return codes.view(torch.float8_e4m3fn), folded


def score(logit: float) -> float:
    return math.sqrt(max(logit, 0) + math.log1p(math.exp(-abs(logit))))


def weigh(scores: list[float], normalise: bool = True) -> list[float]:
    return [s / sum(scores) for s in scores] if normalise else scores


def hash_topk(router_logits, input_ids, tid2eid):
    ids = [tid2eid[token].tolist() for token in input_ids.tolist()]
    weights = [weigh([score(float(router_logits[t, e])) for e in chosen]) for t, chosen in enumerate(ids)]
    shape = (len(ids), tid2eid.shape[1])
    return out(weights).view(shape), torch.tensor(ids, dtype=torch.int32).view(shape)


def router_topk(router_logits, correction_bias, k, renormalize=True):
    weights, ids = [], []
    for row in router_logits.tolist():
        # In fp32, as the op adds: float64 would break ties that fp32 has.
        total = [
            float(np.float32(score(v)) + np.float32(b)) for v, b in zip(row, correction_bias.tolist(), strict=True)
        ]
        ids.append(sorted(range(len(row)), key=lambda e: (-total[e], e))[:k])
        weights.append(weigh([score(row[e]) for e in ids[-1]], renormalize))
    return out(weights).view(-1, k), torch.tensor(ids, dtype=torch.int32).view(-1, k)


def sample_token(logits, temperature, noise):
    tokens, each = [], len(logits) // len(temperature)
    for row, t, e in zip(f64(logits), np.repeat(f64(temperature), each, 0), f64(noise), strict=True):
        scores = row / t - np.log(np.maximum(e, np.finfo(np.float32).tiny))
        scores = np.where(np.isnan(scores), -np.inf, scores).tolist()
        tokens.append(scores.index(max(scores)))
    return torch.tensor(tokens, dtype=torch.int32)


def clear_draft_states(layers, req_pool_indices, seq_lens, accept_lens, ring_size, num_draft_tokens):
    for request, length, accepted in zip(
        req_pool_indices.tolist(), seq_lens.tolist(), accept_lens.tolist(), strict=True
    ):
        for position in range(length + accepted, length + num_draft_tokens):
            for states in layers.states:
                slot = states[request * ring_size + position % ring_size]
                slot[: len(slot) // 2] = 0
                slot[len(slot) // 2 :] = -math.inf


def silu_mul_clamp(gate_up, limit):
    gate, up = np.split(f64(gate_up), 2, -1)
    return rounded(silu(np.minimum(gate, limit)) * np.clip(up, -limit, limit))


def ring_row(ratio, request, position, req_to_token, full_to_swa, swa_page_size, ring_size) -> int:
    if ratio == 128:
        return request * ring_size + position % ring_size
    slot = int(full_to_swa[int(req_to_token[request, position])])
    return slot // swa_page_size * ring_size + slot % ring_size


def rows_of(packed: list[bytes], size: int) -> torch.Tensor:
    return torch.tensor(list(b"".join(packed)), dtype=torch.uint8).view(-1, size)


def compress_prefill_plan(
    ratio, req_pool_indices, seq_lens, extend_lens, req_to_token, full_to_swa, swa_page_size, ring_size
):
    compress_rows, write_rows, ragged = [], [], 0
    window = 8 if ratio == 4 else 128
    for b, (seq_len, extend) in enumerate(zip(seq_lens.tolist(), extend_lens.tolist(), strict=True)):
        request = int(req_pool_indices[b])

        def row(position, request=request):
            return ring_row(ratio, request, position, req_to_token, full_to_swa, swa_page_size, ring_size)

        for j in range(extend):
            position = seq_len - extend + j
            if position % ratio == ratio - 1:
                missing = max(0, window - (j + 1))
                pages = (row(max(0, position - ratio)) // ratio, row(position) // ratio) if missing else (-1, b)
                compress_rows.append(struct.pack("<IHHii", position + 1, ragged, missing, *pages))
            block = position // ratio
            last = seq_len // ratio - (1 if ratio == 4 else 0)
            page_end = ratio == 4 and (position + 4) // swa_page_size > position // swa_page_size
            draft = position >= seq_len - {8: 0, 16: 10, 128: 0, 256: 130}[ring_size]
            if block >= last or page_end or draft:
                write_rows.append(struct.pack("<Ii", ragged, row(position)))
            ragged += 1
    return rows_of(compress_rows, 16), rows_of(write_rows, 8)


def compress_decode_plan(ratio, req_pool_indices, seq_lens, req_to_token, full_to_swa, swa_page_size, ring_size):
    packed = []
    for request, seq_len in zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True):
        now, before = (
            ring_row(ratio, request, p, req_to_token, full_to_swa, swa_page_size, ring_size)
            for p in (seq_len - 1, max(0, seq_len - 1 - ratio))
        )
        packed.append(struct.pack("<Iiii", seq_len, now, before // ratio, now // ratio))
    return rows_of(packed, 16)


def compress(kv_score_buffer, kv_score_input, ape, plans, is_decode, head_dim, ratio, out=None):
    ring = kv_score_buffer.view(-1, kv_score_buffer.shape[-1])
    result = torch.zeros((len(plans[0]), head_dim), dtype=torch.float64)
    window = 8 if ratio == 4 else 128

    def block(rows: list[Array], seq_len: int) -> torch.Tensor:
        kv, scores = [], []
        for i, row in enumerate(rows):
            parts = row.reshape(-1, head_dim)
            if ratio == 4:
                if i < 4 and seq_len == 4:
                    continue
                kv.append(parts[0 if i < 4 else 1])
                scores.append(parts[2 if i < 4 else 3] + f64(ape[i]))
            else:
                kv.append(parts[0])
                scores.append(parts[1] + f64(ape[i]))
        weight = np.exp(np.array(scores) - np.max(scores, 0))
        return torch.from_numpy((weight * np.array(kv)).sum(0) / weight.sum(0))

    if is_decode:
        for b, record in enumerate(plans[0]):
            seq_len, write, page_0, page_1 = struct.unpack("<Iiii", bytes(record.tolist()))
            ring[write] = kv_score_input[b]
            if seq_len % ratio == 0:
                old = [f64(ring[page_0 * ratio + i]) for i in range(window - ratio)]
                new = [f64(ring[page_1 * ratio + i]) for i in range(ratio)]
                result[b] = block(old + new, seq_len)
    else:
        for n, record in enumerate(plans[0]):
            seq_len, ragged, missing, page_0, page_1 = struct.unpack("<IHHii", bytes(record.tolist()))
            if seq_len == 2**32 - 1:
                continue
            rows = []
            for i in range(window):
                if i >= missing:
                    rows.append(f64(kv_score_input[ragged - window + 1 + i]))
                else:
                    rows.append(f64(ring[(page_0 if i < window - ratio else page_1) * ratio + i % ratio]))
            result[n] = block(rows, seq_len)
        for record in plans[1]:
            ragged, write = struct.unpack("<Ii", bytes(record.tolist()))
            if ragged != 2**32 - 1:
                ring[write] = kv_score_input[ragged]
    return result if out is None else out.copy_(result)


def compress_norm_rope_store(kv, plan, is_decode, ratio, norm_weight, eps, freqs_cis, out_slots, pages, page_size):
    for n, record in enumerate(plan):
        seq_len, ragged = struct.unpack("<IH", bytes(record.tolist()[:6]))
        if seq_len == 2**32 - 1 or seq_len % ratio:
            continue
        slot = int(out_slots[n if is_decode else ragged])
        entry = turned(norm(f64(kv[n]), f64(norm_weight), eps), freqs_cis, seq_len - ratio)
        if slot < 0:
            continue
        if len(entry) == 512:
            kv_store(pages, slot, page_size, entry)
        else:
            indexer_store(pages, slot, page_size, hadamard(entry))
