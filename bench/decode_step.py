"""Time of a decode step of the whole model, served, and where it goes: `python bench/decode_step.py --out DIR`.

All layers at full width with the experts cut to what fits one card (128 of 256 touch the same bytes per token at batch
1), written as a `config.json` and served by `sglang.launch_server --load-format dummy` with CUDA graphs, the step and
random weights (`random_weights`).

Per batch and context it sends that many prompts of random tokens, and takes the median time between streamed tokens
from the moment all of them decode; with EAGLE or DSpark the time is a cycle's. One profiled pass per batch tells, for
the mean cycle: kernel time by op in each graph, the kernels between graphs, when the GPU is idle, where the host waits
(`cycles`); and of the prompts' prefill kernel time by op. It fails when a kernel of DeepGEMM, TileLang, FlashMLA or FA3
ran.

DSpark's requests are greedy, the others' sampled: `compact` accepts in the verification's graph for greedy ones alone,
whose cycle commits one token where a random drafter is not right by chance.
Writes DIR/decode_step.json, the servers' logs, the traces and a picture of one cycle of each; prints a table last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("evals", "reference")]

import httpx
import torch

import cycles
import sm120_lowering
import traces
from bench import lower
from local_server import LocalServer, ServerError
from sglang_sm120 import ops, registry
from sglang_sm120.checkpoint.config import DSPARK, DSPARK_FOLDER, ReferenceConfig, model_config
from sglang_sm120.parity import calls_of
from sglang_sm120_reference import tokenizer
from sglang_sm120_reference.config_file import FLASH_DRAFTER
from streamed import INTERVAL, ask, cycle, drawn, pace, speculation

TARGET_MS = 5.0
ANSWER = 1 + 24 * INTERVAL
"""Tokens of each answer."""
PROFILED_STEPS = 6
"""Passes of each stage that a trace has at most."""
CHUNK = 8192
"""Tokens of a pass of prefill, at most."""
MANY_ROWS = 256
"""Rows by which a prefill's kernels are known: they have these names at any more."""
Known = dict[str, dict[Any, str]]
"""Which op launches a kernel, as `traces.ranges` gives it."""
STEP_SERVES = "the step takes its first {} pass"


@dataclass(frozen=True)
class Served:
    """How a server differs from the plain one.

    rows: of a request in the passes of a cycle. passes: modes of which the log is to name the step's first pass, one
    word for each model. on_hopper: flags for such a card alone.
    """

    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[int, ...] = (1,)
    passes: tuple[str, ...] = ("decode",)
    temperature: float = 1.0
    on_hopper: tuple[str, ...] = ()

    @property
    def speculates(self) -> bool:
        return "target_verify" in self.passes


def _dspark(mode: str) -> Served:
    block = FLASH_DRAFTER[f"{DSPARK}block_size"]
    return Served(
        ("--speculative-algorithm", "DSPARK"), {"SGLANG_RAGGED_VERIFY_MODE": mode}, (block, block + 1),
        # The stages' passes have the name of the target's.
        ("target_verify", "target_verify"), 0.0, sm120_lowering.DRAFTER_FLAGS,
    )  # fmt: skip


SERVERS = {
    "plain": Served(),
    "eagle": Served(speculation(3), rows=(1, 4), passes=("target_verify",)),
    **{f"dspark-{mode}": _dspark(mode) for mode in ("static", "compact")},
}


def write_model(folder: Path, experts: int) -> ReferenceConfig:
    """A directory that SGLang takes for the model: configuration and tokenizer."""
    source = {**model_config(), "n_routed_experts": experts}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(source, indent=1))
    tokenizer.write(folder, source["vocab_size"], source["max_position_embeddings"])
    return ReferenceConfig.from_json(source)


def write_drafter(folder: Path) -> None:
    """Beside a model of `write_model` the DSpark drafter published for it, with as many experts as the model has."""
    source = json.loads((folder / "config.json").read_text())
    (folder / DSPARK_FOLDER).mkdir()
    (folder / DSPARK_FOLDER / "config.json").write_text(json.dumps(source | FLASH_DRAFTER, indent=1))


def step_ms(url: str, batch: int, context: int, rng: random.Random, server: str = "plain") -> float:
    """Median milliseconds per decode step, or cycle, while `batch` requests of `context` random tokens decode.

    server: which of SERVERS it is.
    """
    served = SERVERS[server]
    chunks = ask(url, [drawn(context, rng) for _ in range(batch)], ANSWER, served.temperature)
    return (cycle if served.speculates else pace)(chunks)


