"""Train a small DeepSeek-V4 on exact tasks, in calls of some minutes that go on where the last one ended.

`python evals/training/train.py --out DIR --minutes 8.5 [--resume]`; see docs/training.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("evals", "overlay", "reference")]

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sglang_sm120.checkpoint.config import HEAD_DIM, INDEX_HEAD_DIM, WINDOW, ReferenceConfig
from sglang_sm120_reference.packed import stored_bytes
from training import data, state
from training.model import Mode, Model, Weights, served, stacked, tables
from training.start import initial

EVAL_SEED = 1 << 30
"""Evaluation data: no training step draws from this seed."""

RESERVE = 45.0
"""Seconds of a call kept for evaluation and saving."""

MTP_WEIGHT, INDEX_WEIGHT = 0.3, 1.0

HIDDEN_WEIGHT = 3.0
"""Weight of a turn of a sequence with c4 entries hidden: it has few turns, and c128 learns from no other."""

CALL_WORD_WEIGHT = 100.0
"""Weight of a tool call's word against each other token of its block, about as many: with 1 it was not learned."""

BALANCE_RATE = 1e-3
LOG_EVERY = 20


class Stage(NamedTuple):
    """Part of the curriculum up to `until` of the run, its shapes taken in turn. select: every other step the
    indexer's top-k decides; the number of shapes must be odd then, so that each is seen both ways."""

    until: float
    shapes: tuple[data.Shape, ...]
    select: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and how it is trained. levels: see `quantise.fp8_weight`."""

    config: ReferenceConfig
    stages: tuple[Stage, ...]
    levels: int = 7
    peak: float = 1e-3
    warm_up: int = 200
    rewarm: int = 50

    def stage(self, progress: float) -> Stage:
        """The stage at `progress` 0 … 1."""
        return next((s for s in self.stages if progress < s.until), self.stages[-1])

    def rate(self, progress: float, step: int, since_resume: int) -> float:
        """Learning rate: linear warm-up, cosine to a twentieth, and a short warm-up after each resume."""
        warm = min(1.0, (step + 1) / self.warm_up, (since_resume + 1) / self.rewarm)
        return self.peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def _config(*ratios: int, **sizes: Any) -> ReferenceConfig:
    widths = {"hidden_size": 128, "index_n_heads": 8, "n_routed_experts": 8, "moe_intermediate_size": 256} | sizes
    return ReferenceConfig(
        vocab_size=data.VOCAB, num_hidden_layers=len(ratios), compress_ratios=(*ratios, 0), num_hash_layers=1, **widths
    )


# 8,192 tokens a step. A third of the sequences has c4 entries hidden, so that c128 must carry the answer.
_SHORT, _LONG, _LONGEST = data.Shape(512, 16, 5), data.Shape(4096, 2, 0.7), data.Shape(8192, 1, 0.35)
_CURRICULUM = (
    Stage(0.25, (_SHORT,)),
    Stage(0.45, (data.Shape(1024, 8, 2.7),)),
    Stage(0.65, (data.Shape(2048, 4, 1.3),)),
    # Without short ones among them, recall from the 1,024 tokens before fell to 98 % in 3,700 steps.
    Stage(0.82, (_LONG, _LONG, _SHORT), select=True),
    Stage(1.00, (_LONGEST, _LONGEST, _SHORT), select=True),
)

RECIPES = {
    "two": Recipe(_config(4, 128), _CURRICULUM),
    # For tests on a CPU.
    "tiny": Recipe(
        _config(4, 128, num_attention_heads=4, index_n_heads=2, moe_intermediate_size=128),
        (Stage(1.0, (data.Shape(256, 8, 1),)),),
        warm_up=10,
        rewarm=5,
    ),
}


def mode(recipe: Recipe, device: torch.device, **changes: Any) -> Mode:
    """bf16 products on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Mode(dtype=dtype, levels=recipe.levels)._replace(**changes)


class _Steps(Dataset):
    """Batches of one stage by step number."""

    def __init__(self, seed: int, stage: Stage) -> None:
        self.seed, self.stage = seed, stage

    def __getitem__(self, step: int) -> data.Batch:
        return data.batch(self.seed, step, self.stage.shapes[step % len(self.stage.shapes)])


def _same(batch: data.Batch) -> data.Batch:
    return batch


