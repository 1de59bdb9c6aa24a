"""Replace several files of an installed package so that a reader sees all of them changed or none.

Two ways, tried in this order:

1. **Exchange.** A second copy of the package is built beside it (hard links for the files that stay, new files
   for the ones that change) and one ``renameat2(RENAME_EXCHANGE)`` swaps the two directories. Guarantee: at every
   instant, also after ``kill -9``, the package on disk is wholly the old one or wholly the new one.
2. **Journal**, where the file system cannot exchange directories (overlayfs lower layers) or link. The new files
   are written beside the package, a manifest commits them, then each is moved over its target. Guarantee: each
   file is old or new; a run that was killed before the manifest leaves the package old, and after it
   ``recover`` finishes the job. In between the package is mixed, which the start-up check of the overlay refuses.

No file is ever written in place: installers hard-link packages into caches that other environments share.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Dict, Iterator

STAGE = ".sglang-sm120.stage"
JOURNAL = ".sglang-sm120.journal"
MANIFEST = "manifest.json"
AT_FDCWD = -100
RENAME_EXCHANGE = 2


class Busy(Exception):
    """Another run holds the site."""


@contextlib.contextmanager
def locked(site: Path) -> Iterator[None]:
    """Hold the site for one run; raises Busy when another run has it. The kernel drops the lock with the process."""
    fd = os.open(site, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another patchset run is working on {site}: wait for it to end") from None
        except OSError:
            # Some network file systems cannot lock a directory; the swap itself stays atomic without.
            pass
        yield
    finally:
        os.close(fd)


def replace_files(package: Path, contents: Dict[str, bytes]) -> None:
    """Give the files of `package` named in `contents` (path relative to it -> bytes) those bytes, all or none.

    The files must exist. Their modes and owners are kept and their byte-code caches dropped. Raises OSError with
    the package unchanged when neither way is possible.
    """
    try:
        _require_movable(package)
        twin = _build_twin(package, contents)
        _exchange(twin, package)
    except (OSError, AttributeError, ImportError):
        _discard(package.parent / STAGE)
        _replace_by_journal(package, contents)
        return
    _sync(package.parent)
    _discard(package.parent / STAGE)


def exchange_or_move(new: Path, target: Path, spare: Path) -> None:
    """Put the directory `new` at `target`; what was there ends at `new` (exchange) or at `spare` (two renames)."""
    if not target.exists():
        os.rename(new, target)
        return
    try:
        _exchange(new, target)
    except (OSError, AttributeError, ImportError):
        os.rename(target, spare)
        os.rename(new, target)


def recover(parent: Path, package: str) -> bool:
    """Finish what a killed run left in `parent`: replay a committed journal, drop everything uncommitted.

    Returns whether a journal was replayed.
    """
    journal = parent / JOURNAL
    replayed = (journal / MANIFEST).is_file()
    if replayed:
        _replay(journal, parent / package)
    _discard(journal)
    _discard(parent / STAGE)
    return replayed


def stage_dir(parent: Path) -> Path:
    """An empty scratch directory on the file system of `parent`, dropped by `recover` if this run dies."""
    stage = parent / STAGE
    _discard(stage)
    stage.mkdir()
    return stage


def discard_stage(parent: Path) -> None:
    _discard(parent / STAGE)


def _require_movable(package: Path) -> None:
    """Raise OSError where the file system cannot move the package, before linking copies every file up a layer.

    The rename is refused in any case, its target not being empty; the reason is what tells.
    """
    occupied = stage_dir(package.parent) / "occupied"
    (occupied / "by").mkdir(parents=True)
    try:
        os.rename(package, occupied)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _build_twin(package: Path, contents: Dict[str, bytes]) -> Path:
    twin = stage_dir(package.parent) / package.name
    for folder, folders, files in os.walk(package):
        inside = os.path.relpath(folder, package)
        made = os.path.normpath(os.path.join(twin, inside))
        os.mkdir(made)
        for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            relative = os.path.normpath(os.path.join(inside, name))
            if relative in contents:
                _write_like(os.path.join(folder, name), os.path.join(made, name), contents[relative])
            elif _source_of(relative) not in contents:
                os.link(os.path.join(folder, name), os.path.join(made, name), follow_symlinks=False)
        _copy_owner_and_mode(folder, made)
    # After the walk: one commit of the file system's journal then covers them all.
    for made, _, _ in os.walk(twin):
        _sync(made)
    return twin


def _replace_by_journal(package: Path, contents: Dict[str, bytes]) -> None:
    journal = package.parent / JOURNAL
    _discard(journal)
    (journal / "new").mkdir(parents=True)
    manifest = {}
    for index, relative in enumerate(sorted(contents)):
        _write_like(str(package / relative), str(journal / "new" / str(index)), contents[relative])
        manifest[relative] = {"new": str(index), "sha256": hashlib.sha256(contents[relative]).hexdigest()}
    _sync(journal / "new")
    draft = journal / (MANIFEST + ".draft")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, journal / MANIFEST)
    _sync(journal)
    _replay(journal, package)
    _discard(journal)


def _replay(journal: Path, package: Path) -> None:
    manifest = json.loads((journal / MANIFEST).read_text(encoding="utf-8"))
    for relative, entry in manifest.items():
        target, new = package / relative, journal / "new" / entry["new"]
        if new.exists():
            os.replace(new, target)
        elif hashlib.sha256(target.read_bytes()).hexdigest() != entry["sha256"]:
            raise OSError(errno.EIO, "changed since an interrupted run; reinstall sglang", str(target))
        _drop_byte_code(target)
        _sync(target.parent)
    os.unlink(journal / MANIFEST)


def _exchange(one: Path, two: Path) -> None:
    import ctypes  # absent from some minimal interpreters, which then take the journal

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two), RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(two))


def _write_like(model: str, target: str, data: bytes) -> None:
    with open(target, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _copy_owner_and_mode(model, target)


def _copy_owner_and_mode(source: str, target: str) -> None:
    status = os.stat(source)
    if os.geteuid() == 0:
        os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, status.st_mode & 0o7777)


def _source_of(relative: str) -> str:
    """The source of a byte-code cache file (a/__pycache__/b.cpython-311.pyc -> a/b.py); any other path unchanged."""
    folder, name = os.path.split(relative)
    if os.path.basename(folder) != "__pycache__" or not name.endswith(".pyc"):
        return relative
    return os.path.join(os.path.dirname(folder), name.split(".", 1)[0] + ".py")


def _drop_byte_code(source: Path) -> None:
    for cached in source.parent.glob(f"__pycache__/{source.stem}.*.pyc"):
        cached.unlink()


def _sync(folder: "str | Path") -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _discard(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
