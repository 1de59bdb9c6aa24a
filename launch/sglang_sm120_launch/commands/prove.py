"""`sglang-sm120 prove`: what works on the card that is there and how fast, as one JSON file and a page.

Kernels and servers run in child processes, so that one that ends its process loses its own op or server alone: another
process goes on with the next. What is done is kept beside the file, until it is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import getpass
import glob
import ipaddress
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from sglang_sm120 import __version__
from sglang_sm120.checkpoint.config import FLASH

from .. import cards, predict, proved, request
from ..address import HOST, PORT
from ..child import Child
from ..errors import LaunchError
from ..machine import Machine
from ..model import Model
from . import doctor

KERNELS = ("-m", "sglang_sm120.parity")
SERVERS = Path("bench/proof.py")
"""What Python runs for each kind; the second is in a clone alone."""
STOP_SECONDS = 30.0
"""For the process that has a server to stop."""
PRIVATE = re.compile(
    r"[^\s=]*/(?!dev/shm\b|shm\b)\S+|(?<=\bNCCL_)(\w+)=(?!-?\d+(?:\s|$))\S+"
    r"|(?i:\b(?:(?:MIG-|GPU-)+[\da-f]{8}[\da-f-]*|[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12}))"
)
"""A path (/dev/shm is everyone's), a value of NCCL's that is no number, a UUID, as of a card."""
ADDRESS = re.compile(
    r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)|(?<![\w:.])[\da-fA-F]{0,4}(?::[\da-fA-F]{0,4}){2,7}"
    r"(?:\.\d{1,3}){0,3}(?![\w:])"
)
"""What may be one of IPv4 or IPv6."""
PACKAGES = ("sglang", "torch", "triton")
DEVICES = "CUDA_VISIBLE_DEVICES"
VARIABLES = (*request.VARIABLES, DEVICES, "SGLANG_SM120_PDL", "TRITON_OVERRIDE_ARCH")
"""They change what is run."""

SENTENCES = ("none", "not_run", "ended", "problem")
"""Keys of what a child says in which a path may stand."""

Save = Callable[[], None]


class Kind(NamedTuple):
    """What a child runs, under which keys it stands in the file, what variables and words the child is given first."""

    many: str
    one: str
    figures: str
    figure: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    words: Callable[[], list[str]] = list


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `prove`."""
    out = "the file to write (schema: docs/prove.md), FILE.md its page (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("prove.json"), metavar="FILE.json", help=out)
    seconds = "run no server longer than so many seconds from now; what that leaves out is named"
    parser.add_argument("--seconds", type=int, metavar="N", help=seconds)


def run(arguments: argparse.Namespace) -> int:
    """Write file and page; 0 when all passed that decides; 1 when something failed, or, without a file, nothing ran.

    Raises:
        LaunchError: the file cannot be written, what lies beside it is of another machine or commit, or the cards that
            are visible are none that serve the model.
    """
    out: Path = arguments.out
    part, page, table = out.with_name(f"{out.name}.part"), out.with_suffix(".md"), out.with_suffix(".table.json")
    # Beside what is kept, they are of an end that was interrupted.
    for path in () if part.exists() else (out, page, table, *logs(out)):
        if path.exists():
            raise LaunchError(f"{path} is there already: move it away, or name another file with --out.")
    if out.suffix != ".json" or not os.access(out.absolute().parent, os.W_OK):
        raise LaunchError(f"--out {out} cannot be written: name a .json file in an existing folder of yours.")
    if arguments.seconds is not None and arguments.seconds < 1:
        raise LaunchError(f"--seconds is {arguments.seconds}: give 1 or more.")
    # As Ctrl-C does: servers are stopped, their folder is removed, what was done is kept.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    deadline = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    devices = os.environ.get(DEVICES)
    if devices and not re.fullmatch(r"\d+(,\d+)*", devices):
        raise LaunchError(f"{DEVICES} is {devices!r}: give card numbers, as nvidia-smi counts them, such as 0,1.")
    machine, findings = doctor.look(HOST, PORT)
    machine, env = used(machine, devices)
    same = identity(machine)
    report: dict[str, Any] = {"seconds": 0.0, "waiting": {}, "same": same}
    if part.exists():
        report = _resumed(part, same)
    began = time.monotonic() - report["seconds"]

    def save() -> None:
        report["seconds"] = round(time.monotonic() - began, 1)
        _write(part, json.dumps(report))

    print("doctor, every op with Triton kernels, then servers", flush=True)
    print(doctor.table(findings), flush=True)
    report["doctor"] = doctor.report([finding._replace(found=public(finding.found)) for finding in findings])
    try:
        end = collect(Kind("ops", "op", "calls", "call", KERNELS, env), report, save)
        if end is not None:
            print(f"sglang-sm120 prove: {end}", file=sys.stderr)
            return 1
        report["left_out"] = serve(report, save, deadline, out, env)
        save()
        report = _whole(report, machine)
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        if report["choice"]:
            _write(table, proved.table(report))
        _write(page, proved.page(report, [log.name for log in logs(out)]))
        _write(out, text)
        part.unlink()
    except KeyboardInterrupt:
        if part.exists():
            goes_on = "" if _is_dirty(same) else ": the same command goes on from there"
            print(f"\nkept in {part}{goes_on}", file=sys.stderr)
        raise
    if report["left_out"]:
        print(f"left out: {report['left_out']}")
    print(f"{report['verdict']} in {report['seconds']:.0f} s ({report['evidence']}): {out}, {page}")
    if report["choice"]:
        print(proved.advice(report, table))
    return 0 if report["verdict"] == "pass" else 1


def used(machine: Machine, devices: str | None) -> tuple[Machine, dict[str, str]]:
    """The machine with the cards that a plan takes of the visible ones, and variables that leave a child those alone.

    Raises:
        LaunchError: none of them serves the model, or one is not there.
    """
    if not machine.gpus:
        return machine, {}
    numbers = devices.split(",") if devices else [str(number) for number in range(len(machine.gpus))]
    if len(numbers) != len(machine.gpus):
        raise LaunchError(f"{DEVICES} is {devices} and NVML sees not so many cards: name those that are there.")
    chosen = cards.choose(machine, Model.load(FLASH), None, None).visible
    if chosen is None and not devices:
        return machine, {}
    chosen = chosen or tuple(range(len(numbers)))
    env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", DEVICES: ",".join(numbers[index] for index in chosen)}
    return dataclasses.replace(machine, gpus=tuple(machine.gpus[index] for index in chosen)), env


def logs(out: Path) -> list[Path]:
    """The logs that are kept beside a file."""
    return sorted(out.parent.glob(f"{glob.escape(out.stem)}.*.log"))


def serve(
    report: dict[str, Any], save: Save, deadline: float | None, out: Path, env: Mapping[str, str]
) -> str | None:
    """Run the servers until then, into `report`, and keep the logs of those that failed; why none was run, or None."""
    report.setdefault("servers", [])
    if not SERVERS.is_file():
        return f"no {SERVERS} here, which a wheel does not hold: run this in a clone of the repository"
    with tempfile.TemporaryDirectory(prefix="sglang-sm120-prove-") as scratch:

        def words() -> list[str]:
            left = [] if deadline is None else ["--seconds", str(max(0, round(deadline - time.monotonic())))]
            return ["--scratch", scratch, *left]

        try:
            return collect(Kind("servers", "server", "points", "what", (str(SERVERS),), env, words), report, save)
        finally:
            for one in report["servers"]:
                log = Path(scratch, proved.log_name(one["server"]))
                if one["verdict"] == "fail" and log.exists():
                    shutil.copyfile(log, out.with_name(f"{out.stem}.{log.name}"))


def _whole(report: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """The file's contents, from what was collected."""
    # A name with `=` is that of a provider or a prefill which nothing chooses by itself: it decides nothing.
    judged = [one for one in report["ops"] if "=" not in one["op"]]
    judged += [one for one in report["servers"] if "=" not in one["server"]]
    found: dict[str, Any] = {
        "schema": proved.SCHEMA,
        "verdict": "pass" if all(one["verdict"] != "fail" for one in judged) else "fail",
    }
    found |= {name: report[name] for name in ("evidence", "seconds")} | {"commit": report["same"]["commit"]}
    found |= {"cards": [dataclasses.asdict(gpu) for gpu in machine.gpus], "link": machine.link, "p2p": machine.p2p}
    versions = report["same"]["versions"] | report["versions"]
    found |= {"gpu": report["gpu"], "versions": versions, "doctor": report["doctor"]}
    found |= {"prediction": {"formula": predict.FORMULA, "off": predict.OFF}}
    found |= {name: report[name] for name in ("ops", "servers", "left_out")}
    return found | {"choice": proved.choice(found)}


def _resumed(part: Path, same: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted run has left.

    Raises:
        LaunchError: it is damaged, or was begun on another machine, with other software or with changed files.
    """
    away = "move it away, or name another file with --out"
    try:
        report: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
        before, _ = report["same"], report["seconds"] + len(report["waiting"])
        differ = [name for name in same if before[name] != same[name]]
    except (OSError, ValueError, KeyError, TypeError):
        raise LaunchError(f"{part} is not what an interrupted `prove` leaves: {away}.") from None
    if differ:
        name = differ[0]
        raise LaunchError(f"{part} was begun with {name} {before[name]}, and here is {same[name]}: {away}.")
    if _is_dirty(same):
        changed = f"{same['commit']}, with changed files that may have changed again since"
        raise LaunchError(f"{part} was begun with commit {changed}: {away}.")
    print(f"going on from {part}", flush=True)
    return report


def identity(machine: Machine) -> dict[str, Any]:
    """What has to be the same for a run to go on."""
    there = [f"{gpu.name}, {gpu.memory_mib} MiB" for gpu in machine.gpus]
    versions = {name: _version(name) for name in PACKAGES} | {"sglang-sm120": __version__, "driver": machine.driver}
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {"cards": there, "versions": versions, "commit": commit(), "variables": variables}


def commit() -> str | None:
    """The commit of the clone that this runs in, with `-dirty` behind it where files differ; None outside of one."""
    if not SERVERS.is_file():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _is_dirty(same: dict[str, Any]) -> bool:
    return str(same["commit"]).endswith("-dirty")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def public(text: str) -> str:
    """A text without the paths, addresses, UUIDs, host and user that stand in it."""
    for folder in (Path.cwd(), sys.prefix, Path.home()):
        text = text.replace(str(folder), "/…") if str(folder) != "/" else text
    text = PRIVATE.sub(lambda found: f"{found[1]}=…" if found[1] else "…", text)
    text = ADDRESS.sub(_address, text)
    for name in {platform.node(), _user()} - {"", "root", "localhost"}:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", text)
    return text


def _address(found: re.Match[str]) -> str:
    """An address hidden; what is none stays, and so do those that every host has."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(found[0])
        return found[0] if address.is_loopback or address.is_unspecified else "…"
    return found[0]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def collect(kind: Kind, report: dict[str, Any], save: Save) -> str | None:
    """Run what is left of a kind, and put into `report` what its child says, which docs/prove.md describes.

    Returns:
        Why nothing of it could be run, or None.
    """
    entries: list[dict[str, Any]] = report.setdefault(kind.many, [])
    waiting: list[str] | None = report["waiting"].get(kind.many)
    while waiting is None or waiting:
        entry: dict[str, Any] | None = None
        end = None
        for said in _child(kind, waiting or ()):
            said |= {key: public(said[key]) for key in SENTENCES if said.get(key)}
            if "none" in said:
                end = said["none"]
            elif "doing" in said:
                print(said["doing"], flush=True)
                if entry is not None:
                    _name(kind, entry)
            elif kind.many in said:
                waiting = report["waiting"][kind.many] = list(said.pop(kind.many))
                report |= said
            elif kind.one in said:
                _end(kind, entry, save)
                entry = _begin(kind, entries, waiting or [], said)
            elif entry is not None:
                if kind.figure in said:
                    entry[kind.figures].append(said)
                else:
                    entry |= said
        if waiting is None:
            return end or "the process that was to run said nothing."
        if end is not None:
            entry = entry or _begin(kind, entries, waiting, {})
            entry["ended"] = end
        _end(kind, entry, save)
    return None


def _begin(kind: Kind, entries: list[dict[str, Any]], waiting: list[str], said: dict[str, Any]) -> dict[str, Any]:
    """The next one's entry, whose `seconds` is when it began, and the beginning of its line."""
    entry = {kind.one: waiting.pop(0), "verdict": "", "not_run": None, "ended": None, "seconds": time.monotonic()}
    entries.append(entry | said | {kind.figures: []})
    _name(kind, entry)
    return entries[-1]


def _name(kind: Kind, entry: dict[str, Any]) -> None:
    print(f"{entry[kind.one]:<25}", end="", flush=True)


def _end(kind: Kind, entry: dict[str, Any] | None, save: Save) -> None:
    """Judge one, end its line, and keep it."""
    if entry is None:
        return
    entry["seconds"] = round(time.monotonic() - entry["seconds"], 1)
    figures = entry[kind.figures]
    wrong = [figure for figure in figures if figure["problem"] or figure.get("replay")]
    entry["verdict"] = "fail" if wrong or entry["ended"] else "not run" if entry["not_run"] else "pass"
    print(proved.line(kind.figures, entry, wrong), flush=True)
    save()


def _child(kind: Kind, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a process says that runs these, or all; `none`: why it runs none of them, or no more."""
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8", errors="replace") as lines:
        with open(writing, "wb") as output:
            child = Child([*kind.words(), *names], kind.env, output, kind.command)
        last = ""
        try:
            for line in lines:
                if line.startswith('{"'):
                    # NaN and infinity are no JSON.
                    yield json.loads(line, parse_constant=lambda _: None)
                elif line.strip():
                    last = line.strip()
            status = child.wait()
        finally:
            child.stop(STOP_SECONDS)
    if status:
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        yield {"none": f"the process ended with {how}: {last or 'it said nothing'}"}