class Feed:
    """Batches made ahead by `workers` processes; 0 makes them on demand."""

    def __init__(self, seed: int, workers: int) -> None:
        self.seed, self.workers = seed, workers
        self._stage: Stage | None = None
        self._batches: Iterator[data.Batch] = iter(())

    def next(self, step: int, stage: Stage) -> data.Batch:
        """Batch `step`; steps must follow each other."""
        if stage != self._stage:
            self._stage = stage
            ahead = {"prefetch_factor": 4} if self.workers else {}
            steps = range(step, step + 1_000_000)
            loader = DataLoader(
                _Steps(self.seed, stage), batch_size=None, sampler=steps, num_workers=self.workers,
                collate_fn=_same, **ahead,
            )  # fmt: skip
            self._batches = iter(loader)
        return next(self._batches)


class Loss(NamedTuple):
    """Of one batch: total to minimise, next-token, MTP and index parts, share of answer tokens predicted right.

    recall [2, 2]: values of records predicted right and asked for, with c4 entries visible and hidden.
    """

    total: Tensor
    answer: Tensor
    mtp: Tensor
    index: Tensor
    right: Tensor
    recall: Tensor
    loads: dict[str, Tensor]


class _Answers(NamedTuple):
    """recall [2, n]: 1 where a record's value is predicted, c4 entries visible and hidden."""

    row: Tensor
    position: Tensor
    target: Tensor
    weight: Tensor
    recall: Tensor


def _answers(batch: data.Batch, tokens: Tensor) -> _Answers:
    """Where answers are predicted. A turn weighs the same however long its answer, HIDDEN_WEIGHT with c4 hidden; of a
    call's weight about half lies on its word."""
    marks = torch.from_numpy(batch.answer)
    row, position = marks.nonzero(as_tuple=True)
    target = torch.from_numpy(batch.tokens)[row, position + 1]
    number = marks[row, position]
    tasks = [batch.turns[r][n - 1].task for r, n in zip(row.tolist(), number.tolist(), strict=True)]
    # A recall answer is a key, a value and the end.
    value = torch.tensor([task == "recall" for task in tasks])
    value &= (marks[row, position - 1] == number) & (marks[row, position + 1] == number)
    hidden = torch.from_numpy(batch.hide_c4)[row]
    recall = torch.stack((value & ~hidden, value & hidden)).float()
    called = torch.tensor([task == "call" for task in tasks]) & torch.isin(target, torch.from_numpy(data.words().said))
    share = torch.where(called, CALL_WORD_WEIGHT, 1.0)
    _, inverse = (row * (marks.max() + 1) + number).unique(return_inverse=True)
    turn = torch.zeros(int(inverse.max()) + 1).index_add_(0, inverse, share)
    weight = (1.0 + (HIDDEN_WEIGHT - 1.0) * hidden) * share / turn[inverse]
    on_device = (t.to(tokens.device) for t in (row, position, target, weight / weight.sum(), recall))
    return _Answers(*on_device)


def loss_of(model: Model, batch: data.Batch, device: torch.device) -> Loss:
    """Cross-entropy on answers, of the model and of its MTP layer, and the indexer's distillation loss."""
    tokens = torch.from_numpy(batch.tokens).to(device)
    at = _answers(batch, tokens)
    out = model(tokens, torch.from_numpy(batch.hide_c4).to(device) if batch.hide_c4.any() else None)
    logits = model.logits(out.hidden[at.row, at.position])
    answer = (F.cross_entropy(logits, at.target, reduction="none") * at.weight).sum()
    drafts = model.mtp(out.hidden, tokens.roll(-1, 1))
    drafted = model.logits(drafts[at.row, at.position - 1], "mtp.0.")
    mtp = (F.cross_entropy(drafted, at.target, reduction="none") * at.weight).sum()
    right = (logits.argmax(-1) == at.target).float()
    recall = torch.stack((at.recall @ right, at.recall.sum(1)))
    total = answer + MTP_WEIGHT * mtp + INDEX_WEIGHT * out.index_loss
    return Loss(total, answer, mtp, out.index_loss, right.mean(), recall, out.loads)


