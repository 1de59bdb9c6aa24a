"""One model on several machines: every process of it, from one description that all files are written from.

A server spans `--nodes` machines, tensor parallel over all their cards. With `--role` there are servers that prefill
and servers that decode, with SGLang's own transfer of the cache between them and its router in front (the extra `pd`).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sglang_sm120 import __version__

from . import show
from .address import PORT
from .errors import LaunchError
from .plan import Plan, make_plan
from .request import Wanted
from .settings import SECRET, Setting, command, env, flag, overridden
from .values import number

ROLES = ("prefill", "decode")
RENDEZVOUS_PORT = 20000
BOOTSTRAP_PORT = 8998
ROUTER_PORT = 8000
RANKS = ("dist-init-addr", "nnodes", "node-rank")
"""Flags that say which part of a server a process is."""
ROUTER, SERVER = "sglang_router.launch_router", "sglang.launch_server"


@dataclass(frozen=True)
class Process:
    """One process to start on one host.

    Attributes:
        name: unique in the deployment: `server`, `prefill0`, `decode1-node0`, `router`.
        role: `server`, `prefill`, `decode` or `router`.
        server, rank: which server it is part of, by name, and which of its nodes.
        settings: its flags and variables; `plan` is what they come from, None for the router.
    """

    name: str
    role: str
    server: str
    rank: int
    host: str
    module: str
    settings: tuple[Setting, ...]
    plan: Plan | None

    def command(self) -> list[str]:
        """The command to type on the host, keys and passwords hidden."""
        return command(self.module, self.settings)

    def variables(self) -> list[Setting]:
        """The environment variables."""
        return [entry for entry in self.settings if entry.kind == "env"]

    def flags(self) -> list[Setting]:
        """What its command line has."""
        return [entry for entry in self.settings if entry.kind == "flag" and entry.arguments()]

    def secrets(self) -> list[str]:
        """Variables that hold the values of keys and passwords where files are written: none of them is written."""
        return [variable(entry) for entry in self.flags() if SECRET.search(entry.name)]

    def words(self, escape: Callable[[str], str], secret: Callable[[str], str]) -> Iterator[tuple[list[str], str]]:
        """The words of each flag and why it is there.

        Args:
            escape: a word as the file's format wants it.
            secret: how that format refers to a variable.
        """
        for entry in self.flags():
            words = [escape(word) for word in entry.arguments()]
            if SECRET.search(entry.name):
                words[1:] = [secret(variable(entry))]
            yield words, entry.reason


def variable(entry: Setting) -> str:
    """The variable that holds a secret flag's value: SGLANG_API_KEY for --api-key."""
    return f"SGLANG_{entry.name.replace('-', '_').upper()}"


@dataclass(frozen=True)
class Shape:
    """How many machines and servers: `nodes` a server, and servers by role; `role` is what is asked for of them."""

    nodes: int
    prefill: int
    decode: int
    role: str | None

    def servers(self) -> list[tuple[str, str]]:
        """Role and name of every server, in the order of their hosts."""
        if self.role is None:
            return [("server", "server")]
        counts = zip(ROLES, (self.prefill, self.decode), strict=True)
        return [(role, f"{role}{index}") for role, count in counts for index in range(count)]


