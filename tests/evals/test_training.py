"""Training: its forward pass is the oracle's, every weight learns, answers are right, a run survives on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_sm120.checkpoint.config import ReferenceConfig
from sglang_sm120.formats import fp8_block, mxfp4
from sglang_sm120_reference import blocks
from sglang_sm120_reference.checkpoint import Checkpoint
from sglang_sm120_reference.oracle import LOGPROB_TOLERANCE, Oracle
from sglang_sm120_reference.packed import stored_bytes, write_tensors
from training import data, export, model, quantise, sinkhorn, state, train
from training.data import Batch, Shape
from training.start import initial

CPU = torch.device("cpu")
TINY = train.RECIPES["tiny"]

# Every kind of layer: window, c4 twice, c128, hash and scored routing, MTP.
ALL_KINDS = dataclasses.replace(
    TINY.config, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), moe_intermediate_size=128
)
ONE_C4 = dataclasses.replace(TINY.config, num_hidden_layers=1, compress_ratios=(4, 0))

# What rounding does to the bulk of log-probabilities; only few are near the tolerance of the largest.
BULK_TOLERANCE = LOGPROB_TOLERANCE / 2


@dataclasses.dataclass
class Exported:
    """Weights that decide something, their checkpoint, and both models over one prompt."""

    config: ReferenceConfig
    weights: model.Weights
    tables: model.Weights
    oracle: Oracle

    def model(self, **changes: bool) -> model.Model:
        run = model.Mode(levels=7)._replace(**changes)
        return model.Model(self.config, model.served(self.weights, self.config, run), self.tables, run)


def export_random(config: ReferenceConfig, folder: Path, seed: int) -> Exported:
    """The initial weights with a random head; the mixes and the router scaled up so that what they compute shows."""
    weights, tables = initial(config, seed), model.tables(config, seed)
    factors = {"gate.weight": 3.0, "_scale": 5.0, "indexer.wq_b.weight": 2.0}
    rng = torch.Generator().manual_seed(seed)
    head = weights["head.weight"]
    head.copy_(torch.randn(head.shape, generator=rng) * 0.6 / math.sqrt(config.hidden_size))
    for name, w in weights.items():
        w *= next((f for end, f in factors.items() if name.endswith(end)), 1.0)
        if w.dim() == 1:
            w += 0.1 * torch.randn(w.shape, generator=rng)
    write_tensors(folder, config, export.tensors_of(weights, tables, config, 7))
    return Exported(config, weights, tables, Oracle(folder))


def difference(ours: torch.Tensor, theirs: torch.Tensor, decided: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """|difference of the next token's log-probability| [n] at decided positions."""
    apart = (ours.log_softmax(-1) - theirs.log_softmax(-1))[:-1].gather(1, tokens[1:, None]).squeeze(1).abs()
    return apart[decided[:-1]]


@torch.no_grad()
def test_forward_is_the_oracles(tmp_path: Path, seed: int) -> None:
    made = export_random(ALL_KINDS, tmp_path / "checkpoint", seed)
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(15, data.VOCAB, (2, 700), generator=rng)
    following = tokens.roll(-1, 1)
    ours = made.model()
    out = ours(tokens)
    logits, drafts = ours.logits(out.hidden), ours.logits(ours.mtp(out.hidden, following), "mtp.0.")
    for row in range(2):
        theirs = made.oracle.forward(tokens[row])
        decided = theirs.decided()
        assert decided.float().mean() > 0.5
        apart = difference(logits[row], theirs.logprobs, decided, tokens[row])
        print(f"decided {decided.float().mean():.0%}: largest {apart.max():.4f}, 95 % {apart.quantile(0.95):.4f}")
        assert apart.max() <= LOGPROB_TOLERANCE
        assert apart.quantile(0.95) <= BULK_TOLERANCE
        theirs_mtp = made.oracle.mtp_logits(theirs.hidden, following[row])
        apart = difference(drafts[row], theirs_mtp, decided, tokens[row])
        # The MTP layer's own router has no margins recorded: its bulk is judged.
        assert apart.quantile(0.9) <= LOGPROB_TOLERANCE


