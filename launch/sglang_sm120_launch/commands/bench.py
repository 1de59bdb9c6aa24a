"""`sglang-sm120 bench`: SGLang's own serving benchmark against a running server, as one JSON file and one picture.

Every prompt is random words, cut so that the server's own tokenizer and chat template make it as long as asked for:
nothing here applies a template. Prompts differ from each other and the prefix cache is emptied before each point.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from tqdm import tqdm

from .. import passes
from ..address import HOST, PORT
from ..errors import LaunchError
from ..picture import Panel, draw
from ..stream import ask

SCHEMA = 1
"""Version of the JSON file; `compare` refuses another."""
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information"
).split()
DATASET = "sglang-sm120"
"""Under which name SGLang's benchmark finds the prompts."""
SERVER = (
    "version", "device", "tp_size", "pp_size", "dp_size", "context_length", "chunked_prefill_size",
    "mem_fraction_static", "max_running_requests", "max_total_num_tokens", "cuda_graph_config", "disable_radix_cache",
    "enable_nvidia_megakernel", "moe_runner_backend", "attention_backend", "kv_cache_dtype", "speculative_algorithm",
    "speculative_num_steps", "speculative_num_draft_tokens",
)  # fmt: skip
"""What is kept of /server_info: settings that change the figures."""
KEYS = ("SGLANG_API_KEY", "OPENAI_API_KEY")
"""Variables that may hold the server's key: `serve`'s own before the one that may be for another service."""
ADMIN = "SGLANG_ADMIN_API_KEY"


def _numbers(text: str) -> list[int]:
    """`1,2,4` or `4K,64K` as numbers; raises argparse's error for anything else."""
    try:
        values = [int(item[:-1]) * 1024 if item[-1:] in "kK" else int(item) for item in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different positive numbers such as 1,2,4 or 4K,64K")
    return values


def _positive(text: str) -> int:
    values = _numbers(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than one number")
    return values[0]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.add_argument("--base-url", default=f"http://{HOST}:{PORT}", help="the server (default: %(default)s)")
    parser.add_argument("--concurrency", type=_numbers, default="1,2,4,8,16,32,64", metavar="N,N,…",
                        help="requests in flight at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=_numbers, default="4K,16K,64K", metavar="N,N,…",
                        help="lengths of prompts as the server counts them (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output-tokens", type=_positive, default="256", metavar="N",
                        help="tokens to generate for each request (default: %(default)s)")  # fmt: skip
    rounds = "requests at each point are this many times its concurrency (default: %(default)s)"
    parser.add_argument("--rounds", type=_positive, default="2", metavar="N", help=rounds)
    parser.add_argument("--tokenizer", metavar="PATH|ID", help="where the server's own is not readable from here")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), metavar="FILE.json",
                        help="result; the picture lies beside it as FILE.svg (default: %(default)s)")  # fmt: skip


class _Stopped(Exception):
    """Why the measurement cannot go on."""


class Server(NamedTuple):
    """A running server: its root URL, the name it serves, its tokenizer, the longest sequence, and its settings."""

    url: str
    name: str
    tokenizer: str
    longest: int | None
    settings: dict[str, Any]


