"""`plan --topology`: one model over two hosts (`2n`), or prefill and decode on hosts of their own (`1p1d`).

Both use SGLang's own means: `--nnodes`, `--disaggregation-mode`, and the package sglang-router.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass, replace

from . import show
from .address import PORT
from .errors import LaunchError
from .plan import Plan, make_plan
from .request import Wanted
from .settings import Setting, env, flag, overridden

RENDEZVOUS_PORT = 20000
BOOTSTRAP_PORT = 8998
ROUTER_PORT = 8000


@dataclass(frozen=True)
class Node:
    """One process to start: its name, the host, its command, and its plan unless it is the router."""

    name: str
    where: str
    command: list[str]
    plan: Plan | None

    def checked(self, wanted: Wanted) -> Node:
        """This node, its flags parsed as SGLang parses them."""
        return self if self.plan is None else replace(self, plan=wanted.check(self.plan))


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `plan` for more than one host."""
    parser.add_argument("--topology", choices=_MAKERS, help="2n: two hosts as one; 1p1d: prefill and decode apart")
    parser.add_argument(
        "--hosts", default="host0,host1", metavar="A,B", help="the two hosts' names (default: %(default)s)"
    )


def nodes(kind: str, hosts: str, wanted: Wanted) -> list[Node]:
    """Every node of a topology. Both hosts are like the machine that is planned for.

    Raises:
        LaunchError: not two hosts are named, or the machine cannot be part of the topology.
    """
    names = hosts.split(",")
    if len(names) != 2 or not all(names):
        raise LaunchError(f"--hosts is {hosts!r}, needed two names with a comma between them.")
    return _MAKERS[kind](names, wanted)


def _two_nodes(hosts: list[str], wanted: Wanted) -> list[Node]:
    if not wanted.machine.gpus:
        raise LaunchError("--topology 2n needs GPUs and none was found: plan with --machine for one that has them.")
    plan = make_plan(replace(wanted.machine, nodes=2), wanted.model, wanted.request)
    made = []
    for rank, host in enumerate(hosts):
        extra = [
            flag("dist-init-addr", f"{hosts[0]}:{RENDEZVOUS_PORT}", "where the nodes meet: the first one"),
            flag("node-rank", rank, "the first node answers requests"),
        ]
        if rank == 0:
            extra += [flag("host", "0.0.0.0", "clients are on other machines"), flag("port", PORT, "SGLang's default")]
        made.append(_node(f"node {rank}", host, plan, extra))
    return made


def _prefill_decode(hosts: list[str], wanted: Wanted) -> list[Node]:
    plan = make_plan(wanted.machine, wanted.model, replace(wanted.request, apart=True))
    made = []
    for mode, host in zip(("prefill", "decode"), hosts, strict=True):
        extra = [
            flag("disaggregation-mode", mode, f"this host does the {mode} of every request"),
            flag("disaggregation-transfer-backend", "mooncake", "moves the cache; needs mooncake-transfer-engine"),
            flag("disaggregation-bootstrap-port", BOOTSTRAP_PORT, "where decode finds prefill; SGLang's default"),
            flag("host", "0.0.0.0", "the router is on another machine"),
            flag("port", PORT, "SGLang's default"),
        ]
        if wanted.machine.rdma:
            devices = ",".join(entry.split(":")[0] for entry in wanted.machine.rdma)
            extra.append(flag("disaggregation-ib-device", devices, "RDMA devices whose network interface is up"))
        else:
            extra.append(env("MC_FORCE_TCP", "1", "no RDMA device is up: mooncake moves the cache over TCP"))
        made.append(_node(mode, host, plan, extra))
    router = ["python", "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    router += ["--prefill", f"http://{hosts[0]}:{PORT}", str(BOOTSTRAP_PORT)]
    router += ["--decode", f"http://{hosts[1]}:{PORT}", "--host", "0.0.0.0", "--port", str(ROUTER_PORT)]
    return [*made, Node("router", "either host; package sglang-router", router, None)]


_MAKERS = {"2n": _two_nodes, "1p1d": _prefill_decode}


def _node(name: str, where: str, plan: Plan, extra: list[Setting]) -> Node:
    """A server of this plan with further settings; one the user has given keeps the user's value."""
    plan = replace(plan, settings=overridden([*plan.settings, *extra], plan.settings))
    return Node(name, where, plan.command(), plan)


def as_json(nodes: list[Node]) -> str:
    """A list of nodes; the router's plan is null."""
    return json.dumps([{**vars(node), "plan": node.plan and show.as_dict(node.plan)} for node in nodes], indent=2)


def as_text(nodes: list[Node]) -> str:
    """The first node's plan in full, then every node's command."""
    plans = [node.plan for node in nodes if node.plan]
    parts = [show.as_text(plans[0]).rsplit("Command:", 1)[0].rstrip(), ""]
    for node in nodes:
        parts += [f"{node.name} ({node.where}):", "  " + shlex.join(node.command), ""]
    return "\n".join(parts).rstrip()
