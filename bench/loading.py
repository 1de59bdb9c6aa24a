"""How fast SGLang's own loaders bring a checkpoint in, beside the disk: `python bench/loading.py --out DIR --folder F`.

Writes a checkpoint of the published format and about `--gb` GB into F, measures at which rate the disk gives its files
(O_DIRECT, several numbers of threads; once through the page cache), and has `sglang.launch_server` load it with each
loader's flags, in turn, `--runs` times, the page cache emptied of it before (for `warm` filled with it). A server ends
when its log says `Load weight end`, whose seconds count: in them the model is made and loaded weights are changed, too,
which `warm` shows without the disk. Results go into DIR/loading.json, the servers' logs beside it, a table comes last.

On a Hopper card the server has the step's flags, as in `side_by_side`; without a GPU it is SGLang on the CPU.
`--ahead N`: so many servers start together and wait before they touch the GPU, and are then measured one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("evals", "reference")]

import psutil
import torch

import disk
import random_checkpoint
import sm120_lowering
from local_server import ServerError, free_port
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120_launch.child import Child

HERE = Path(__file__).parent
sys.path.append(str(HERE / "random_weights"))
from random_weights import WAITS  # noqa: E402  otherwise on PYTHONPATH of servers alone

AIM = 0.8
"""Share of the disk's rate below which SGLang's loaders are too slow."""
THREADS = (1, 2, 4, 8, 16)
LOOK = 0.1
"""Seconds between two looks at a server."""
BEGIN = "Load weight begin"
END = re.compile(r"Load weight end\. elapsed=([\d.]+) s")


@dataclass(frozen=True)
class Loader:
    """Flags and variables of a server, and whether the page cache is emptied before it loads, or filled."""

    flags: tuple[str, ...] = ()
    cold: bool = True
    env: Mapping[str, str] = field(default_factory=dict)


def _extra(**values: Any) -> tuple[str, str]:
    return "--model-loader-extra-config", json.dumps(values)


LOADERS = {
    "default": Loader(),
    "warm": Loader(cold=False),
    "threads": Loader(_extra(enable_multithread_load=True, num_threads=16)),
    "prefetch": Loader(("--weight-loader-prefetch-checkpoints", "--weight-loader-prefetch-num-threads", "16")),
    "prefetch-threads": Loader(("--weight-loader-prefetch-checkpoints", *_extra(enable_multithread_load=True))),
    "serial": Loader(_extra(enable_multithread_load=False)),
    "no-mmap": Loader(("--weight-loader-disable-mmap",)),
    "ours": Loader(env={"SGLANG_SM120_LOADER": "1"}),
    "ours-warm": Loader(cold=False, env={"SGLANG_SM120_LOADER": "1"}),
}
"""SGLang 0.5.23's, by name. Its default maps the files and has eight threads open them; `no-mmap` ends in a KeyError,
for safetensors 0.9.0rc1 takes no block scales (F8_E8M0) out of bytes."""
MEASURED = ("default", "warm", "prefetch", "ours", "ours-warm", "threads")


@dataclass(frozen=True)
class Load:
    """One loading: `seconds` by SGLang's log, of the slowest rank.

    Attributes:
        cached: share of the files that was in the page cache when it began, None where the kernel does not say.
        device: bytes that the server's processes had from a device, None as above.
        host: bytes by which their memory grew at most, mapped files left out; on a CPU the model is among them.
        peak: bytes of the largest of them at its largest (VmHWM), with mapped files.
    """

    seconds: float
    cached: float | None
    device: int | None
    host: int
    peak: int


class Turn(NamedTuple):
    """One server's turn."""

    loader: str
    run: int

    def __str__(self) -> str:
        return f"{self.loader}-{self.run}"


def seconds_of(log: str, ranks: int) -> float | None:
    """How long the slowest rank loaded, by a server's log; None before all of them are done."""
    found = [float(one) for one in END.findall(log)]
    return max(found) if len(found) >= ranks else None


