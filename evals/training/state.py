"""A training run on disk, small enough to travel: files below 16 MiB, about 3 bytes per weight.

Weights keep the upper 24 bits of their fp32 value (a mantissa of 16 bits: updates of 1e-5 of a weight survive). Of
AdamW's moments the second is kept as row and column means (whole where a tensor has one dimension) and the first
starts again at zero: both forget within 50 steps, during which a resumed run warms up again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE_BYTES = 15 << 20

Weights = dict[str, Tensor]


@dataclass
class Progress:
    """How far a run is: steps done, seconds trained, and the names of its model size and its seed."""

    step: int = 0
    seconds: float = 0.0
    size: str = ""
    seed: int = 0


def save(folder: Path, progress: Progress, weights: Weights, second: Weights) -> Path:
    """Write `folder/state-STEP` and remove older ones. It appears under its name when it is complete.

    second: AdamW's second moments by name; a weight without one is not in it.
    """
    final = folder / f"state-{progress.step:06d}"
    part = folder / "state.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shards: list[Weights] = [{}]
    size = 0
    for name, w in weights.items():
        value = _shorten(w)
        if shards[-1] and size + value.nbytes > FILE_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    for i, shard in enumerate(shards):
        save_file(shard, part / f"weights-{i}.safetensors")
    means = {f"{name}/{axis}": m.cpu() for name, v in second.items() for axis, m in _means(v).items()}
    save_file(means, part / "progress.safetensors", metadata={"progress": json.dumps(asdict(progress))})
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in folder.glob("state-*"):
        if old != final:
            shutil.rmtree(old)
    return final


def load(folder: Path) -> tuple[Progress, Weights, Weights]:
    """Progress, fp32 weights and second moments of the newest state. Raises FileNotFoundError when there is none."""
    states = sorted(folder.glob("state-*"))
    if not states:
        raise FileNotFoundError(f"{folder} holds no state-* folder to resume from: start without --resume")
    weights: Weights = {}
    for file in sorted(states[-1].glob("weights-*.safetensors")):
        weights |= {name: _lengthen(value) for name, value in load_file(file).items()}
    path = states[-1] / "progress.safetensors"
    with safe_open(path, "pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
    means: dict[str, Weights] = {}
    for name, value in load_file(path).items():
        means.setdefault(name.rpartition("/")[0], {})[name.rpartition("/")[2]] = value
    return progress, weights, {name: _product(parts) for name, parts in means.items()}


def _shorten(w: Tensor) -> Tensor:
    """fp32 [...] to uint8 [..., 3], the upper bytes after rounding."""
    bits = w.detach().float().cpu().contiguous().view(torch.int32).long()
    return ((bits + 0x80) >> 8).to(torch.int32).unsqueeze(-1).view(torch.uint8)[..., :3].contiguous()


def _lengthen(value: Tensor) -> Tensor:
    low = torch.zeros((*value.shape[:-1], 1), dtype=torch.uint8)
    return torch.cat((low, value), dim=-1).view(torch.int32).view(torch.float32).squeeze(-1)


def _means(v: Tensor) -> Weights:
    if v.dim() < 2:
        return {"all": v.contiguous()}
    return {"rows": v.mean(-1).contiguous(), "columns": v.mean(-2).contiguous()}


def _product(parts: Weights) -> Tensor:
    if "all" in parts:
        return parts["all"]
    rows, columns = parts["rows"], parts["columns"]
    total = rows.mean(-1, keepdim=True).clamp(min=1e-30).unsqueeze(-1)
    return rows.unsqueeze(-1) * columns.unsqueeze(-2) / total