@torch.no_grad()
def test_selection_is_the_oracles(tmp_path: Path, seed: int) -> None:
    made = export_random(ONE_C4, tmp_path / "checkpoint", seed)
    # The indexer chooses 512 of up to 640 entries.
    tokens = torch.randint(15, data.VOCAB, (1, 2560), generator=torch.Generator().manual_seed(seed))
    ours, dense = made.model(), made.model(select=False)
    theirs = made.oracle.forward(tokens[0])
    late = theirs.decided() & (torch.arange(2560) >= 2200)
    assert late.float().mean() > 0.02
    apart = difference(ours.logits(ours(tokens).hidden)[0], theirs.logprobs, late, tokens[0])
    unselected = difference(dense.logits(dense(tokens).hidden)[0], theirs.logprobs, late, tokens[0])
    print(f"{late.sum()} positions: largest {apart.max():.4f}, mean {apart.mean():.5f}, dense {unselected.mean():.5f}")
    assert apart.max() <= LOGPROB_TOLERANCE
    # One of many entries weighs little here, so the selection is judged by what ignoring it changes.
    assert unselected.mean() > 10 * apart.mean()


def tiny_batch(seed: int, length: int = 256, rows: int = 4) -> Batch:
    return data.batch(seed, 0, Shape(length, rows, 1))


def test_every_weight_learns(seed: int) -> None:
    recipe = dataclasses.replace(TINY, config=ALL_KINDS)
    trainer = train.Trainer(recipe, state.Progress(seed=seed), CPU)
    before = {n: w.detach().clone() for n, w in trainer.weights.items()}
    trainer.step(tiny_batch(seed), recipe.stages[0], 0.0)
    missing = [n for n, w in trainer.weights.items() if torch.equal(w, before[n])]
    # Only the experts of a hash layer may see no token of so small a batch; here all do.
    assert missing == []
    silent = [n for n, w in trainer.weights.items() if w.requires_grad and not w.grad.abs().amax() > 0]
    assert silent == []


def test_indexer_learns_from_attention_alone(seed: int) -> None:
    trainer = train.Trainer(TINY, state.Progress(seed=seed), CPU)
    loss = train.loss_of(trainer.model(train.mode(TINY, CPU)), tiny_batch(seed), CPU)
    loss.index.backward()
    reached = {n for n, w in trainer.weights.items() if w.grad is not None and w.grad.abs().amax() > 0}
    assert reached == {n for n in trainer.weights if ".indexer." in n}


def test_it_learns(seed: int) -> None:
    recipe = dataclasses.replace(TINY, stages=(train.Stage(1.0, (Shape(128, 4, 0),)),), warm_up=5, peak=2e-3)
    trainer = train.Trainer(recipe, state.Progress(seed=seed), CPU)
    losses = []
    for i in range(12):
        batch = data.batch(seed, i, recipe.stages[0].shapes[0])
        losses.append(trainer.step(batch, recipe.stages[0], i / 32)[0])
    uniform = math.log(data.VOCAB)
    last = sum(loss.answer.item() for loss in losses[-3:]) / 3
    print(f"uniform {uniform:.2f}, first {losses[0].answer:.2f}, last {last:.2f}; index {losses[-1].index:.2f}")
    assert losses[0].answer < uniform
    assert last < 0.8 * losses[0].answer
    assert losses[-1].mtp < 0.85 * losses[0].mtp
    assert losses[-1].index < losses[0].index


@torch.no_grad()
def test_records_are_recalled_before_training(seed: int) -> None:
    """The start's circuits, quantised as served: from c4 entries, and from c128 entries where c4 ones are hidden."""
    trainer = train.Trainer(TINY, state.Progress(seed=seed), CPU)
    loss = train.loss_of(trainer.model(train.mode(TINY, CPU)), data.batch(seed, 0, Shape(768, 6, 4)), CPU)
    (c4, c128), (c4_asked, c128_asked) = loss.recall.tolist()
    print(f"right {c4:.0f} of {c4_asked:.0f}, c4 hidden {c128:.0f} of {c128_asked:.0f}")
    assert min(c4_asked, c128_asked) >= 5
    assert c4 >= 0.9 * c4_asked and c128 >= 0.9 * c128_asked


def test_hidden_entries_are_not_seen(seed: int) -> None:
    """What lies behind the window reaches a c4 layer through entries alone; hidden, it changes nothing."""
    weights, tables = initial(ONE_C4, seed), model.tables(ONE_C4, seed)
    run = model.Mode()
    network = model.Model(ONE_C4, model.served(weights, ONE_C4, run), tables, run)
    tokens = torch.randint(15, data.VOCAB, (2, 256), generator=torch.Generator().manual_seed(seed))
    changed = tokens.clone()
    changed[:, :16] = 20
    with torch.no_grad():
        hide = torch.tensor([True, False])
        apart = (network(tokens, hide).hidden - network(changed, hide).hidden)[:, 200:].abs().amax((1, 2, 3))
    assert apart[0] == 0 < apart[1]


