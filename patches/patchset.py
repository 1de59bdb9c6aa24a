#!/usr/bin/env python3
"""Apply the patch series to an installed SGLang, take it back, and prove which of the two is the case.

    patchset.py status|apply|unapply|verify|refresh [--python EXE | --site DIR]
    patchset.py lint
    patchset.py port --wheel FILE

A site is the directory that holds `sglang/` and `sglang-<version>.dist-info/`. Its state is judged on the files
the series touches alone: **clean** (every file has the hash of the wheel's RECORD), **applied** (every file has the
`after` hash of sglang.lock), **outdated** (as the series that was placed with the overlay left it, which is not the
checkout's), **dirty** (anything else). Exit status: 0 done, 1 refused or failed, 2 misuse.

`port` says what another SGLang's wheel asks of the series, and ends with 1 when that is work.

Needs Python 3.9, its standard library and GNU patch; `lint` also needs unidiff.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional

# An isolated interpreter (-I) leaves the script's own folder out of the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import atomic  # noqa: E402
import authoring  # noqa: E402
import distribution  # noqa: E402
import port  # noqa: E402
from series import (  # noqa: E402
    Misuse,
    Refused,
    Series,
    Site,
    patched,
    placed_series,
    replace,
    require_usable,
    state,
)

LOCATE = """
import importlib.util, os, sys
spec = importlib.util.find_spec("sglang")
print(os.path.dirname(list(spec.submodule_search_locations)[0]) if spec else "")
"""


def apply(site: Site, root: Path) -> None:
    series, older = checkout(root), placed_series(site)
    series.require_locked_patches()
    distribution.require_ours(site.folder)
    now = require_usable(site, series, older)
    if now == "outdated" and older is not None:
        replace(site, patched(site, older, "before"))
        now = require_usable(site, series, None)
    # Computed before anything is placed: a series that does not apply changes nothing.
    contents = patched(site, series, "after") if now == "clean" else {}
    refreshed = distribution.place(site.folder, distribution.wanted(root, site.folder))
    if contents:
        replace(site, contents)
        print(f"applied {len(series.patches)} patches to {len(contents)} files of {site.package}")
    elif refreshed:
        print(f"the series was in place already; the overlay in {site.folder} was refreshed")
    else:
        print(f"already applied to {site.package}: nothing to do")


def unapply(site: Site, root: Path) -> None:
    series, older = checkout(root), placed_series(site)
    distribution.require_ours(site.folder)
    now = require_usable(site, series, older)
    if now != "clean":
        # The placed copy of the patches is what was applied; the checkout's may have been edited since.
        was_placed = older is not None and not site.differing(older.hashes("after"))
        replace(site, patched(site, older if older is not None and was_placed else series, "before"))
    removed = distribution.remove(site.folder)
    if now == "clean" and not removed:
        print(f"{site.package} is clean: nothing to do")
    else:
        print(f"{site.package} is as released, and the overlay is gone")


def status(site: Site, root: Path) -> None:
    series, older = checkout(root), placed_series(site)
    site.require_version(series)
    now, files = state(site, series, older)
    print(f"sglang {site.version} in {site.folder}: {now} ({len(series.patches)} patches, {len(series.files())} files)")
    placed = distribution.placed(site.folder)
    overlay = "as in the checkout" if placed == distribution.wanted(root, site.folder) else "not as in the checkout"
    print(f"overlay: {overlay if placed else 'absent'}")
    touched = set(series.files()) | set(older.files() if older else [])
    for file in site.differing({file: digest for file, digest in site.record.items() if file not in touched}):
        print(f"outside the series and not as released: {file}")
    if now == "dirty":
        require_usable(site, series, older)


def verify(site: Site, root: Path) -> None:
    series = checkout(root)
    site.require_version(series)
    series.require_locked_patches()
    wrong = site.differing(series.hashes("after"))
    if wrong:
        raise Refused(f"not as sglang.lock says in {site.folder}: {', '.join(wrong)}; run `make apply`")
    wanted, placed = distribution.wanted(root, site.folder), distribution.placed(site.folder)
    stale = sorted(name for name in wanted.keys() | placed.keys() if wanted.get(name) != placed.get(name))
    if stale:
        raise Refused(f"overlay not as in the checkout in {site.folder}: {', '.join(stale)}; run `make apply`")
    print(f"verified {len(series.patches)} patches, {len(series.files())} files, {len(placed)} overlay files")


def checkout(root: Path) -> Series:
    return Series.load(root / "patches")


COMMANDS: Dict[str, Callable[[Site, Path], None]] = {
    "status": status,
    "apply": apply,
    "unapply": unapply,
    "verify": verify,
    "refresh": authoring.refresh,
}


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="patchset.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("command", choices=[*COMMANDS, "lint", "port"])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--site", metavar="DIR", help="the site directory that holds sglang")
    where.add_argument("--python", metavar="EXE", help="the interpreter whose sglang is meant (default: this one)")
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--root", metavar="DIR", type=Path, default=root,
                        help="the checkout with patches/ and overlay/ (default: this script's)")
    parser.add_argument("--wheel", metavar="FILE", help="another SGLang's wheel, for port")
    given = parser.parse_args(arguments)
    try:
        if given.command == "lint":
            authoring.lint(given.root)
            return 0
        if given.command == "port":
            return 0 if port.report(given.root, given.wheel) else 1
        folder = _site_folder(given.site, given.python)
        with atomic.locked(folder):
            site = Site.open(folder)
            for parent in sorted({folder, site.package.parent}):
                if atomic.recover(parent, site.package.name):
                    print(f"finished an interrupted run in {parent}", file=sys.stderr)
            try:
                COMMANDS[given.command](site, given.root)
            finally:
                atomic.discard_stage(folder)
        if given.command == "apply" and given.python is not None:
            print(f"start it with {shlex.quote(given.python)} -m sglang.launch_server")
    except (Refused, distribution.Foreign, atomic.Busy) as refusal:
        print(f"patchset: {refusal}", file=sys.stderr)
        return 2 if isinstance(refusal, Misuse) else 1
    except OSError as error:
        place = error.filename or given.site or given.python or sys.executable
        print(f"patchset: {place}: {error.strerror}: check the permissions and space there", file=sys.stderr)
        return 1
    return 0


def _site_folder(site: Optional[str], python: Optional[str]) -> Path:
    if site is not None:
        if not os.path.isdir(site):
            raise Misuse(f"{site} is not a directory: give the site directory that holds sglang")
        return Path(site).resolve()
    executable = python or sys.executable
    if os.sep in executable:
        executable = os.path.abspath(executable)
    try:
        # From "/", so that a folder named sglang where the user stands is not mistaken for the installed one.
        done = subprocess.run([executable, "-c", LOCATE], capture_output=True, text=True, cwd="/")
    except OSError as error:
        raise Misuse(f"{executable} cannot be run ({error.strerror}): name a Python interpreter") from None
    if done.returncode != 0:
        raise Misuse(f"{executable} is not a working Python interpreter: name one that has sglang")
    if not done.stdout.strip():
        raise Refused(f"no installed sglang for {executable}: run `make setup` or name another interpreter")
    return Path(done.stdout.strip()).resolve()


if __name__ == "__main__":
    sys.exit(main())
