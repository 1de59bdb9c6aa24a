"""SGLang's own forward and the step, on one card in one run: `python bench/side_by_side.py --out DIR`.

All 43 layers at full width with the experts cut to what fits one card, random weights (`random_weights`), served by
`sglang.launch_server`. The sides take turns, `--runs` times; medians and spreads go into DIR/side_by_side.json, a
picture beside it and a table (`--draw FILE.json`: the picture of a finished run). On a Hopper card the step runs under
SM120 lowering (`sm120`) and compiled natively (`native`); `sglang` has the card's own kernels and Marlin's experts
there. With EAGLE each side drafts for itself.

Decode: milliseconds from token to token while all requests decode. At 1,024 tokens of context each request has its own
prompt; at more they share all but the last tokens of one, so that their cached pages are the same. EAGLE: milliseconds
of a cycle (3 draft steps, 4 tokens to verify). Prefill: tokens of one prompt by the seconds to its first token, after
another prompt of that length.

`--overlay NAME=FOLDER…` adds a side: the step with the `sglang_sm120` that lies in FOLDER, of another commit perhaps.

With `--ahead` the next server's processes start while the last one's are measured, and wait before they touch the GPU:
a machine with cores to spare is done in half the time. Time to ready is then that of the first server only; of the
others it is the time from when they may load the model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("evals", "reference")]

import httpx
import torch

import sm120_lowering
from decode_step import write_model
from local_server import LocalServer, ServerError
from sglang_sm120_launch.picture import Panel, draw
from streamed import INTERVAL, ask, cycle, drawn, pace, speculation

HERE = Path(__file__).parent
OWN = 1024
"""Context up to which every request has a prompt of its own."""
TAIL = 64
ANSWER = 1 + 8 * INTERVAL
"""Tokens of each answer."""


EAGLE = speculation(3)
AXES = {
    "decode": ("requests", "ms a token"), "eagle": ("requests", "ms a cycle"),
    "prefill": ("tokens of the prompt", "tokens/s"),
}  # fmt: skip
"""Of a figure's kind, for the picture."""


@dataclass(frozen=True)
class Side:
    """One way to serve: its flags, its variables and folders for PYTHONPATH, and whether the step is to decode."""

    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    path: tuple[Path, ...] = ()
    is_step: bool = True


def sides(overlays: Sequence[tuple[str, Path]] = ()) -> dict[str, Side]:
    """By name, for the card that is there; `overlays` are names and folders of the step as it was or may be."""
    if torch.cuda.get_device_capability()[0] != 9:
        own = {"sglang": Side(env={"SGLANG_SM120": "0"}, is_step=False), "step": Side()}
        return own | {name: Side(path=(folder,)) for name, folder in overlays}
    forced = (sm120_lowering.SERVER_FLAGS, sm120_lowering.SERVER_ENVIRONMENT)
    lowered = HERE / "lowered_children"
    # FlashInfer's fused all-reduce makes NVLink multicast objects, which the machine's owner may forbid by this.
    forbidden = os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0") != "0"
    flags = ("--moe-runner-backend", "marlin", *(sm120_lowering.NO_FUSED_ALL_REDUCE,) * forbidden)
    own = {
        "sglang": Side(flags, {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}, is_step=False),
        "sm120": Side(*forced, (lowered,)),
        "native": Side(*forced),
    }
    return own | {name: Side(*forced, (folder, lowered)) for name, folder in overlays}


