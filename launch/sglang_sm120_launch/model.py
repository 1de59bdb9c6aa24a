"""What the plan knows about a model: its config.json and how large each tensor of its checkpoint is."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from .errors import LaunchError

FLASH = "deepseek-ai/DeepSeek-V4-Flash"
INDEX = "model.safetensors.index.json"
_NEEDED = (
    "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "o_lora_rank", "o_groups",
    "index_n_heads", "index_topk", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "max_position_embeddings", "compress_ratios", "head_dim", "qk_rope_head_dim", "index_head_dim", "rope_scaling",
)  # fmt: skip


_SHARDED = re.compile(
    r"^(embed|head)\.weight$|\.attn\.(wq_b|wo_a|wo_b)\.|\.ffn\.(shared_experts|experts\.\d+)\.w[123]\."
)


class Kind(NamedTuple):
    """What tensors have in common as far as memory goes.

    owner is `layers`, `mtp` or `shared`, the embedding and head that both use; role `weight`, `scale` of an FP8 or
    MXFP4 weight, or `norm` of a compressor; sharded says that tensor parallelism divides it; wo_a, that it belongs to
    the attention's first output projection, which SGLang and the step each keep in a form of their own.
    """

    owner: str
    expert: bool
    role: str
    sharded: bool
    wo_a: bool


def kind_of(name: str) -> Kind:
    """The kind of a tensor by its published name."""
    if name in ("embed.weight", "head.weight"):
        owner = "shared"
    else:
        owner = "mtp" if name.startswith("mtp.") else "layers"
    if name.endswith(".scale"):
        role = "scale"
    else:
        role = "norm" if name.endswith("compressor.norm.weight") else "weight"
    return Kind(owner, ".experts." in name, role, _SHARDED.search(name) is not None, ".attn.wo_a." in name)


@dataclass(frozen=True)
class Model:
    """A DeepSeek-V4 model.

    Attributes:
        path: what SGLang gets as `--model-path`.
        config: the parsed config.json.
        tensors: bytes of every tensor as it is stored, by its published name.
        counted: where those bytes come from, for the reader of a plan.
    """

    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, int]
    counted: str

    @cached_property
    def bytes_of(self) -> Mapping[Kind, int]:
        """Stored bytes of each kind of tensor: a checkpoint has some 70,000 tensors of a dozen kinds."""
        totals: Counter[Kind] = Counter()
        for name, size in self.tensors.items():
            totals[kind_of(name)] += size
        return totals

    @classmethod
    def load(cls, path: str) -> Model:
        """Read a checkpoint directory, a model of the Hugging Face cache, or Flash's published config.

        Raises:
            LaunchError: there is no such model here, it is not DeepSeek-V4, or a file of the checkpoint is missing.
        """
        folder = Path(path)
        if not folder.is_dir():
            cached = _cached(path)
            if cached is None and path != FLASH:
                raise LaunchError(
                    f"{path} is neither a directory nor a model in the Hugging Face cache: give a checkpoint directory "
                    f"or download it first with `hf download`."
                )
            folder = cached or folder
        file = folder / "config.json"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        elif path == FLASH:
            text = resources.files("sglang_sm120").joinpath("model-config.json").read_text(encoding="utf-8")
        else:
            raise LaunchError(f"{folder} has no config.json: give the directory of a DeepSeek-V4 checkpoint.")
        config = _checked(text, path)
        if (folder / INDEX).is_file():
            return cls(path, config, _from_shards(folder), "the checkpoint's index")
        return cls(path, config, _from_config(config, path), "config.json")


def _cached(name: str) -> Path | None:
    """The newest complete snapshot of a model in the Hugging Face cache; never touches the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _checked(text: str, path: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise LaunchError(f"config.json of {path} is not JSON ({error}): download it again.") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "deepseek_v4":
        raise LaunchError(f"{path} is a model of type {kind}, needed deepseek_v4: this launcher serves nothing else.")
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise LaunchError(f"config.json of {path} lacks {', '.join(missing)}: download it again.")
    return config


def _from_shards(folder: Path) -> dict[str, int]:
    """Bytes of every tensor, from the headers of the files that the index names."""
    try:
        places: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError):
        raise LaunchError(f"{folder / INDEX} has no weight_map: download it again.") from None
    tensors: dict[str, int] = {}
    for shard in sorted(set(places.values())):
        header = shard_header(folder / shard)
        tensors |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise LaunchError(f"{places[absent[0]]} lacks the tensor {absent[0]} that the index names: download it again.")
    return {name: tensors[name] for name in places}


def shard_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: tensor name -> `dtype`, `shape`, `data_offsets`.

    Raises:
        LaunchError: the file is missing, is no safetensors file, or is shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
    except FileNotFoundError:
        raise LaunchError(f"{file} is missing though the index names it: download it.") from None
    except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
        raise LaunchError(f"{file} has no readable safetensors header ({error}): download it again.") from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    found = file.stat().st_size
    if found != 8 + size + end:
        raise LaunchError(f"{file} has {found} bytes, its header says {8 + size + end}: download it again.")
    return header


def _from_config(config: dict[str, Any], path: str) -> dict[str, int]:
    from sglang_sm120.checkpoint.config import ReferenceConfig
    from sglang_sm120.checkpoint.layout import stored

    try:
        layout = stored(ReferenceConfig.from_json(config))
    except ValueError as error:
        raise LaunchError(f"config.json of {path} is none this project can serve: {error}.") from None
    return {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items()}
