"""Deliberate defects, each one change of the source: what a port of this model gets wrong, and where.

Most are made in a Triton kernel, where parity in the interpreter must notice, and again in what the kernels are held
against (torch references, byte formats, the oracle), where examples by hand and the second readings must.
"""

from __future__ import annotations

import re

from mutations.kernel_sites import KERNELS
from mutations.mutation import (
    ATTENTION,
    CLEARED,
    CLEARING,
    COMPRESSOR,
    DRAFT,
    DRAFTER,
    DRAW,
    DSPARK_PLAN,
    EXPERTS,
    HASHED,
    INDEXER,
    LINEARS,
    MIXING,
    NVFP4,
    NVFP4_MODEL,
    ORACLE,
    PACKAGES,
    PAGES,
    PLUGIN,
    REFUSALS,
    ROOT,
    ROTATION,
    ROUTER,
    SAMPLER,
    SCALES,
    STEP,
    STREAMS,
    Mutation,
    Stale,
)

from sglang_sm120_reference.defects import Defect

_REFERENCES = (
    Mutation(
        "page stride assumed", "page formats", "formats/_pool.py",
        (("(pages.stride(0), width, 1)", "(pages.shape[1], width, 1)"),), PAGES,
    ),
    Mutation(
        "indexer off by one block", "torch reference", "ops/topk_slots/__init__.py",
        (("logits.masked_fill(~inside", "logits.roll(1, 1).masked_fill(~inside"),), INDEXER,
    ),
    Mutation(
        "scale of an index key dropped", "torch reference", "ops/indexer_logits/__init__.py",
        ((".squeeze(1) * scale[index]", ".squeeze(1)"),), INDEXER,
    ),
    Mutation(
        "RoPE on the first 64 channels", "torch reference", "ops/_math.py",
        (
            (
                "torch.cat((x[..., :-64], rotate(x[..., -64:], freqs_cis, positions)), dim=-1)",
                "torch.cat((rotate(x[..., :64], freqs_cis, positions), x[..., 64:]), dim=-1)",
            ),
        ),
        ROTATION,
    ),
    Mutation(
        "query norm missing", "torch reference", "ops/fp8_linear/__init__.py",
        (("if norm_weight is not None:", "if False:"),), LINEARS,
    ),
    Mutation(
        "query norm missing", "of each head, torch reference", "ops/sparse_mla/__init__.py",
        (("rms_norm(q, None, q_eps)", "q.float()"),), ATTENTION,
    ),
    Mutation(
        "queries turned backwards", "torch reference", "ops/sparse_mla/__init__.py",
        (("q_eps), freqs_cis, positions)", "q_eps), freqs_cis.conj(), positions)"),), ATTENTION,
    ),
    Mutation(
        "inverse RoPE missing", "torch reference turns forwards", "ops/sparse_mla/__init__.py",
        (("positions[rows], inverse=True)", "positions[rows])"),), ATTENTION,
    ),
    Mutation(
        "comb transposed", "torch reference", "ops/mhc_post/__init__.py",
        (("comb.float().transpose(1, 2) @", "comb.float() @"),), MIXING,
    ),
    Mutation(
        "one Sinkhorn iteration too few", "torch reference", "ops/_math.py",
        (("range(iters - 1)", "range(iters - 2)"),), MIXING,
    ),
    Mutation(
        "one Sinkhorn iteration instead of 20", "torch reference", "ops/_math.py",
        (("range(iters - 1)", "range(0)"),), MIXING,
    ),
    Mutation(
        "post is sigmoid(...) instead of 2 sigmoid(...)", "torch reference", "ops/_math.py",
        (("post = 2 * torch.sigmoid(", "post = torch.sigmoid("),), MIXING,
    ),
    Mutation(
        "one Sinkhorn iteration too few", "oracle", "reference/blocks.py",
        (("range(iterations - 1)", "range(iterations - 2)"),), ORACLE,
    ),
    Mutation(
        "nibbles swapped", "MXFP4 format", "formats/mxfp4.py",
        (("(bits & 15, bits >> 4)", "(bits >> 4, bits & 15)"),), SCALES,
    ),
    Mutation(
        "gate and up swapped", "experts, torch reference", "ops/mxfp4_moe/__init__.py",
        (("up, gate = (x[row]", "gate, up = (x[row]"),), EXPERTS,
    ),
    Mutation(
        "gate and up swapped", "experts from SGLang's CPU layout", "formats/experts.py",
        (("Experts(w13.roll(inter, 1), s13", "Experts(w13, s13"),), SCALES,
    ),
    Mutation(
        "scale of another row", "experts, torch reference", "ops/mxfp4_moe/__init__.py",
        (("mxfp4.unswizzle_scales(e8m0.scale_bytes(scale))", "e8m0.scale_bytes(scale)"),), EXPERTS,
    ),
    Mutation(
        "scale of another row", "swizzled scales", "formats/mxfp4.py",
        ((".unflatten(-3, (-1, 4, 32))", ".unflatten(-3, (-1, 32, 4)).transpose(-3, -4)"),), SCALES,
    ),
    Mutation(
        "ring of ratio 128 by window page", "plan format", "formats/compress_plan.py",
        (("if self.ratio == 128:", "if False:"),), COMPRESSOR,
    ),
    Mutation(
        "a c4 entry pools its own 4 tokens only", "torch reference", "ops/compress/__init__.py",
        (("old[:, :, 2].masked_fill(first, -torch.inf)", "torch.full_like(old[:, :, 2], -torch.inf)"),), COMPRESSOR,
    ),
    Mutation(
        "the compressor's gate has no position term", "torch reference", "ops/compress/__init__.py",
        (("(score + ape.float()).softmax(1)", "score.softmax(1)"),), COMPRESSOR,
    ),
    Mutation(
        "scale exponent off by one", "E8M0 format", "formats/e8m0.py",
        ((".view(torch.float8_e8m0fnu).float()", ".view(torch.float8_e8m0fnu).float() * 2"),), SCALES,
    ),
    Mutation(
        "sink dropped", "torch reference", "ops/sparse_mla/__init__.py",
        ((" + torch.exp(sink.float().view(1, -1, 1) - top)", ""),), ATTENTION,
    ),
    Mutation(
        "mass in a row of no length", "a length of 0 read as 1, torch reference", "ops/sparse_mla/__init__.py",
        (("< lengths.unsqueeze(1))", "< lengths.clamp(min=1).unsqueeze(1))"),), ATTENTION,
    ),
    Mutation(
        "mass in a row of no length", "neither candidate nor sink, torch reference", "ops/sparse_mla/__init__.py",
        ((".masked_fill(~live.any(-1, keepdim=True), 0)", ""),), ATTENTION,
    ),
    Mutation(
        "window off by one", "last slot of a list, torch reference", "ops/sparse_mla/__init__.py",
        (("< lengths.unsqueeze(1))", "< lengths.unsqueeze(1) - 1)"),), ATTENTION,
    ),
    Mutation(
        "entry visible before its block ends", "prefill plan", "ops/compress_prefill_plan/__init__.py",
        (("((position + 1) % ratio == 0)", "((position + 2) % ratio == 0)"),), COMPRESSOR,
    ),
    Mutation(
        "entry visible before its block ends", "decode step", "ops/compress/__init__.py",
        (("decode.seq_len % ratio == 0", "(decode.seq_len + 1) % ratio == 0"),), COMPRESSOR,
    ),
    Mutation(
        "entry visible before its block ends", "store", "ops/compress_norm_rope_store/__init__.py",
        (("done = seq_len % ratio == 0", "done = (seq_len + 1) % ratio == 0"),), COMPRESSOR,
    ),
    Mutation(
        "routed weight scaled twice", "router, torch reference", "ops/router_topk/__init__.py",
        (("return weights, ids", "return weights * 1.5, ids"),), EXPERTS,
    ),
    Mutation(
        "the six routing weights are not divided by their sum", "router, torch reference",
        "ops/router_topk/__init__.py", (("if renormalize:", "if False:"),), ROUTER,
    ),
    Mutation(
        "first refused draft stays in the ring", "torch reference", "ops/clear_draft_states/__init__.py",
        (("offset >= accept_lens", "offset > accept_lens"),), CLEARING,
    ),
    Mutation(
        "refused drafts cleared behind their ring's end", "torch reference", "ops/clear_draft_states/__init__.py",
        (("[:, None] + offset) % ring_size", "[:, None]) % ring_size + offset"),), CLEARING,
    ),
    Mutation(
        "draw without its temperature", "torch reference", "ops/sample_token/__init__.py",
        (("scores = logits / temperature", "scores = logits"),), DRAW,
    ),
    Mutation(
        "the six routing weights are not divided by their sum", "hash layers, torch reference",
        "ops/hash_topk/__init__.py", (("return scores / scores.sum(-1, keepdim=True), ids", "return scores, ids"),),
        HASHED,
    ),
    Mutation(
        "routed weight scaled twice", "oracle", "reference/blocks.py",
        (("self._round(routed) * scale", "self._round(routed) * scale * scale"),), ORACLE,
    ),
)  # fmt: skip

