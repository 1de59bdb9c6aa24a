"""How fast a disk gives the bytes of files, and how to have it give them again: the page cache emptied of them.

What the kernel keeps of a file is asked of `mincore`, and what came from a device of `/proc/PID/io`. Caches below the
kernel (a hypervisor's, the device's own) nobody sees from here.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

BLOCK = 16 << 20
"""Bytes of one read."""


def resident(files: Sequence[Path]) -> float:
    """The share of the files' pages that the page cache holds.

    Raises:
        OSError: the kernel does not say.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    held = pages = 0
    for file in files:
        mapped = np.memmap(file, np.uint8, "r")
        found = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
        arguments = (mapped.ctypes.data, mapped.size, found.ctypes.data)
        if libc.mincore(*map(ctypes.c_void_p, arguments)):
            raise OSError(ctypes.get_errno(), "mincore failed", str(file))
        held, pages = held + int((found & 1).sum()), pages + found.size
    return held / pages


def drop(files: Sequence[Path]) -> str:
    """Empty the page cache of these files; how it was done.

    `drop_caches` only where advice leaves pages: it also empties the cache of the programs that read them next.
    """
    for file in files:
        with file.open("rb") as one:
            os.fsync(one.fileno())
            os.posix_fadvise(one.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):
        if not resident(files):
            return "POSIX_FADV_DONTNEED"
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")
        return "POSIX_FADV_DONTNEED and drop_caches"
    return "POSIX_FADV_DONTNEED, drop_caches not permitted"


def fill(files: Sequence[Path]) -> None:
    """Read these files into the page cache."""
    for file in files:
        with file.open("rb", buffering=0) as one:
            while one.read(BLOCK):
                pass


def from_device(pid: int | None = None) -> int | None:
    """Bytes that a process, this one by default, has had from a device so far; None where the kernel does not say."""
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        return psutil.Process(pid).io_counters().read_bytes
    return None


def file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on."""
    kinds = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    return next((kinds[one] for one in (place, *place.parents) if one in kinds), "unknown")


@dataclass(frozen=True)
class Rate:
    """`bytes` read in `seconds` by `threads` threads, of which `device` came from a device, None where nobody says.

    `direct`: by O_DIRECT, past the page cache.
    """

    threads: int
    direct: bool
    bytes: int
    seconds: float
    device: int | None

    @property
    def gb_s(self) -> float:
        """GB a second."""
        return self.bytes / self.seconds / 1e9


class Reader:
    """Reads files in blocks of BLOCK bytes, each measurement on from where the last one ended, and round again.

    So no measurement finds what one just before it left in caches that the kernel does not know.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._blocks = [(file, place) for file in files for place in range(0, file.stat().st_size, BLOCK)]
        self._first = 0

    def rate(self, threads: int, seconds: float, direct: bool = True) -> Rate:
        """Read with so many threads until every block was read once, or the time is up.

        O_DIRECT where the file system takes it.
        """
        if direct and not self._takes_direct():
            return self.rate(threads, seconds, direct=False)
        order = itertools.islice(itertools.cycle(self._blocks), self._first, self._first + len(self._blocks))
        lock, taken = threading.Lock(), 0
        before, began = from_device(), time.monotonic()

        def work(_: int) -> int:
            nonlocal taken
            opened: dict[Path, int] = {}
            read = 0
            # Anonymous memory begins at a page, as O_DIRECT wants it.
            with mmap.mmap(-1, BLOCK) as buffer, contextlib.ExitStack() as stack:
                while time.monotonic() - began < seconds:
                    with lock:
                        block = next(order, None)
                        if block is None:
                            break
                        taken += 1
                    file, place = block
                    if file not in opened:
                        opened[file] = os.open(file, os.O_RDONLY | os.O_DIRECT * direct)
                        stack.callback(os.close, opened[file])
                    read += os.preadv(opened[file], [buffer], place)
            return read

        with ThreadPoolExecutor(threads) as pool:
            count = sum(pool.map(work, range(threads)))
        spent, after = time.monotonic() - began, from_device()
        self._first = (self._first + taken) % len(self._blocks)
        device = None if before is None or after is None else after - before
        return Rate(threads, direct, count, spent, device)

    def _takes_direct(self) -> bool:
        try:
            opened = os.open(self._blocks[0][0], os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return False
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as buffer:
                return os.preadv(opened, [buffer], 0) > 0
        except OSError:
            return False
        finally:
            os.close(opened)
