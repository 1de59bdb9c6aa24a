"""EAGLE's torch twins against loops written from what they promise, and against SGLang's own kernels interpreted."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from sglang_sm120 import hooks
from sglang_sm120.step import cpu_speculation as twins

PAGE = 256
VOCAB = 50
SOME = settings(max_examples=40)
MANY = settings(SOME, max_examples=200)
FEW = settings(max_examples=6)
seeds = st.integers(0, 2**32 - 1)
batches = st.integers(0, 5)
nodes = st.integers(2, 10)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def below(g: torch.Generator, end: int, *shape: int) -> Tensor:
    return torch.randint(end, shape, generator=g)


def table(g: torch.Generator, requests: int, pages: int) -> Tensor:
    """`req_to_token` with each request on its own pages in any order; no two cells are equal."""
    order = torch.randperm(requests * pages, generator=g).view(requests, pages, 1)
    return (order * PAGE + torch.arange(PAGE)).view(requests, -1).int()


def spans(g: torch.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table, rows of it, and where a span of each row begins and ends: some empty, some over page borders."""
    slots = table(g, 8, 3)
    start = below(g, 2 * PAGE, batch)
    return slots, torch.randperm(8, generator=g)[:batch], start, start + below(g, 2, batch) * below(g, PAGE, batch)


def chain(batch: int, n: int) -> dict[str, Tensor]:
    """The outputs that `build_chain_tree` writes, with nonsense in them."""
    shape = (batch, n)
    names = ("retrieve_index", "retrieve_next_token", "retrieve_next_sibling")
    return {"positions": torch.full((batch * n,), -7)} | {name: torch.full(shape, -7) for name in names}


def tree_inputs(g: torch.Generator, batch: int, n: int) -> dict[str, Tensor]:
    """The inputs and outputs of a verification of a chain; drafts come from few tokens, so that some are right."""
    made = chain(batch, n)
    twins.build_chain_tree(torch.zeros(batch), torch.empty(batch * n * n, dtype=torch.bool), **made, mask_mode=1)
    return {
        "predicts": torch.zeros(batch * n, dtype=torch.int32),
        "accept_index": torch.full((batch, n), -1, dtype=torch.int32),
        "accept_token_num": torch.full((batch,), -7, dtype=torch.int32),
        "candidates": below(g, 3, batch, n),
    } | {name: made[name] for name in ("retrieve_index", "retrieve_next_token", "retrieve_next_sibling")}


def outputs(case: dict[str, Tensor]) -> list[list[Any]]:
    """What a verification says, as lists."""
    return [case[name].tolist() for name in ("predicts", "accept_index", "accept_token_num")]


@SOME
@given(seeds, batches)
def test_slots_of_spans_are_read_in_order(seed: int, batch: int) -> None:
    slots, rows, start, end = spans(generator(seed), batch)
    expected = [
        int(slots[row, position])
        for row, a, b in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True)
        for position in range(a, b)
    ]
    found = hooks.assign_extend_cache_locs(rows, slots, start, end)
    assert found.dtype == torch.int64 and found.tolist() == expected
    found = torch.full((batch * 4,), -7)
    hooks.assign_draft_cache_locs(rows, slots, start.int(), found, 4)
    assert found.view(batch, 4).tolist() == [slots[r, a : a + 4].tolist() for r, a in zip(rows, start, strict=True)]


@SOME
@given(seeds, batches)
def test_new_slots_are_entered_where_they_belong(seed: int, batch: int) -> None:
    g = generator(seed)
    slots, rows, start, end = spans(g, batch)
    new = 10**6 + torch.randperm(batch * PAGE + 9, generator=g)
    expected, rest = slots.tolist(), new.tolist()
    for row, a, b in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        for position in range(a, b):
            expected[row][position] = rest.pop(0)
    hooks.assign_req_to_token_pool(rows, slots, start.int(), end.int(), new)
    assert slots.tolist() == expected
    assert torch.equal(hooks.assign_extend_cache_locs(rows, slots, start, end), new[: int((end - start).sum())])