class Learner:
    """Weights, their optimiser and how far they are."""

    def __init__(self, weights: Weights, recipe: Recipe, progress: state.Progress, device: torch.device) -> None:
        self.recipe, self.progress, self.device = recipe, progress, device
        # One layout for weights, gradients and restored moments: the fused optimiser wants it.
        self.weights = {name: w.to(device).contiguous() for name, w in weights.items()}
        self._trained = [name for name in self.weights if not name.endswith("gate.bias")]
        for name in self._trained:
            self.weights[name].requires_grad_()
        self.optimiser = torch.optim.AdamW(
            [self.weights[name] for name in self._trained], lr=0.0, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0,
            fused=device.type == "cuda",
        )  # fmt: skip
        self._since_resume = recipe.rewarm

    def go_on(self, weights: Weights) -> None:
        """From saved weights; the optimiser starts again and is warmed up."""
        with torch.no_grad():
            for name, w in self.weights.items():
                w.copy_(weights[name])
        self._since_resume = 0

    def update(self, loss: Tensor, loads: dict[str, Tensor], done: float) -> Tensor:
        """One at `done` 0 … 1 of the run; the gradient's norm. loads: tokens of each expert, by a router's prefix."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([self.weights[name] for name in self._trained], 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(done, self.progress.step, self._since_resume)
        self.optimiser.step()
        self._balance(loads)
        self.progress.step += 1
        self._since_resume += 1
        return norm

    @torch.no_grad()
    def _balance(self, loads: dict[str, Tensor]) -> None:
        """Experts with less than their share of tokens become likelier: the router's bias has no other training."""
        for prefix, load in loads.items():
            if (bias := self.weights.get(prefix + "gate.bias")) is not None:
                bias += BALANCE_RATE * (load.float().mean() - load).sign()


class Trainer(Learner):
    """Of the whole model."""

    def __init__(self, recipe: Recipe, progress: state.Progress, device: torch.device) -> None:
        super().__init__(initial(recipe.config, progress.seed), recipe, progress, device)
        self.tables = {n: t.to(device) for n, t in tables(recipe.config, progress.seed).items()}

    def restore(self, weights: Weights, second: Weights) -> None:
        """Go on from a saved state of the same size."""
        self.go_on(weights)
        for name in self._trained:
            w = self.weights[name]
            # `step` only corrects the moments' start at zero: the second one is whole, the first is warmed up.
            self.optimiser.state[w] = {
                "step": torch.tensor(1000.0, device=w.device if self.device.type == "cuda" else "cpu"),
                "exp_avg": torch.zeros_like(w),
                "exp_avg_sq": second[name].to(w.device).view_as(w).clone(),
            }

    def second_moments(self) -> Weights:
        return {n: self.optimiser.state[self.weights[n]]["exp_avg_sq"] for n in self._trained}

    def model(self, run: Mode) -> Model:
        return Model(self.recipe.config, served(self.weights, self.recipe.config, run), self.tables, run)

    def step(self, batch: data.Batch, stage: Stage, done: float) -> tuple[Loss, Tensor]:
        """One update at `done` 0 … 1 of the run; the loss and the gradient's norm."""
        select = stage.select and self.progress.step % 2 == 1
        loss = loss_of(self.model(mode(self.recipe, self.device, select=select)), batch, self.device)
        return loss, self.update(loss.total, loss.loads, done)


DISTANCES = (128, 1024, 2176, 4096, 1 << 30)


@torch.no_grad()
def evaluate(trainer: Trainer, shapes: tuple[data.Shape, ...], questions: int, **changes: Any) -> dict[str, list[int]]:
    """Answers that greedy decoding gets wholly right: "task [, c4 hidden] [, <= distance]" -> [right, asked].

    Each shape runs until `questions` recall questions were asked. changes: of the `Mode`.
    """
    model = trainer.model(mode(trainer.recipe, trainer.device, **changes))
    score: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for shape in shapes:
        asked, step = 0, 0
        while asked < questions:
            batch = data.batch(EVAL_SEED, step, shape)
            step += 1
            for name, right in _judged(model, batch, trainer.device):
                score[name][0] += right
                score[name][1] += 1
                asked += name.startswith("recall")
    return dict(sorted(score.items()))