def run(arguments: argparse.Namespace) -> int:
    """Measure every point, write the JSON file after each and the picture at the end; 1 when a request failed.

    Raises:
        LaunchError: the file cannot be written, no SGLang server answers, or no point fits into its context.
    """
    out: Path = arguments.out
    if out.suffix != ".json" or not out.absolute().parent.is_dir():
        raise LaunchError(f"--out {out} cannot be written: name a file that ends in .json in an existing folder.")
    server = find_server(arguments.base_url, arguments.tokenizer)
    prompt_tokens, output_tokens, rounds = arguments.prompt_tokens, arguments.output_tokens, arguments.rounds
    room = None if server.longest is None else server.longest - output_tokens
    fitting = [(p, c) for p in prompt_tokens for c in arguments.concurrency if room is None or p <= room]
    if not fitting:
        raise LaunchError(
            f"No point fits: the server's context is {server.longest} tokens, the shortest prompt and its answer need "
            f"{min(prompt_tokens) + output_tokens}: give shorter --prompt-tokens."
        )
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": server.name,
        "server": server.settings,
        "output_tokens": output_tokens,
        "rounds": rounds,
        "seed": arguments.seed,
        "too_long": [p for p in prompt_tokens if room is not None and p > room],
        "complete": False,
        "passes": None,
        "points": [],
    }
    before = _passes(server.url)
    for length in result["too_long"]:
        print(f"left out: prompts of {length} tokens, the server's context is {server.longest}")
    measure = _measure(server, output_tokens, rounds, arguments.seed)
    with tqdm(total=sum(c for _, c in fitting) * rounds, unit="req", dynamic_ncols=True) as bar:
        for length, count in fitting:
            bar.set_description(f"{length} tokens x {count}")
            try:
                point = measure(length, count)
            except (_Stopped, KeyboardInterrupt) as stop:
                bar.close()
                kept = f"Kept in {out}: {len(result['points'])} of {len(fitting)} points." if result["points"] else ""
                print(f"sglang-sm120: {str(stop) or 'Stopped.'} {kept}", file=sys.stderr)
                return 1
            result["points"].append(point)
            after = _passes(server.url)
            result["passes"] = None if before is None or after is None else passes.between(before, after)
            _write(out, result)
            bar.set_postfix_str(f"{point['output_tokens_per_s']:.1f} tok/s")
            bar.update(point["requests"])
    result["complete"] = True
    _write(out, result)
    picture(result, out.with_suffix(".svg"))
    print("\n".join([*passes.lines(result["passes"]), str(out), str(out.with_suffix(".svg"))]))
    failed = sum(point["requests"] - point["completed"] for point in result["points"])
    if failed:
        print(f"{failed} requests failed, {out} has the first error of each point")
    return 1 if failed else 0


def find_server(url: str, tokenizer: str | None = None) -> Server:
    """Ask a server what it serves; raises LaunchError when none answers there, or not as SGLang does."""
    url = url.rstrip("/")
    try:
        card = _get(url, "/v1/models")["data"][0]
        settings = _get(url, "/server_info")
        tokenizer = tokenizer or str(_get(url, "/model_info")["tokenizer_path"])
        found = {name: settings[name] for name in SERVER if name in settings}
        server = Server(url, card["id"], tokenizer, card.get("max_model_len"), found)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise LaunchError(f"What answers at {url} is not SGLang: name an SGLang server with --base-url.") from None
    # A name of the Hub is neither.
    if (Path(tokenizer).is_absolute() or tokenizer.startswith(".")) and not Path(tokenizer).exists():
        raise LaunchError(f"The server's tokenizer {tokenizer} is not to be found from here: name it with --tokenizer.")
    return server


def _passes(url: str) -> dict[str, float] | None:
    try:
        page = httpx.get(f"{url}/metrics", headers=_key(), timeout=30)
        return passes.read(page.text) if page.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


def _get(url: str, path: str) -> Any:
    try:
        answer = httpx.get(url + path, headers=_key(), timeout=30)
        if answer.status_code in (401, 403):
            raise LaunchError(f"The server at {url} wants its key: set SGLANG_API_KEY, or OPENAI_API_KEY, to it.")
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise LaunchError(
            f"No SGLang server answers at {url}{path} ({error or type(error).__name__}): start one, or name it with "
            "--base-url."
        ) from None


