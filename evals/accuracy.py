"""`make accuracy`: how right a running server is, against any OpenAI-compatible base URL.

Exit code: 0 every score reached its floor · 1 one did not, or the server went away · 2 misuse, in one sentence.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cookbook
import instructions
import needles
import synthetic
import tools
from client import Client, Misuse, ServerGone
from report import Row, exit_code, facts, table, write

SUITES = ("synthetic", *cookbook.EVALUATIONS, "json", "tools", "needle")
QUICK_LONGEST = 16384
SIDE_CONCURRENCY = 4
"""Requests in flight in the suites json and tools."""


def _numbers(text: str) -> list[int]:
    units = {"K": 1 << 10, "M": 1 << 20}
    try:
        found = [
            int(item[:-1]) * units[item[-1].upper()] if item[-1:].isalpha() else int(item) for item in text.split(",")
        ]
    except (ValueError, KeyError):
        found = []
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different positive numbers such as 1,8 or 4K,1M")
    return found


def _suites(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no suite: choose of {','.join(SUITES)}")
    return names


def _floor(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if name not in SUITES or not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no floor such as tools=0.9, of {', '.join(SUITES)}")
    return name, share


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(prog="make accuracy", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", metavar="URL", help="base URL of the server, with or without /v1")
    parser.add_argument("--only", type=_suites, metavar="SUITE,…", help=f"of {','.join(SUITES)} (default: all; "
                        "synthetic where --synthetic names a file)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=f"{cookbook.QUICK_QUESTIONS} questions of GSM8K, "
                        "needles up to 16K; the rest is marked not run")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="questions of GSM8K and GPQA "
                        "(default: their tools' own download)")  # fmt: skip
    parser.add_argument("--synthetic", type=Path, metavar="FILE.jsonl", help="questions with exact answers")
    parser.add_argument("--lengths", type=_numbers, default=list(needles.LENGTHS), metavar="N,…",
                        help="of needle prompts with their answers (default: 4K,16K,64K,256K,1M)")  # fmt: skip
    parser.add_argument("--concurrency", type=_numbers, default=list(needles.CONCURRENCY), metavar="N,…",
                        help="requests in flight, needle and synthetic (default: 1,8,16)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="needles of each length, depth and "
                        "concurrency, at least (default: %(default)s)")  # fmt: skip
    parser.add_argument("--floor", type=_floor, action="append", default=[], metavar="SUITE=SHARE",
                        help="instead of the stated floor")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("accuracy.json"), metavar="FILE.json",
                        help="result (default: %(default)s)")  # fmt: skip
    arguments = parser.parse_args(words)
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}, needed at least 1")
    if arguments.only is None:
        arguments.only = [name for name in SUITES if name != "synthetic" or arguments.synthetic]
    return arguments


def _parts(client: Client, arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows as they are found, suite by suite; everything that can be misuse is found out before the first request."""
    floors = dict(arguments.floor)
    wanted = [suite for suite in SUITES if suite in arguments.only]
    if "synthetic" in wanted and arguments.synthetic is None:
        raise Misuse("The suite synthetic has no questions: name a file with --synthetic.")
    questions = synthetic.load(arguments.synthetic) if "synthetic" in wanted else []
    longest = QUICK_LONGEST if arguments.quick else None
    haystack = needles.prepare(client, arguments.lengths, longest) if "needle" in wanted else None
    if wanted == ["needle"] and haystack is None:
        reason = needles.refusal(client, min(arguments.lengths), longest)
        raise Misuse(f"No needle can be asked for, {reason}: give shorter --lengths or serve with more context.")
    data = cookbook.load([suite for suite in wanted if suite in cookbook.EVALUATIONS], arguments.data)
    for suite in wanted:
        given = {"floor": floors[suite]} if suite in floors else {}
        if suite == "synthetic":
            yield from synthetic.run(client, questions, arguments.concurrency, **given)
        elif suite in cookbook.EVALUATIONS:
            examples = cookbook.QUICK_QUESTIONS if arguments.quick and suite == "gsm8k" else None
            yield [cookbook.run(client, suite, data[suite], examples, **given)]
        elif suite == "json":
            yield [instructions.run(client, SIDE_CONCURRENCY, **given)]
        elif suite == "tools":
            yield [tools.run(client, SIDE_CONCURRENCY, **given)]
        else:
            yield from needles.run(
                client, haystack, arguments.lengths, arguments.concurrency, arguments.repeats, longest, **given
            )


def main(words: Sequence[str] | None = None) -> int:
    """Ask, judge, write the JSON file after each part, print the table last."""
    arguments = parse(words)
    out: Path = arguments.out
    rows: list[Row] = []
    known: dict[str, Any] = {}
    start = time.monotonic()
    try:
        if out.suffix != ".json" or not out.absolute().parent.is_dir():
            raise Misuse(f"--out {out} cannot be written: name a file that ends in .json in an existing folder.")
        client = Client(arguments.url)
        known = facts(client)
        known |= {"quick": arguments.quick, "suites": arguments.only}
        for part in _parts(client, arguments):
            rows += part
            write(out, known, rows, complete=False)
        known["seconds"] = round(time.monotonic() - start)
        known["mtp_accept_length"] = client.accept_length()
        write(out, known, rows, complete=True)
    except Misuse as error:
        print(f"make accuracy: {error}", file=sys.stderr)
        return 2
    except (ServerGone, KeyboardInterrupt) as stop:
        kept = f" Judged before and kept in {out}: {len(rows)} rows." if rows else ""
        print(f"make accuracy: {str(stop) or 'Stopped.'}{kept}", file=sys.stderr)
        return 1
    print(f"{known['model']} at {known['url']}, {known['machine']['name']}"
          f"{'' if known['local'] else ' (the server is elsewhere)'}\n\n{table(rows)}\n{out}")  # fmt: skip
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
