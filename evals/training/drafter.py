"""Train a DSpark drafter for the trained small model, which stays as it is, in a call of some minutes.

`python evals/training/drafter.py --out DIR --minutes 5 [--resume]`, then `export.py write DIR CHECKPOINT/dspark` and
`export.py pack CHECKPOINT/dspark PACKED`; see docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("evals", "overlay", "reference")]

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_sm120.checkpoint.config import HEAD_DIM, WINDOW, DSparkConfig, ReferenceConfig
from sglang_sm120.checkpoint.layout import Storage, parameters
from sglang_sm120_reference.checkpoint import Checkpoint
from sglang_sm120_reference.config_file import config_json, load_config, load_dspark
from sglang_sm120_reference.packed import stored_bytes, unpack
from sglang_sm120_reference.write import drafter_of
from training import data, state
from training.model import Mode, Model, Weights, served, stack_name, stacked
from training.start import random
from training.train import EVAL_SEED, LOG_EVERY, RESERVE, Feed, Learner, Recipe, Stage

TARGET = Path(__file__).parents[1] / "small-deepseek-v4.xz"
SIZE = "dspark"
"""What a run's state has as its size."""
LEVELS = 7
SHAPES = (data.Shape(512, 16, 0), data.Shape(2048, 4, 0))
"""Taken in turn; from 2,048 tokens on conversations call the tool. No c4 entries are hidden, as when serving."""
FADE = 0.8
"""Weight of a block's row against the row before it: it counts only where those before it are right."""


class Blocks(NamedTuple):
    """Where N blocks start: row [N] of a batch, anchor [N], its position, and whether each proposal belongs to an
    answer [N, G], with the token that is right [N, G]."""

    row: Tensor
    anchor: Tensor
    counts: Tensor
    target: Tensor


