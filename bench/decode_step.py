"""Time of a decode step of the whole model, served: `python bench/decode_step.py --out DIR`.

All layers at full width with the experts cut to what fits one card (128 of 256 touch the same bytes per token at batch
1), written as a `config.json` and served by `sglang.launch_server --load-format dummy` with CUDA graphs, the step and
random weights (`random_weights`).

Per batch and context it sends that many prompts of random tokens, and takes the median time between streamed tokens
from the moment all of them decode. One profiled pass per batch gives kernel time by op and launches per layer, and
fails when a kernel of DeepGEMM, TileLang, FlashMLA or FA3 ran in decode or prefill.
Writes DIR/decode_step.json, the server's log and the traces; prints a table last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("evals", "reference")]

import httpx
import torch

import sm120_lowering
import traces
from bench import lower
from local_server import LocalServer, ServerError
from sglang_sm120 import ops, registry
from sglang_sm120.checkpoint.config import ReferenceConfig, model_config
from sglang_sm120.parity import calls_of
from sglang_sm120_reference import tokenizer
from streamed import INTERVAL, ask, drawn, pace

TARGET_MS = 5.0
ANSWER = 1 + 24 * INTERVAL
"""Tokens of each answer."""
PROFILED_STEPS = 6
STEP_SERVES = "the step takes its first decode pass"


def write_model(folder: Path, experts: int) -> ReferenceConfig:
    """A directory that SGLang takes for the model: configuration and tokenizer."""
    source = {**model_config(), "n_routed_experts": experts}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(source, indent=1))
    tokenizer.write(folder, source["vocab_size"], source["max_position_embeddings"])
    return ReferenceConfig.from_json(source)


def step_ms(url: str, batch: int, context: int, rng: random.Random) -> float:
    """Median milliseconds per decode step while `batch` requests of `context` random tokens decode."""
    return pace(ask(url, [drawn(context, rng) for _ in range(batch)], ANSWER))


def profile(url: str, folder: Path, batch: int, context: int, rng: random.Random) -> dict[str, list[traces.Kernel]]:
    """Kernels of the prefill and of the decode steps of one batch, by stage."""
    folder.mkdir(parents=True, exist_ok=True)
    order = {"output_dir": str(folder), "num_steps": PROFILED_STEPS, "profile_by_stage": True}
    order |= {"activities": ["CPU", "GPU"], "with_stack": False, "record_shapes": False}
    httpx.post(f"{url}/start_profile", json=order, timeout=60).raise_for_status()
    step_ms(url, batch, context, rng)
    deadline = time.monotonic() + 60
    while len(files := sorted(folder.glob("*.trace.json.gz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    found = {file.name.removesuffix(".trace.json.gz").rpartition("-")[2]: traces.read(file) for file in files}
    if set(found) != {"EXTEND", "DECODE"}:
        raise RuntimeError(f"the profiler left {[file.name for file in files]} and not a trace of each stage")
    return found


def known_kernels(batches: list[int], context: int, folder: Path) -> dict[str, dict[Any, str]]:
    """Which op launches which kernels at each batch: run once here, under a profiler, with the server's lowering."""
    with torch.profiler.profile() as profiler:
        for batch in batches:
            for op in ops.with_triton():
                for call in calls_of(op, 1, batch, context, 0):
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
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--lowering", choices=("sm120", "native"), default="sm120", help="on a Hopper card")
    parser.add_argument("--seconds", type=float, default=400, help="no measurement begins later than this")
    parser.add_argument("--flag", nargs="*", default=[], help="more flags for the server, without their dashes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("decode_step: this machine has no CUDA device, needed one: run it on a GPU machine.", file=sys.stderr)
        return 1
    began = time.monotonic()
    lower(args.lowering)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        config = write_model(Path(folder), args.experts)
        flags = [
            "--load-format", "dummy", "--mem-fraction-static", "0.8", "--grammar-backend", "none",
            "--max-running-requests", str(max(args.batch)), "--cuda-graph-bs-decode", *map(str, sorted(args.batch)),
            "--context-length", str(max(args.context) + 1024), "--chunked-prefill-size", "8192",
            *(sm120_lowering.SERVER_FLAGS if torch.cuda.get_device_capability()[0] == 9 else ()),
            *(f"--{flag}" for flag in args.flag),
        ]  # fmt: skip
        path = os.pathsep.join((str(Path(__file__).parent / "random_weights"), os.environ.get("PYTHONPATH", "")))
        env = {**sm120_lowering.SERVER_ENVIRONMENT, "PYTHONPATH": path}
        server = LocalServer(Path(folder), *flags, log=args.out / "server.log", env=env, ready_seconds=400)
        try:
            with server:
                ready = time.monotonic() - began
                print(f"ready after {ready:.0f} s", flush=True)
                result = measure(server.url, args, config, began)
                if STEP_SERVES not in server.log.read_text(errors="replace"):
                    result["problems"].append("the step served no decode pass: server.log says why")
                if not server.alive():
                    result["problems"].append(f"the server died, its log ends in: {server.log_tail()[-1500:]}")
        except ServerError as error:
            print(f"decode_step: {error}", file=sys.stderr)
            return 1
    result |= {"gpu": torch.cuda.get_device_name(), "lowering": args.lowering, "experts": args.experts}
    result |= {"torch": torch.__version__, "ready_seconds": round(ready), "layers": config.num_hidden_layers}
    (args.out / "decode_step.json").write_text(json.dumps(result, indent=1))
    print(report(result))
    return 1 if result["foreign"] or result["problems"] else 0


def measure(url: str, args: argparse.Namespace, config: ReferenceConfig, began: float) -> dict[str, Any]:
    """Times of every batch and context, and the profile of every batch at the shortest context."""
    rng = random.Random(0)
    shortest = min(args.context)
    result: dict[str, Any] = {"steps": [], "profiles": [], "foreign": [], "problems": []}
    known: dict[str, dict[Any, str]] = {"exact": {}, "compiled": {}, "name": {}}

    def cell(batch: int, context: int) -> None:
        if time.monotonic() - began > args.seconds:
            result["problems"].append(f"batch {batch} at {context} tokens was not measured: out of time")
            return
        about = {"batch": batch, "context": context, "weights": "random"}
        try:
            ms = step_ms(url, batch, context, rng)
            result["steps"].append({**about, "ms": round(ms, 3), "tokens_per_s": round(batch * 1000 / ms, 1)})
            print(json.dumps(result["steps"][-1]), flush=True)
            if context == shortest:
                stages = profile(url, args.out / f"traces-{batch}", batch, context, rng)
                for stage, found in stages.items():
                    result["foreign"] += [f"{stage} at batch {batch}: {name}" for name in traces.foreign(found)]
                summary = traces.summary(stages["DECODE"], known, config.num_hidden_layers)
                result["profiles"].append({**about, **summary})
        except (RuntimeError, ValueError, httpx.HTTPError) as error:
            result["problems"].append(f"batch {batch} at {context} tokens: {type(error).__name__}: {error}")
        # A run that is cut off leaves what it has.
        (args.out / "decode_step.json").write_text(json.dumps(result, indent=1))

    try:
        known |= known_kernels(args.batch, max(args.context) + 1024, args.out)
    except RuntimeError as error:
        result["problems"].append(f"kernels keep their own names in the tables, their ops did not run here: {error}")
    torch.cuda.empty_cache()
    for context in sorted(args.context):
        for batch in sorted(args.batch):
            cell(batch, context)
    return result


def report(result: dict[str, Any]) -> str:
    """The result for reading; the trace's summary first, the times last."""
    lines = []
    for profiled in result["profiles"]:
        lines.append(
            f"batch {profiled['batch']} at {profiled['context']} tokens, {profiled['weights']} weights: "
            f"{profiled['launches']} kernels a step, "
            f"{profiled['per_layer']} a layer; {profiled['busy_us']:.0f} us of kernels in {profiled['span_us']:.0f} us"
        )
        lines += [
            f"  {row['op'][:60]:60s} {row['us']:8.1f} us {row['share']:5.1%} {row['per_layer']:6.2f} a layer"
            for row in profiled["ops"][:24]
        ]
    for row in result["steps"]:
        aim = ""
        if row["batch"] == 1:
            over = row["ms"] - TARGET_MS
            aim = f"  target {TARGET_MS:g} ms missed by {over:.2f}" if over > 0 else f"  target {TARGET_MS:g} ms met"
        line = f"batch {row['batch']:3d} context {row['context']:6d} {row['weights']}: {row['ms']:7.2f} ms a step"
        lines.append(f"{line}, {row['tokens_per_s']:8.1f} tokens/s{aim}")
    foreign = result["foreign"] or ["none"]
    lines.append(f"kernels of DeepGEMM, TileLang, FlashMLA or FA3: {'; '.join(foreign)[:600]}")
    lines += [f"problem: {problem[-1500:]}" for problem in result["problems"]]
    lines.append(f"{result['gpu']}, lowering {result['lowering']}, {result['experts']} experts")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