class Server:
    """A server that loads `model` when it is let, and is to be stopped when it has."""

    def __init__(self, turn: Turn, model: Path, args: argparse.Namespace) -> None:
        self._ranks, self._deadline = args.tp, time.monotonic() + args.ready
        self._log, self._gate = args.out / f"{turn}.log", args.folder / f"{turn}-may-load"
        flags, variables = ["--device", "cpu"], {}
        if torch.cuda.is_available():
            flags = ["--mem-fraction-static", "0.8", "--cuda-graph-bs-decode", "1"]
            if torch.cuda.get_device_capability()[0] == 9:
                flags, variables = [*flags, *sm120_lowering.SERVER_FLAGS], sm120_lowering.SERVER_ENVIRONMENT
        words = [
            "--model-path", str(model), "--host", "127.0.0.1", "--port", str(free_port()), "--tp", str(args.tp),
            "--grammar-backend", "none", "--context-length", "4096", "--max-running-requests", "1",
            *flags, *LOADERS[turn.loader].flags,
        ]  # fmt: skip
        path = os.pathsep.join((str(HERE / "random_weights"), os.environ.get("PYTHONPATH", "")))
        with self._log.open("wb") as log:
            environment = {"PYTHONPATH": path, "RANDOM_WEIGHTS_GATE": str(self._gate)}
            self._child = Child(words, {**variables, **LOADERS[turn.loader].env, **environment}, output=log)

    def wait_at_gate(self) -> None:
        """Return when its processes, the ranks and the detokenizer, have imported what they need.

        Raises:
            ServerError: it ended, or took too long.
        """
        while self._text().count(WAITS) <= self._ranks:
            self._go_on("to import")

    def load(self, cached: float | None) -> Load:
        """Let it load, and measure until its log says that all ranks have.

        Raises:
            ServerError: it ended, or took too long.
        """
        members = psutil.Process(self._child.pid).children(recursive=True)
        before = [disk.from_device(one.pid) for one in members]
        self._gate.touch()
        first = most = peak = 0
        while (seconds := seconds_of(log := self._text(), self._ranks)) is None:
            found = [_memory(one.pid) for one in members]
            taken = sum(one["RssAnon"] + one["RssShmem"] for one in found)
            if BEGIN in log:
                first, most = first or taken, max(most, taken)
            peak = max(peak, *(one["VmHWM"] for one in found))
            self._go_on("to load")
        pairs = zip(before, [disk.from_device(one.pid) for one in members], strict=True)
        given = [after - first for first, after in pairs if first is not None and after is not None]
        return Load(seconds, cached, sum(given) if given else None, most - first, peak)

    def stop(self) -> None:
        self._child.stop(2)

    def _text(self) -> str:
        return self._log.read_text(errors="replace")

    def _go_on(self, what: str) -> None:
        ended = self._child.status() is not None
        if ended or time.monotonic() > self._deadline:
            last = "\n".join(self._text().splitlines()[-30:])
            raise ServerError(f"The server {'ended' if ended else 'took too long'} and had {what}; its log:\n{last}")
        time.sleep(LOOK)


def _memory(pid: int) -> dict[str, int]:
    """What /proc says of a process's memory, in bytes; 0 each when it is gone."""
    kinds = ("RssAnon", "RssShmem", "VmHWM")
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        text = ""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    return {kind: 1024 * int(found.get(kind, 0)) for kind in kinds}


def loaded(turn: Turn, server: Server, files: Sequence[Path]) -> Load:
    """One turn of a server that waits, from an emptied page cache or a full one.

    Raises:
        ServerError: it did not load.
    """
    if LOADERS[turn.loader].cold:
        disk.drop(files)
    else:
        disk.fill(files)
    try:
        cached = disk.resident(files)
    except OSError:
        cached = None
    return server.load(cached)


def rates(files: Sequence[Path], seconds: float) -> list[dict[str, Any]]:
    """The disk's rate with each number of threads, and with the most of them through an empty page cache."""
    reader = disk.Reader(files)
    disk.drop(files)
    found = [reader.rate(threads, seconds) for threads in THREADS]
    disk.drop(files)
    found.append(reader.rate(THREADS[-1], seconds, direct=False))
    return [{**asdict(one), "gb_s": one.gb_s} for one in found]


def best(found: Sequence[Mapping[str, Any]]) -> float:
    """The disk's rate in GB/s: the best of those past the page cache, of all where the file system has no O_DIRECT."""
    direct = [row["gb_s"] for row in found if row["direct"]]
    return max(direct or [row["gb_s"] for row in found])


def shares(result: Mapping[str, Any]) -> dict[str, float]:
    """What each loader gets of the disk's rate, by the median of its runs from an empty page cache."""
    most = best(result["disk"])
    return {
        name: result["bytes"] / statistics.median(one["seconds"] for one in loads) / 1e9 / most
        for name, loads in result["loaders"].items()
        if loads and LOADERS[name].cold
    }