def _judged(model: Model, batch: data.Batch, device: torch.device) -> Iterator[tuple[str, bool]]:
    tokens = torch.from_numpy(batch.tokens).to(device)
    at = _answers(batch, tokens)
    hide = torch.from_numpy(batch.hide_c4).to(device)
    out = model(tokens, hide if batch.hide_c4.any() else None)
    correct = (model.logits(out.hidden[at.row, at.position]).argmax(-1) == at.target).cpu()
    drafts = model.mtp(out.hidden, tokens.roll(-1, 1))
    drafted = (model.logits(drafts[at.row, at.position - 1], "mtp.0.").argmax(-1) == at.target).cpu()
    turn = torch.from_numpy(batch.answer)[at.row.cpu(), at.position.cpu()]
    wrong = {(r, t) for r, t, c in zip(at.row.tolist(), turn.tolist(), correct.tolist(), strict=True) if not c}
    for row, turns in enumerate(batch.turns):
        hidden = ", c4 hidden" if batch.hide_c4[row] else ""
        for number, asked in enumerate(turns, 1):
            far = next(d for d in DISTANCES if asked.distance <= d)
            bin_ = f", <= {far}" if far < DISTANCES[-1] else ", farther"
            yield asked.task + hidden + (bin_ if asked.task == "recall" else ""), (row, number) not in wrong
    for right in drafted.tolist():
        yield "MTP draft of an answer token", right


EVAL_SHAPES = (data.Shape(512, 32, 16), data.Shape(2048, 16, 8), data.Shape(8192, 4, 2))


def flops_per_token(config: ReferenceConfig, length: int) -> float:
    """Multiply-adds x 2 of forward and backward, half the entries visible."""
    matrices = [p for n, p in stacked(config).items() if n.endswith(".weight") and n != "embed.weight"]
    linear = sum(math.prod(p.shape) for p in matrices)
    total = 6.0 * linear
    for ratio in config.compress_ratios:
        # One product forward and two backward, for scores and for values.
        columns = 2 * WINDOW + (0.5 * length / ratio if ratio else 0)
        total += 3 * 4 * config.num_attention_heads * HEAD_DIM * columns
        if ratio == 4:
            total += 3 * 2 * config.index_n_heads * INDEX_HEAD_DIM * 0.5 * length / 4
    return total


def describe(recipe: Recipe) -> str:
    """Size on disk, parameters, the preamble's tokens and what a token costs."""
    config = recipe.config
    count = sum(math.prod(p.shape) for p in stacked(config).values())
    lengths = sorted({shape.length for stage in recipe.stages for shape in stage.shapes})
    costs = ", ".join(f"{length}: {flops_per_token(config, length) / 1e6:.0f}" for length in lengths)
    return (
        f"layers {config.compress_ratios}, {config.num_attention_heads} heads, hidden {config.hidden_size}, "
        f"{config.n_routed_experts} experts, vocabulary {config.vocab_size}: {count:,} weights\n"
        f"published format: {stored_bytes(config):,} bytes of tensors\n"
        f"tool preamble: {len(data.preamble())} tokens\n"
        f"MFLOP per token by length: {costs}"
    )


