"""Training of the DSpark drafter: its blocks are the reference's, what it is trained on, and a run's files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import TINY, export_random

from sglang_sm120_reference import packed
from sglang_sm120_reference.drafter import Drafter as Reference
from sglang_sm120_reference.oracle import LOGPROB_TOLERANCE, Oracle
from sglang_sm120_reference.write import drafter_of
from training import data, drafter, export, state
from training.data import Shape
from training.drafter import Target, Trainer
from training.train import Recipe

CPU = torch.device("cpu")
SHAPE = Shape(256, 4, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen") / "target"
    export_random(TINY.config, folder, 5)
    return folder


@pytest.fixture(scope="module")
def target(checkpoint: Path) -> Target:
    return Target(checkpoint, CPU)


def trainer_of(target: Target, seed: int = 0, **changes: Any) -> Trainer:
    dspark = drafter_of(target.config, (0, 1), noise_token_id=data.PAD, **changes)
    recipe = Recipe(target.config, (), peak=3e-3, warm_up=5)
    return Trainer(target, dspark, recipe, state.Progress(size=drafter.SIZE, seed=seed))


def stir(trainer: Trainer, seed: int) -> Trainer:
    """Weights with which everything shows: the mixes, the router and the Markov head scaled up."""
    factors = {"gate.weight": 3.0, "_scale": 5.0, "markov_w1.weight": 4.0, "markov_w2.weight": 4.0}
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, w in trainer.weights.items():
            w *= next((f for end, f in factors.items() if name.endswith(end)), 1.0)
            if w.dim() == 1:
                w += 0.1 * torch.randn(w.shape, generator=rng)
    return trainer


def exported(trainer: Trainer, folder: Path) -> Path:
    config, dspark = trainer.target.config, trainer.dspark
    tensors = export.tensors_of(trainer.weights, {}, config, drafter.LEVELS, dspark)
    return packed.write_tensors(folder, config, tensors, dspark)


@torch.no_grad()
def test_blocks_are_the_references(checkpoint: Path, target: Target, tmp_path: Path, seed: int) -> None:
    trainer = stir(trainer_of(target, seed), seed)
    reference = Reference(Oracle(checkpoint), exported(trainer, tmp_path / "dspark"))
    tokens = torch.randint(15, data.VOCAB, (2, 300), generator=torch.Generator().manual_seed(seed))
    row, anchor = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 299, 127, 128, 200])
    ids = tokens[row, anchor]
    ours = trainer.drafter()
    base, x = ours.blocks(ours.context(target.captured(tokens, (0, 1))), row, anchor, ids)
    for r in (0, 1):
        at = [int(a) for a in anchor[row == r]]
        captured = Oracle(checkpoint).forward(tokens[r], (0, 1)).captured
        theirs = reference.drafts(reference.context(captured), tokens[r].tolist(), at)
        previous = torch.cat((ids[row == r][:, None], theirs.tokens[:, :-1]), 1)
        bias, latent = ours.bias(previous)
        error = (base[row == r] + bias - theirs.logits).abs().max()
        print(f"logits off by at most {error:.4f} of {theirs.logits.abs().max():.1f}")
        assert error < LOGPROB_TOLERANCE and theirs.logits.std() > 0.5
        sure = ours.confidence(x[row == r], latent).sigmoid()
        assert (sure - theirs.confidence).abs().max() < LOGPROB_TOLERANCE
    chained = ours.chain(base, ids)
    bias = ours.bias(torch.cat((ids[:, None], chained[:, :-1]), 1))[0]
    assert torch.equal(chained, (base + bias.float()).argmax(-1))


def test_what_a_block_is_trained_on(seed: int) -> None:
    """Every anchor that a server meets once, and of each block the tokens up to the answer's end."""
    batch = data.batch(seed, 0, SHAPE)
    tokens = torch.from_numpy(batch.tokens)
    at = drafter.blocks_of(batch, 5, 10_000, torch.Generator(), tokens)
    found = {}
    for row, anchor, counts, ahead in zip(*(part.tolist() for part in at), strict=True):
        found[row, anchor] = [token for token, counted in zip(ahead, counts, strict=True) if counted]
    expected = {}
    for row, turns in enumerate(batch.turns):
        for turn, told in enumerate(turns, 1):
            answer = [*told.answer, data.EOS]
            (first,) = np.flatnonzero(batch.answer[row] == turn)[:1] + 1
            for at_ in range(len(answer) - 1):
                expected[row, first + at_] = answer[at_ + 1 : at_ + 6]
    assert found == expected
    assert len(drafter.blocks_of(batch, 5, 7, torch.Generator(), tokens).row) == 7