def profile(url: str, folder: Path, batch: int, context: int, rng: random.Random, server: str) -> dict[str, Path]:
    """The traces of the prefill and of the decode steps of one batch, by stage."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run before
    folder.mkdir(parents=True)
    order = {"output_dir": str(folder), "num_steps": PROFILED_STEPS, "profile_by_stage": True}
    order |= {"activities": ["CPU", "GPU"], "with_stack": False, "record_shapes": False}
    httpx.post(f"{url}/start_profile", json=order, timeout=60).raise_for_status()
    step_ms(url, batch, context, rng, server)
    deadline = time.monotonic() + 60
    while len(files := sorted(folder.glob("*.trace.json.gz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    found = {file.name.removesuffix(".trace.json.gz").rpartition("-")[2]: file for file in files}
    if set(found) != {"EXTEND", "DECODE"}:
        raise RuntimeError(f"the profiler left {[file.name for file in files]} and not a trace of each stage")
    return found


def known_kernels(steps: list[int], context: int, folder: Path) -> Known:
    """Which op launches which kernels at so many rows: run once here, under a profiler, with the server's lowering."""
    with torch.profiler.profile() as profiler:
        for rows in steps:
            for op in ops.with_triton():
                for call in calls_of(op, 1, rows, context, 0):
                    torch.cuda.synchronize()
                    with torch.profiler.record_function(f"op:{op}"):
                        registry.ops()[op].by("triton", **call.arguments)
                        torch.cuda.synchronize()
    trace = folder / "ops.trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    return traces.ranges(trace, "op:")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 16_384])
    parser.add_argument(
        "--serve", choices=SERVERS, nargs="+", default=["plain"], metavar="NAME",
        help=f"servers, one after another: of {', '.join(SERVERS)}; EAGLE with 3 draft steps, 4 tokens to verify, "
        "DSpark with the published drafter's sizes and the mode of SGLANG_RAGGED_VERIFY_MODE (default: plain)",
    )  # fmt: skip
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--lowering", choices=("sm120", "native"), default="sm120", help="on a Hopper card")
    parser.add_argument("--ready", type=float, default=1200, help="seconds that a server may take to be ready")
    parser.add_argument("--seconds", type=float, default=400, help="no measurement begins later, from when it is ready")
    parser.add_argument("--flag", nargs="*", default=[], help="more flags for the server, without their dashes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("decode_step: this machine has no CUDA device, needed one: run it on a GPU machine.", file=sys.stderr)
        return 1
    lower(args.lowering)
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"steps": [], "profiles": [], "prefills": [], "foreign": [], "problems": []}
    result |= {"gpu": torch.cuda.get_device_name(), "lowering": args.lowering, "experts": args.experts}
    result |= {"torch": torch.__version__, "ready_seconds": {}}
    known: Known = {"exact": {}, "compiled": {}, "name": {}}
    try:
        decoded = {batch * rows for batch in args.batch for name in args.serve for rows in SERVERS[name].rows}
        rows = sorted({*decoded, MANY_ROWS})
        known |= known_kernels(rows, max(args.context) + 1024, args.out)
    except RuntimeError as error:
        result["problems"].append(f"kernels keep their own names in the tables, their ops did not run here: {error}")
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        result["layers"] = write_model(Path(folder), args.experts).num_hidden_layers
        write_drafter(Path(folder))
        for name in dict.fromkeys(args.serve):
            try:
                serve(Path(folder), args, name, known, result)
            except ServerError as error:
                result["problems"].append(f"{error}"[-2000:])
    save(result, args.out)
    print(report(result))
    return 1 if result["foreign"] or result["problems"] else 0


def save(result: dict[str, Any], out: Path) -> None:
    """Write what there is."""
    (out / "decode_step.json").write_text(json.dumps(result, indent=1))


