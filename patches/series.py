"""What the patch series is, what a site holds, and which of the states the two are in."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import atomic
import distribution

LOCK = "sglang.lock"


class Refused(Exception):
    """An expected failure: its text is the one sentence the user reads."""


class Misuse(Refused):
    """The command line cannot be carried out as given."""


@dataclass(frozen=True)
class Series:
    """An ordered list of patches for one SGLang release, and the lock that fixes its result."""

    folder: Path
    patches: Tuple[Path, ...]
    lock: Dict[str, Any]

    @staticmethod
    def load(patches: Path, lock: Optional[Path] = None, require_lock: bool = True) -> "Series":
        """Read `patches`/<version>/series and the lock beside it, or the one that is given.

        Raises Refused when there is not exactly one series, or a patch or the lock is missing.
        """
        found = sorted(patches.glob("*/series"))
        if len(found) != 1:
            raise Refused(f"{patches} holds {len(found)} series, needed one: restore it from the repository")
        folder = found[0].parent
        names = [line.strip() for line in found[0].read_text(encoding="utf-8").splitlines()]
        listed = tuple(folder / name for name in names if name and not name.startswith("#"))
        for patch in listed:
            if not patch.is_file():
                raise Refused(
                    f"{found[0]} lists {patch.relative_to(folder)}, which is not there: add the patch or drop the line"
                )
        lock = lock or folder / LOCK
        if not lock.is_file() and require_lock:
            raise Refused(f"{lock} is missing: restore it or run `patchset.py refresh`")
        return Series(folder, listed, json.loads(lock.read_text("utf-8")) if lock.is_file() else {})

    @property
    def version(self) -> str:
        """The SGLang release that the series is for."""
        return self.folder.name

    def name(self, patch: Path) -> str:
        """A patch as the series lists it: `group/NN-name.patch`."""
        return patch.relative_to(self.folder).as_posix()

    def files(self) -> List[str]:
        return sorted(self.lock["files"])

    def hashes(self, which: str) -> Dict[str, str]:
        """Touched file -> its sha256 `before` or `after` the series."""
        return {file: hashes[which] for file, hashes in self.lock["files"].items()}

    def hash_of(self, file: str, which: str) -> str:
        return self.hashes(which)[file]

    def require_locked_patches(self) -> None:
        """Raise Refused when a patch is not the one the lock was made from."""
        hashes = {self.name(patch): sha256(patch.read_bytes()) for patch in self.patches}
        locked = self.lock["patches"]
        for name in sorted(hashes.keys() | locked.keys()):
            if hashes.get(name) != locked.get(name):
                raise Refused(f"{name} is not the patch that sglang.lock was made from: run `patchset.py refresh`")


@dataclass(frozen=True)
class Site:
    """A directory with one installed SGLang."""

    folder: Path
    version: str
    record: Dict[str, str]

    @staticmethod
    def open(folder: Path) -> "Site":
        """Find SGLang in `folder` and read its RECORD; raises Refused when there is none or no RECORD."""
        metadata = sorted(folder.glob("sglang-*.dist-info"))
        if not metadata or not (folder / "sglang").is_dir():
            raise Refused(f"no installed sglang in {folder}: install sglang there or name another site")
        if len(metadata) > 1:
            names = ", ".join(path.name for path in metadata)
            raise Refused(f"{folder} holds {names}, needed one: reinstall sglang there")
        record = metadata[0] / "RECORD"
        if not record.is_file():
            raise Refused(f"{record} is missing, so nothing proves what is installed: reinstall sglang there")
        hashes = {}
        with open(record, newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                if len(row) > 1 and row[0].startswith("sglang/") and row[1].startswith("sha256="):
                    hashes[row[0]] = base64.urlsafe_b64decode(row[1][len("sha256=") :] + "==").hex()
        return Site(folder, metadata[0].name[len("sglang-") : -len(".dist-info")], hashes)

    @property
    def package(self) -> Path:
        # Resolved: exchanging a link with a directory would leave its target unpatched.
        return (self.folder / "sglang").resolve()

    def read(self, file: str) -> Optional[bytes]:
        try:
            return (self.folder / file).read_bytes()
        except FileNotFoundError:
            return None

    def bytes_of(self, file: str) -> bytes:
        data = self.read(file)
        if data is None:
            raise Refused(f"{file} is not in {self.folder}: correct the patch or reinstall sglang=={self.version}")
        return data

    def differing(self, files: Mapping[str, Optional[str]]) -> List[str]:
        """The files that do not have the given sha256."""
        return [file for file in sorted(files) if sha256(self.read(file)) != files[file]]

    def require_version(self, series: Series) -> None:
        if self.version != series.version:
            raise Refused(
                f"sglang {self.version} is installed in {self.folder}, "
                f"the series is for {series.version}: install sglang=={series.version}"
            )


def state(site: Site, series: Series, older: Optional[Series]) -> Tuple[str, List[str]]:
    """(clean | applied | outdated | dirty, the offending files), judged on the bytes of the touched files.

    `older` is the series that was placed with the overlay: a site it was applied to is outdated, not dirty.
    Raises Refused when the wheel's RECORD and sglang.lock disagree about what was released.
    """
    for file in series.files():
        if site.record.get(file) != series.hash_of(file, "before"):
            raise Refused(
                f"the RECORD of sglang {site.version} in {site.folder} disagrees with sglang.lock about {file}: "
                f"install the published wheel"
            )
    touched = set(series.files()) | set(older.files() if older else [])
    found = {file: sha256(site.read(file)) for file in sorted(touched)}
    clean = {file: site.record.get(file) for file in touched}
    applied = {**clean, **series.hashes("after")}
    outdated = {**clean, **(older.hashes("after") if older else {})}
    for name, expected in (("clean", clean), ("applied", applied), ("outdated", outdated)):
        if found == expected:
            return name, []
    known = [{expected[file] for expected in (clean, applied, outdated)} for file in found]
    foreign = [file for (file, digest), hashes in zip(found.items(), known) if digest not in hashes]
    return "dirty", foreign or [file for file in found if found[file] != clean[file]]


def require_usable(site: Site, series: Series, older: Optional[Series]) -> str:
    """The state, when it is one that apply and unapply can start from; raises Refused otherwise."""
    site.require_version(series)
    now, files = state(site, series, older)
    if now == "dirty":
        raise Refused(
            f"neither as released nor as patched in {site.folder}: {', '.join(files)}; "
            f"reinstall sglang=={site.version}"
        )
    return now


def released(site: Site, files: List[str], older: Optional[Series]) -> Dict[str, bytes]:
    """The released bytes of `files`: read from the site, the placed series taken back on copies if need be."""
    contents = {file: site.bytes_of(file) for file in files}
    if older is not None and site.differing({file: site.record.get(file) for file in older.files()}):
        contents.update(patched(site, older, "before"))
    for file, data in contents.items():
        if sha256(data) != site.record.get(file):
            raise Refused(f"{file} in {site.folder} is not as released: reinstall sglang=={site.version}")
    return {file: contents[file] for file in files}


def patched(site: Site, series: Series, target: str) -> Dict[str, bytes]:
    """The touched files moved to the lock's `target` (after: patched, before: as released), on copies."""
    contents = {file: site.bytes_of(file) for file in series.files()}
    contents = run_patches(series.patches, contents, atomic.stage_dir(site.folder), reverse=target == "before")
    for file, data in contents.items():
        if sha256(data) != series.hash_of(file, target):
            raise Refused(f"the patches give {file} other bytes than sglang.lock says: run `patchset.py refresh`")
    return contents


