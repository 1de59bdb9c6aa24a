"""`sglang-sm120 plan`: every setting with its reason, the memory line by line, the command; or files to start it."""

from __future__ import annotations

import argparse

from .. import deployment, request, show, writers
from ..plan import make_plan


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `plan`."""
    request.configure(parser)
    deployment.configure(parser)
    writers.configure(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print a plan, or write files; 0."""
    writers.check(arguments)
    wanted = request.read(arguments)
    if arguments.write:
        print(writers.write(arguments, wanted))
    elif deployment.asked(arguments):
        shape = deployment.shape(arguments, wanted)
        described = deployment.describe(shape, deployment.hosts(arguments, shape), wanted)
        print(deployment.as_json(described) if arguments.json else deployment.as_text(described))
    else:
        plan = wanted.check(make_plan(wanted.machine, wanted.model, wanted.request))
        print(show.as_json(plan) if arguments.json else show.as_text(plan))
    return 0
