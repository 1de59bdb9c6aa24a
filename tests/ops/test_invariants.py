"""What must hold of single ops whatever the numbers are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.common import Maker
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_sm120 import kernels, ops, registry, tuned
from sglang_sm120.formats import kv_page
from sglang_sm120.ops import _math
from sglang_sm120.ops.topk_slots import streamed
from sglang_sm120.ops.topk_slots import triton as topk

CPU = torch.device("cpu")
SOME = settings(max_examples=30)
seeds = st.integers(0, 2**32 - 1)


@SOME
@given(seeds, st.floats(0.1, 5))
def test_sinkhorn_is_doubly_stochastic(seed: int, spread: float) -> None:
    make = Maker(seed, CPU)
    pre, post, comb = _math.sinkhorn(make.normal(9, 24), torch.ones(3), make.normal(24, scale=spread), 20, 1e-6)
    # Columns come last; each is divided by its sum + eps. Rows follow as the iteration converges.
    torch.testing.assert_close(comb.sum(-2), torch.ones(9, 4), atol=2e-6, rtol=0)
    assert (comb > 0).all()
    assert ((pre > 0) & (pre <= 1 + 1e-6) & (post >= 0) & (post <= 2)).all()
    longer = _math.sinkhorn(make.normal(9, 24), torch.ones(3), make.normal(24), 200, 1e-6)[2]
    torch.testing.assert_close(longer.sum(-1), torch.ones(9, 4), atol=1e-4, rtol=0)


def test_mhc_post_keeps_a_stream_that_comb_copies(seed: int) -> None:
    make = Maker(seed, CPU)
    x, f = make.bf16(5, 4, 64), make.bf16(5, 64)
    shift = torch.eye(4).roll(1, 1).expand(5, 4, 4)
    # comb[j, j + 1] = 1: stream j goes to place j + 1.
    assert torch.equal(ops.mhc_post(f, x, torch.zeros(5, 4), shift), x.roll(1, 1))
    post = torch.tensor([1.0, 0, 2, 0]).expand(5, 4)
    y = ops.mhc_post(f, x, post, torch.zeros(5, 4, 4))
    assert torch.equal(y[:, 0], f) and torch.equal(y[:, 2], f * 2) and not y[:, 1::2].any()


@pytest.mark.parametrize("hidden", [640, 7168])
def test_mhc_of_fewer_steps_than_parts(hidden: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card's SMs 10 steps of columns are divided among 16 programs, Pro's 112 among 128: some have none."""
    monkeypatch.setattr(kernels, "sms", lambda _: kernels.SM120_SMS)
    make = Maker(seed, CPU)
    inputs = {"x": make.bf16(2, 4, hidden), "fn": make.normal(4, 4 * hidden, scale=(4 * hidden) ** -0.5)}
    inputs |= {"scale": make.normal(1).abs() + 0.5, "base": make.normal(4), "rms_eps": 0.1, "hc_eps": 0.1}
    got, expected = ops.mhc_head.by("triton", **inputs), ops.mhc_head.reference(**inputs)
    # One rounding to bf16 that falls the other way.
    torch.testing.assert_close(got, expected, atol=2**-8, rtol=2**-7)