def _key(*first: str) -> dict[str, str]:
    """The header with the server's key where it has one: of these variables, then of KEYS, the first that is set."""
    key = next(filter(None, map(os.environ.get, (*first, *KEYS))), None)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _flush(url: str) -> None:
    """Empty the server's prefix cache, as its administrator where it knows one."""
    try:
        httpx.post(f"{url}/flush_cache?timeout=60", headers=_key(ADMIN), timeout=90).raise_for_status()
    except httpx.HTTPError as error:
        raise _Stopped(
            f"The server's prefix cache was not emptied ({error or type(error).__name__}): set SGLANG_ADMIN_API_KEY if "
            "it has one, and let no other request run."
        ) from None


def prompt(length: int, rng: random.Random, count: Callable[[str], int]) -> tuple[str, int]:
    """Random words that `count` says are at most `length` tokens, and that count: within 2 % or one word of it.

    Raises:
        LaunchError: one word is longer than `length`: the chat template alone takes more.
    """
    words = [rng.choice(WORDS) for _ in range(length)]
    fits, best, over, found = 0, 0, length + 1, length
    number = length
    # Counts grow almost evenly with the words: each guess is proportional, the bracket (fits, over) ends the search.
    while over - fits > 1 and best < 0.98 * length:
        found = count(" ".join(words[:number]))
        if found > length:
            over = number
        else:
            fits, best = number, found
        number = max(fits + 1, min(over - 1, round(number * 0.99 * length / found)))
    if not fits:
        raise LaunchError(f"A prompt of one word has {found} tokens on this server: give --prompt-tokens above that.")
    return " ".join(words[:fits]), best


def counter(server: Server) -> Callable[[str], int]:
    """How many tokens the server makes of a user's message, its chat template included.

    Raises:
        LaunchError: (the function) the server does not say.
    """
    def count(text: str) -> int:
        body = {"model": server.name, "messages": [{"role": "user", "content": text}]}
        try:
            answer = httpx.post(f"{server.url}/tokenize", json=body, headers=_key(), timeout=120)
            answer.raise_for_status()
            return int(answer.json()["count"])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise LaunchError(
                f"{server.url}/tokenize does not count tokens ({error or type(error).__name__}), needed to cut prompts "
                "with the server's chat template: name SGLang's server, not a router."
            ) from None

    return count


def _measure(server: Server, output_tokens: int, rounds: int, seed: int) -> Callable[[int, int], dict[str, Any]]:
    """The function that measures one point (prompt tokens, concurrency) with SGLang's benchmark in this process."""
    # Imported once, not in a process for each point: torch and transformers come with it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if key := os.environ.get(KEYS[0]):
        os.environ[KEYS[1]] = key  # which SGLang's benchmark reads
    from sglang.bench_serving import run_benchmark
    from sglang.benchmark import serving
    from sglang.benchmark.datasets import DATASET_MAPPING
    from sglang.benchmark.datasets.common import BaseDataset, DatasetRow
    from sglang.test.test_utils import get_benchmark_args

    class Prompts(BaseDataset):
        """The prompts that were made here, with the lengths that the server counted."""

        def __init__(self, prompts: list[tuple[str, int]]) -> None:
            self.prompts = prompts

        @classmethod
        def from_args(cls, args: argparse.Namespace) -> Prompts:
            return cls(args.prompts)

        def load(self, tokenizer: Any, model_id: str | None = None) -> list[DatasetRow]:
            return [DatasetRow(prompt=text, prompt_len=n, output_len=output_tokens) for text, n in self.prompts]

    # SGLang's own kinds count with the tokenizer's template, which DeepSeek-V4's has not, or without any.
    DATASET_MAPPING[DATASET] = Prompts
    serving.ASYNC_REQUEST_FUNCS["sglang-oai-chat"] = ask
    serving.flush_server_cache = lambda url, *_: _flush(url)  # SGLang's knows one key, and not the administrator's
    count = counter(server)

    def measure(prompt_tokens: int, concurrency: int) -> dict[str, Any]:
        rng = random.Random(f"{seed} {prompt_tokens} {concurrency}")
        number = concurrency * rounds
        prompts = [prompt(prompt_tokens, rng, count) for _ in range(number)]
        with tempfile.TemporaryDirectory(prefix="sglang-sm120-bench-") as scratch:
            log = Path(scratch) / "log"
            # The chat backend sends messages, so that the server applies its template.
            settings = get_benchmark_args(
                base_url=server.url, backend="sglang-oai-chat", dataset_name=DATASET, tokenizer=server.tokenizer,
                num_prompts=number, seed=seed, max_concurrency=concurrency,
            )  # fmt: skip
            settings.prompts = prompts
            settings.model, settings.served_model_name = server.tokenizer, server.name
            settings.extra_request_body = json.dumps({"stream_options": {"include_usage": True}})
            settings.flush_cache, settings.disable_tqdm = True, True
            settings.output_file, settings.output_details = str(Path(scratch) / "result.jsonl"), True
            with open(log, "w") as stream, contextlib.redirect_stdout(stream):
                try:
                    found = run_benchmark(settings)
                except (SystemExit, ValueError, OSError) as error:
                    reason = str(error).strip().splitlines()[-1:] or ["no reason given"]
                    raise _Stopped(
                        f"SGLang's benchmark stopped at {prompt_tokens} tokens x {concurrency} ({reason[0]}): look at "
                        "the server's log."
                    ) from None
        return _point(prompt_tokens, concurrency, number, found)

    return measure