@dataclass(frozen=True)
class Deployment:
    """Every process that was asked for, in order of start; `release` names this package and SGLang."""

    shape: Shape
    wanted: Wanted
    release: str
    processes: tuple[Process, ...]

    def whole(self) -> bool:
        """Whether nothing was left out by --role."""
        return self.shape.role in (None, "all")

    def servers(self) -> list[list[Process]]:
        """The processes by server, without the router."""
        found: dict[str, list[Process]] = {}
        for one in self.processes:
            if one.plan:
                found.setdefault(one.server, []).append(one)
        return list(found.values())

    def hosts(self) -> list[str]:
        """Every host, once."""
        return list(dict.fromkeys(one.host for one in self.processes))

    def cards(self) -> int:
        """Cards that a server takes of one machine; 0 on CPUs."""
        tp = self.processes[0].plan.value("tp-size") if self.processes[0].plan else 0
        return int(str(tp)) // self.shape.nodes if self.wanted.machine.gpus else 0


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `plan` for more than one machine."""
    parser.add_argument("--nodes", type=int, metavar="N", help="machines of one server, tensor parallel over all cards")
    parser.add_argument("--role", choices=(*ROLES, "all"), help="prefill and decode apart: plan one role or all")
    parser.add_argument("--prefill", type=int, metavar="P", help="servers that prefill (1): the first hosts are theirs")
    parser.add_argument("--hosts", metavar="A,B,…", help="the machines, by names under which they reach each other")


def asked(arguments: argparse.Namespace) -> bool:
    """Whether the arguments describe more than one process."""
    return any(getattr(arguments, name) is not None for name in ("nodes", "role", "prefill", "hosts"))


def shape(arguments: argparse.Namespace, wanted: Wanted) -> Shape:
    """The shape that the arguments describe.

    Raises:
        LaunchError: the numbers do not go together, in one sentence.
    """
    for name in ("nodes", "prefill"):
        if (count := getattr(arguments, name)) is not None and count < 1:
            raise LaunchError(f"--{name} is {count}: give a whole number of 1 or more.")
    if arguments.prefill is not None and arguments.role is None:
        raise LaunchError("--prefill counts servers that prefill alone, and no --role was given: add --role all.")
    for name in (*RANKS, "disaggregation-mode"):
        if name != "nnodes" and wanted.request.value(name) is not None:
            raise LaunchError(f"--{name} was given, and --nodes and --role decide it for every process: leave it out.")
    planned = number(wanted.request, "nnodes") or (wanted.machine.nodes if wanted.machine.nodes > 1 else None)
    names = _names(arguments.hosts)
    whole = len(names) if names and arguments.role is None else 1
    nodes = arguments.nodes or planned or whole
    if planned not in (None, nodes):
        raise LaunchError(f"--nodes is {nodes} and the config or the machine says {planned}: give one number.")
    if arguments.role is None:
        if names and len(names) != nodes:
            raise LaunchError(
                f"--hosts names {len(names)} and one server spans {nodes}: name as many, or add --role for prefill and "
                f"decode apart."
            )
        return Shape(nodes, 0, 0, None)
    prefill = arguments.prefill or 1
    count = len(names) or nodes * (prefill + 1)
    if count % nodes:
        raise LaunchError(f"--hosts names {count} and each server spans {nodes}: name a multiple of {nodes}.")
    decode = count // nodes - prefill
    if decode < 1:
        raise LaunchError(
            f"--hosts names {count}, of which {prefill} prefill server{'s' * (prefill > 1)} of {nodes} take "
            f"{prefill * nodes}, and none is left to decode: name {(prefill + 1) * nodes} or more."
        )
    return Shape(nodes, prefill, decode, arguments.role)


def hosts(arguments: argparse.Namespace, shape: Shape) -> list[str]:
    """The hosts' names, made up where none were given."""
    return _names(arguments.hosts) or [f"host{index}" for index in range(shape.nodes * len(shape.servers()))]


_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
"""They become parts of URLs and names of files."""