def test_hadamard_is_its_own_inverse_and_keeps_norms(seed: int) -> None:
    x = Maker(seed, CPU).normal(7, 128)
    y = _math.hadamard(x)
    torch.testing.assert_close(_math.hadamard(y), x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(_math.hadamard(torch.eye(128)[:1]), torch.full((1, 128), 128**-0.5))


def test_rope_inverse_undoes_it(seed: int) -> None:
    make = Maker(seed, CPU)
    x, table, positions = make.normal(9, 3, 64), make.freqs_cis(), make.integers(0, 512, 9)
    turned = _math.rotate(x, table, positions)
    pairs = x.unflatten(-1, (-1, 2)).norm(dim=-1)
    torch.testing.assert_close(turned.unflatten(-1, (-1, 2)).norm(dim=-1), pairs)
    torch.testing.assert_close(_math.rotate(turned, table, positions, inverse=True), x)
    assert torch.equal(_math.rotate(x, table, torch.zeros(9, dtype=torch.int64)), x)


def test_rope_pairs_are_interleaved() -> None:
    x = torch.zeros(1, 64)
    x[0, 6] = 1
    table = torch.ones(1, 32, dtype=torch.complex64)
    table[0, 3] = 1j
    y = _math.rotate(x, table, torch.tensor([0]))
    assert y[0].nonzero().flatten().tolist() == [7] and y[0, 7] == 1


def test_attention_takes_the_rope_of_keys_from_the_result(seed: int) -> None:
    """Of one key, wherever it and the query are, what is left is the key as it was before it was turned."""
    make = Maker(seed, CPU)
    key, table = make.normal(1, 512), make.freqs_cis()
    slots = torch.zeros(1, 1, dtype=torch.int32)
    for position in (0, 1, 300):
        at = torch.tensor([position])
        pages = torch.zeros(1, kv_page.page_bytes(1), dtype=torch.uint8)
        kv_page.store(pages, slots[0].long(), _math.rotate_tail(key, table, at), 1)
        y = ops.sparse_mla(
            make.bf16(1, 2, 512), pages, slots, torch.ones(1, dtype=torch.int32), 1, None, None, None, None,
            torch.full((2,), -torch.inf), 1.0, table, at,
        )  # fmt: skip
        # The key is stored in bf16 and the result rounded once more.
        torch.testing.assert_close(y[0, :, 448:].float(), key[:, 448:].expand(2, 64), atol=0.03, rtol=0)


@SOME
@given(seeds, st.integers(1, 300), st.integers(1, 80), st.integers(1, 6))
def test_topk_slots_are_a_top_k(seed: int, length: int, k: int, levels: int) -> None:
    make = Maker(seed, CPU)
    logits = make.integers(0, levels * levels, 1, 320).float()
    table = torch.arange(5).flip(0).view(1, 5).int()
    out = torch.full((1, k + 3), -7, dtype=torch.int32)
    slots = ops.topk_slots(logits, torch.tensor([length]), table, k, out=out)[0].tolist()
    chosen = [(4 - slot // 64) * 64 + slot % 64 for slot in slots if slot >= 0]
    assert len(chosen) == min(k, length) and chosen == sorted(set(chosen)) and max(chosen) < length
    rest = set(range(length)) - set(chosen)
    # Nothing left out beats anything chosen; among equals the lower index is chosen.
    assert all((logits[0, c], -c) > (logits[0, r], -r) for c in chosen for r in rest)
    assert slots[len(chosen) :] == [-1] * (k + 3 - len(chosen))


ORDERS = ("few values", "mostly nothing", "ascending", "descending", "sampled high", "sampled low")


def _scores(make: Maker, order: str, length: int) -> torch.Tensor:
    """Scores of one row in an order that the guess of `streamed` was or was not made for."""
    if order == "few values":
        return torch.tensor([torch.nan, -torch.inf, 0.0, -0.0, 1.0, torch.inf])[make.integers(0, 6, length).long()]
    if order == "mostly nothing":
        nothing = torch.tensor([torch.nan, -torch.inf])[make.integers(0, 2, length).long()]
        return torch.where(make.integers(0, 200, length) == 0, make.normal(length), nothing)
    scores = make.normal(length).sort().values
    if order in ("ascending", "descending"):
        return scores if order == "ascending" else scores.flip(0)
    # Its sample: eight adjacent entries at 128 places.
    sampled = (torch.arange(128) * length // 128 // 8 * 8).unsqueeze(1) + torch.arange(8)
    sampled = sampled[sampled < length]
    scores[sampled] = (torch.arange(len(sampled)) + 9.0) * (1 if order == "sampled high" else -1)
    return scores


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=6)
@given(
    seeds,
    st.one_of(
        st.integers(1, 6000),
        st.builds(lambda tiles, more: 512 * tiles + more, st.integers(1, 11), st.integers(-1, 1)),
    ),
    st.sampled_from([1, 16, 511, 512, 513, 1024]),
    st.integers(-2, 2),
    st.sampled_from([(512, 2), (1024, 4)]),
)
@example(0, 6001, 512, 0, (512, 2))
@example(1, 5900, 40, 1, (1024, 4))
def test_streamed_topk_slots_are_the_references(
    order: str, seed: int, length: int, k: int, more: int, launch: tuple[int, int]
) -> None:
    make = Maker(seed, CPU)
    # One row of the length, one about as long as k: the second finds what the first left in the buffer.
    lengths = [length, max(0, k + more)]
    logits = torch.full((2, 6016), torch.nan)
    for row, entries in enumerate(lengths):
        logits[row, :entries] = _scores(make, order, entries)
    arguments = {"logits": logits, "lengths": make.tensor(lengths), "page_table": make.integers(0, 99, 2, 94), "k": k}
    table = {topk.TUNED.key((8192, k), 2): topk.Config(*launch, stream=True)}
    with tuned.using(table), pytest.MonkeyPatch.context() as patch:
        # One program for both.
        patch.setattr(streamed, "WARPS_PER_SM", 1)
        slots = ops.topk_slots.by("triton", **arguments)
    assert torch.equal(slots, ops.topk_slots.reference(**arguments))


@pytest.mark.parametrize("most_programs", [1, 64], ids=["a program a tile", "shared tiles"])
@pytest.mark.parametrize("values", [3, 1 << 20], ids=["ties", "few ties"])
@pytest.mark.parametrize("config", [topk.Config(1024, 4, 16), topk.Config(4096, 8, 4), topk.Config(8192, 16, 4)])
def test_tournaments_of_topk_slots_are_the_references(
    config: topk.Config, values: int, most_programs: int, seed: int
) -> None:
    """Rows of several tiles, one row a launch; ties lie on both sides of every border."""
    make, k, lengths = Maker(seed, CPU), 512, [16384, 9000, 513]
    logits = make.integers(0, values, 3, 16384).float()
    arguments = {"logits": logits, "lengths": make.tensor(lengths), "page_table": make.integers(0, 99, 3, 256), "k": k}
    with tuned.using({topk.TUNED.key((16384, k), 3): config}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "MOST_PROGRAMS", most_programs)
        patch.setattr(topk, "SCRATCH_BYTES", 1)
        slots = ops.topk_slots.by("triton", **arguments)
    assert torch.equal(slots, ops.topk_slots.reference(**arguments))


def test_topk_slots_ranks_nan_lowest() -> None:
    logits = torch.tensor([[1.0, torch.nan, 3, torch.nan, 2]])
    slots = ops.topk_slots(logits, torch.tensor([5]), torch.zeros(1, 1).int(), 4)
    assert slots.tolist() == [[0, 1, 2, 4]]


@pytest.mark.parametrize(
    "out", [torch.zeros(1, 3).int(), torch.zeros(2, 4).int(), torch.zeros(1, 4), torch.zeros(1, 8).int()[:, ::2]]
)
def test_an_out_that_cannot_take_the_slots_is_refused(out: torch.Tensor, seed: int) -> None:
    make = Maker(seed, CPU)
    table = {"page_table": torch.zeros(1, 1).int(), "lengths": torch.tensor([5]), "k": 4, "out": out}
    pages = torch.zeros(1, 64 * 132, dtype=torch.uint8)
    scored = {"q": make.normal(1, 8, 128).to(torch.float8_e4m3fn), "weights": make.normal(1, 8), "pages": pages}
    for op, inputs in ((ops.topk_slots, {"logits": torch.zeros(1, 64)}), (ops.indexer_topk, scored)):
        for provider in op.providers:
            op.by(provider, **inputs | table | {"out": None})
            with pytest.raises(ValueError, match=r"needs torch.int32 \[1, 4\] or wider, with adjacent"):
                op.by(provider, **inputs | table)


DRAW = {"logits": torch.zeros(3, 5), "temperature": torch.ones(3, 1), "noise": torch.ones(3, 5)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": torch.ones(2, 1)},
        {"temperature": torch.ones(0, 1)},
        {"temperature": torch.ones(3)},
        {"noise": torch.ones(1, 5)},
        {"logits": torch.zeros(3, 0), "noise": torch.ones(3, 0)},
    ],
)
def test_a_draw_of_other_shapes_is_refused(wrong: dict[str, Any]) -> None:
    for provider in ops.sample_token.providers:
        assert ops.sample_token.by(provider, **DRAW).tolist() == [0, 0, 0]
        with pytest.raises(ValueError, match=r"and need \[T, V\], \[B, 1\] and \[T, V\]"):
            ops.sample_token.by(provider, **DRAW | wrong)


def test_a_draw_is_judged_by_scores_near_ties_apart() -> None:
    problem = ops.SPECS["sample_token"].problem
    assert problem is not None
    scores = {"logits": torch.tensor([[1.0, 4.0, 4.00001, 3.99]]), "temperature": torch.ones(1, 1)}
    scores |= {"noise": torch.ones(1, 4)}
    assert [problem(scores, torch.tensor([token])) for token in (1, 2)] == [None, None]
    for token in (0, 3):
        assert problem(scores, torch.tensor([token])) == "a token scores lower than another"
    for tokens in ([4], [-1], [1, 1]):
        assert problem(scores, torch.tensor(tokens)) == "a token is none of the vocabulary"


E4M3 = torch.zeros(2, 130, 256).to(torch.float8_e4m3fn)
LINEARS = {
    "fp8_linear": {"x": torch.zeros(2, 256).bfloat16(), "w": E4M3[0], "scale": torch.ones(2, 2)},
    "fp8_grouped_linear": {"o": torch.zeros(3, 2, 256).bfloat16(), "w": E4M3, "scale": torch.ones(2, 2, 2)},
    "bf16_linear_fp32": {"x": torch.zeros(2, 256).bfloat16(), "w": torch.zeros(130, 256).bfloat16()},
}


@pytest.mark.parametrize(
    ("op", "wrong", "why"),
    [
        ("fp8_linear", {"x": torch.zeros(2, 128).bfloat16()}, r"input is \[2, 128\] and needs \[256\] last"),
        ("fp8_linear", {"scale": torch.ones(2, 1)}, r"has scales \[2, 1\] and needs \[2, 2\]"),
        ("fp8_linear", {"norm_weight": torch.ones(255).bfloat16()}, r"norm_weight is \[255\] and needs \[256\]"),
        ("fp8_grouped_linear", {"o": torch.zeros(3, 1, 256).bfloat16()}, r"is \[3, 1, 256\] and needs \[2, 256\]"),
        ("fp8_grouped_linear", {"scale": torch.ones(2, 2)}, r"has scales \[2, 2\] and needs \[2, 2, 2\]"),
        ("bf16_linear_fp32", {"x": torch.zeros(2, 255).bfloat16()}, r"input is \[2, 255\] and needs \[256\] last"),
    ],
)
def test_linears_refuse_shapes_that_disagree(op: str, wrong: dict, why: str) -> None:
    for provider in registry.ops()[op].providers:
        registry.ops()[op].by(provider, **LINEARS[op])
        with pytest.raises(ValueError, match=f"^{op}: .*{why}"):
            registry.ops()[op].by(provider, **LINEARS[op] | wrong)


def attention(make: Maker, heads: int = 4, candidates: int = 24) -> dict:
    slots = make.slots(80, candidates, [candidates, candidates])
    return {
        "q": make.bf16(2, heads, 512),
        "window_pages": make.kv_pool(64, slots, 2),
        "window_slots": slots,
        "window_lengths": torch.tensor([candidates, candidates]),
        "window_page_size": 64,
        "extra_pages": None,
        "extra_slots": None,
        "extra_lengths": None,
        "extra_page_size": None,
        "sink": torch.full((heads,), -torch.inf),
        "scale": 512**-0.5,
    }


def test_sparse_mla_without_a_sink_is_attention(seed: int) -> None:
    inputs = attention(Maker(seed, CPU))
    k = kv_page.load(inputs["window_pages"], inputs["window_slots"], 64).float().unsqueeze(1)
    expected = torch.nn.functional.scaled_dot_product_attention(inputs["q"].float().unsqueeze(2), k, k).squeeze(2)
    torch.testing.assert_close(ops.sparse_mla(**inputs).float(), expected, atol=4e-3, rtol=2**-7)


def test_sparse_mla_does_not_care_where_a_candidate_stands(seed: int) -> None:
    make = Maker(seed, CPU)
    inputs = attention(make) | {"sink": make.normal(4)}
    expected = ops.sparse_mla(**inputs)
    slots, pages = inputs["window_slots"], inputs["window_pages"]
    moved = {
        "window_slots": slots[:, 10:],
        "window_lengths": torch.tensor([14, 14]),
        "extra_pages": pages,
        "extra_slots": slots[:, :10].flip(1),
        "extra_lengths": torch.tensor([10, 10]),
        "extra_page_size": 64,
    }
    torch.testing.assert_close(ops.sparse_mla(**inputs | moved), expected, atol=2**-8, rtol=2**-7)


def test_sparse_mla_survives_large_scores(seed: int) -> None:
    make = Maker(seed, CPU)
    inputs = attention(make) | {"sink": torch.full((4,), 1e4), "scale": 50.0}
    assert ops.sparse_mla(**inputs).isfinite().all()
    inputs["sink"] = torch.full((4,), -1e4)
    assert ops.sparse_mla(**inputs).isfinite().all()


@settings(SOME, max_examples=200)
@given(
    st.integers(1, 256), st.sampled_from([8, 16, 32, 64]), st.integers(0, 8192), st.sampled_from([1, 20, 48, 170, 188])
)
@example(100, 64, 8192, 188)
def test_sparse_mla_writes_no_part_beyond_its_scratch(rows: int, heads: int, entries: int, sms: int) -> None:
    """Up to 1M tokens of context, where a row's candidates alone would want 64 parts each."""
    asked: list[dict[str, Any]] = []

    def note(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        asked.append(dict(zip(kernel.arg_names, args, strict=False)))

    def on_meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pages, lengths = on_meta(1, 584 * 64, dtype=torch.uint8), on_meta(rows)
    extra = (pages, on_meta(rows, entries), lengths, 64) if entries else (None,) * 4
    with kernels.rehearse(kernels.Rehearsal(note, sms)):
        ops.sparse_mla.by(
            "triton", on_meta(rows, heads, 512, dtype=torch.bfloat16), pages, on_meta(rows, 128), lengths, 64, *extra,
            on_meta(heads, dtype=torch.float32), 1.0,
        )  # fmt: skip
    attend = asked[0]
    if attend["splits"] != 1:
        for scratch in (attend["parts"], attend["stats"]):
            assert rows * attend["splits"] <= scratch.shape[0]


@pytest.mark.parametrize(
    ("alone", "why"),
    [
        ({"extra_pages": torch.zeros(2, 37_440, dtype=torch.uint8)}, "extra_pages came without its .* or none"),
        ({"positions": torch.zeros(1, dtype=torch.int64)}, "freqs_cis and positions came without the other"),
        ({"freqs_cis": torch.ones(1, 32, dtype=torch.complex64)}, "freqs_cis and positions came without the other"),
        ({"q_eps": 1e-6}, "q_eps came without freqs_cis and positions"),
    ],
)
def test_sparse_mla_wants_what_belongs_together(alone: dict, why: str, seed: int) -> None:
    inputs = attention(Maker(seed, CPU))
    for provider in ops.sparse_mla.providers:
        ops.sparse_mla.by(provider, **inputs)
        with pytest.raises(ValueError, match=why):
            ops.sparse_mla.by(provider, **inputs | alone)


@pytest.mark.parametrize("op", ["mxfp4_moe", "nvfp4_moe"])
@SOME
@given(seeds, st.booleans())
def test_experts_are_finite_for_any_bytes(op: str, seed: int, random_scales: bool) -> None:
    make = Maker(seed, CPU)
    e, hidden, inter = 3, 128, 128

    def data(*shape: int) -> torch.Tensor:
        return make.integers(0, 256, *shape, dtype=torch.uint8)

    def scales(*shape: int) -> torch.Tensor:
        return data(*shape) if random_scales else torch.full(shape, 255, dtype=torch.uint8)

    shapes = ((e, 2 * inter, hidden), (e, hidden, inter))
    block = 32 if op == "mxfp4_moe" else 16
    layer = {name: data(*rows, k // 2) for name, (*rows, k) in zip(("w13", "w2"), shapes, strict=True)}
    layer |= {name: scales(*rows, k // block) for name, (*rows, k) in zip(("s13", "s2"), shapes, strict=True)}
    if op == "nvfp4_moe":
        layer |= {name: layer[name].view(torch.float8_e4m3fn) for name in ("s13", "s2")}
        layer |= {"g13": make.normal(e, 2), "g2": make.normal(e)}
    x, ids, weights = make.bf16(5, hidden, scale=1000.0), make.integers(-1, e, 5, 2), make.normal(5, 2)
    y = registry.ops()[op](x, ids, weights, limit=10.0, **layer)
    assert y.isfinite().all()
    assert random_scales or not y.any()


@SOME
@given(seeds, st.integers(1, 40))
def test_router_weights_sum_to_one(seed: int, tokens: int) -> None:
    make = Maker(seed, CPU)
    logits = make.normal(tokens, 16, scale=5.0)
    weights, ids = ops.router_topk(logits, make.normal(16), 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(tokens))
    assert all(len(set(row)) == 6 for row in ids.tolist())
    # The bias moves the choice and not the weights.
    everyone, order = ops.router_topk(logits, make.normal(16, scale=100.0), 16)
    plain, ranked = ops.router_topk(logits, torch.zeros(16), 16)
    assert torch.equal(everyone.gather(1, order.argsort(1)).argmax(1), plain.gather(1, ranked.argsort(1)).argmax(1))


def test_silu_mul_clamp_limits_gate_from_above_only() -> None:
    gate_up = torch.tensor([[100.0, -100.0, 1.0, 1.0, 50.0, -50.0]]).bfloat16()
    y = ops.silu_mul_clamp(gate_up, 10.0)
    expected = torch.nn.functional.silu(torch.tensor([10.0, -100.0, 1.0])) * torch.tensor([1.0, 10.0, -10.0])
    torch.testing.assert_close(y[0], expected.bfloat16())


def test_chunking_does_not_change_results(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from cases.compress import cases as compress_cases
    from cases.indexer_logits import inputs as indexer_inputs

    scorer = indexer_inputs(Maker(seed, CPU), 8, [200, 1, 0, 130, 65])
    attended = attention(Maker(seed, CPU))
    compressed = next(case for case in compress_cases("cpu") if case.name == "c4-first")

    def results() -> list[torch.Tensor]:
        return [
            ops.indexer_logits(**scorer),
            ops.sparse_mla(**attended),
            ops.indexer_topk(**scorer, k=32),
            ops.compress(**compressed.build(Maker(seed, CPU))),
        ]

    whole = results()
    monkeypatch.setattr(_math, "CHUNK_BYTES", 1)
    monkeypatch.setitem(ops.indexer_logits.reference.__globals__, "PAGES_AT_ONCE", 1)
    assert len(list(_math.row_chunks(5, 100))) == 5
    for small, large in zip(results(), whole, strict=True):
        torch.testing.assert_close(small, large)


def test_row_chunks_cover_all_rows_once() -> None:
    for rows, size in ((0, 5), (1, 1 << 40), (1000, _math.CHUNK_BYTES // 3), (7, 0)):
        covered = [i for chunk in _math.row_chunks(rows, size) for i in range(chunk.start, chunk.stop)]
        assert covered == list(range(rows))