def _point(prompt_tokens: int, concurrency: int, requests: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of `points`. Rates are tokens per second of the whole server; times are milliseconds, None where no
    request succeeded.
    """
    times = {
        f"{name}_ms": {kind: found[f"{kind}_{name}_ms"] for kind in ("median", "mean", "p99")}
        if found["completed"]
        else None
        for name in ("ttft", "tpot", "itl", "e2e_latency")
    }
    errors = [error for error in found["errors"] if error]
    return {
        "prompt_tokens": prompt_tokens,
        "concurrency": concurrency,
        "requests": requests,
        "completed": found["completed"],
        "duration_s": found["duration"],
        "input_tokens": found["total_input_tokens"],
        "output_tokens": found["total_output_tokens"],
        "input_tokens_per_s": found["input_throughput"],
        "output_tokens_per_s": found["output_throughput"],
        "requests_per_s": found["request_throughput"],
        **times,
        "accept_length": found["accept_length"],
        "error": errors[0].strip().splitlines()[-1] if errors else None,
    }


def _write(path: Path, result: Mapping[str, Any]) -> None:
    """Replace the file in one step, so that an interrupted run leaves the points it had."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    os.replace(draft, path)


def picture(result: Mapping[str, Any], path: Path) -> None:
    """Throughput, time to first token and time per output token against concurrency, a line for each length."""
    def series(value: Callable[[Mapping[str, Any]], float]) -> dict[str, Sequence[tuple[float, float]]]:
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in result["points"]:
            if point["completed"] and value(point) > 0:
                label = f"{point['prompt_tokens']:,} prompt tokens"
                lines.setdefault(label, []).append((point["concurrency"], value(point)))
        return dict(lines)

    across = "concurrent requests"
    first = series(lambda p: p["ttft_ms"]["median"])
    panels = [
        Panel("Output throughput", across, "tokens / s, all requests", series(lambda p: p["output_tokens_per_s"])),
        Panel("Time to first token (TTFT)", across, "ms, median, log scale", first, log=True),
        Panel("Time per output token (TPOT)", across, "ms, median", series(lambda p: p["tpot_ms"]["median"])),
    ]
    server = result["server"]
    heading = f"{Path(result['model']).name} on SGLang {server.get('version')}, TP {server.get('tp_size')}, "
    heading += f"{server.get('device')}, {result['output_tokens']} output tokens, {result['started'][:10]}"
    failed = sum(point["requests"] - point["completed"] for point in result["points"])
    if failed:
        heading += f" — {failed} of {sum(point['requests'] for point in result['points'])} requests failed"
    draw(heading, panels, path)