def table(result: Mapping[str, Any]) -> str:
    """The result for reading."""
    emptied = f"page cache emptied by {result['emptied_by']}"
    lines = [f"{result['bytes'] / 1e9:.1f} GB in {result['files']} files on {result['file_system']}, {emptied}"]
    for row in result["disk"]:
        device = "" if row["device"] is None else f", {row['device'] / row['bytes']:.0%} of it from a device"
        way = "O_DIRECT" if row["direct"] else "page cache"
        lines.append(f"disk, {way:10s}, {row['threads']:2d} threads: {row['gb_s']:6.2f} GB/s{device}")
    found = shares(result)
    heads = ("s", "GB/s", "of disk", "cached", "device GB", "host GB", "peak GB")
    lines.append(f"{'loader':16s}" + "".join(f"{head:>13s}" for head in heads))
    for name, loads in result["loaders"].items():
        if not loads:
            continue
        seconds = [one["seconds"] for one in loads]
        middle, spread = statistics.median(seconds), (max(seconds) - min(seconds)) / 2
        share = f"{found[name]:.0%}" if name in found else "-"
        cells = [f"{middle:.2f} ±{spread:.2f}", f"{result['bytes'] / middle / 1e9:.2f}", share]
        for what in ("cached", "device", "host", "peak"):
            known = [one[what] for one in loads if one[what] is not None]
            shown = f"{max(known):.0%}" if what == "cached" and known else f"{max(known) / 1e9:.1f}" if known else "-"
            cells.append(shown)
        lines.append(f"{name:16s}" + "".join(f"{cell:>13s}" for cell in cells))
    theirs = [name for name in found if not LOADERS[name].env]
    if theirs:
        name = max(theirs, key=lambda one: found[one])
        verdict = "enough" if found[name] >= AIM else "too little"
        lines.append(f"SGLang's best, {name}, has {found[name]:.0%} of the disk's rate: {verdict} for {AIM:.0%}")
    return "\n".join([*lines, *(f"problem: {one[-1500:]}" for one in result["problems"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--folder", type=Path, required=True, help="a new one on the disk in question; removed after")
    parser.add_argument("--gb", type=float, default=20, help="size of the checkpoint")
    parser.add_argument("--config", type=Path, help="config.json with other widths than Flash's")
    parser.add_argument("--loader", nargs="+", choices=LOADERS, default=MEASURED, help="which, in this order")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--ahead", type=int, default=1, metavar="N", help="servers that start together")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--disk-seconds", type=float, default=5, help="for the disk's rate with one number of threads")
    parser.add_argument("--ready", type=float, default=600, help="seconds that a server may take from its start on")
    parser.add_argument("--seconds", type=float, default=600, help="no server begins to load later than that")
    args = parser.parse_args()
    args.deadline = time.monotonic() + args.seconds
    if args.folder.exists():
        print(f"loading: {args.folder} is there, needed a new folder, which is removed: name one.", file=sys.stderr)
        return 2
    whole = json.loads(args.config.read_text()) if args.config else model_config()
    source = random_checkpoint.cut(whole, args.gb * 1e9)
    # As Ctrl-C does: the server is stopped, and what was measured stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    args.folder.mkdir(parents=True)
    try:
        result = measure(source, args)
    except OSError as error:
        print(f"loading: {error}; needed {random_checkpoint.bytes_of(source) / 1e9:.1f} GB.", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(args.folder)
    print(table(result))
    return 1 if result["problems"] else 0


def measure(source: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint, measure the disk and every turn; the result, which is kept after each turn."""
    began = time.monotonic()
    model = args.folder / "model"
    files = random_checkpoint.write(model, source, os.cpu_count() or 1)
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "cores": os.cpu_count(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "layers": source["num_hidden_layers"],
        "tp": args.tp, "bytes": random_checkpoint.bytes_of(source), "files": len(files),
        "file_system": disk.file_system(model), "emptied_by": disk.drop(files),
        "written_seconds": round(time.monotonic() - began, 1), "disk": rates(files, args.disk_seconds),
        "flags": {name: LOADERS[name].flags for name in args.loader},
        "loaders": {name: [] for name in args.loader}, "problems": [],
    }  # fmt: skip
    print(f"written in {result['written_seconds']} s, disk {best(result['disk']):.2f} GB/s", flush=True)
    turns = [Turn(name, run) for run in range(args.runs) for name in args.loader]
    servers: dict[Turn, Server] = {}
    try:
        for i, turn in enumerate(turns):
            if time.monotonic() > args.deadline:
                break
            if i % args.ahead == 0:
                servers |= {one: Server(one, model, args) for one in turns[i : i + args.ahead]}
                # One that still imports would take cores from the one that loads.
                for one in [*servers]:
                    try:
                        servers[one].wait_at_gate()
                    except ServerError as error:
                        result["problems"].append(f"{one}: {error}")
                        servers.pop(one).stop()
            if turn not in servers:
                continue
            try:
                load = loaded(turn, servers[turn], files)
                result["loaders"][turn.loader].append(asdict(load))
                print(f"{turn}: {load.seconds:.2f} s", flush=True)
            except ServerError as error:
                result["problems"].append(f"{turn}: {error}")
            servers.pop(turn).stop()
            (args.out / "loading.json").write_text(json.dumps(result, indent=1))
    finally:
        for server in servers.values():
            server.stop()
    return result


if __name__ == "__main__":
    sys.exit(main())