@SOME
@given(seeds, batches, nodes, st.booleans())
def test_a_chain_sees_itself_and_what_came_before(seed: int, batch: int, n: int, full: bool) -> None:
    lengths = below(generator(seed), 600, batch)
    # A buffer that is larger than this batch, and True or False wherever nothing is written.
    size = n * int(lengths.sum() * full) + n * n * batch + 5
    masks = [torch.full((size,), fill) for fill in (True, False)]
    for mask in masks:
        made = chain(batch, n)
        hooks.build_chain_tree(lengths, mask, **made, mask_mode=0 if full else 1)
    expected: list[bool | None] = []
    for length in lengths.tolist():
        for node in range(n):
            seen, at = {node}, node
            while at > 0:
                at -= 1
                seen.add(at)
            expected += [None] * (length * full) + [other in seen for other in range(n)]
    expected += [None] * 5
    found = [a if a == b else None for a, b in zip(masks[0].tolist(), masks[1].tolist(), strict=True)]
    assert found == expected
    assert made["positions"].tolist() == [length + node for length in lengths.tolist() for node in range(n)]
    assert made["retrieve_index"].flatten().tolist() == list(range(batch * n))
    assert made["retrieve_next_token"].tolist() == [[*range(1, n), -1]] * batch
    assert made["retrieve_next_sibling"].tolist() == [[-1] * n] * batch


def test_a_packed_tree_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="mode 2, but a CPU writes FULL_MASK or QLEN_ONLY"):
        hooks.build_chain_tree(torch.ones(1), torch.empty(9), **chain(1, 3), mask_mode=2)


def walk(case: dict[str, Tensor], accepts: Any, last: Any) -> list[list[Any]]:
    """A verification by SGLang's pointers, node by node: `accepts(request, node, draft)`, `last(request, node, bool)`
    is the token behind the last accepted node, where the flag says whether a draft was refused there."""
    batch, n = case["candidates"].shape
    predicts, index, number = [0] * (batch * n), [], []
    for i in range(batch):
        node, path, refused = 0, [int(case["retrieve_index"][i, 0])], False
        while not refused and (following := int(case["retrieve_next_token"][i, node])) >= 0 and len(path) < n:
            draft = int(case["candidates"][i, following])
            if accepts(i, node, draft):
                predicts[path[-1]] = draft
                node = following
                path.append(int(case["retrieve_index"][i, node]))
            else:
                refused = True
        predicts[path[-1]] = last(i, node, refused)
        index.append(path + [-1] * (n - len(path)))
        number.append(len(path) - 1)
    return [predicts, index, number]


@SOME
@given(seeds, batches, nodes)
def test_greedy_drafts_are_kept_up_to_the_first_wrong_one(seed: int, batch: int, n: int) -> None:
    g = generator(seed)
    case, target = tree_inputs(g, batch, n), below(g, 2, batch, n)
    expected = walk(
        case, lambda i, node, draft: int(target[i, node]) == draft, lambda i, node, refused: int(target[i, node])
    )
    names = ("predicts", "accept_index", "accept_token_num", "candidates", "retrieve_index")
    returned = hooks.verify_chain_greedy(*(case[name] for name in names), target)
    assert outputs(case) == expected
    assert all(a is case[name] for a, name in zip(returned, names, strict=False))


def sample(case: dict[str, Tensor], probs: Tensor, coins: Tensor, final: Tensor, **thresholds: float) -> None:
    """As SGLang calls it."""
    given_ = {name.replace("retrieve", "retrive"): value for name, value in case.items()}
    hooks.sample_chain_target_only(
        **given_,
        uniform_samples=coins,
        uniform_samples_for_final_sampling=final,
        target_probs=probs,
        draft_probs=torch.zeros_like(probs),
        deterministic=True,
        **thresholds,
    )


@SOME
@given(seeds, batches, nodes, st.sampled_from([(1.0, 1.0), (0.4, 1.0), (1.0, 0.5)]))
def test_sampling_goes_node_by_node(seed: int, batch: int, n: int, thresholds: tuple[float, float]) -> None:
    g = generator(seed)
    case = tree_inputs(g, batch, n)
    probs = (torch.rand(batch, n, 4, generator=g) * below(g, 2, batch, n, 4) + 1e-3).softmax(-1)
    coins, final = torch.rand(batch, n, generator=g), torch.rand(batch, generator=g)
    single, scale = thresholds

    def accepts(i: int, node: int, draft: int) -> bool:
        p = float(probs[i, node, draft])
        return float(coins[i, node]) < p / scale or p >= single

    def last(i: int, node: int, refused: bool) -> int:
        weights = [float(p) for p in probs[i, node]]
        if refused:
            weights[int(case["candidates"][i, node + 1])] = 0.0
        left = float(final[i]) * sum(weights)
        for token, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return token
        raise AssertionError("the weights do not reach their own sum")

    expected = walk(case, accepts, last)
    sample(case, probs, coins, final, threshold_single=single, threshold_acc=scale)
    assert outputs(case) == expected