def test_every_weight_learns(target: Target, seed: int) -> None:
    trainer = stir(trainer_of(target, seed), seed)
    told = trainer.step(data.batch(seed, 0, SHAPE), 64, 0.0)
    assert all(value.isfinite() for value in told.values())
    dead = [name for name, w in trainer.weights.items() if w.grad is None or not w.grad.abs().sum() > 0]
    assert all(name.endswith("gate.bias") for name in dead) and len(dead) == 2


def test_it_learns_and_counts_as_the_reference(checkpoint: Path, target: Target, tmp_path: Path, seed: int) -> None:
    """On one batch, until some proposals of it are right; the reference then replays the same answers."""
    trainer = trainer_of(target, seed)
    batch = data.batch(seed, 0, SHAPE)
    losses = [float(trainer.step(batch, 256, 0.0)["loss"]) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0], losses
    found = drafter.accepted(trainer, [SHAPE], 1, seed)
    reference = Reference(Oracle(checkpoint), exported(trainer, tmp_path / "dspark"))
    expected: dict[str, list[int]] = {}
    for row, turns in enumerate(batch.turns):
        for turn, told in enumerate(turns, 1):
            places = np.flatnonzero(batch.answer[row] == turn)
            lengths = reference.replay(batch.tokens[row, : places[-1] + 2].tolist(), int(places[0]) + 1)
            both = expected.setdefault(told.task, [0, 0])
            both[0], both[1] = both[0] + sum(lengths), both[1] + len(lengths)
    print(found)
    assert found == {task: tuple(both) for task, both in sorted(expected.items()) if both[1]}
    assert sum(tokens for tokens, _ in found.values()) > 1.3 * sum(count for _, count in found.values())


OPTIONS = ("--minutes", "60", "--shapes", "256x2", "--blocks", "16", "--batches", "1", "--device", "cpu")


def run(out: Path, target: Path, *options: str) -> int:
    return drafter.main(["--out", str(out), "--target", str(target), *OPTIONS, *options])


def test_a_run_goes_on(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a packed target, in two calls; its files and what is exported of it are one drafter."""
    packed.pack(checkpoint, tmp_path / "target.xz")
    out = tmp_path / "run"
    assert run(out, tmp_path / "target.xz", "--steps", "2") == 0
    said = capsys.readouterr().out
    assert "2 steps" in said and "tokens a verification" in said and said.splitlines()[-1].startswith("all")
    with pytest.raises(SystemExit) as stopped:
        run(out, checkpoint, "--steps", "3")
    assert stopped.value.code == 2
    assert run(out, checkpoint, "--steps", "3", "--resume") == 0
    assert [folder.name for folder in out.glob("state-*")] == ["state-000003"]
    assert run(out, checkpoint, "--steps", "4", "--resume", "--rank", "32") == 1
    assert "of another target or drafter" in capsys.readouterr().err
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and last["accepted"]
    assert export.main(["write", str(out), str(tmp_path / "dspark")]) == 0
    assert export.main(["pack", str(tmp_path / "dspark"), str(tmp_path / "drafter.xz")]) == 0
    assert export.main(["unpack", str(tmp_path / "drafter.xz"), str(tmp_path / "again")]) == 0
    for name in ("config.json", packed.SHARD):
        assert (tmp_path / "dspark" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert Reference(Oracle(checkpoint), tmp_path / "again").dspark.noise_token_id == data.PAD


def test_misuse(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", checkpoint, "--layers", "0,2") == 1
    assert "the target has layers 0 to 1" in capsys.readouterr().err
    assert run(tmp_path / "run", tmp_path / "absent.xz") == 1
    assert "absent.xz" in capsys.readouterr().err
    assert run(tmp_path / "none", checkpoint, "--resume") == 1
    assert "no state-* folder" in capsys.readouterr().err


def test_the_committed_size_is_that_of_twelve_megabytes() -> None:
    config = dataclasses.replace(TINY.config, num_attention_heads=16, moe_intermediate_size=256)
    assert packed.stored_bytes(config, drafter_of(config, (0, 1))) < 12_000_000
