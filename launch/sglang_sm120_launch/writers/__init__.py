"""`plan --write DIR --format NAME`: a deployment as files for what starts processes elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sglang_sm120 import __version__

from .. import deployment
from ..deployment import Deployment, Shape
from ..errors import LaunchError
from ..request import Wanted
from . import compose, dynamo, kubernetes, slurm, srt_slurm, systemd

Files = dict[str, str]
FORMATS: dict[str, tuple[Callable[[Deployment, str], tuple[Files, list[str]]], Callable[[Shape], list[str]] | None]] = {
    "compose": (compose.files, None),
    "systemd": (systemd.files, None),
    "slurm": (slurm.files, slurm.hosts),
    "kubernetes": (kubernetes.files, kubernetes.hosts),
    "srt-slurm": (srt_slurm.files, None),
    "dynamo": (dynamo.files, None),
}
"""By name: the files of a deployment and of an image, with the steps to start them; and the hosts' names where that
which starts the processes knows them, and not the user."""
BY_ADDRESS = ("compose", "systemd")
"""Formats whose files hold the names of the user's machines."""
RELEASE = "# Written by `sglang-sm120 plan` for "
"""How the first lines of every written file say which release it is for."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `plan` for files."""
    parser.add_argument("--write", metavar="DIR", help="write files that start the plan into this folder")
    parser.add_argument("--format", choices=FORMATS, help="what reads the files")
    parser.add_argument("--image", metavar="NAME", help=f"the container image (default: sglang-sm120:{__version__})")


def check(arguments: argparse.Namespace) -> None:
    """Raise LaunchError where the arguments do not go together, or --write names nothing."""
    if arguments.write == "":
        raise LaunchError("--write is '', which names no folder: name one, or . for the present one.")
    if arguments.write and not arguments.format:
        raise LaunchError(f"--write was given and no --format: add one of {', '.join(FORMATS)}.")
    for name in ("format", "image"):
        if getattr(arguments, name) and not arguments.write:
            raise LaunchError(f"--{name} says how files are written, and no --write was given: add --write DIR.")
    if arguments.write and arguments.json:
        raise LaunchError("--json prints a plan and --write writes files: leave one of them out.")


def write(arguments: argparse.Namespace, wanted: Wanted) -> str:
    """Write the files; what to do with them.

    Raises:
        LaunchError: the deployment cannot be described or written so, a file is there, or the folder has those of
            another release. Nothing is written then.
    """
    make, names = FORMATS[arguments.format]
    shape = deployment.shape(arguments, wanted)
    if names and not (arguments.hosts and arguments.format == "slurm"):
        hosts = names(shape)
    else:
        hosts = deployment.hosts(arguments, shape)
    if arguments.format in BY_ADDRESS and len(hosts) > 1 and not arguments.hosts:
        raise LaunchError(
            f"--format {arguments.format} writes addresses of {len(hosts)} machines: name them with --hosts."
        )
    if Path(wanted.model.path).is_dir():
        # What starts the processes has another working directory.
        wanted = replace(wanted, model=replace(wanted.model, path=str(Path(wanted.model.path).absolute())))
    described = deployment.describe(shape, hosts, wanted)
    files, steps = make(described, arguments.image or f"sglang-sm120:{__version__}")
    folder = Path(arguments.write)
    texts = {name: headed(text, described.release) for name, text in files.items()}
    _require_room(folder, texts, described.release)
    _write(folder, texts)
    notes = dict.fromkeys(note for one in described.processes if one.plan for note in one.plan.notes)
    return "\n".join([f"Wrote {', '.join(files)} into {folder}.", *steps, *notes])


def _write(folder: Path, texts: Files) -> None:
    """Write all of the files or, raising LaunchError, none; nor is a folder left that was made for them."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    begun: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with (folder / name).open("x", encoding="utf-8") as file:
                begun.append(folder / name)
                file.write(text)
    except (OSError, UnicodeError) as error:
        for path in begun:
            path.unlink()
        for one in new:
            # One that was not made, or that somebody has put something into since.
            with suppress(OSError):
                one.rmdir()
        raise LaunchError(f"--write names {folder}, where nothing can be written ({error}): give another.") from None


def headed(text: str, release: str) -> str:
    """The text, its first line after a shebang says which release it is for."""
    first, rest = text.split("\n", 1) if text.startswith("#!") else ("", text)
    return f"{first}\n{RELEASE}{release}.\n{rest}".lstrip("\n")


def _require_room(folder: Path, texts: Files, release: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise LaunchError(f"--write names {folder}, which is no folder: give another.")
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.name in texts:
            raise LaunchError(f"{file} is there already, and nothing is overwritten: remove it or give another folder.")
        if not file.is_file():
            continue
        with file.open(encoding="utf-8", errors="replace") as lines:
            first = (lines.readline(), lines.readline())
        found = [line[len(RELEASE) : -2] for line in first if line.startswith(RELEASE)]
        if found and found[0] != release:
            raise LaunchError(
                f"{file} is for {found[0]} and this plan for {release}, and one deployment needs one release: plan "
                f"both with the same, or give another folder."
            )