@MANY
@given(st.data())
def test_sampled_tokens_have_exactly_the_targets_distribution(data: st.DataObject) -> None:
    """Every outcome of the random numbers once: probabilities are quarters, and 12 can be divided by 1 to 4."""
    n, vocab = 3, 4
    row = st.lists(st.integers(0, vocab - 1), min_size=4, max_size=4)
    quarters = [[drawn.count(token) for token in range(vocab)] for drawn in (data.draw(row) for _ in range(n))]
    drafts = data.draw(st.lists(st.integers(0, vocab - 1), min_size=n - 1, max_size=n - 1))
    grid = torch.tensor(list(product(range(4), range(4), range(12))))
    case = tree_inputs(generator(0), len(grid), n)
    case["candidates"] = torch.tensor([0, *drafts]).expand(len(grid), n)
    coins = torch.cat([(grid[:, :2] + 0.5) / 4, torch.zeros(len(grid), 1)], 1)
    sample(case, (torch.tensor(quarters) / 4).expand(len(grid), n, vocab), coins, (grid[:, 2] + 0.5) / 12)
    tokens, accepted = case["predicts"].view(-1, n), case["accept_token_num"]
    reached = torch.ones(len(grid), dtype=torch.bool)
    for node in range(n):
        counts = torch.bincount(tokens[reached, node], minlength=vocab).tolist()
        assert counts == [int(reached.sum()) * Fraction(count, 4) for count in quarters[node]]
        reached &= accepted > node
        if node < n - 1:
            assert bool((tokens[reached, node] == drafts[node]).all())


def test_filtered_samples_follow_the_filtered_distribution(seed: int) -> None:
    """Real softmaxes through top-k and top-p, and as many samples as show an error of 1 %."""
    g, rows = generator(seed), 200_000
    logits = torch.randn(2, VOCAB, generator=g) * 2
    probs = twins.top_k_renorm_prob(logits.softmax(-1), torch.tensor([20, 20]))
    probs = twins.top_p_renorm_prob(probs, torch.tensor([0.9, 0.9]))
    # A draft that the target likes, so that both of its fates are frequent.
    draft = int(probs[0].argmax())
    case = tree_inputs(g, rows, 2)
    case["candidates"] = torch.tensor([0, draft]).expand(rows, 2)
    coins, final = torch.rand(rows, 2, generator=g), torch.rand(rows, generator=g)
    sample(case, probs.expand(rows, 2, VOCAB), coins, final)
    tokens, accepted = case["predicts"].view(rows, 2), case["accept_token_num"] == 1
    for found, expected in ((tokens[:, 0], probs[0]), (tokens[accepted, 1], probs[1])):
        counts, kept = torch.bincount(found, minlength=VOCAB), expected > 0
        assert not counts[~kept].any()
        wanted = (expected[kept] / expected[kept].sum()).double() * len(found)
        assert chisquare(counts[kept].numpy(), (wanted / wanted.sum() * len(found)).numpy()).pvalue > 1e-6


def test_no_token_without_probability_is_taken(seed: int) -> None:
    """Random numbers at both ends of [0, 1), and a tail of zeros behind and before what is possible."""
    n, rows = 3, 64
    g = generator(seed)
    probs = torch.rand(rows, n, 6, generator=g)
    probs[..., [0, 4, 5]] = 0
    probs /= probs.sum(-1, keepdim=True)
    for end, single in ((0.0, 1.0), (1 - 2**-24, 1.0), (0.5, 0.0)):
        case = tree_inputs(g, rows, n)
        case["candidates"] = below(g, 6, rows, n)
        sample(case, probs, torch.full((rows, n), end), torch.full((rows,), end), threshold_single=single)
        for i, number in enumerate(case["accept_token_num"].tolist()):
            for node in range(number + 1):
                assert probs[i, node, case["predicts"][i * n + node]] > 0


