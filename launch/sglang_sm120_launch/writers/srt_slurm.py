"""A recipe for NVIDIA's srt-slurm (`srtctl apply`), which starts the servers and the router and hands out ranks.

Format: `schema: 2`, github.com/NVIDIA/srt-slurm at 01aebde8f8fcba0cce62a53aeb75a6b8249c748a (its schema reference).
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from ..deployment import RANKS, Deployment, Process
from ..errors import LaunchError
from .kubernetes import chosen_by
from .yaml_text import Said, document

DECIDED = (*RANKS, "model-path", "host", "port", "disaggregation-mode", "disaggregation-bootstrap-port")
"""Flags that srtctl gives each process itself."""


def files(deployment: Deployment, image: str) -> tuple[dict[str, str], list[str]]:
    """`sglang-sm120.srt.yaml`, and how to submit it.

    Raises:
        LaunchError: the recipe cannot say what the plan does.
    """
    complete(deployment, "srt-slurm")
    chosen_by(deployment, "srt-slurm")
    shape, model = deployment.shape, deployment.wanted.model.path
    roles = {}
    for server in deployment.servers():
        count = {"prefill": shape.prefill, "decode": shape.decode}.get(server[0].role, 1)
        roles["agg" if server[0].role == "server" else server[0].role] = {
            "nodes": count * shape.nodes,
            "workers": count,
            "gpus": deployment.cards() * shape.nodes,
            "env": {entry.name: Said(str(entry.value), entry.reason) for entry in server[0].variables()},
            "args": _arguments(server[0]),
        }
    recipe = {
        "schema": 2,
        "name": "sglang-sm120",
        "model": {
            "path": model if PurePath(model).is_absolute() else f"hf:{model}",
            "container": Said(image, "an alias of srtslurm.yaml, or a .sqsh"),
            "precision": Said("fp4", "the experts'"),
        },
        "resources": {"gpus_per_node": len(deployment.wanted.machine.gpus)},
        "engine": "sglang",
        "frontend": {"type": "sglang-router" if shape.role else "sglang", "enable_multiple_frontends": False},
        "roles": roles,
    }
    return {"sglang-sm120.srt.yaml": document(recipe)}, ["with srt-slurm set up: srtctl apply -f sglang-sm120.srt.yaml"]


def complete(deployment: Deployment, who: str) -> None:
    """Raise LaunchError where `who` needs a whole deployment on GPUs without keys, and this is none."""
    if not deployment.whole():
        raise LaunchError(f"{who} starts all servers from one file, and --role is {deployment.shape.role}: give all.")
    if not deployment.cards():
        raise LaunchError(f"{who} hands out GPUs and the plan is for CPUs: choose another --format, or a --machine.")
    if keys := sorted({key for one in deployment.processes for key in one.secrets()}):
        raise LaunchError(
            f"{', '.join(keys)} is set, and the file of {who} would have to hold it: unset it and ask for keys "
            f"in front of it, or choose another --format."
        )


def _arguments(one: Process) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in one.flags():
        if entry.name in DECIDED:
            continue
        value = list(entry.value) if isinstance(entry.value, tuple) else entry.value
        found[entry.name] = Said(value, entry.reason)
    return found
