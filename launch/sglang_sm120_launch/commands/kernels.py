"""`sglang-sm120 kernels`: which provider serves each op on this machine, why, and what serves prefill in its place."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_sm120.limits import SM12X

from ..errors import LaunchError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kernels`."""
    parser.add_argument("--device", metavar="KIND", help="another device kind: cpu, sm120, sm90 … (default: this one)")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of op, provider, chosen, why, prefill")


def run(arguments: argparse.Namespace) -> int:
    """Print op x provider x chosen x why, and what serves prefill where the step does not; 0."""
    if arguments.device is not None and not re.fullmatch(r"cpu|sm\d+", arguments.device):
        raise LaunchError(f"--device {arguments.device} is no device kind: name cpu, sm120, sm90 …")
    found = rows(arguments.device)
    print(json.dumps(found, indent=2) if arguments.json else text(found))
    return 0


def rows(device: str | None) -> list[dict[str, Any]]:
    """Every provider of every op on a device kind, by default this machine's, as `--json` prints it.

    Raises:
        LaunchError: the ops cannot be imported, or a variable names what they have not.
    """
    try:
        import torch

        from sglang_sm120.ops import SPECS
        from sglang_sm120.registry import ProviderError, device_kind, table
    except ImportError as error:
        raise LaunchError(f"The ops cannot be imported ({error}): run `make setup` and use its .venv.") from None
    try:
        kind = device or device_kind(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        found = table(kind)
    except ProviderError as error:
        raise LaunchError(str(error)) from None
    apart = kind in {f"sm{sm}" for sm in SM12X} and os.environ.get("SGLANG_SM120_PREFILL") != "overlay"
    return [row._asdict() | {"prefill": SPECS[row.op].prefill if row.chosen and apart else None} for row in found]


def text(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows for reading, and below them what serves prefill where the step does not."""
    ops, providers = (max(len(row[name]) for row in found) for name in ("op", "provider"))
    prefill = {row["op"]: row["prefill"] for row in found if row["prefill"]}
    line = f"{{}} {{op:<{ops}}}  {{provider:<{providers}}}  {{why}}"
    lines = [line.format("*" if row["chosen"] else " ", **row) for row in found]
    lines += ["", "* serves the op" + (" in decode and verification" if prefill else "")]
    if prefill:
        lines += ["", "Prefill is SGLang 0.5.23's own (SGLANG_SM120_PREFILL=overlay lets the step take it too):"]
    return "\n".join([*lines, *(f"  {op:<{ops}}  {served}" for op, served in prefill.items())])