def plot(log: Path, picture: Path) -> None:
    """The training curve: losses, and answer tokens predicted right, over the trained minutes."""
    from matplotlib.figure import Figure

    rows = [r for r in map(json.loads, log.read_text().splitlines()) if "loss" in r]
    minutes = [r["seconds"] / 60 for r in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.add_subplot()
    for key, label in (("loss", "answers"), ("mtp", "MTP"), ("index", "indexer (KL)")):
        left.plot(minutes, [max(r[key], 1e-4) for r in rows], label=label, linewidth=1)
    left.set(xlabel="minutes trained", ylabel="loss", yscale="log")
    right = left.twinx()
    right.plot(minutes, [r["right"] for r in rows], color="black", linewidth=1, label="answer tokens right")
    right.set(ylabel="share", ylim=(0, 1.02))
    longest = rows[0]["length"]
    for row in rows:
        if row["length"] > longest:
            longest = row["length"]
            left.axvline(row["seconds"] / 60, color="grey", linewidth=0.5)
            left.annotate(str(longest), (row["seconds"] / 60, 1), xycoords=("data", "axes fraction"))
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def train(trainer: Trainer, out: Path, seconds: float, budget: float, steps: int | None, workers: int) -> None:
    """Train for `seconds` or to the end of the run (`budget` seconds in all, or `steps` in all), logging into out."""
    feed = Feed(trainer.progress.seed, workers)
    progress, recipe = trainer.progress, trainer.recipe
    start, before = time.monotonic(), progress.seconds
    recall = torch.zeros(2, 2, device=trainer.device)
    with (out / "log.jsonl").open("a") as log:
        while True:
            done = progress.step / steps if steps else progress.seconds / budget
            if done >= 1 or time.monotonic() - start >= seconds:
                break
            stage = recipe.stage(done)
            batch = feed.next(progress.step, stage)
            loss, norm = trainer.step(batch, stage, done)
            recall += loss.recall
            if progress.step % LOG_EVERY == 0:
                row = {
                    "step": progress.step, "done": round(done, 4), "length": batch.tokens.shape[1],
                    "loss": loss.answer.item(), "mtp": loss.mtp.item(), "index": loss.index.item(),
                    "right": loss.right.item(), **_shares(recall), "norm": norm.item(),
                    "seconds": round(before + time.monotonic() - start, 1),
                }  # fmt: skip
                if not math.isfinite(row["loss"] + row["norm"]):
                    raise FloatingPointError(
                        f"the loss is {row['loss']}, its gradient {row['norm']} at step {progress.step}: "
                        "resume from the last state with a lower --rate"
                    )
                recall.zero_()
                log.write(json.dumps(row) + "\n")
                log.flush()
                if progress.step % (10 * LOG_EVERY) == 0:
                    print(json.dumps(row), flush=True)
            progress.seconds = before + time.monotonic() - start


def _shares(recall: Tensor) -> dict[str, float | None]:
    """Share of values recalled since the last line of the log, of sequences with c4 entries visible and hidden."""
    right, asked = recall.tolist()
    return {k: r / a if a else None for k, r, a in zip(("recall", "hidden"), right, asked, strict=True)}


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when done, 1 when it failed, 2 for misuse."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="train.py", description="Train the small DeepSeek-V4 of the accuracy tests.")
    parser.add_argument("--out", type=Path, required=True, help="state, log.jsonl")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call, evaluation included")
    parser.add_argument(
        "--budget", type=float, help="minutes of training in all calls; by default this is the last one"
    )
    parser.add_argument("--steps", type=int, help="end of the run in steps instead of minutes")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--size", choices=RECIPES, default="two")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=300, help="recall questions per length in the evaluation")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="draw the curve at the end (needs matplotlib)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    recipe = RECIPES[args.size]
    if args.rate:
        recipe = dataclasses.replace(recipe, peak=args.rate)
    if not args.resume and any(args.out.glob("state-*")):
        parser.error(f"{args.out} holds a state: add --resume to go on, or name another directory")
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    print(describe(recipe), flush=True)
    try:
        progress = state.Progress(size=args.size, seed=args.seed)
        if args.resume:
            progress, weights, second = state.load(args.out)
            if (progress.size, progress.seed) != (args.size, args.seed):
                raise ValueError(
                    f"the state in {args.out} has --size {progress.size} --seed {progress.seed}: resume with the same"
                )
        trainer = Trainer(recipe, progress, device)
        if args.resume:
            trainer.restore(weights, second)
        seconds = args.minutes * 60 - RESERVE - (time.monotonic() - began)
        budget = args.budget * 60 if args.budget else progress.seconds + max(seconds, 1.0)
        train(trainer, args.out, seconds, budget, args.steps, workers=4 if device.type == "cuda" else 0)
        folder = state.save(args.out, trainer.progress, trainer.weights, trainer.second_moments())
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {trainer.progress.step} steps, {trainer.progress.seconds / 60:.1f} minutes trained", flush=True)
    shapes = EVAL_SHAPES if args.size != "tiny" else recipe.stages[-1].shapes
    _report(trainer, args.out, shapes, args.questions)
    if args.plot:
        plot(args.out / "log.jsonl", args.plot)
    return 0


def _report(trainer: Trainer, out: Path, shapes: tuple[data.Shape, ...], questions: int) -> None:
    """Print recall by task and distance, quantised and not, and log it."""
    with_ = evaluate(trainer, shapes, questions)
    without = evaluate(trainer, shapes, questions, exact=False)
    print(f"{'answers right':42} quantised        unquantised")
    for name, (right, asked) in with_.items():
        other = without[name][0]
        print(f"{name:42} {right:5}/{asked:<5} {right / asked:6.1%} {other:5}/{asked:<5} {other / asked:6.1%}")
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": trainer.progress.step, "quantised": with_, "unquantised": without}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