_STEP = (
    Mutation(
        "routed weight scaled twice", "step", "step/experts.py",
        (("alpha=e.factor)", "alpha=e.factor * e.factor)"),), STEP,
    ),
    Mutation(
        "routed experts are not multiplied by 1.5", "step", "step/experts.py",
        (("torch.add(shared, routed, alpha=e.factor)", "torch.add(shared, routed)"),), STEP,
    ),
    Mutation(
        "gate and up of the shared expert swapped", "step", "step/experts.py",
        (
            (
                "ops.fp8_linear(x, *e.shared_gate_up), e.limit",
                "ops.fp8_linear(x, *e.shared_gate_up).roll(e.shared_gate_up.weight.shape[0] // 2, 1), e.limit",
            ),
        ),
        STEP,
    ),
    Mutation(
        "hash layers choose experts by score", "step", "step/weights.py",
        (
            (
                "(None, m.topk.tid2eid) if m.is_hash else (m.gate.e_score_correction_bias, None)",
                "(m.gate.weight[:, 0].float() * 0 if m.is_hash else m.gate.e_score_correction_bias, None)",
            ),
        ),
        STEP,
    ),
    Mutation(
        "norm of the other block", "attention's before the experts", "step/weights.py",
        (('mix("ffn", module.post_attention_layernorm)', 'mix("ffn", module.input_layernorm)'),), STEP,
    ),
    Mutation(
        "streams not handed on", "from attention to experts", "step/target.py",
        (
            (
                "layer.experts_mix\n        x, y, post, comb = ops.mhc_post_pre",
                "layer.experts_mix\n        _, y, post, comb = ops.mhc_post_pre",
            ),
        ),
        STEP,
    ),
    Mutation(
        "sum over the ranks left out", "experts", "step/target.py",
        (("post_experts_all_reduce(experts(layer.experts, y, input_ids, at.beside))",
          "experts(layer.experts, y, input_ids, at.beside)"),), STEP,
    ),
    Mutation(
        "sum over the ranks left out", "attention", "step/target.py",
        (("of_attention.all_reduce(attention(layer.attention, y, at))", "attention(layer.attention, y, at)"),), STEP,
    ),
    Mutation(
        "top-p left out", "tokens that drafts are compared with", "step/sample.py",
        ((" or info.need_top_p_sampling", ""),), SAMPLER,
    ),
    Mutation(
        "each rank draws for itself", "tokens that drafts are compared with", "step/sample.py",
        (("get_parallel().tp_group.broadcast(_drawn(logits, info).long(), src=0)", "_drawn(logits, info).long()"),),
        SAMPLER,
    ),
    Mutation(
        "noise of another distribution", "for the draw of a token", "step/sample.py",
        ((".exponential_()", ".uniform_()"),), SAMPLER,
    ),
    Mutation(
        "tokens drawn by SGLang after all", "the step does not say that it draws", "plugin.py",
        (("    sample.serve(device)\n", ""),), PLUGIN,
    ),
    Mutation(
        "refused drafts cleared by SGLang after all", "the step does not say that it clears", "plugin.py",
        (("    draft_states.serve(device)\n", ""),), PLUGIN,
    ),
    Mutation(
        "refused drafts of the first layer alone cleared", "table of the layers", "step/draft_states.py",
        (("for of_layer in states])", "for of_layer in states[:1]])"),), CLEARED,
    ),
    Mutation(
        "head of another model", "the draft's, rounded before it was the target's", "step/draft.py",
        (("if lm_head.weight is not self._source:", "if self._source is None:"),), DRAFT,
    ),
    Mutation(
        "weights of another layout", "drafts by the step whatever the experts are", "plugin.py",
        (("    if drafts():", "    if True:"),), DRAFT,
    ),
    Mutation(
        "halves of gate and up swapped", "NVFP4's scales as SGLang keeps them", "formats/experts.py",
        (("e.s13.view(torch.uint8).roll(inter, 1).view(e.s13.dtype)", "e.s13"),), NVFP4_MODEL,
    ),
    Mutation(
        "factors of gate and up swapped", "NVFP4, torch reference", "ops/nvfp4_moe/__init__.py",
        (("a.g13[e].flip(0)", "a.g13[e]"),), NVFP4,
    ),
    Mutation(
        "part not joined", "attention's, in a graph", "step/attention.py",
        (("    beside.join()\n    o = ops.sparse_mla", "    o = ops.sparse_mla"),), STREAMS,
    ),
    Mutation(
        "part not joined", "shared expert, in a graph", "step/experts.py", (("    beside.join()\n", ""),), STREAMS,
    ),
    Mutation(
        "part that does not wait", "top-k for the indexer's keys, in a graph", "step/attention.py",
        (("beside.on(INDEX_QUERIES, stored)", "beside.on(INDEX_QUERIES)"),), STREAMS,
    ),
    Mutation(
        "part that does not wait", "keys for their projection, in a graph", "step/attention.py",
        (("beside.on(KEYS, latent)", "beside.on(KEYS, start)"),), STREAMS,
    ),
    Mutation(
        "RoPE table of another layer kind", "the first layer's in every layer", "step/target.py",
        (
            (
                "prepare(model)",
                "[one._replace(attention=one.attention._replace(freqs_cis=model.model.layers[0].self_attn.freqs_cis))"
                " for one in prepare(model)]",
            ),
        ),
        STEP,
    ),
    Mutation(
        "streams of the layer before", "means for DSpark", "step/target.py",
        (("if index - 1 in captured:", "if index in captured:"),), STEP,
    ),
    Mutation(
        "call that no graph can hold", "not collected", "warmup.py",
        (("if step[0] <= graph_rows", "if step[0] > graph_rows"),), REFUSALS,
    ),
    Mutation(
        "call that no graph can hold", "collected and served all the same", "warmup.py",
        (("    if found.refused:", "    if False:"),), REFUSALS,
    ),
    Mutation(
        "rows of a larger batch", "pass not cut to its rows", "step/metadata.py",
        (("return rows[: self.rows]", "return rows"),), STEP,
    ),
)  # fmt: skip

