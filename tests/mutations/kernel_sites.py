"""The mutations of Triton kernels, and of how they are launched."""

from __future__ import annotations

from mutations.mutation import (
    ATTENTION,
    CLEARING,
    COMPILED,
    DRAW,
    EXPERTS,
    INDEXER,
    LINEARS,
    MIXING,
    MXFP8,
    NEEDED,
    NVFP4,
    PTX,
    REFUSALS,
    ROUTER,
    SCALES,
    SCRATCH,
    STREAMS,
    TOPK,
    Mutation,
)

KERNELS = (
    Mutation(
        "page stride assumed", "KV pages, Triton", "ops/_pages_triton.py",
        (("page * page_stride", "page * ((page_size * (ROW + FOOTER) + ROW - 1) // ROW * ROW)"),), ATTENTION,
    ),
    Mutation(
        "page stride assumed", "index keys, Triton", "ops/indexer_logits/triton.py",
        (("page.to(tl.int64) * page_stride", "page.to(tl.int64) * (PAGE * (DIM + SCALE))"),), INDEXER,
    ),
    Mutation(
        "int32 offset", "KV pages, Triton", "ops/_pages_triton.py",
        (("(slot // page_size).to(tl.int64)", "slot // page_size"),), ATTENTION,
    ),
    Mutation(
        "int32 offset", "index keys, Triton", "ops/indexer_logits/triton.py",
        (("page.to(tl.int64) * page_stride", "page * page_stride"),), INDEXER,
    ),
    Mutation(
        "indexer off by one block", "Triton", "ops/topk_slots/triton.py",
        (("logits + entry, mask=live,", "logits + entry - 1, mask=live & (entry > 0),"),), INDEXER,
    ),
    Mutation(
        "scale of an index key dropped", "Triton", "ops/indexer_logits/triton.py",
        (("weight[None, :], 1) * factor", "weight[None, :], 1)"),), INDEXER,
    ),
    Mutation(
        "comb transposed", "exit of a block, Triton", "ops/_mhc_triton.py",
        (
            ("c = comb + row * 16 + k", "c = comb + row * 16 + 4 * k"),
            ("tl.load(c + 4), x1", "tl.load(c + 1), x1"),
            ("tl.load(c + 8), x2", "tl.load(c + 2), x2"),
            ("tl.load(c + 12), x3", "tl.load(c + 3), x3"),
        ),
        MIXING,
    ),
    Mutation(
        "comb transposed", "exit and entry in one, Triton", "ops/_mhc_triton.py",
        (
            ("c00, c01, c02, c03 =", "c00, c10, c20, c30 ="),
            ("c10, c11, c12, c13 =", "c01, c11, c21, c31 ="),
            ("c20, c21, c22, c23 =", "c02, c12, c22, c32 ="),
            ("c30, c31, c32, c33 =", "c03, c13, c23, c33 ="),
        ),
        MIXING,
    ),
    Mutation(
        "one Sinkhorn iteration too few", "Triton", "ops/_sinkhorn_triton.py",
        (("range(ITERS - 1)", "range(ITERS - 2)"),), MIXING,
    ),
    Mutation(
        "one Sinkhorn iteration instead of 20", "Triton", "ops/_sinkhorn_triton.py",
        (("range(ITERS - 1)", "range(0)"),), MIXING,
    ),
    Mutation(
        "post is sigmoid(...) instead of 2 sigmoid(...)", "entry of a block, Triton", "ops/_mhc_triton.py",
        (("2.0 * gate, mask=live[:, None]", "gate, mask=live[:, None]"),), MIXING,
    ),
    Mutation(
        "nibbles swapped", "experts, Triton (as interpreted; on a GPU it is PTX)", "ops/mxfp4_moe/grouped.py",
        (
            (
                "return w0 * factor, w1 * factor, w2 * factor, w3 * factor",
                "return w1 * factor, w0 * factor, w3 * factor, w2 * factor",
            ),
        ),
        EXPERTS,
    ),
    Mutation(
        "nibbles swapped", "experts, PTX", "ops/mxfp4_moe/grouped.py",
        (
            ("NIBBLE_0 = _nibble(0, 0x000F000F, 0x1040)", "NIBBLE_0 = _nibble(0, 0x00F000F0, 0x104)"),
            ("NIBBLE_1 = _nibble(0, 0x00F000F0, 0x104)", "NIBBLE_1 = _nibble(0, 0x000F000F, 0x1040)"),
        ),
        PTX,
    ),
    Mutation(
        "PTX of another arithmetic", "experts, a bit too many", "ops/mxfp4_moe/grouped.py",
        (("and.b32 a, a, 0x81C081C0", "and.b32 a, a, 0x83C083C0"),), PTX,
    ),
    Mutation(
        "PTX of another arithmetic", "two bf16 of fp32, halves exchanged", "ops/_mhc_triton.py",
        (("cvt.rn.bf16x2.f32 $1, b, a;", "cvt.rn.bf16x2.f32 $1, a, b;"),), PTX,
    ),
    Mutation(
        "PTX of another arithmetic", "fp32 rounded to bf16, a bit too few", "ops/_mhc_triton.py",
        (("and.b32 $1, t, 0xFFFF0000;", "and.b32 $1, t, 0xFFFE0000;"),), PTX,
    ),
    Mutation(
        "PTX of another arithmetic", "exit of a block, of both rows the first's product", "ops/_mhc_triton.py",
        (("mul.rn.f32 b, $2, $4;", "mul.rn.f32 b, $2, $3;"),), PTX,
    ),
    Mutation(
        "interpreter's arithmetic on a GPU", "experts, Triton", "ops/mxfp4_moe/triton.py",
        (('"ASM": x.device.type != "cpu"', '"ASM": False'),), COMPILED,
    ),
    Mutation(
        "rows of the last expert lost", "where its rows end, Triton", "ops/mxfp4_moe/grouped.py",
        (("tl.store(offsets_ptr + E, begin + count)", "tl.store(offsets_ptr + E, begin)"),), EXPERTS,
    ),
    Mutation(
        "scale exponent off by one", "experts, Triton", "ops/mxfp4_moe/grouped.py",
        (("(exponent + 63) << 7", "(exponent + 64) << 7"),), EXPERTS,
    ),
    Mutation(
        "gate and up swapped", "experts, Triton", "ops/mxfp4_moe/tiles.py",
        (("half = 1 - row // 8 % 2", "half = row // 8 % 2"),), EXPERTS,
    ),
    Mutation(
        "rows of an expert lost", "more than half a tile in one of half, Triton", "ops/mxfp4_moe/tiles.py",
        (("if count <= T // 2:\n            _gate_up_tile(", "if count <= T:\n            _gate_up_tile("),), EXPERTS,
    ),
    Mutation(
        "rows of an expert lost", "downs of more than half a tile in one of half, Triton", "ops/mxfp4_moe/tiles.py",
        (("if count <= T // 2:\n            _down_tile(", "if count <= T:\n            _down_tile("),), EXPERTS,
    ),
    Mutation(
        "scale of another block", "the first of four for all, Triton", "ops/mxfp4_moe/grouped.py",
        (("tl.arange(0, 4) * 8)", "tl.arange(0, 4) * 0)"),), EXPERTS,
    ),
    Mutation(
        "scale of another row", "experts by few rows, Triton", "ops/mxfp4_moe/grouped.py",
        (("place // 128 * 128 + place % 4 * 32 + place % 128 // 4", "place"),), EXPERTS,
    ),
    Mutation(
        "scale of another row", "experts by many rows, Triton", "ops/mxfp4_moe/grouped.py",
        (("(place % 32 * 16 + place % 128 // 32 * 4)", "place % 128 * 4"),), EXPERTS,
    ),
    Mutation(
        "scale exponent off by one", "KV pages, Triton", "ops/_pages_triton.py",
        (("kv_scale_bytes(scales, FIRST, 1) - 127", "kv_scale_bytes(scales, FIRST, 1) - 126"),), ATTENTION,
    ),
    Mutation(
        "scale of a key clamped", "small keys, Triton", "ops/_pages_triton.py",
        ((" - 127, -24), 15)", " - 127, -15), 15)"),), ATTENTION,
    ),
    Mutation(
        "scale of a key clamped", "large keys, Triton", "ops/_pages_triton.py",
        ((" - 127, -24), 15)", " - 127, -24), 6)"),), ATTENTION,
    ),
    Mutation(
        "scale exponent off by one", "FP8 linears, Triton", "ops/_arithmetic.py",
        (("wide << 23", "(wide + 1) << 23"),), SCALES,
    ),
    Mutation(
        "sink dropped", "Triton", "ops/sparse_mla/triton.py",
        (("total * shrink + tl.exp2(bias - peak)", "total * shrink"),), ATTENTION,
    ),
    Mutation(
        "mass in a row of no length", "a length of 0 read as 1, Triton", "ops/sparse_mla/triton.py",
        (("tl.load(window_lengths + row).to(tl.int32)", "tl.maximum(tl.load(window_lengths + row).to(tl.int32), 1)"),),
        ATTENTION,
    ),
    Mutation(
        "mass in a row of no length", "neither candidate nor sink, Triton", "ops/sparse_mla/triton.py",
        (("tl.where(whole > 0, shrink / whole, 0.0)", "shrink / whole"),), ATTENTION,
    ),
    Mutation(
        "mass in an absent slot", "score 0 instead of none, Triton", "ops/sparse_mla/triton.py",
        (('scores * (scale * LOG2E), float("-inf"))', "scores * (scale * LOG2E), 0.0)"),), ATTENTION,
    ),
    Mutation(
        "inverse RoPE missing", "Triton turns forwards", "ops/sparse_mla/triton.py",
        (("+ imaginary * sin, imaginary * cos - real", "- imaginary * sin, imaginary * cos + real"),), ATTENTION,
    ),
    Mutation(
        "query norm missing", "of each head, Triton", "ops/sparse_mla/triton.py",
        (("to_bf16(value * factor[:, None])", "to_bf16(value)"),), ATTENTION,
    ),
    Mutation(
        "queries turned backwards", "Triton", "ops/sparse_mla/triton.py",
        (("-sin, sin)", "sin, -sin)"),), ATTENTION,
    ),
    Mutation(
        "first group for every group", "grouped FP8 linear by TMA", "ops/_linear_triton.py",
        (("x.load([m_first, group * K + start])", "x.load([m_first, start])"),), LINEARS,
    ),
    Mutation(
        "first group for every group", "its weights", "ops/_linear_triton.py",
        (("w.load([group * N + first, start])", "w.load([first, start])"),), LINEARS,
    ),
    Mutation(
        "query norm missing", "one row, Triton", "ops/_linear_triton.py",
        (("value = _rms_norm(value, norm, eps, K).to(tl.float32)", "value = value * norm"),), LINEARS,
    ),
    Mutation(
        "query norm missing", "more rows, Triton", "ops/_linear_triton.py",
        (('if norm is not None and c.kernel != "gemv":', "if False:"),), LINEARS,
    ),
    Mutation(
        "window off by one", "last slot of a list, Triton", "ops/sparse_mla/triton.py",
        (("(offset < count)", "(offset < count - 1)"),), ATTENTION,
    ),
    Mutation(
        "routed weight scaled twice", "experts, Triton", "ops/mxfp4_moe/tiles.py",
        (("total += weight * tl.load", "total += weight * weight * tl.load"),), EXPERTS,
    ),
    Mutation(
        "routed weight scaled twice", "router, Triton", "ops/router_topk/triton.py",
        (("tl.store(weights_ptr + out, weights,", "tl.store(weights_ptr + out, weights * 1.5,"),), EXPERTS,
    ),
    Mutation(
        "the six routing weights are not divided by their sum", "router, Triton", "ops/router_topk/triton.py",
        (("if RENORMALIZE:", "if False:"),), ROUTER,
    ),
    Mutation(
        "draw without its temperature", "Triton", "ops/sample_token/triton.py",
        (("logits / tl.load(temperature_ptr + row // each)", "logits"),), DRAW,
    ),
    Mutation(
        "each row of a verification has a temperature of its own", "Triton", "ops/sample_token/triton.py",
        (("temperature_ptr + row // each", "temperature_ptr + row"),), DRAW,
    ),
    Mutation(
        "NaN drawn", "Triton", "ops/sample_token/triton.py",
        (("scores == scores, scores, -float(", "scores == scores, scores, float("),), DRAW,
    ),
    Mutation(
        "draw of the last of equal tokens", "Triton", "ops/sample_token/triton.py",
        (
            (
                "_, part = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)",
                "part = tl.max(tl.where(best == tl.max(best, axis=0), lane, -1), axis=0)",
            ),
        ),
        DRAW,
    ),
    Mutation(
        "first refused draft stays in the ring", "Triton", "ops/clear_draft_states/triton.py",
        (("offset >= tl.load(accept_lens", "offset > tl.load(accept_lens"),), CLEARING,
    ),
    Mutation(
        "refused drafts cleared behind their ring's end", "Triton", "ops/clear_draft_states/triton.py",
        (("to(tl.int64) + offset) % ring_size", "to(tl.int64)) % ring_size + offset"),), CLEARING,
    ),
    Mutation(
        "refused drafts of the first layer alone cleared", "Triton", "ops/clear_draft_states/triton.py",
        (("addresses + tl.program_id(2)", "addresses"),), CLEARING,
    ),
    Mutation(
        "stale scratch", "merge reads parts that nobody wrote, Triton", "ops/sparse_mla/triton.py",
        (('live = top > float("-inf")', "live = part < splits"),), ATTENTION,
    ),
    Mutation(
        "factor of the first expert", "NVFP4, gate and up, Triton", "ops/mxfp4_moe/tiles.py",
        (("factors_ptr += expert * 2", "factors_ptr += 0"),), NVFP4,
    ),
    Mutation(
        "factor of an expert dropped", "NVFP4, down at one row, Triton", "ops/mxfp4_moe/tiles.py",
        (("weight = weight * tl.load(factors_ptr + expert,", "weight += 0 * tl.load(factors_ptr + expert,"),), NVFP4,
    ),
    Mutation(
        "NaN taken for a scale", "NVFP4, Triton", "ops/mxfp4_moe/grouped.py",
        (("tl.abs(value) <= 448", "tl.abs(value) <= 480"),), NVFP4,
    ),
    Mutation(
        "stale scratch", "sum reads absent experts' slots, Triton", "ops/mxfp4_moe/tiles.py",
        (("mask=inside & chosen,", "mask=inside,"),), EXPERTS,
    ),
    Mutation(
        "stale scratch", "tournament reads what no tile handed on, Triton", "ops/topk_slots/triton.py",
        (("    live = (own // K * TILE + own % K) < length", "    live = own < tiles * K"),), INDEXER,
    ),
    Mutation(
        "scratch overrun", "more parts than it was made for, Triton", "ops/sparse_mla/triton.py",
        (("min(blocks, MAX_SPLITS, slots // max(programs, 1))", "min(blocks, MAX_SPLITS)"),), ATTENTION,
    ),
    Mutation(
        "one tie too many", "many rows, Triton", "ops/topk_slots/streamed.py",
        (("places(keys, before, threshold, K - greater)", "places(keys, before, threshold, K - greater + 1)"),), TOPK,
    ),
    Mutation(
        "keys beyond a tile left out", "handed on by many tiles, Triton", "ops/topk_slots/triton.py",
        (("again = _handed_on(width, k, tile)", "again = min(_handed_on(width, k, tile), LARGEST_TILE)"),), TOPK,
    ),
    Mutation(
        "more keys than a program has registers for", "handed on by many tiles, Triton", "ops/topk_slots/triton.py",
        (("if size > LARGEST_TILE:", "if False:"),), NEEDED,
    ),
    Mutation(
        "call that no graph can hold", "top-k of V4-Pro's full context, Triton", "ops/topk_slots/triton.py",
        (("MOST_HANDED_ON = 2 * LARGEST_TILE", "MOST_HANDED_ON = LARGEST_TILE"),), REFUSALS,
    ),
    Mutation(
        "scale off by one", "weights for SM120's block-scaled tensor cores, Triton", "ops/mxfp4_moe/mxfp8.py",
        (("exponent + (SHIFT + 6)", "exponent + (SHIFT + 5)"),), MXFP8,
    ),
    Mutation(
        "operands of another format", "index scores, Triton", "ops/indexer_logits/triton.py",
        (("FP8=c.fp8", "FP8=False"),), INDEXER,
    ),
    Mutation(
        "scratch shared by two streams", "keyed without the stream", "kernels.py",
        (("torch.cuda.current_stream(device).cuda_stream)", "0)"),), SCRATCH,
    ),
    Mutation(
        "scratch of too few streams", "of what runs beside the step", "ops/fp8_linear/spec.py",
        (("streams=2", "streams=1"),), STREAMS,
    ),
)  # fmt: skip