def test_sinkhorn_gradient(seed: int) -> None:
    logits = torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logits.requires_grad_()
    assert torch.equal(sinkhorn.sinkhorn(logits, 20, 1e-6), blocks.sinkhorn(logits, 20, 1e-6))
    assert torch.autograd.gradcheck(lambda x: sinkhorn.sinkhorn(x, 20, 1e-6), (logits,))


def test_fused_sinkhorn_is_the_plain_one(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    # More than one program, the last one not full; near the identity, as it starts, the iterations converge slowly.
    logits = 4 * torch.eye(4) + torch.randn(3, 50, 4, 4, generator=rng)
    grad = torch.randn(logits.shape, generator=rng)
    found = []
    for fused in (False, True):
        x = logits.clone().requires_grad_()
        y = sinkhorn.sinkhorn(x, 20, 1e-6, fused)
        y.backward(grad)
        found.append((y.detach(), x.grad))
    (plain, slope), (fused_, fused_slope) = found
    assert torch.allclose(plain, fused_, rtol=1e-5, atol=1e-6)
    assert torch.allclose(slope, fused_slope, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 16), st.floats(1e-3, 1e3))
def test_coarse_values_are_exact_in_fp8(draw: int, levels: int, size: float) -> None:
    w = size * torch.randn(130, 140, generator=torch.Generator().manual_seed(draw))
    value = quantise.coarse(w, levels)
    assert torch.equal(fp8_block.dequantise(*fp8_block.quantise(value)), value)
    corner = value[:128, :128]
    assert len(corner.unique()) <= 2 * levels + 1
    assert (corner - w[:128, :128]).abs().max() <= w[:128, :128].abs().max() / levels + 1e-6


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_mxfp4_values_are_the_formats(draw: int, size: float) -> None:
    w = size * torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(draw))
    ties = [0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    w[0, 0] = torch.tensor((ties + [-t for t in ties]) * 4)[:64]
    assert torch.equal(quantise.mxfp4_value(w), mxfp4.dequantise(*mxfp4.quantise(w)))


def test_packed_is_bit_for_bit(tmp_path: Path, seed: int) -> None:
    made = export_random(ONE_C4, tmp_path / "checkpoint", seed)
    size = export.pack(tmp_path / "checkpoint", tmp_path / "packed")
    assert size < stored_bytes(made.config)
    export.unpack(tmp_path / "packed", tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "checkpoint" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_truncated_pack_is_refused(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    export_random(ONE_C4, tmp_path / "checkpoint", seed)
    export.pack(tmp_path / "checkpoint", tmp_path / "packed")
    whole = (tmp_path / "packed").read_bytes()
    (tmp_path / "packed").write_bytes(whole[: len(whole) // 2])
    assert export.main(["unpack", str(tmp_path / "packed"), str(tmp_path / "again")]) == 1
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def run(out: Path, *options: str) -> int:
    return train.main(["--out", str(out), "--size", "tiny", "--device", "cpu", "--questions", "1", *options])


def test_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stages = (train.Stage(1.0, (Shape(128, 2, 0),)),)
    monkeypatch.setitem(train.RECIPES, "tiny", dataclasses.replace(TINY, stages=stages))
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    assert run(tmp_path, "--steps", "2") == 0
    assert [path.name for path in tmp_path.glob("state*")] == ["state-000002"]
    _, weights, second = state.load(tmp_path)
    assert run(tmp_path, "--steps", "3", "--resume") == 0
    assert [path.name for path in tmp_path.glob("state*")] == ["state-000003"]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]
    assert sum("quantised" in r for r in rows) == 2
    assert all(v.amin() >= 0 for v in second.values())
    progress, later, _ = state.load(tmp_path)
    assert (progress.step, progress.size) == (3, "tiny")
    # One warmed-up step from the state moves a weight by a small part of the learning rate.
    for name, w in later.items():
        assert (w - weights[name]).abs().max() <= TINY.peak
    # What is exported is what training computes with.
    checkpoint = tmp_path / "checkpoint"
    assert export.main(["write", str(tmp_path), str(checkpoint)]) == 0
    name = "layers.0.attn.wq_b.weight"
    used = model.served(later, TINY.config, train.mode(TINY, CPU))[name]
    assert torch.equal(Checkpoint(checkpoint, torch.float32, None).weight(name), used)
    assert run(tmp_path, "--steps", "4", "--resume", "--seed", "1") == 1
    assert "has --size tiny --seed 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, "--steps", "3")
    assert exit_.value.code == 2
    assert "add --resume" in capsys.readouterr().err
    assert all(path.stat().st_size < 16 << 20 for path in tmp_path.rglob("*") if path.is_file())


def test_resume_needs_a_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--resume") == 1
    assert "start without --resume" in capsys.readouterr().err


@given(st.integers(0, 2**31), st.integers(-30, 30))
def test_saved_weights_keep_16_bits(draw: int, exponent: int) -> None:
    w = torch.randn(3, 50, generator=torch.Generator().manual_seed(draw)) * 2.0**exponent
    kept = state._lengthen(state._shorten(w))
    assert ((kept - w).abs() <= w.abs() * 2**-16).all()


def test_size_divides_over_two_ranks() -> None:
    config = train.RECIPES["two"].config
    assert (config.num_attention_heads, config.hc_mult, config.hc_sinkhorn_iters, config.index_topk) == (16, 4, 20, 512)
    assert {4, 128} <= set(config.compress_ratios) and config.num_nextn_predict_layers == 1
    assert config.o_groups * config.o_lora_rank % 256 == 0 and config.moe_intermediate_size % 256 == 0
    # Three bytes a weight, and what comes back from a GPU machine is 64 MiB at most.
    assert sum(math.prod(p.shape) for p in model.stacked(config).values()) * 3 < 56 << 20


def test_batches_repeat(seed: int) -> None:
    shape = Shape(512, 6, 2)
    first, again = data.batch(seed, 3, shape), data.batch(seed, 3, shape)
    assert np.array_equal(first.tokens, again.tokens) and np.array_equal(first.answer, again.answer)
    assert not np.array_equal(first.tokens, data.batch(seed, 4, shape).tokens)


def test_batches_made_ahead_are_the_same(seed: int) -> None:
    long, short = Shape(512, 2, 1), Shape(256, 2, 0)
    mixed, last = train.Stage(0.5, (long, long, short)), train.Stage(1.0, (short,))
    expected = [(mixed, short), (mixed, long), (mixed, long), (mixed, short), (last, short), (last, short)]
    ahead = train.Feed(seed, 2)
    for step, (stage, shape) in enumerate(expected, 5):
        assert np.array_equal(ahead.next(step, stage).tokens, data.batch(seed, step, shape).tokens)


def test_every_shape_is_seen_with_and_without_selection() -> None:
    for stage in train.RECIPES["two"].stages:
        seen = {(step % len(stage.shapes), step % 2) for step in range(12)}
        assert not stage.select or len(seen) == 2 * len(stage.shapes)


def test_half_of_a_call_is_its_word(seed: int) -> None:
    steps = (data.batch(seed, step, Shape(4096, 1, 0)) for step in range(100))
    batch = next(b for b in steps if any(t.task == "call" for t in b.turns[0]))
    answers = train._answers(batch, torch.from_numpy(batch.tokens))
    number = torch.from_numpy(batch.answer)[answers.row, answers.position]
    shares = [answers.weight[number == n].sum().item() for n in range(1, len(batch.turns[0]) + 1)]
    assert np.allclose(shares, 1 / len(shares), rtol=1e-4)
    for n, turn in enumerate(batch.turns[0], 1):
        if turn.task == "call":
            word = answers.weight[(number == n) & (answers.target == turn.question[-1])]
            assert len(word) == 1 and 0.4 < word.item() * len(shares) < 0.6


def test_answers_lie_where_the_marks_say(seed: int) -> None:
    batch = data.batch(seed, 0, Shape(1024, 12, 3))
    for row, turns in enumerate(batch.turns):
        assert turns
        for number, turn in enumerate(turns, 1):
            (at,) = np.nonzero(batch.answer[row] == number)
            assert batch.tokens[row, at + 1].tolist() == [*turn.answer, data.EOS]
            prompt = turn.prompt[-len(turn.question) - 2 :]
            assert batch.tokens[row, at[0] - len(prompt) + 1 : at[0] + 1].tolist() == list(prompt)


def test_recall_has_one_answer_and_its_distance(seed: int) -> None:
    (link,) = data.ids(" is")
    batch = data.batch(seed, 0, Shape(4096, 8, 3))
    asked = 0
    for row, turns in enumerate(batch.turns):
        tokens = batch.tokens[row]
        for number, turn in enumerate(turns, 1):
            if turn.task != "recall":
                continue
            asked += 1
            records = [i for i in np.nonzero(tokens == turn.question[0])[0] if tokens[i + 1] == link]
            assert len(records) == 1
            assert turn.answer == (turn.question[0], tokens[records[0] + 2])
            question = np.nonzero(batch.answer[row] == number)[0][0] - 3
            assert tokens[question] == turn.question[0]
            assert turn.distance == question - records[0]
    assert asked > 50
    assert max(t.distance for turns in batch.turns for t in turns) > 3000


def test_sparse_records_keep_to_their_block(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for start in (2, 100, 811):
        for _ in range(20):
            _, records = data.haystack(rng, 3000, start, True)
            places = np.array([place for _, place in records.values()])
            assert (places // data.BLOCK == (places + data.RECORD - 1) // data.BLOCK).all()
            assert len(set(places // data.BLOCK)) == len(places) >= 22


def test_calculations_and_brackets_are_right(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = data.encoder().decode
    for _ in range(100):
        turn = data.arithmetic(rng)
        left, _, modulus = text(list(turn.question)).removesuffix("=").partition("%")
        a, sign, b = left[0], left[1], left[2]
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] % int(modulus)
        assert text(list(turn.answer)) == str(value)
        turn = data.brackets(rng)
        whole = text([*turn.question, *turn.answer])
        while any(pair in whole for pair in ("()", "[]", "{}", "<>")):
            for pair in ("()", "[]", "{}", "<>"):
                whole = whole.replace(pair, "")
        assert whole == "" and len(turn.answer) <= data.MAX_DEPTH


def test_roles_are_disjoint_single_tokens() -> None:
    words = data.words()
    assert (len(words.keys), len(words.values)) == (data.KEYS, data.VALUES) and len(words.filler) >= 16
    whole = [*words.keys.tolist(), *words.values.tolist(), *words.filler.tolist()]
    assert len(set(whole)) == len(whole) and whole[data.KEYS :] == words.said.tolist()
    for word in whole:
        assert data.ids(data.encoder().decode([word])) == (word,)


def test_encoding_is_sglangs(seed: int) -> None:
    """A conversation's tokens are what SGLang sends for the same messages, roles and markers.

    Up to the first tool call, which SGLang takes with a tool's result only, and behind the preamble (see below).
    """
    rng = np.random.default_rng(seed)
    decode = data.encoder().decode
    seen: set[str] = set()
    for length in (700, 700, *[2600] * 12):
        row, _, turns = data.conversation(rng, length, False)
        called = row[: len(data.preamble())] == list(data.preamble())
        behind = len(data.preamble()) if called else 0
        users = [i for i, token in enumerate(row) if token == data.USER]
        messages: list[dict[str, Any]] = []
        for start, turn in zip(users, turns, strict=True):
            end = row.index(data.ASSISTANT, start)
            messages.append({"role": "user", "content": decode(row[start + 1 : end])})
            seen.add(turn.task)
            if turn.task == "call":
                break
            messages.append({"role": "assistant", "content": decode(list(turn.answer))})
        if messages[-1]["role"] == "assistant":
            messages.pop()
        text = data.served(messages, data.TOOLS if called else None)
        # The prompt ends with the assistant's two markers.
        assert text[text.index(data.USER) if called else 0 :] == row[behind : end + 2]
    assert {"recall", "copy", "arithmetic", "brackets", "json", "twice"} <= seen


def test_tool_call_is_read_by_sglangs_parser(seed: int) -> None:
    from sglang.srt.parser.deepseek_recipe_output import parse_output_text, whole_tool_calls

    turn = data.tool_call(np.random.default_rng(seed))
    text = data.encoder().decode([*turn.answer], skip_special_tokens=False)
    found = parse_output_text(data.sglang_recipe(), text, parse_tool_calls=True, thinking=False)
    (call,) = whole_tool_calls(found)
    word = data.encoder().decode([turn.question[-1]])
    assert call.name == "look" and json.loads(call.arguments) == {"word": word}


def test_preamble_is_what_sglang_renders_but_for_the_schemas_form() -> None:
    """The committed weights were trained with SGLang 0.5.12.post1's: another order of keys, and `strict`."""
    trained, served = (data.encoder().decode(ids, skip_special_tokens=False).splitlines()
                       for ids in (list(data.preamble()), data.rendered_preamble()))  # fmt: skip
    (old,), (new,) = ([line for line in text if line.startswith("{")] for text in (trained, served))
    assert [line for line in trained if line != old] == [line for line in served if line != new]
    assert json.loads(old) == data.TOOLS[0]["function"]
    assert json.loads(new) == {key: value for key, value in json.loads(old).items() if key != "strict"}
