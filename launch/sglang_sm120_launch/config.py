"""A file of `configs/`: for which cards it is, what it needs, how it was tried, and what it fixes.

for:       {model: ID, gpu: name, cards: 2, nodes: 1}     the plan refuses other cards
needs:     {compute_capability: "12.0", memory_mib: 96000, driver: 580}     the least that will do
evidence:  unverified | compiled | emulated | measured (machine)
env:       variables with fixed values
server:    SGLang's flags with fixed values
auto:      SGLang's flags whose values the plan decides; a flag in neither keeps SGLang's default
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import LaunchError
from .flags import Flags, nearest
from .machine import Machine
from .settings import Value

KEYS = ("for", "needs", "evidence", "env", "server", "auto")
FOR = ("model", "gpu", "cards", "nodes")
NEEDS = ("compute_capability", "memory_mib", "driver", "ram_mib")
GPUS = ("RTX PRO 6000", "RTX PRO 6000 Max-Q", "RTX 5090", "GB10", "H200", "none")
EVIDENCE = re.compile(r"unverified|compiled|emulated \(.+\)|measured \(.+\)")


@dataclass(frozen=True)
class Config:
    """One file, checked. `name` is how sentences call it."""

    name: str
    model: str
    gpu: str
    cards: int
    nodes: int
    needs: Mapping[str, Any]
    evidence: str
    env: Mapping[str, str]
    server: Mapping[str, Value]
    auto: tuple[str, ...]

    @classmethod
    def load(cls, path: Path, flags: Flags) -> Config:
        """Read a file.

        Raises:
            LaunchError: it cannot be read, a key is missing or unknown, or a flag is none of SGLang's.
        """
        name = path.name
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise LaunchError(f"{path} cannot be read ({error.strerror}): name a file of configs/.") from None
        except yaml.YAMLError as error:
            first = " ".join(str(error).split())
            raise LaunchError(f"{path} is not YAML ({first}): correct it.") from None
        top = _keys(found, KEYS, KEYS, name)
        target = _keys(top["for"], FOR, FOR, f"{name}, `for`")
        needs = _keys(top["needs"], NEEDS, (), f"{name}, `needs`")
        if target["gpu"] not in GPUS:
            raise LaunchError(f"{name} is for the unknown GPU {target['gpu']!r}: known are {', '.join(GPUS)}.")
        if not isinstance(top["evidence"], str) or not EVIDENCE.fullmatch(top["evidence"]):
            raise LaunchError(
                f"{name} has the evidence {top['evidence']!r}, needed unverified, compiled, emulated (machine) or "
                f"measured (machine)."
            )
        server = flags.from_mapping(_keys(top["server"], None, (), f"{name}, `server`"), name)
        if not isinstance(top["auto"], list):
            raise LaunchError(f"{name}: auto is {top['auto']!r}, needed a list of flags.")
        auto = tuple(flags.name(str(flag), name) for flag in top["auto"])
        both = sorted(server.keys() & set(auto))
        if both:
            raise LaunchError(f"{name} has {', '.join(both)} both in `server` and in `auto`: keep one.")
        return cls(
            name=name,
            model=str(target["model"]),
            gpu=str(target["gpu"]),
            cards=_whole(target["cards"], f"{name}: cards"),
            nodes=_whole(target["nodes"], f"{name}: nodes"),
            needs=needs,
            evidence=top["evidence"],
            env={key: str(value) for key, value in _keys(top["env"], None, (), f"{name}, `env`").items()},
            server=server,
            auto=auto,
        )

    def require(self, machine: Machine) -> None:
        """Raise LaunchError where the config is not for this machine, or the machine has less than it needs."""
        if self.gpu == "none":
            if machine.ram_mib < self.needs.get("ram_mib", 0):
                raise LaunchError(
                    f"{self.name} needs {self.needs['ram_mib']} MiB of memory and this host has {machine.ram_mib}."
                )
            return
        matching = [gpu for gpu in machine.gpus if matches(self.gpu, gpu.name)]
        if len(matching) < self.cards:
            found = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
            raise LaunchError(
                f"{self.name} is for {self.cards} x {self.gpu} and this machine has {found}: use another config or "
                f"none."
            )
        for gpu in matching[: self.cards]:
            least = self.needs.get("memory_mib", 0)
            if gpu.memory_mib < least:
                raise LaunchError(f"{self.name} needs {least} MiB per card and {gpu.name} has {gpu.memory_mib}.")
            if gpu.compute_capability != self.needs.get("compute_capability", gpu.compute_capability):
                raise LaunchError(
                    f"{self.name} needs compute capability {self.needs['compute_capability']} and {gpu.name} has "
                    f"{gpu.compute_capability}."
                )
        driver = self.needs.get("driver", 0)
        if machine.driver is None or int(machine.driver.split(".")[0]) < driver:
            raise LaunchError(f"{self.name} needs driver {driver} or newer and {machine.driver} was found: install it.")


def matches(wanted: str, name: str) -> bool:
    """Whether NVML's name of a card is the one a config means: its Max-Q edition too, which differs in power alone."""
    return wanted.removesuffix(" Max-Q") in name and ("Max-Q" in name or not wanted.endswith("Max-Q"))


def _keys(value: object, known: tuple[str, ...] | None, needed: tuple[str, ...], where: str) -> dict[str, Any]:
    if value is None and not needed:
        return {}
    if not isinstance(value, Mapping):
        raise LaunchError(f"{where} is {value!r}, needed keys and values.")
    for key in value:
        if known is not None and key not in known:
            raise LaunchError(f"{where} has the unknown key {key!r}: the nearest is {nearest(str(key), known)!r}.")
    for key in needed:
        if key not in value:
            raise LaunchError(f"{where} has no key {key!r}: add it (keys: {', '.join(needed)}).")
    return dict(value)


def _whole(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise LaunchError(f"{where} is {value!r}, needed a whole number.")
    return value