def test_a_certain_draft_is_always_kept() -> None:
    case = tree_inputs(generator(0), 1, 2)
    case["candidates"] = torch.tensor([[0, 3]])
    probs = torch.nn.functional.one_hot(torch.tensor([[3, 1]]), 5).float()
    sample(case, probs, torch.full((1, 2), 1 - 2**-24), torch.zeros(1))
    assert outputs(case) == [[3, 1], [[0, 1]], [1]]


def renormalised(row: list[float], keep: list[bool]) -> Tensor:
    kept = [p if k else 0.0 for p, k in zip(row, keep, strict=True)]
    return torch.tensor([p / sum(kept) for p in kept])


def ahead(row: list[float], i: int) -> list[float]:
    """The probabilities that come before the i-th: larger ones, and equal ones on its left."""
    return [other for j, other in enumerate(row) if other > row[i] or (other == row[i] and j < i)]


def some_probs(seed: int, rows: int) -> Tensor:
    """Softmaxes with many equal values, as those of bf16 logits have."""
    return torch.randn(rows, VOCAB, generator=generator(seed)).mul(4).round().div(4).softmax(-1)


@SOME
@given(seeds, st.lists(st.integers(1, 2 * VOCAB) | st.just(1 << 30), max_size=4))
def test_top_k_keeps_the_k_largest(seed: int, ks: list[int]) -> None:
    probs = some_probs(seed, len(ks))
    found = hooks.top_k_renorm_prob(probs, torch.tensor(ks, dtype=torch.int32))
    assert found.shape == probs.shape and found.dtype == probs.dtype
    for row, k, kept in zip(probs.tolist(), ks, found, strict=True):
        expected = renormalised(row, [len(ahead(row, i)) < k for i in range(VOCAB)])
        torch.testing.assert_close(kept, expected, atol=1e-7, rtol=1e-6)
    greedy = hooks.top_k_renorm_prob(probs, torch.ones(len(ks), dtype=torch.int32))
    assert torch.equal(greedy, torch.nn.functional.one_hot(probs.argmax(1), VOCAB).float())


@SOME
@given(seeds, st.lists(st.floats(1e-6, 1.0), max_size=4))
def test_top_p_keeps_the_fewest_that_reach_p(seed: int, ps: list[float]) -> None:
    probs = some_probs(seed, len(ps))
    found = hooks.top_p_renorm_prob(probs, torch.tensor(ps, dtype=torch.float32))
    assert found.shape == probs.shape and found.dtype == probs.dtype
    for row, p, kept in zip(probs.tolist(), torch.tensor(ps, dtype=torch.float32).tolist(), found, strict=True):
        # One is needed when all that come first do not reach p without it.
        masses = [sum((Fraction(other) for other in ahead(row, i)), Fraction(0)) for i in range(VOCAB)]
        expected = renormalised(row, [p == 1 or mass < p for mass in masses])
        torch.testing.assert_close(kept, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("p", "kept"), [(0.5, [1]), (0.625, [1, 2]), (0.75, [1, 2]), (0.8, [1, 2, 3])])
def test_top_p_that_is_just_reached(p: float, kept: list[int]) -> None:
    found = hooks.top_p_renorm_prob(torch.tensor([[0.0, 0.5, 0.25, 0.125, 0.125]]), torch.tensor([p]))
    assert found[0].nonzero().flatten().tolist() == kept


def test_top_p_of_one_keeps_all() -> None:
    # A head whose sum rounds to more than 1.
    probs = torch.cat([torch.full((1, 10), 0.1), torch.full((1, 5), 1e-12)], 1)
    assert (hooks.top_p_renorm_prob(probs, torch.ones(1)) > 0).all()