class Drafter(Model):
    """The drafter over `served` weights, with embedding and head of the target among them: `reference/drafter.py`."""

    def __init__(self, config: ReferenceConfig, dspark: DSparkConfig, weights: Weights, mode: Mode) -> None:
        super().__init__(dspark.stage(config), weights, {}, mode)
        self.dspark = dspark
        self._last = f"mtp.{dspark.stages - 1}."

    def context(self, captured: dict[int, Tensor]) -> list[Tensor]:
        """Each stage's keys [B, T, 512] from the target's streams [B, T, 4, H] after the drafter's layers."""
        means = [self._round(captured[layer].float().mean(2)) for layer in self.dspark.target_layer_ids]
        x = self._norm(self._linear(torch.cat(means, -1), "mtp.0.main_proj"), "mtp.0.main_norm.weight")
        turn = self._turn(0, x.shape[1])
        return [self._keys(f"mtp.{stage}.attn.", x, turn) for stage in range(self.dspark.stages)]

    def blocks(self, context: Sequence[Tensor], row: Tensor, anchor: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Base logits [N, G, V] and what they are of [N, G, H], for anchors with these ids [N]."""
        self._loads = {}
        steps = torch.arange(self.dspark.block_size, device=ids.device)
        positions = anchor.unsqueeze(1) + steps
        tokens = torch.where(steps == 0, ids.unsqueeze(1), self.dspark.noise_token_id)
        self._block_turn = self._turn(0, context[0].shape[1] + len(steps))[positions]
        before = anchor.unsqueeze(1) + torch.arange(-WINDOW, 0, device=ids.device)
        self._hidden = before < 0
        streams = self._round(self._w("embed.weight")[tokens]).unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        for stage, keys in enumerate(context):
            self._window = keys[row.unsqueeze(1), before.clamp(min=0)]
            streams = self._layer(f"mtp.{stage}.", 0, streams, tokens, None)
        x = self._collapsed(streams, self._last)
        return self._logits(x, self._last), x

    def _attention(self, prefix: str, ratio: int, x: Tensor, hide_c4: Tensor | None) -> Tensor:
        q = self._queries(prefix, x, self._block_turn)[1]
        keys = torch.cat((self._window, self._keys(prefix, x, self._block_turn)), 1)
        logits = (q.flatten(1, 2) @ keys.mT).unflatten(1, q.shape[1:3]).float() * HEAD_DIM**-0.5
        hidden = F.pad(self._hidden, (0, x.shape[1]))
        logits = logits.masked_fill(hidden[:, None, None], -math.inf)
        kept = (logits.logsumexp(-1) - self._w(prefix + "attn_sink")).sigmoid().unsqueeze(-1)
        out = (logits.softmax(-1).to(q.dtype).flatten(1, 2) @ keys).unflatten(1, q.shape[1:3]) * kept
        return self._projected(prefix, self._round(out), self._block_turn)

    def bias(self, previous: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens before [...] add to logits [..., V], and their latent [..., rank]."""
        latent = self._w(self._last + "markov_head.markov_w1.weight")[previous]
        latent = self._round(latent)
        return self._round(latent @ self._w(self._last + "markov_head.markov_w2.weight").to(latent.dtype).T), latent

    def confidence(self, x: Tensor, latent: Tensor) -> Tensor:
        """Logits fp32 [..., ] of a proposal being right."""
        features = torch.cat((x, latent), -1).float()
        return (features @ self._w(self._last + "confidence_head.proj.weight").T).squeeze(-1)

    def chain(self, base: Tensor, ids: Tensor) -> Tensor:
        """The greedy proposals [N, G] of base logits [N, G, V] after the anchors ids [N]."""
        found = [ids]
        for row in base.unbind(1):
            found.append((row + self.bias(found[-1])[0].float()).argmax(-1))
        return torch.stack(found[1:], 1)


class Target:
    """The model that is drafted for, frozen, read from a checkpoint directory."""

    def __init__(self, checkpoint: Path, device: torch.device) -> None:
        files = Checkpoint(checkpoint, torch.float32, None)
        self.config, self.device = files.config, device
        weights: Weights = {}
        experts: dict[str, list[Tensor]] = defaultdict(list)
        self._tables = {}
        for p in parameters(self.config):
            if p.storage is Storage.INT32:
                self._tables[p.name] = files.raw(p.name).to(device)
            elif p.storage is Storage.MXFP4:
                experts[stack_name(p.name)].append(files.weight(p.name))
            else:
                weights[p.name] = files.weight(p.name)
        weights |= {name: torch.stack(parts) for name, parts in experts.items()}
        weights = {name: w.to(device) for name, w in weights.items()}
        # Read back from the files' formats: nothing is left to round.
        self.mode = Mode(torch.bfloat16 if device.type == "cuda" else torch.float32, exact=False)
        self._weights = served(weights, self.config, self.mode)
        self.shared = {name: self._weights[name] for name in ("embed.weight", "head.weight")}

    @torch.no_grad()
    def captured(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """The streams [B, T, 4, H] after these layers over tokens [B, T]."""
        return Model(self.config, self._weights, self._tables, self.mode)(tokens, capture=layers).captured


class Trainer(Learner):
    """Of the drafter, for a target that stays as it is."""

    def __init__(self, target: Target, dspark: DSparkConfig, recipe: Recipe, progress: state.Progress) -> None:
        self.target, self.dspark, config = target, dspark, target.config
        weights = {name: random(name, p.shape, config, progress.seed) for name, p in stacked(config, dspark).items()}
        super().__init__(weights, recipe, progress, target.device)
        self._rng = torch.Generator().manual_seed(progress.seed + progress.step)

    def drafter(self) -> Drafter:
        mode = self.target.mode._replace(levels=LEVELS, exact=True)
        weights = served(self.weights, self.target.config, mode, self.dspark)
        return Drafter(self.target.config, self.dspark, weights | self.target.shared, mode)

    def step(self, batch: data.Batch, most: int, done: float) -> dict[str, Tensor]:
        """One update at `done` 0 … 1 of the run, on `most` blocks of a batch: loss, shares that are right."""
        tokens = torch.from_numpy(batch.tokens).to(self.target.device)
        at = blocks_of(batch, self.dspark.block_size, most, self._rng, tokens)
        drafter = self.drafter()
        context = drafter.context(self.target.captured(tokens, self.dspark.target_layer_ids))
        ids = tokens[at.row, at.anchor]
        base, x = drafter.blocks(context, at.row, at.anchor, ids)
        bias, latent = drafter.bias(torch.cat((ids.unsqueeze(1), at.target[:, :-1]), 1))
        logits = base + bias.float()
        fade = at.counts * FADE ** torch.arange(self.dspark.block_size, device=ids.device)
        loss = F.cross_entropy(logits.flatten(0, 1), at.target.flatten(), reduction="none").view_as(fade)
        right = (logits.argmax(-1) == at.target).float()
        unsure = F.binary_cross_entropy_with_logits(
            drafter.confidence(x.detach(), latent.detach()), right, reduction="none"
        )
        answer, confidence = ((part * fade).sum() / fade.sum() for part in (loss, unsure))
        norm = self.update(answer + confidence, drafter._loads, done)
        first, all_ = ((right * at.counts)[:, :n].sum() / at.counts[:, :n].sum() for n in (1, None))
        return {"loss": answer, "confidence": confidence, "first right": first, "right": all_, "norm": norm}


def blocks_of(batch: data.Batch, size: int, most: int, rng: torch.Generator, tokens: Tensor) -> Blocks:
    """Up to `most` blocks of a batch, drawn: anchors are answers' tokens but the last, as a server meets them."""
    marks = torch.from_numpy(batch.answer)
    # The token at `anchor` is of the turn that is marked before it, and another one of it follows.
    row, before = ((marks[:, :-1] > 0) & (marks[:, :-1] == marks[:, 1:])).nonzero(as_tuple=True)
    chosen = torch.randperm(len(row), generator=rng)[:most]
    row, anchor = row[chosen], before[chosen] + 1
    ahead = anchor.unsqueeze(1) + torch.arange(size)
    turn = F.pad(marks, (0, size))[row.unsqueeze(1), ahead]
    counts = (turn == marks[row, anchor].unsqueeze(1)).float()
    row, anchor, counts = (part.to(tokens.device) for part in (row, anchor, counts))
    return Blocks(row, anchor, counts, F.pad(tokens, (0, size + 1))[row.unsqueeze(1), ahead.to(tokens.device) + 1])


@torch.no_grad()
def accepted(
    trainer: Trainer, shapes: Sequence[data.Shape], batches: int, seed: int = EVAL_SEED
) -> dict[str, tuple[int, int]]:
    """Of conversations that no training step saw, by task: tokens that verifications commit, and verifications.

    As `Drafter.replay` of the reference counts, of the answers that are right, which the target gives nearly always.
    """
    score: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    drafter = trainer.drafter()
    for shape in shapes:
        for number in range(batches):
            batch = data.batch(seed, number, shape)
            tokens = torch.from_numpy(batch.tokens).to(trainer.target.device)
            context = drafter.context(trainer.target.captured(tokens, trainer.dspark.target_layer_ids))
            spans = []
            for row, turns in enumerate(batch.turns):
                for turn, told in enumerate(turns, 1):
                    places = (batch.answer[row] == turn).nonzero()[0]
                    spans.append((row, int(places[0]) + 1, int(places[-1]) + 1, told.task))
            while spans:
                row, anchor = (torch.tensor(part, device=tokens.device) for part in list(zip(*spans, strict=True))[:2])
                ids = tokens[row, anchor]
                proposed = drafter.chain(drafter.blocks(context, row, anchor, ids)[0], ids).cpu()
                following = []
                for (place, at, end, task), tokens_ahead in zip(spans, proposed.tolist(), strict=True):
                    expected = batch.tokens[place, at + 1 : end + 1].tolist()
                    pairs = enumerate(zip(tokens_ahead, expected, strict=False))
                    right = next((n for n, (a, b) in pairs if a != b), min(len(tokens_ahead), len(expected)))
                    committed = min(right + 1, len(expected))
                    score[task][0] += committed
                    score[task][1] += committed > 0
                    if committed and at + committed < end:
                        following.append((place, at + committed, end, task))
                spans = following
    return {task: (tokens_, verified) for task, (tokens_, verified) in sorted(score.items()) if verified}


def configs(folder: Path) -> tuple[ReferenceConfig, DSparkConfig]:
    """The target's configuration and the drafter's, from a run or a `dspark/`."""
    config = load_config(folder)
    return config, load_dspark(folder, config)


def train(
    trainer: Trainer, out: Path, seconds: float, budget: float, steps: int | None, shapes: tuple[data.Shape, ...],
    most: int, workers: int,
) -> None:  # fmt: skip
    """Train for `seconds`, or to the end of the run (`budget` seconds or `steps` in all), logging into out."""
    feed, stage, progress = Feed(trainer.progress.seed, workers), Stage(1.0, shapes), trainer.progress
    start, before = time.monotonic(), progress.seconds
    with (out / "log.jsonl").open("a") as log:
        while True:
            done = progress.step / steps if steps else progress.seconds / budget
            if done >= 1 or time.monotonic() - start >= seconds:
                break
            found = trainer.step(feed.next(progress.step, stage), most, done)
            if progress.step % LOG_EVERY == 0:
                row = {name: round(value.item(), 5) for name, value in found.items()}
                row |= {"step": progress.step, "seconds": round(before + time.monotonic() - start, 1)}
                if not math.isfinite(row["loss"] + row["norm"]):
                    raise FloatingPointError(f"the loss is {row['loss']} at step {progress.step}: give a lower --rate")
                log.write(json.dumps(row) + "\n")
                log.flush()
                if progress.step % (10 * LOG_EVERY) == 0:
                    print(json.dumps(row), flush=True)
            progress.seconds = before + time.monotonic() - start


def _shapes(text: str) -> tuple[data.Shape, ...]:
    return tuple(data.Shape(*map(int, part.split("x")), 0) for part in text.split(","))


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when done, 1 when it failed, 2 for misuse."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="drafter.py", description="Train a DSpark drafter for the small model.")
    parser.add_argument("--out", type=Path, required=True, help="state, config.json, log.jsonl")
    parser.add_argument("--minutes", type=float, default=5, help="of this call, evaluation included")
    parser.add_argument("--budget", type=float, help="minutes of training in all calls; by default this is the last")
    parser.add_argument("--steps", type=int, help="end of the run in steps instead of minutes")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--target", type=Path, default=TARGET, help="packed file or checkpoint directory")
    parser.add_argument("--layers", default="0,1", metavar="L,L", help="the target's layers whose streams it sees")
    parser.add_argument("--block", type=int, default=5, help="tokens of a proposal")
    parser.add_argument("--rank", type=int, default=64, help="of the Markov head")
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, metavar="LxB,…", help="tokens x sequences a step")
    parser.add_argument("--blocks", type=int, default=1024, help="blocks a step, at most")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=4, help="batches of each shape in the evaluation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not args.resume and any(args.out.glob("state-*")):
        parser.error(f"{args.out} holds a state: add --resume to go on, or name another directory")
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as place:
            target = Target(args.target if args.target.is_dir() else unpack(args.target, Path(place) / "model"), device)
        dspark = drafter_of(
            target.config, tuple(map(int, args.layers.split(","))), block_size=args.block, markov_rank=args.rank,
            noise_token_id=data.PAD,
        )  # fmt: skip
        progress = state.Progress(size=SIZE, seed=args.seed)
        if args.resume:
            progress, weights, _ = state.load(args.out)
            if progress.size != SIZE or configs(args.out) != (target.config, dspark):
                raise ValueError(f"the state in {args.out} is of another target or drafter: resume with the same")
        (args.out / "config.json").write_text(json.dumps(config_json(target.config, dspark), indent=2) + "\n")
        print(f"drafter: {stored_bytes(target.config, dspark):,} bytes of tensors in the published format", flush=True)
        recipe = Recipe(target.config, (), peak=args.rate)
        trainer = Trainer(target, dspark, recipe, progress)
        if args.resume:
            trainer.go_on(weights)
        seconds = args.minutes * 60 - RESERVE - (time.monotonic() - began)
        budget = args.budget * 60 if args.budget else progress.seconds + max(seconds, 1.0)
        workers = 4 if device.type == "cuda" else 0
        train(trainer, args.out, seconds, budget, args.steps, args.shapes, args.blocks, workers)
        folder = state.save(args.out, progress, trainer.weights, {})
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {progress.step} steps, {progress.seconds / 60:.1f} minutes trained", flush=True)
    found = accepted(trainer, args.shapes, args.batches)
    with (args.out / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": progress.step, "accepted": found}) + "\n")
    total = tuple(sum(part) for part in zip(*found.values(), strict=True))
    for task, (tokens, verified) in [*found.items(), ("all", total)]:
        print(f"{task:12} {tokens / verified:5.2f} tokens a verification ({tokens} of {verified})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
