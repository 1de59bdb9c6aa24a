"""One sbatch script: a step for each process, and the job ends with the first that does."""

from __future__ import annotations

import re
import shlex

from ..deployment import Deployment, Process, Shape
from ..errors import LaunchError

HOST = re.compile(r"\$\{hosts\[\d+\]\}")
"""What stands for a machine of the allocation until the job has one."""


def hosts(shape: Shape) -> list[str]:
    """The machines of the allocation, by number.

    Raises:
        LaunchError: a part of a deployment cannot know the others' machines.
    """
    if shape.role not in (None, "all"):
        raise LaunchError(
            f"--format slurm writes {shape.role} alone, and only the job knows the other's machines: name them with "
            f"--hosts, or give --role all."
        )
    return [f"${{hosts[{index}]}}" for index in range(shape.nodes * len(shape.servers()))]


def files(deployment: Deployment, image: str) -> tuple[dict[str, str], list[str]]:
    """`sglang-sm120.sbatch`, and how to submit it."""
    machines = deployment.hosts()
    name = "sglang-sm120" if deployment.whole() else f"sglang-sm120-{deployment.shape.role}"
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={len(machines)}",
        *([] if HOST.search(machines[0]) else [f"#SBATCH --nodelist={','.join(machines)}"]),
        "#SBATCH --ntasks-per-node=1",
        *([f"#SBATCH --gpus-per-node={len(deployment.wanted.machine.gpus)}"] if deployment.cards() else []),
        "#SBATCH --exclusive",
        "# Partition, account and time are your cluster's: sbatch --partition=… --time=…",
        "set -euo pipefail",
        "",
    ]
    if HOST.search(machines[0]):
        lines += ['mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")', ""]
    keys = sorted({key for one in deployment.processes for key in one.secrets()})
    if keys:
        # Told before the first process starts.
        lines += [f': "${{{key}:?is not set: export it before sbatch}}"' for key in keys] + [""]
    lines += ["# One process that ends takes the others with it."]
    lines += ["trap 'kill $(jobs -p) 2> /dev/null || true' EXIT", ""]
    for one in deployment.processes:
        lines += _step(one)
    lines.append("wait -n")
    steps = [f"export {key}=…" for key in keys]
    return {f"{name}.sbatch": "\n".join(lines) + "\n"}, [*steps, f"where SGLang is on PATH: sbatch {name}.sbatch"]


def _step(one: Process) -> list[str]:
    array = re.sub(r"\W", "_", one.name)
    lines = [f"{array}=(", *(["    env"] if one.variables() else [])]
    lines += [f"    {_quoted(f'{entry.name}={entry.value}')}  # {entry.reason}" for entry in one.variables()]
    lines.append(f"    python -m {one.module}")
    for words, reason in one.words(_quoted, lambda name: f'"${name}"'):
        lines.append(f"    {' '.join(words)}  # {reason}")
    where = f'srun --nodes=1 --ntasks=1 --overlap --nodelist={_quoted(one.host)} --output="%x-%j-{one.name}.log"'
    return [*lines, ")", f'{where} "${{{array}[@]}}" &', ""]


def _quoted(word: str) -> str:
    return f'"{word}"' if HOST.search(word) else shlex.quote(word)