def serve(model: Path, args: argparse.Namespace, name: str, known: Known, result: dict[str, Any]) -> None:
    """One server's figures, added to `result`.

    Raises:
        ServerError: it does not start.
    """
    served, hopper = SERVERS[name], torch.cuda.get_device_capability()[0] == 9
    flags = [
        "--load-format", "dummy", "--mem-fraction-static", "0.8", "--grammar-backend", "none",
        "--max-running-requests", str(max(args.batch)), "--cuda-graph-bs-decode", *map(str, sorted(args.batch)),
        "--context-length", str(max(args.context) + 1024), "--chunked-prefill-size", str(CHUNK),
        *((*sm120_lowering.SERVER_FLAGS, *served.on_hopper) if hopper else ()),
        *served.flags, *(f"--{flag}" for flag in args.flag),
    ]  # fmt: skip
    path = os.pathsep.join((str(Path(__file__).parent / "random_weights"), os.environ.get("PYTHONPATH", "")))
    env = {**sm120_lowering.SERVER_ENVIRONMENT, **served.env, "PYTHONPATH": path}
    began = time.monotonic()
    with LocalServer(model, *flags, log=args.out / f"{name}.log", env=env, ready_seconds=args.ready) as server:
        args.deadline = time.monotonic() + args.seconds
        result["ready_seconds"][name] = round(time.monotonic() - began)
        print(f"{name} ready after {result['ready_seconds'][name]} s", flush=True)
        measure(server.url, args, name, known, result)
        log = server.log.read_text(errors="replace")
        if any(log.count(STEP_SERVES.format(mode)) < count for mode, count in Counter(served.passes).items()):
            result["problems"].append(f"the step served no pass of a model of {name}: its log says why")
        if not server.alive():
            result["problems"].append(f"the server died, its log ends in: {server.log_tail()[-1500:]}")


def measure(url: str, args: argparse.Namespace, server: str, known: Known, result: dict[str, Any]) -> None:
    """Times of every batch and context, and the profile of every batch at the shortest context, into `result`."""
    rng = random.Random(0)
    for context in sorted(args.context):
        for batch in sorted(args.batch):
            about = {"batch": batch, "context": context, "server": server, "weights": "random"}
            if time.monotonic() > args.deadline:
                result["problems"].append(f"batch {batch} at {context} tokens was not measured: out of time")
                continue
            try:
                ms = step_ms(url, batch, context, rng, server)
                result["steps"].append({**about, "ms": round(ms, 3)})
                print(json.dumps(result["steps"][-1]), flush=True)
                if context == min(args.context):
                    name, speculates = f"{server}-{batch}", SERVERS[server].speculates
                    stages = profile(url, args.out / name, batch, context, rng, server)
                    for stage, trace in stages.items():
                        for kernel in traces.foreign(traces.read(trace)):
                            result["foreign"].append(f"{stage} at batch {batch}: {kernel}")
                    found = cycles.read(stages["DECODE"])
                    result["profiles"].append({**about, **cycles.account(found, known, speculates)})
                    told = cycles.prefill(traces.read(stages["EXTEND"]), known)
                    tokens = min(batch * context, PROFILED_STEPS * CHUNK)
                    result["prefills"].append({**about, "tokens": tokens, **told})
                    heading = f"{result['gpu']}, {name}, {context} tokens"
                    cycles.timeline(found[len(found) // 2], heading, known, speculates, args.out / f"{name}.svg")
            except (RuntimeError, LookupError, ValueError, OSError, httpx.HTTPError) as error:
                result["problems"].append(f"batch {batch} at {context} tokens: {type(error).__name__}: {error}")
            # A run that is cut off leaves what it has.
            save(result, args.out)


def report(result: dict[str, Any]) -> str:
    """The result for reading; the accounts first, the times last."""
    lines = []
    for profiled in result["profiles"]:
        a_layer = profiled["replays"][0]["launches"] / result["layers"]
        about = f"{profiled['server']}, batch {profiled['batch']} at {profiled['context']} tokens"
        lines += [f"{about}: {a_layer:.1f} kernels a layer", cycles.table(profiled)]
    for prefill in result["prefills"]:
        about = f"{prefill['server']}, prefill of {prefill['tokens']} tokens, {prefill['context']} a prompt"
        lines += [f"{about}:", cycles.prefill_table(prefill)]
    for row in result["steps"]:
        aim = ""
        if row["batch"] == 1 and row["server"] == "plain":
            over = row["ms"] - TARGET_MS
            aim = f"  target {TARGET_MS:g} ms missed by {over:.2f}" if over > 0 else f"  target {TARGET_MS:g} ms met"
        kind = "cycle" if SERVERS[row["server"]].speculates else "step"
        about = f"{row['server']}, batch {row['batch']:3d} context {row['context']:6d}"
        lines.append(f"{about}: {row['ms']:7.2f} ms a {kind}{aim}")
    foreign = result["foreign"] or ["none"]
    lines.append(f"kernels of DeepGEMM, TileLang, FlashMLA or FA3: {'; '.join(foreign)[:600]}")
    lines += [f"problem: {problem[-1500:]}" for problem in result["problems"]]
    lines.append(f"{result['gpu']}, lowering {result['lowering']}, {result['experts']} experts")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