_DSPARK = (
    Mutation(
        "streams of the layer before", "the last layer's mean for DSpark", "step/target.py",
        (("if len(layers) - 1 in captured:", "if len(layers) in captured:"),), STEP,
    ),
    Mutation(
        "first stream instead of the mean", "what DSpark gets of the target", "step/target.py",
        (("x.float().mean(1).to(x.dtype)", "x[:, 0]"),), STEP,
    ),
    Mutation(
        "block a position too far", "DSpark's stages", "step/draft.py",
        (("Pass(view, forward_batch, positions), input_ids)", "Pass(view, forward_batch, positions + 1), input_ids)"),),
        DRAFTER,
    ),
    Mutation(
        "one stage of several", "forward of DSpark's", "step/draft.py",
        (("through(self._layers, x, Pass(", "through(self._layers[:1], x, Pass("),), DRAFTER,
    ),
    Mutation(
        "one stage of several", "windows of DSpark's in a plan", "launch/fit.py",
        (("return self.model.dspark.stages if self.model.dspark else 1", "return 1"),), DSPARK_PLAN,
    ),
    Mutation(
        "head and chain of the first stage", "layout of a DSpark drafter", "checkpoint/layout.py",
        (('f"mtp.{dspark.stages - 1}."', '"mtp.0."'),), DRAFTER,
    ),
    Mutation(
        "drafter of another target taken", "its dimensions", "checkpoint/config.py",
        (("(found := getattr(same, name)) != has:", "(found := getattr(same, name)) is None:"),), DSPARK_PLAN,
    ),
    Mutation(
        "drafter of another target taken", "order of its layers", "checkpoint/config.py",
        (("sorted(set(layers)) != layers or ", ""),), DRAFTER,
    ),
    Mutation(
        "drafter that SGLang does not load", "config without the key of DFlash's parser", "reference/config_file.py",
        (('        keys["target_layer_ids"] = list(dspark.target_layer_ids)\n', ""),), DRAFTER,
    ),
    Mutation(
        "embedding and head counted twice", "a DSpark drafter's in a plan", "launch/memory.py",
        (('(set() if mtp and model.dspark else {"shared"})', '{"shared"}'),), DSPARK_PLAN,
    ),
    Mutation(
        "modes of the MTP layer", "passes of a DSpark drafter", "plugin.py",
        (("DSPARK_MODES, alone=", "DRAFT_MODES, alone="),), DRAFT,
    ),
)  # fmt: skip
"""What serves a DSpark drafter, plans with one or makes one."""

