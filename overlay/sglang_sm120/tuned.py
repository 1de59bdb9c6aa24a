"""Launch configurations measured on one GPU, in place of the heuristics. Read from `tuned/`, never searched here.

`make tune` writes `tuned/<GPU>.json`. An entry holds the whole configuration of one family of kernels for one shape and
the rows up to a power of two (more than half of it), so that it stays valid when a heuristic changes. Where a table or
an entry is missing the heuristic decides. A family refuses an entry that could give wrong results or would not fit, so
that a table can only make things slower. The launcher reads a table's `prefill`, which `prove` writes.

Processes that compile for another one get its table with the job (`compilation.Job`) and are `using` it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import torch

from .limits import tuned_table

FOLDER = Path(__file__).parent / "tuned"
SHARED_LIMIT = 101_376
"""Bytes of shared memory that a block has on SM120."""

Shape = tuple[int, ...]
Key = tuple[str, Shape, int]
"""Family, shape, rows rounded up to a power of two."""
Table = Mapping[Key, Any]
EMPTY: Table = {}
C = TypeVar("C", bound=tuple[Any, ...])


class TableError(ValueError):
    """A table that cannot be used: which file, what is wrong, what to do."""


@dataclass(frozen=True)
class Family(Generic[C]):
    """Kernels that one configuration launches.

    shape: names of the sizes that, with the rows, choose it. config: a named tuple of int, bool and str.
    refusal(shape, rows, config): why no call of up to `rows` rows may be launched so, or None.
    """

    name: str
    shape: tuple[str, ...]
    config: type[C]
    refusal: Callable[[Shape, int, C], str | None]

    def __post_init__(self) -> None:
        FAMILIES[self.name] = self

    def key(self, shape: Shape, rows: int) -> Key:
        return self.name, shape, bucket(rows)

    def choose(self, device: torch.device, shape: Shape, rows: int, heuristic: C) -> C:
        """The configuration of a call: the table's, else `heuristic`."""
        found: C = active(device).get(self.key(shape, rows), heuristic)
        return found


FAMILIES: dict[str, Family[Any]] = {}


def bucket(rows: int) -> int:
    """The power of two at or above rows."""
    return 1 << max(rows - 1, 0).bit_length()


def beyond(config: tuple[Any, ...], **allowed: Any) -> str | None:
    """The first field of `config` whose value is not among `allowed`, in words, or None."""
    for name, values in allowed.items():
        if (value := getattr(config, name)) not in values:
            return f"{name} is {value!r} and needs one of {', '.join(map(repr, values))}"
    return None


_using: ContextVar[Table | None] = ContextVar("using", default=None)


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
    """Inside, launches and rehearsals on any device follow `table`."""
    token = _using.set(table)
    try:
        yield
    finally:
        _using.reset(token)


def active(device: torch.device) -> Table:
    """The table that launches on `device` follow."""
    table = _using.get()
    if table is not None:
        return table
    return of_device(device) if device.type == "cuda" else EMPTY


@cache
def of_device(device: torch.device) -> Table:
    """The table of a CUDA device, empty if there is none.

    Raises:
        TableError: it cannot be used.
    """
    path = path_of(device)
    return load(path) if path.exists() else EMPTY


def path_of(device: torch.device) -> Path:
    """Where the table of a CUDA device lies. Code lowered for another GPU has one of its own, which names that GPU."""
    from triton import knobs

    major, minor = torch.cuda.get_device_capability(device)
    arch = knobs.runtime.override_arch
    lowered = "" if arch in (None, f"sm{major}{minor}") else arch
    return FOLDER / tuned_table(torch.cuda.get_device_name(device), lowered)


def load(path: Path) -> dict[Key, Any]:
    """The table in a file.

    Raises:
        TableError: not JSON of this form, an unknown family or field, or a configuration that its family refuses.
    """
    table: dict[Key, Any] = {}
    for number, entry in enumerate(entries(path), 1):
        try:
            key, config = parse(entry)
            if key in table:
                raise ValueError(f"{key[0]} {entry['shape']} at {key[2]} rows is there twice")
        except ValueError as error:
            where = f"{path}, entry {number}"
            raise TableError(f"{where}: {error}: correct it, delete the file or run `make tune`.") from None
        table[key] = config
    return table


def entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file as they are written there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["entries"]
        if not isinstance(found, list):
            raise TypeError(found)
    except (ValueError, KeyError, TypeError):
        raise TableError(f'{path} is no JSON object with a list "entries": delete it or run `make tune`.') from None
    return found


def parse(entry: Any) -> tuple[Key, Any]:
    """Key and configuration of an entry.

    Raises:
        ValueError: it is not one, or its family refuses it.
    """
    from . import ops  # noqa: F401  registers the families

    if not isinstance(entry, dict) or not {"family", "shape", "rows", "config"} <= entry.keys():
        raise ValueError("it is no object with family, shape, rows and config")
    family = FAMILIES.get(entry["family"])
    if family is None:
        raise ValueError(f"family is {entry['family']!r} and needs one of {', '.join(sorted(FAMILIES))}")
    shape, rows, fields = entry["shape"], entry["rows"], entry["config"]
    if not isinstance(shape, dict) or shape.keys() != set(family.shape) or not all(map(_is_size, shape.values())):
        raise ValueError(f"shape of {family.name} is {shape} and needs {', '.join(family.shape)}, each at least 1")
    if not _is_size(rows) or rows != bucket(rows):
        raise ValueError(f"rows are {rows!r} and need a power of two")
    kinds = get_type_hints(family.config)
    needed = kinds.keys() - getattr(family.config, "_field_defaults", {}).keys()
    if not isinstance(fields, dict) or not needed <= fields.keys() <= kinds.keys():
        raise ValueError(f"config of {family.name} is {fields} and needs {', '.join(kinds)}")
    for name, value in fields.items():
        if type(value) is not kinds[name]:
            raise ValueError(f"{name} is {value!r} and needs to be of type {kinds[name].__name__}")
    config = family.config(**fields)
    sizes = tuple(shape[name] for name in family.shape)
    if why := family.refusal(sizes, rows, config):
        raise ValueError(f"{family.name} at {shape} and {rows} rows: {why}")
    return family.key(sizes, rows), config


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1