def _names(text: str | None) -> list[str]:
    names = text.split(",") if text else []
    if not all(_HOST.fullmatch(name) for name in names) or text == "":
        raise LaunchError(f"--hosts is {text!r}: give host names or IPv4 addresses with a comma between them.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise LaunchError(f"--hosts names {twice} twice, and each machine has one part: name it once.")
    return names


def describe(shape: Shape, hosts: Sequence[str], wanted: Wanted) -> Deployment:
    """Every process of a deployment, its flags parsed as SGLang parses them. The machines are alike.

    Raises:
        LaunchError: the model does not fit, or SGLang does not take a flag.
    """
    machine = replace(wanted.machine, nodes=shape.nodes)
    plan = make_plan(machine, wanted.model, wanted.request)
    made, places = [], iter(hosts)
    for role, server in shape.servers():
        group = [next(places) for _ in range(shape.nodes)]
        for rank, host in enumerate(group):
            extra = [*_ranks(group, rank), *_apart(role, wanted), *_reached()]
            settings = overridden([*plan.settings, *extra], plan.settings)
            one = wanted.check(replace(plan, settings=settings))
            name = f"{server}-node{rank}" if shape.nodes > 1 else server
            made.append(Process(name, role, server, rank, host, SERVER, one.settings, one))
    if shape.role is not None:
        made.append(Process("router", "router", "router", 0, hosts[0], ROUTER, tuple(_router(made)), None))
    # The router's place is the first host, which prefills.
    shown = {None: made, "all": made, "decode": [one for one in made if one.role == "decode"]}
    processes = shown.get(shape.role, [one for one in made if one.role != "decode"])
    release = f"sglang-sm120 {__version__}, sglang {wanted.flags.planned_for}"
    return Deployment(shape, wanted, release, tuple(processes))


def _ranks(group: Sequence[str], rank: int) -> Iterator[Setting]:
    if len(group) > 1:
        yield flag("dist-init-addr", f"{group[0]}:{RENDEZVOUS_PORT}", "where the nodes meet: the first one")
        yield flag("node-rank", rank, "which of them this is; the first answers requests")


def _apart(role: str, wanted: Wanted) -> Iterator[Setting]:
    if role not in ROLES:
        return
    devices = ",".join(entry.split(":")[0] for entry in wanted.machine.rdma)
    backend = wanted.request.value("disaggregation-transfer-backend")
    yield flag("disaggregation-mode", role, f"this server does the {role} of every request")
    if devices:
        yield flag("disaggregation-transfer-backend", "mooncake", "moves the cache, by RDMA; in the extra `pd`")
    else:
        yield flag("disaggregation-transfer-backend", "mooncake_tcp", "moves the cache: no RDMA device is up")
    yield flag("disaggregation-bootstrap-port", BOOTSTRAP_PORT, "where decode finds prefill; SGLang's default")
    if devices and backend in (None, "mooncake"):
        yield flag("disaggregation-ib-device", devices, "RDMA devices whose network interface is up")


def _reached() -> Iterator[Setting]:
    yield flag("host", "0.0.0.0", "others are on other machines")
    yield flag("port", PORT, "SGLang's default")
    yield env("SGLANG_SM120_VERSION", __version__, "one release everywhere: with another a server does not start")


def _router(servers: Sequence[Process]) -> Iterator[Setting]:
    yield flag("pd-disaggregation", True, "prefill and decode are servers of their own")
    for one in servers:
        if one.rank or one.plan is None:
            continue
        scheme = "https" if one.plan.value("ssl-certfile") else "http"
        url = f"{scheme}://{one.host}:{one.plan.value('port')}"
        if one.role == "prefill":
            bootstrap = str(one.plan.value("disaggregation-bootstrap-port"))
            yield flag("prefill", (url, bootstrap), f"{one.server}, and where decode finds it")
        else:
            yield flag("decode", url, one.server)
    yield flag("host", "0.0.0.0", "clients are on other machines")
    yield flag("port", ROUTER_PORT, "clients ask here")
    yield flag("health-check-interval-secs", 5, "a lost server is left out after two of them, not three minutes")
    yield flag("health-failure-threshold", 2, "as above")
    if sum(one.role == "decode" and not one.rank for one in servers) == 1:
        yield flag("disable-retries", True, "what a lost server had would be prefilled again, and wait for it in vain")


def as_json(deployment: Deployment) -> str:
    """A list of processes; the router's plan is null."""
    made = [
        {
            "name": one.name, "role": one.role, "host": one.host, "command": one.command(),
            "plan": one.plan and show.as_dict(one.plan),
        }
        for one in deployment.processes
    ]  # fmt: skip
    return json.dumps(made, indent=2)


def as_text(deployment: Deployment) -> str:
    """The first server's plan in full, then every command."""
    plans = [one.plan for one in deployment.processes if one.plan]
    parts = [show.as_text(plans[0]).rsplit("Command:", 1)[0].rstrip(), ""]
    for one in deployment.processes:
        parts += [f"{one.name} ({one.host}):", "  " + shlex.join(one.command()), ""]
    return "\n".join(parts).rstrip()
