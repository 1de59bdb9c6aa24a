"""`sglang-sm120 doctor`: what this machine has and lacks for serving DeepSeek-V4 on SM120, and what to do about it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..address import HOST, PORT
from ..checks import CACHE_VARIABLE, Finding, Status, machine_checks
from ..checks_checkpoint import checkpoint_checks
from ..checks_software import software_checks
from ..errors import LaunchError
from ..machine import Machine
from ..model import located

SCHEMA = 1
"""Version of the JSON report, described in docs/doctor.md: raised when a reader of the old one would go wrong."""
ORDER: tuple[Status, ...] = ("ok", "warn", "fail")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`."""
    parser.add_argument("--model", metavar="PATH|ID", help="also check a checkpoint's directory, or a downloaded model")
    parser.add_argument("--host", default=HOST, help="address the server will listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="port the server will listen on (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON (schema: docs/doctor.md)")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 0 when no check failed, 1 otherwise."""
    folder = None
    if arguments.model is not None and (folder := located(arguments.model)) is None:
        raise LaunchError(
            f"{arguments.model} is not downloaded: run `hf download {arguments.model} --local-dir DIR`, then name DIR."
        )
    _, findings = look(arguments.host, arguments.port)
    if folder is not None:
        findings += checkpoint_checks(folder)
    print(json.dumps(report(findings), indent=2) if arguments.json else table(findings))
    return 1 if worst(findings) == "fail" else 0


def look(host: str, port: int) -> tuple[Machine, list[Finding]]:
    """This machine, and every check of it but those of a checkpoint."""
    machine = visible(Machine.detect(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".triton").absolute()
    return machine, [*machine_checks(machine, host, port, cache), *software_checks()]


def visible(machine: Machine, devices: str | None) -> Machine:
    """The machine with the cards that CUDA_VISIBLE_DEVICES leaves; all of them where it does not give numbers."""
    if devices is None or not re.fullmatch(r"\d+(,\d+)*", devices):
        return machine
    chosen = [int(number) for number in devices.split(",")]
    return dataclasses.replace(machine, gpus=tuple(machine.gpus[i] for i in chosen if i < len(machine.gpus)))


def worst(findings: Sequence[Finding]) -> Status:
    """The status of the whole report."""
    return max((finding.status for finding in findings), key=ORDER.index, default="ok")


def report(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as docs/doctor.md describes them."""
    return {"schema": SCHEMA, "status": worst(findings), "checks": [finding._asdict() for finding in findings]}


def table(findings: Sequence[Finding]) -> str:
    """One line a check, what to do below those that are not ok, and a summary."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.name:<{width}}  {finding.found}")
        if finding.do:
            lines.append(f"{'':<4}  {'':<{width}}  -> {finding.do}")
    counts = ", ".join(f"{sum(f.status == status for f in findings)} {status}" for status in ORDER)
    return "\n".join([*lines, "", f"{len(findings)} checks: {counts}"])