def overlay(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER` as name and folder.

    Raises:
        argparse.ArgumentTypeError: the folder holds no sglang_sm120.
    """
    name, _, folder = text.partition("=")
    path = Path(folder).resolve()
    if not name or not folder or not (path / "sglang_sm120/__init__.py").exists():
        raise argparse.ArgumentTypeError(f"{text!r}, needed NAME=FOLDER, a folder that holds sglang_sm120.")
    return name, path


def measure(url: str, args: argparse.Namespace, eagle: bool, deadline: float) -> Iterator[tuple[str, float]]:
    """(what, figure) of one server; what would begin after `deadline` is left out."""
    rng = random.Random(0)
    if not eagle:
        ask(url, [drawn(OWN, rng)], 8)
        for length in args.prefill:
            if time.monotonic() < deadline:
                # The first one may compile kernels of its length.
                _, second = (ask(url, [drawn(length, rng)], 1)[0][0].seconds for _ in range(2))
                yield f"prefill {length}", length / second
    for context in (min(args.context),) if eagle else args.context:
        alike = drawn(context - TAIL, rng) if context > OWN else []
        if alike and time.monotonic() < deadline:
            ask(url, [alike], 1)
        for batch in args.eagle if eagle else args.batch:
            if time.monotonic() > deadline:
                return
            chunks = ask(url, [alike + drawn(context - len(alike), rng) for _ in range(batch)], ANSWER)
            yield (f"eagle {batch} {context}", cycle(chunks)) if eagle else (f"decode {batch} {context}", pace(chunks))


class Turn(NamedTuple):
    """One server's turn: which side, in which run, and whether it speculates."""

    side: str
    run: int
    eagle: bool

    def __str__(self) -> str:
        return f"{self.side}{'-eagle' if self.eagle else ''}-{self.run}"


class Turns:
    """Servers one after another: `prepare` starts one's processes, `serve` lets them load the model and measures."""

    def __init__(self, model: Path, args: argparse.Namespace) -> None:
        self._model, self._args, self._sides = model, args, sides(args.overlay)
        # A server ends with the thread that started it.
        self._pool = ThreadPoolExecutor(2)
        self._prepared: dict[Turn, tuple[LocalServer, Future[LocalServer]]] = {}

    def _gate(self, turn: Turn) -> Path:
        return self._model / f"{turn}-may-load"

    def prepare(self, turn: Turn) -> None:
        """Start the server; its scheduler waits before it touches the GPU."""
        args, side = self._args, self._sides[turn.side]
        sizes = args.eagle if turn.eagle else args.batch
        flags = [
            "--load-format", "dummy", "--mem-fraction-static", str(args.mem_fraction), "--grammar-backend", "none",
            "--max-running-requests", str(max(sizes)), "--cuda-graph-bs-decode", *map(str, sorted(sizes)),
            "--context-length", str(max([*args.context, *args.prefill]) + 1024), "--chunked-prefill-size", "8192",
            "--tp", str(args.tp), "--ep-size", str(args.ep), *side.flags, *(EAGLE if turn.eagle else ()),
        ]  # fmt: skip
        path = os.pathsep.join(map(str, (*side.path, HERE / "random_weights", os.environ.get("PYTHONPATH", ""))))
        env = {**side.env, "PYTHONPATH": path, "RANDOM_WEIGHTS_GATE": str(self._gate(turn))}
        server = LocalServer(self._model, *flags, log=args.out / f"{turn}.log", env=env, ready_seconds=args.ready)
        self._prepared[turn] = server, self._pool.submit(server.__enter__)

    def serve(
        self, turn: Turn, then: Turn | None, said: Callable[[dict[str, float]], None] = lambda _: None
    ) -> dict[str, float]:
        """What the server gave; `then` is prepared when it is ready. `said` is told after each figure."""
        found: dict[str, float] = {}
        began = time.monotonic()
        is_ahead = turn in self._prepared
        if not is_ahead:
            self.prepare(turn)
        server, started = self._prepared.pop(turn)
        self._gate(turn).touch()
        may_load = time.monotonic()
        try:
            started.result()
            now, kind = time.monotonic(), "eagle " * turn.eagle
            if is_ahead:
                found[f"{kind}load"] = now - may_load
            else:
                found[f"{kind}ready"] = now - began
            if then:
                self.prepare(then)
            for what, figure in measure(server.url, self._args, turn.eagle, self._args.deadline):
                found[what] = figure
                print(f"{turn.side} run {turn.run}: {what}: {figure:.2f}", flush=True)
                said(found)
            mode = "target_verify" if turn.eagle else "decode"
            log, side = server.log.read_text(errors="replace"), self._sides[turn.side]
            if (f"the step takes its first {mode} pass" in log) != side.is_step:
                raise ServerError(f"The other forward served {mode} passes: {server.log} says why.")
            if turn.eagle and side.is_step and "the step takes its first decode pass" not in log:
                print(f"{turn}: the log names no pass of the step's draft: {server.log}", file=sys.stderr, flush=True)
        finally:
            server.stop()
        return found

    def close(self) -> None:
        """Stop what still runs."""
        for server, _ in self._prepared.values():
            server.stop()
        self._pool.shutdown()


def turns_of(names: Sequence[str], args: argparse.Namespace) -> list[Turn]:
    """Who serves when: the sides in turn, so many runs, and all without EAGLE first, for the time may be up before."""
    kinds = (*(False,) * bool(args.batch), *(True,) * bool(args.eagle))
    return [Turn(name, run, eagle) for eagle in kinds for run in range(args.runs) for name in names]


def table(figures: dict[str, dict[str, list[float]]]) -> str:
    """Medians with half the spread, and each side by the first; one row a figure."""
    names = list(figures)
    rows = list(dict.fromkeys(what for found in figures.values() for what in found))
    lines = [f"{'':22s}" + "".join(f"{name:>24s}" for name in names)]
    for what in rows:
        cells, base = [], figures[names[0]].get(what)
        for name in names:
            values = figures[name].get(what)
            if not values:
                cells.append(f"{'-':>24s}")
                continue
            median, spread = statistics.median(values), (max(values) - min(values)) / 2
            ratio = f" {median / statistics.median(base):5.2f}x" if base and name != names[0] else ""
            cells.append(f"{f'{median:.2f} ±{spread:.2f}{ratio}':>24s}")
        lines.append(f"{what:22s}" + "".join(cells))
    return "\n".join(lines)


def panels(figures: dict[str, dict[str, list[float]]]) -> list[Panel]:
    """Medians by requests or by the prompt's length: a panel for decoding at each context, EAGLE's cycle, prefill."""
    found: dict[tuple[str, ...], dict[str, list[tuple[float, float]]]] = {}
    for side, rows in figures.items():
        for what, values in rows.items():
            kind, size, *context = what.split() if " " in what else (what, "")
            if kind in AXES and size.isdigit():
                panel = found.setdefault((kind, *context), {})
                panel.setdefault(side, []).append((int(size), statistics.median(values)))
    return [
        Panel(", ".join([kind, *(f"{int(one):,} tokens of context" for one in context)]), *AXES[kind], series)
        for (kind, *context), series in sorted(found.items(), key=lambda one: [*AXES].index(one[0][0]))
    ]


def picture(run: dict[str, Any], path: Path) -> None:
    """Draw a run as DIR/side_by_side.json has it."""
    where = f"{run['gpu']}, TP {run['asked'].get('tp', 1)}, torch {run['torch']}"
    draw(f"{where}, {run['experts']} experts, {run['date']}", panels(run["figures"]), path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for the results and the servers' logs")
    what.add_argument("--draw", type=Path, metavar="FILE.json", help="draw this finished run as FILE.svg, and end")
    parser.add_argument("--side", nargs="+", help="default: all that this card has, and the overlays")
    parser.add_argument("--overlay", type=overlay, nargs="+", default=[], metavar="NAME=FOLDER", help="more sides")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ahead", action="store_true", help="start each server while the one before is measured")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32],
                        help="requests that decode; none leaves decode without EAGLE and prefill out")  # fmt: skip
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 16_384, 65_536])
    parser.add_argument("--eagle", type=int, nargs="*", default=[1, 4, 16], help="batches; none leaves EAGLE out")
    parser.add_argument("--prefill", type=int, nargs="*", default=[1024, 8192, 32_768], help="tokens of the prompt")
    parser.add_argument("--experts", type=int, default=128, help="of 256; 64 fit an 80 GB card")
    parser.add_argument("--tp", type=int, default=1, help="cards, which share each layer")
    parser.add_argument("--ep", type=int, default=1, help="how many of them divide the experts by number")
    parser.add_argument("--mem-fraction", type=float, default=0.85)
    parser.add_argument("--ready", type=float, default=1200, help="seconds that a server may take to be ready")
    parser.add_argument("--seconds", type=float, default=7200, help="no cell begins later than this")
    args = parser.parse_args()
    if args.draw:
        picture(json.loads(args.draw.read_text()), args.draw.with_suffix(".svg"))
        return 0
    if not torch.cuda.is_available():
        print("side_by_side: this machine has no CUDA device, needed one: run it on a GPU machine.", file=sys.stderr)
        return 1
    known = sides(args.overlay)
    if unknown := set(args.side or ()) - set(known):
        print(f"side_by_side: no side {sorted(unknown)} on this card, needed some of {list(known)}.", file=sys.stderr)
        return 2
    order = turns_of(args.side or list(known), args)
    if not order:
        print("side_by_side: nothing to measure, needed --batch or --eagle.", file=sys.stderr)
        return 2
    # As Ctrl-C does: the server is stopped, and what was measured stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    asked = {name: value for name, value in vars(args).items() if name not in ("out", "draw", "overlay")}
    args.deadline = time.monotonic() + args.seconds
    figures: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in args.side or known}
    about: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "experts": args.experts,
        "date": time.strftime("%Y-%m-%d"), "asked": asked, "problems": [],
        "flags": {name: known[name].flags for name in figures},
    }  # fmt: skip

    def save(**unfinished: dict[str, float]) -> None:
        """A run that is cut off leaves what it has, of a turn that did not end apart."""
        whole = about | {"figures": figures} | ({"unfinished": unfinished} if unfinished else {})
        (args.out / "side_by_side.json").write_text(json.dumps(whole, indent=1))

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.experts)
        turns = Turns(Path(folder), args)
        try:
            for turn, then in zip(order, [*order[1:], None], strict=True):
                if time.monotonic() > args.deadline:
                    break
                try:
                    following, name = then if args.ahead else None, str(turn)
                    found = turns.serve(turn, following, lambda so_far, name=name: save(**{name: so_far}))
                except (ServerError, RuntimeError, httpx.HTTPError) as error:
                    about["problems"].append(f"{turn}: {error}"[-2000:])
                    continue
                for what, figure in found.items():
                    figures[turn.side][what].append(round(figure, 3))
                save()
        finally:
            turns.close()
    picture(about | {"figures": figures}, args.out / "side_by_side.svg")
    print("\n".join(["", table(figures), *(f"problem: {one[-700:]}" for one in about["problems"])]))
    print(f"{about['gpu']}, torch {about['torch']}, {args.experts} experts, {args.runs} runs; ready and load in s, "
          "prefill in tokens/s, the rest in ms")  # fmt: skip
    return 1 if about["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
