"""`sglang-sm120 kernels`: which provider serves each op on this machine, why, and what serves prefill in its place."""

from __future__ import annotations

import argparse
import json
import os
import re

from sglang_sm120.limits import SM12X

from .errors import LaunchError



def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kernels`."""
    parser.add_argument("--device", metavar="KIND", help="another device kind: cpu, sm120, sm90 … (default: this one)")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of op, provider, chosen, why, prefill")


def run(arguments: argparse.Namespace) -> int:
    """Print op x provider x chosen x why, and what serves prefill where the step does not; 0."""
    if arguments.device is not None and not re.fullmatch(r"cpu|sm\d+", arguments.device):
        raise LaunchError(f"--device {arguments.device} is no device kind: name cpu, sm120, sm90 …")
    try:
        import torch

        from sglang_sm120.ops import SPECS
        from sglang_sm120.registry import ProviderError, device_kind, table
    except ImportError as error:
        raise LaunchError(f"The ops cannot be imported ({error}): run `make setup` and use its .venv.") from None
    try:
        kind = arguments.device or device_kind(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        rows = table(kind)
    except ProviderError as error:
        raise LaunchError(str(error)) from None
    apart = kind in {f"sm{sm}" for sm in SM12X} and os.environ.get("SGLANG_SM120_PREFILL") != "overlay"
    prefill = {row.op: SPECS[row.op].prefill for row in rows if row.chosen and apart}
    if arguments.json:
        print(json.dumps([row._asdict() | {"prefill": prefill.get(row.op)} for row in rows], indent=2))
        return 0
    ops = max(len(row.op) for row in rows)
    providers = max(len(row.provider) for row in rows)
    for row in rows:
        print(f"{'*' if row.chosen else ' '} {row.op:<{ops}}  {row.provider:<{providers}}  {row.why}")
    print("\n* serves the op" + (" in decode and verification" if apart else ""))
    if apart:
        print("\nPrefill is SGLang 0.5.23's own (SGLANG_SM120_PREFILL=overlay lets the step take it too):")
        for op, served in prefill.items():
            if served:
                print(f"  {op:<{ops}}  {served}")
    return 0
