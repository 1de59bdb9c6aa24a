"""A file of `configs/`: for which cards it is, what it needs, how it was tried, and what it fixes.

for:       {model: ID, gpu: name, cards: 2, nodes: 1}     the plan refuses other cards
needs:     {compute_capability: "12.0", memory_mib: 96000, driver: 580}     the least that will do
evidence:  unverified | compiled | emulated | measured (machine)
env:       variables with fixed values
server:    SGLang's flags with fixed values
auto:      SGLang's flags whose values the plan decides; a flag in neither keeps SGLang's default
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from .errors import LaunchError
from .flags import Flags
from .machine import Machine
from .typed import typed

OTHER = "use another config or none"


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class For(_Exact):
    """The cards that a config is for."""

    model: str
    gpu: Literal["RTX PRO 6000", "RTX PRO 6000 Max-Q", "RTX 5090", "GB10", "H200", "none"]
    cards: NonNegativeInt
    nodes: NonNegativeInt


class Needs(_Exact):
    """The least that will do, MiB."""

    compute_capability: str | None = None
    memory_mib: int = 0
    driver: int = 0
    ram_mib: int = 0


class Config(_Exact):
    """One file, checked. `name` is how sentences call it."""

    name: str = ""
    target: For = Field(alias="for")
    needs: Needs
    evidence: str = Field(pattern=r"^(unverified|compiled|(emulated|measured) \(.+\))$")
    env: dict[str, str | int]
    server: dict[str, Any]
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
        config: Config = typed(cls, json.dumps(found, default=str), name)
        server = flags.from_mapping(config.server, name)
        auto = tuple(flags.name(flag, name) for flag in config.auto)
        if both := sorted(server.keys() & set(auto)):
            raise LaunchError(f"{name} has {', '.join(both)} both in `server` and in `auto`: keep one.")
        return config.model_copy(update={"name": name, "server": server, "auto": auto})

    def require(self, machine: Machine) -> None:
        """Raise LaunchError where the config is not for this machine, or the machine has less than it needs."""
        target, needs = self.target, self.needs
        if target.gpu == "none":
            if machine.ram_mib < needs.ram_mib:
                raise LaunchError(
                    f"{self.name} needs {needs.ram_mib} MiB of memory and this host has {machine.ram_mib}: {OTHER}."
                )
            return
        matching = [gpu for gpu in machine.gpus if matches(target.gpu, gpu.name)]
        if len(matching) < target.cards:
            found = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
            raise LaunchError(
                f"{self.name} is for {target.cards} x {target.gpu} and this machine has {found}: {OTHER}."
            )
        for gpu in matching[: target.cards]:
            if gpu.memory_mib < needs.memory_mib:
                raise LaunchError(
                    f"{self.name} needs {needs.memory_mib} MiB per card and {gpu.name} has {gpu.memory_mib}: {OTHER}."
                )
            if needs.compute_capability not in (None, gpu.compute_capability):
                raise LaunchError(
                    f"{self.name} needs compute capability {needs.compute_capability} and {gpu.name} has "
                    f"{gpu.compute_capability}: {OTHER}."
                )
        if machine.driver is None or int(machine.driver.split(".")[0]) < needs.driver:
            raise LaunchError(
                f"{self.name} needs driver {needs.driver} or newer and {machine.driver} was found: install it."
            )


def matches(wanted: str, name: str) -> bool:
    """Whether NVML's name of a card is the one a config means: its Max-Q edition too, which differs in power alone."""
    return wanted.removesuffix(" Max-Q") in name and ("Max-Q" in name or not wanted.endswith("Max-Q"))
