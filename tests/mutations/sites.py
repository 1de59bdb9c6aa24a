"""Deliberate defects, each one change of the source: what a port of this model gets wrong, and where.

Most are made in a Triton kernel, where parity in the interpreter must notice, and again in what the kernels are held
against (torch references, byte formats, the oracle), where examples by hand and the second readings must.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sglang_sm120_reference.defects import Defect

ROOT = Path(__file__).parents[2]
PACKAGES = {"overlay": "sglang_sm120", "reference": "sglang_sm120_reference"}
"""What is mutated: folder of the checkout -> the package in it."""


class Tests(NamedTuple):
    """The tests of an area, as pytest's arguments. most: failures after which it stops."""

    arguments: tuple[str, ...]
    most: int = 5


class Mutation(NamedTuple):
    """One change.

    edits: (text that `file` holds exactly once, what stands there instead); file: in `sglang_sm120`, or `reference/`
    and the name in `sglang_sm120_reference`.
    """

    defect: str
    site: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: Tests

    @property
    def name(self) -> str:
        return f"{self.defect}: {self.site}"

    @property
    def path(self) -> str:
        """The file in the checkout."""
        folder, _, rest = self.file.partition("/")
        if folder == "reference":
            return f"reference/{PACKAGES['reference']}/{rest}"
        return f"overlay/{PACKAGES['overlay']}/{self.file}"

    @property
    def scored(self) -> bool:
        """Whether the oracle computes with this file, so that the trained model's answers may show the defect."""
        return self.file.startswith(("reference/", "checkpoint/", "formats/"))


class Stale(ValueError):
    """A mutation whose text is not in its file, or there more than once."""


def mutate(mutation: Mutation, sources: Path) -> None:
    """Make the mutation in a copy that `run.copied` made.

    Raises:
        Stale: the source no longer has a text of the list, or has it twice.
    """
    path = sources / mutation.path
    source = path.read_text(encoding="utf-8")
    for old, new in mutation.edits:
        if source.count(old) != 1:
            raise Stale(
                f"{mutation.file} holds {old!r} {source.count(old)} times and {mutation.name!r} needs it once: "
                f"give the text as it is now in {Path(__file__).name}."
            )
        source = source.replace(old, new)
    path.write_text(source, encoding="utf-8")


def _ops(expression: str) -> Tests:
    return Tests(("tests/ops", "-k", expression))


ATTENTION = _ops("sparse_mla or gather_dequant_kv")
PAGES = _ops("sparse_mla or gather_dequant_kv or indexer or page")
INDEXER = _ops("indexer or topk_slots")
MIXING = _ops("mhc or sinkhorn")
EXPERTS = _ops("mxfp4 or router")
LINEARS = _ops("linear")
ROTATION = _ops("rope")
COMPRESSOR = _ops("compress")
SCALES = _ops("test_by_hand or test_formats or linear or mxfp4")
# What follows a failure there takes a minute and tells no more.
ORACLE = Tests(("tests/model/test_oracle.py",), most=1)
STEP = Tests(("tests/model/test_step.py",), most=2)
STREAMS = Tests(("tests/model/test_streams.py",))

_KERNELS = (
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
        "scale exponent off by one", "experts, Triton", "ops/mxfp4_moe/grouped.py",
        (("(exponent + 63) << 7", "(exponent + 64) << 7"),), EXPERTS,
    ),
    Mutation(
        "gate and up swapped", "experts, Triton", "ops/mxfp4_moe/triton.py",
        (("half = 1 - row // 8 % 2", "half = row // 8 % 2"),), EXPERTS,
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
        "scale exponent off by one", "FP8 linears, Triton", "ops/_linear_triton.py",
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
        "routed weight scaled twice", "experts, Triton", "ops/mxfp4_moe/triton.py",
        (("total += weight * tl.load", "total += weight * weight * tl.load"),), EXPERTS,
    ),
    Mutation(
        "routed weight scaled twice", "router, Triton", "ops/router_topk/triton.py",
        (("tl.store(weights_ptr + out, weights,", "tl.store(weights_ptr + out, weights * 1.5,"),), EXPERTS,
    ),
    Mutation(
        "stale scratch", "merge reads parts that nobody wrote, Triton", "ops/sparse_mla/triton.py",
        (('live = top > float("-inf")', "live = part < splits"),), ATTENTION,
    ),
    Mutation(
        "stale scratch", "sum reads absent experts' slots, Triton", "ops/mxfp4_moe/triton.py",
        (("mask=inside & chosen,", "mask=inside,"),), EXPERTS,
    ),
    Mutation(
        "stale scratch", "tournament reads what no tile handed on, Triton", "ops/topk_slots/triton.py",
        (("    live = (own // K * TILE + own % K) < length", "    live = own < tiles * K"),), INDEXER,
    ),
)  # fmt: skip

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
        "inverse RoPE missing", "torch reference turns forwards", "ops/sparse_mla/__init__.py",
        (("positions[rows], inverse=True)", "positions[rows])"),), ATTENTION,
    ),
    Mutation(
        "comb transposed", "torch reference", "ops/mhc_post/__init__.py",
        (("comb.float().transpose(1, 2) @", "comb.float() @"),), MIXING,
    ),
    Mutation(
        "one Sinkhorn iteration too few", "torch reference", "ops/sinkhorn/__init__.py",
        (("range(iters - 1)", "range(iters - 2)"),), MIXING,
    ),
    Mutation(
        "one Sinkhorn iteration too few", "oracle", "reference/oracle.py",
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
        "routed weight scaled twice", "oracle", "reference/oracle.py",
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
        (
            (
                "f = post_experts_all_reduce(experts(layer.experts, y, input_ids, at.beside))",
                "f = experts(layer.experts, y, input_ids, at.beside)",
            ),
        ),
        STEP,
    ),
    Mutation(
        "sum over the ranks left out", "attention", "step/target.py",
        (("f = of_attention.all_reduce(attention(layer.attention, y, at))", "f = attention(layer.attention, y, at)"),),
        STEP,
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
        "rows of a larger batch", "pass not cut to its rows", "step/metadata.py",
        (("return rows[: self.rows]", "return rows"),), STEP,
    ),
)  # fmt: skip

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
    """The oracle that always makes this mistake."""
    question = re.compile(rf"self\._?defect is (not )?Defect\.{defect.name}\b")
    sources = (ROOT / "reference" / PACKAGES["reference"]).glob("*.py")
    found = [(path, match) for path in sources for match in question.finditer(path.read_text(encoding="utf-8"))]
    if len(found) != 1:
        raise Stale(f"reference/ asks for Defect.{defect.name} {len(found)} times, needed once: mend the oracle.")
    path, match = found[0]
    edits = ((match[0], "False" if match[1] else "True"),)
    return Mutation(_NAMES.get(defect, defect.value), "oracle", f"reference/{path.name}", edits, ORACLE)


def mutations() -> list[Mutation]:
    """All of them, those of one defect together."""
    found = [*_KERNELS, *_REFERENCES, *_STEP, *map(_always, Defect)]
    order = list(dict.fromkeys(mutation.defect for mutation in found))
    return sorted(found, key=lambda mutation: order.index(mutation.defect))
