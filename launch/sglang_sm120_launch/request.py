"""From a command line to what `make_plan` takes: the machine, the model, the config, the user's flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import contract, tuned
from .address import PORT, is_open
from .checks_software import is_patched
from .config import Config
from .errors import LaunchError
from .flags import Flags
from .machine import Machine
from .model import Model, located
from .plan import Plan
from .sections import EMULATION_VARIABLES, LOADER
from .values import Request, asks_dspark

VARIABLES = (
    "CUDA_DEVICE_ORDER", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME", "SGLANG_SM120", "SGLANG_SM120_FORCE", *tuned.VARIABLES,
    LOADER, *contract.VARIABLES, *EMULATION_VARIABLES,
)  # fmt: skip
"""Variables that change a plan or that it may set: the user's own value of one of them stays."""


KEYS = {"SGLANG_API_KEY": "api-key", "SGLANG_ADMIN_API_KEY": "admin-api-key"}
"""Variables of the launcher's own: SGLang takes its keys as flags alone, which a shell keeps in its history."""


@dataclass(frozen=True)
class Wanted:
    """What a plan is made from, and the flags it is checked against."""

    machine: Machine
    model: Model
    request: Request
    flags: Flags

    def check(self, plan: Plan) -> Plan:
        """The plan, its flags parsed as SGLang parses them, with a note where anybody may use the server.

        Raises:
            LaunchError: SGLang does not take the flags.
        """
        self.flags.check(plan.arguments())
        if not is_open(plan.value):
            return plan
        note = f"Everybody who reaches port {plan.value('port') or PORT} of this host may use the server, which has no "
        note += "API key: set the variable SGLANG_API_KEY (SGLANG_ADMIN_API_KEY too, for SGLang's own controls)."
        return replace(plan, notes=(*plan.notes, note))


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments that every command with a plan takes."""
    parser.add_argument("--model", metavar="PATH|ID", help="checkpoint directory, or a model in the Hugging Face cache")
    parser.add_argument("--gpus", type=_indices, metavar="0,1", help="cards to use, as nvidia-smi counts them")
    parser.add_argument("--machine", type=Path, metavar="JSON", help="plan for this machine instead of the present one")
    parser.add_argument("--config", type=Path, metavar="YAML", help="a file of configs/")
    parser.add_argument("--mtp", action="store_true", help="speculative decoding with the checkpoint's MTP layer")
    parser.add_argument("--dspark", action="store_true", help="speculative decoding with its DSpark drafter")
    parser.add_argument("server", nargs="*", metavar="-- FLAG", help="SGLang's own flags after `--`; they win")


def read(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Wanted:
    """Read everything the arguments name.

    Raises:
        LaunchError: a file, a flag or the machine is not what it should be.
    """
    if arguments.model is not None:
        # A path that is not there is told before SGLang is imported.
        located(arguments.model)
    flags = Flags.installed()
    given = flags.from_words(arguments.server)
    config = Config.load(arguments.config, flags) if arguments.config else None
    path = given.pop("model-path", None) or arguments.model or (config.target.model if config else None)
    if path is None:
        raise LaunchError("No model was given: name a checkpoint directory with --model.")
    machine = Machine.from_json(arguments.machine) if arguments.machine else Machine.detect()
    # Another machine's plan has nothing to do with this one's environment.
    present = {} if arguments.machine else environment
    gpus = arguments.gpus
    if gpus is None and (visible := present.get("CUDA_VISIBLE_DEVICES")):
        gpus = _visible(visible)
    keys = {flag: present[variable] for variable, flag in KEYS.items() if present.get(variable)}
    request = Request(
        flags=given,
        keys=keys,
        env={name: present[name] for name in VARIABLES if name in present},
        measured={} if arguments.machine else {gpu.name: tuned.prefill(gpu.name) for gpu in machine.gpus},
        mtp=arguments.mtp,
        dspark=arguments.dspark,
        gpus=gpus,
        # Where SGLang is not installed, the plan is for what `make apply` makes.
        patched=flags.release is None or is_patched(),
    )
    if config is not None:
        config.require(machine)
        if config.target.nodes > 1:
            machine = replace(machine, nodes=config.target.nodes)
        request = replace(
            request,
            config=config.name,
            config_flags=config.server,
            config_env={name: str(value) for name, value in config.env.items()},
            auto=config.auto,
            evidence=config.evidence,
        )
        if config.target.gpu == "none" and machine.gpus:
            machine = replace(machine, gpus=(), link=None, p2p=None)
    model = Model.load(str(path))
    return Wanted(machine, model.with_dspark() if asks_dspark(request) else model, request, flags)


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of card numbers such as 0,1") from None


def _visible(text: str) -> tuple[int, ...]:
    try:
        return _indices(text)
    except argparse.ArgumentTypeError:
        raise LaunchError(f"CUDA_VISIBLE_DEVICES is {text!r}: give card numbers, or use --gpus instead.") from None
