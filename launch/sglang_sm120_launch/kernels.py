"""`sglang-sm120 kernels`: which provider serves each op on this machine, and why."""

from __future__ import annotations

import argparse
import json
import re

from .errors import LaunchError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kernels`."""
    parser.add_argument("--device", metavar="KIND", help="another device kind: cpu, sm120, sm90 … (default: this one)")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of op, provider, chosen, why")


def run(arguments: argparse.Namespace) -> int:
    """Print op x provider x chosen x why; 0."""
    if arguments.device is not None and not re.fullmatch(r"cpu|sm\d+", arguments.device):
        raise LaunchError(f"--device {arguments.device} is no device kind: name cpu, sm120, sm90 …")
    try:
        import sglang_sm120.ops  # noqa: F401  importing an op registers its providers
        from sglang_sm120.registry import ProviderError, table
    except ImportError as error:
        raise LaunchError(f"The ops cannot be imported ({error}): run `make setup` and use its .venv.") from None
    try:
        rows = table(arguments.device)
    except ProviderError as error:
        raise LaunchError(str(error)) from None
    if arguments.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return 0
    ops = max(len(row.op) for row in rows)
    providers = max(len(row.provider) for row in rows)
    for row in rows:
        print(f"{'*' if row.chosen else ' '} {row.op:<{ops}}  {row.provider:<{providers}}  {row.why}")
    print("\n* serves the op")
    return 0