def replace(site: Site, contents: Dict[str, bytes]) -> None:
    """Give the site's files these bytes, all or none."""
    atomic.replace_files(site.package, {file[len("sglang/") :]: data for file, data in contents.items()})


def placed_series(site: Site) -> Optional[Series]:
    """The series that was placed with the overlay, None when no overlay is placed."""
    folder = distribution.placed_series(site.folder)
    return Series.load(folder, folder.parent / LOCK) if folder else None


def run_patches(
    patches: Tuple[Path, ...], contents: Dict[str, bytes], scratch: Path, reverse: bool = False
) -> Dict[str, bytes]:
    """Put `contents` through the patches with GNU patch at fuzz 0 in the empty folder `scratch`."""
    tool = gnu_patch()
    for name, data in contents.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(data)
    for patch in reversed(patches) if reverse else patches:
        command = [tool, "-p1", "-F0", "--force", "--no-backup-if-mismatch", "--reject-file=-", "--quiet"]
        command += ["--directory", str(scratch), "--input", str(patch.resolve())]
        done = subprocess.run(command + (["--reverse"] if reverse else []), capture_output=True, text=True)
        if done.returncode != 0:
            name, reason = "/".join(patch.parts[-2:]), " ".join((done.stdout + done.stderr).split())
            raise Refused(f"{name} does not apply at fuzz 0 ({reason[:300]}): nothing was changed")
    return {name: (scratch / name).read_bytes() for name in contents}


def gnu_patch() -> str:
    """Where GNU patch is; raises Refused when it is not on PATH."""
    tool = shutil.which("patch")
    if tool is None:
        raise Refused("GNU patch is not on PATH, needed to change sglang: install the package `patch`")
    answer = subprocess.run([tool, "--version"], capture_output=True, text=True)
    if not answer.stdout.startswith("GNU patch"):
        raise Refused(f"{tool} is not GNU patch, needed to change sglang: install the package `patch`")
    return tool


def sha256(data: Optional[bytes]) -> Optional[str]:
    """Hex digest, None for a file that is not there."""
    return None if data is None else hashlib.sha256(data).hexdigest()