_NAMES = {
    Defect.COMB_TRANSPOSED: "comb transposed",
    Defect.ONE_SINKHORN_ITERATION: "one Sinkhorn iteration instead of 20",
    Defect.SINK_DROPPED: "sink dropped",
    Defect.ROPE_ON_FIRST_CHANNELS: "RoPE on the first 64 channels",
    Defect.NO_INVERSE_ROPE: "inverse RoPE missing",
    Defect.WINDOW_OFF_BY_ONE: "window off by one",
    Defect.C128_ENTRY_EARLY: "entry visible before its block ends",
    Defect.INDEXER_OFF_BY_ONE_BLOCK: "indexer off by one block",
    Defect.INDEXER_SCALE_DROPPED: "scale of an index key dropped",
    Defect.NIBBLES_SWAPPED: "nibbles swapped",
    Defect.SCALE_EXPONENT_OFF_BY_ONE: "scale exponent off by one",
}
"""Defects of the oracle that are made elsewhere too; the others go by what the enumeration says of them."""


def _always(defect: Defect) -> Mutation:
    """The switch of a defect: the oracle that always makes this mistake."""
    question = re.compile(rf"self\._?defect is (not )?Defect\.{defect.name}\b")
    sources = (ROOT / "reference" / PACKAGES["reference"]).glob("*.py")
    found = [(path, match) for path in sources for match in question.finditer(path.read_text(encoding="utf-8"))]
    if len(found) != 1:
        raise Stale(f"reference/ asks for Defect.{defect.name} {len(found)} times, needed once: mend the oracle.")
    path, match = found[0]
    edits = ((match[0], "False" if match[1] else "True"),)
    return Mutation(_NAMES.get(defect, defect.value), "oracle", f"reference/{path.name}", edits, ORACLE)


def mutations() -> list[Mutation]:
    """All of them, switches too, those of one defect together."""
    found = [*KERNELS, *_REFERENCES, *_STEP, *_DSPARK, *map(_always, Defect)]
    order = list(dict.fromkeys(mutation.defect for mutation in found))
    return sorted(found, key=lambda mutation: order.index(mutation.defect))
