"""Which of a machine's cards serve the model, and how many ranks they make."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_sm120.checkpoint.config import FP8_BLOCK
from sglang_sm120.limits import SM12X

from .errors import LaunchError
from .machine import Gpu, Machine
from .model import Model

SERVED = (90, 100, 103, *SM12X)
"""Compute capabilities for which SGLang has DeepSeek-V4 kernels."""
SIZES = (8, 4, 2, 1)
ALIKE = 0.97
"""Cards are alike when the smaller has at least this share of the larger's memory."""


@dataclass(frozen=True)
class Cards:
    """The chosen cards: the poorest, all their names, the least memory, ranks over all nodes, and why.

    ep is how many of the ranks divide the experts by number, as `experts_by` says.
    """

    gpu: Gpu
    names: tuple[str, ...]
    memory_mib: int
    used_mib: int
    tp: int
    ep: int
    why_tp: str
    visible: tuple[int, ...] | None
    why_visible: str
    notes: tuple[str, ...]


def choose(machine: Machine, model: Model, wanted: tuple[int, ...] | None, tp: int | None) -> Cards:
    """Pick the cards and the number of ranks; `wanted` are indices, `tp` ranks that the user gave.

    Raises:
        LaunchError: an index is not there, the cards differ, none is served, or the ranks do not divide the model.
    """
    count = len(machine.gpus)
    if wanted is not None:
        absent = [index for index in wanted if not 0 <= index < count]
        if absent or not wanted or len(set(wanted)) != len(wanted):
            raise LaunchError(
                f"--gpus is {','.join(map(str, wanted))}, and this machine has 0 to {count - 1}: name each card once."
            )
        group = list(wanted)
        if len(_alike(machine, group)) > 1:
            names = ", ".join(machine.gpus[index].name for index in group)
            raise LaunchError(f"--gpus names cards that differ ({names}): name cards that are alike.")
    else:
        served = [index for index in range(count) if machine.gpus[index].sm in SERVED]
        if not served:
            names = ", ".join(sorted({f"{gpu.name} ({gpu.compute_capability})" for gpu in machine.gpus}))
            raise LaunchError(
                f"{names} is no GPU with DeepSeek-V4 kernels, needed compute capability 9.0, 10.0, 10.3, 12.0 or 12.1: "
                f"use such a card, or --device cpu for a small model."
            )
        groups = _alike(machine, served)
        group = max(groups, key=lambda one: _size(len(one)) * machine.gpus[one[0]].memory_mib)
    unserved = [machine.gpus[index] for index in group if machine.gpus[index].sm not in SERVED]
    if unserved:
        raise LaunchError(f"{unserved[0].name} has no DeepSeek-V4 kernels: name other cards with --gpus.")
    nodes = machine.nodes
    if tp is None:
        local = next((size for size in SIZES if size <= len(group) and experts_by(model, size * nodes)), 0)
        if not local:
            raise LaunchError(f"{nodes} nodes make no number of ranks that divides the model: use 1, 2, 4 or 8 cards.")
        ranks, why = local * nodes, _why(local, len(group), nodes)
    else:
        ranks, why = tp, "as given"
        if not experts_by(model, tp) or tp % nodes or tp // nodes not in SIZES or tp // nodes > len(group):
            most = next((size for size in SIZES if size <= len(group)), 0) * nodes
            raise LaunchError(
                f"TP {tp} was asked for, and {nodes} x {len(group)} cards and the model's heads, groups and FP8 blocks "
                f"allow powers of two up to {most}: give one of them."
            )
        local = tp // nodes
    group = group[:local]
    subset = wanted is not None or local < count
    gpus = [machine.gpus[index] for index in group]
    kinds = sorted({gpu.name for gpu in gpus})
    notes = [f"The cards are {' and '.join(kinds)}: the slowest sets the pace."] if len(kinds) > 1 else []
    if wanted is None and local < count:
        others = ", ".join(f"{i} ({machine.gpus[i].name})" for i in range(count) if i not in group)
        notes.append(f"Not used: {others}.")
    return Cards(
        gpu=min(gpus, key=lambda gpu: gpu.memory_mib),
        names=tuple(kinds),
        memory_mib=min(gpu.memory_mib for gpu in gpus),
        used_mib=max(gpu.used_mib for gpu in gpus),
        tp=ranks,
        ep=experts_by(model, ranks),
        why_tp=why,
        visible=tuple(group) if subset else None,
        why_visible="as --gpus says" if wanted is not None else "ranks need cards that are alike, and 1, 2, 4 or 8",
        notes=tuple(notes),
    )


def _alike(machine: Machine, indices: list[int]) -> list[list[int]]:
    """Groups of cards of one compute capability and nearly one size."""
    groups: list[list[int]] = []
    for index in indices:
        gpu = machine.gpus[index]
        for group in groups:
            first = machine.gpus[group[0]]
            small, large = sorted((first.memory_mib, gpu.memory_mib))
            if first.sm == gpu.sm and small >= ALIKE * large:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _size(count: int) -> int:
    return next(size for size in SIZES if size <= count)


def experts_by(model: Model, tp: int) -> int:
    """By how many of `tp` ranks the experts are divided by number, as SGLang's `--ep-size` says; 0 where it cannot be.

    1: each rank has a part of every expert, of whole FP8 blocks, beside whole heads and output groups. `tp`, of more
    ranks than a node has: the parts would be no whole blocks, so that each has whole experts, the shared one too.
    """
    config = model.config
    low_rank = config["o_groups"] * config["o_lora_rank"]
    if config["num_attention_heads"] % tp or config["o_groups"] % tp or low_rank % (tp * FP8_BLOCK):
        return 0
    if config["moe_intermediate_size"] % (tp * FP8_BLOCK) == 0:
        return 1
    return tp if tp > max(SIZES) and config["n_routed_experts"] % tp == 0 else 0


def _why(local: int, count: int, nodes: int) -> str:
    where = f" on each of {nodes} nodes" if nodes > 1 else ""
    if local == 1:
        return f"one card{where}" if count == 1 else f"of {count} cards{where} the model divides over one"
    if local == count:
        return f"all {count} cards{where}: each reads its share of the weights for every token"
    return f"{local} of {count} cards{where}: a power of two that divides heads, groups and FP8 blocks"