@SOME
@given(seeds, batches, nodes)
def test_the_bonus_is_the_last_token(seed: int, batch: int, n: int) -> None:
    g = generator(seed)
    tokens, lengths = below(g, VOCAB, batch, n).int(), (below(g, n, batch) + 1).int()
    found = torch.full((batch,), -7, dtype=torch.int32)
    hooks.fill_bonus_tokens(tokens, lengths, found, n)
    assert found.tolist() == [row[length - 1] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


@SOME
@given(seeds, batches, st.booleans())
def test_state_of_the_last_pass_is_gathered(seed: int, batch: int, with_hidden: bool) -> None:
    g = generator(seed)
    buffers = [torch.rand(8, 1, generator=g), below(g, VOCAB, 8, 1), below(g, VOCAB, 8).int()]
    hidden = torch.rand(8, 4, 6, generator=g).bfloat16() if with_hidden else None
    indices = below(g, 8, batch)
    found = hooks.gather_spec_extras(indices, *buffers, hidden)
    for part, buffer in zip(found, [*buffers, hidden], strict=True):
        if buffer is None:
            assert part is None
        else:
            assert part.dtype == buffer.dtype and part.shape == (batch, *buffer.shape[1:])
            assert part.tolist() == [buffer[i].tolist() for i in indices.tolist()]


@FEW
@given(seeds, st.integers(1, 4), nodes, st.booleans())
def test_chains_are_those_of_sglangs_kernels(seed: int, batch: int, n: int, full: bool) -> None:
    from sglang.kernels.ops.speculative import spec_tree

    g = generator(seed)
    lengths = below(g, 40, batch)
    size = n * int(lengths.sum() * full) + n * n * batch
    mode = spec_tree.TreeMaskMode(0 if full else 1)
    ours, theirs = (
        [torch.ones(size, dtype=torch.bool), *(tensor.fill_(-1) for tensor in chain(batch, n).values())] for _ in "ab"
    )
    hooks.build_chain_tree(lengths, *ours, mode)
    # What SGLang's worker says of a chain: draft j + 1 is child of draft j.
    parents, drafts = (torch.arange(first, first + n - 1).expand(batch, -1).contiguous() for first in (-1, 0))
    spec_tree.sgl_build_tree_kernel_triton(parents, drafts, lengths, *theirs, 1, n - 1, n, mode)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    target, verified = below(g, 2, batch, n), [tree_inputs(generator(seed), batch, n) for _ in "ab"]
    names = ("predicts", "accept_index", "accept_token_num", "candidates", "retrieve_index")
    hooks.verify_chain_greedy(*(verified[0][name] for name in names), target)
    spec_tree.verify_tree_greedy_triton(**verified[1], target_predict=target)
    assert outputs(verified[0]) == outputs(verified[1])


@FEW
@given(seeds, st.integers(1, 4))
def test_slots_and_tokens_are_those_of_sglangs_kernels(seed: int, batch: int) -> None:
    from sglang.kernels.ops.speculative import cache_locs, eagle
    from sglang.srt.mem_cache import allocation

    g = generator(seed)
    slots, rows, start, end = spans(g, batch)
    ours = hooks.assign_extend_cache_locs(rows, slots, start, end)
    theirs = torch.zeros_like(ours)
    width, upper = slots.shape[1], 4
    cache_locs.assign_extend_cache_locs[(batch,)](rows, slots, start, end, theirs, width, upper)
    assert torch.equal(ours, theirs)
    ours, theirs = torch.zeros(batch * 4, dtype=torch.int64), torch.zeros(batch * 4, dtype=torch.int64)
    hooks.assign_draft_cache_locs(rows, slots, start, ours, 4)
    cache_locs.assign_draft_cache_locs_contiguous[(batch,)](rows, slots, start, theirs, width, 1, 4)
    assert torch.equal(ours, theirs)
    new, tables = torch.randperm(batch * PAGE, generator=g), [slots.clone(), slots.clone()]
    hooks.assign_req_to_token_pool(rows, tables[0], start, end, new)
    allocation.assign_req_to_token_pool[(batch,)](rows, tables[1], start, end, new, width, upper)
    assert torch.equal(*tables)
    tokens, lengths = below(g, VOCAB, batch, 5).int(), (below(g, 5, batch) + 1).int()
    bonus = [torch.zeros(batch, dtype=torch.int32) for _ in "ab"]
    hooks.fill_bonus_tokens(tokens, lengths, bonus[0], 5)
    eagle.fill_bonus_tokens[(batch,)](tokens, lengths, bonus[1], 5)
    assert torch.equal(*bonus)
