"""`sglang-sm120 plan`: every setting with its reason, the memory line by line, the command."""

from __future__ import annotations

import argparse

from .. import request, show, topology
from ..plan import make_plan


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `plan`."""
    request.configure(parser)
    topology.configure(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print a plan; 0."""
    wanted = request.read(arguments)
    if arguments.topology:
        nodes = [node.checked(wanted) for node in topology.nodes(arguments.topology, arguments.hosts, wanted)]
        print(topology.as_json(nodes) if arguments.json else topology.as_text(nodes))
        return 0
    plan = wanted.check(make_plan(wanted.machine, wanted.model, wanted.request))
    print(show.as_json(plan) if arguments.json else show.as_text(plan))
    return 0
