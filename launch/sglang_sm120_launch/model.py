"""What the plan knows about a model: its config.json and how large each tensor of its checkpoint is."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import LaunchError

if TYPE_CHECKING:
    from sglang_sm120.checkpoint.config import DSparkConfig
    from sglang_sm120.checkpoint.layout import Entry

MODEL_TYPE = "deepseek_v4"
INDEX = "model.safetensors.index.json"
_QUANTISED = {"quant_method": "fp8", "weight_block_size": [128, 128]}
"""What config.json says of the published checkpoint, whose experts SGLang knows for MXFP4 beside it."""
_SHARDED = re.compile(
    r"^(embed|head)\.weight$|\.attn\.(wq_b|wo_a|wo_b)\.|"
    r"\.ffn\.(shared_experts|experts\.\d+)\.w[123]\.(?!weight_scale_2$|input_scale$)"
)

_PAIRS = frozenset(("I8", "U8"))
"""Of a byte with two E2M1 values: SGLang takes either (`configs/deepseek_v4.py`) and copies it bit for bit."""
_PART = re.compile(r"^layers\.\d+\.|\.experts\.\d+\.")
"""A layer, and an expert, in a tensor's name."""
_FLOATS = frozenset(("BF16", "F16", "F32"))
"""Of what a drafter has unquantised: no source says in which dtype all of it is published, and SGLang converts."""


class Kind(NamedTuple):
    """What tensors have in common as far as memory goes.

    owner is `layers`, `mtp` or `shared`, the embedding and head that both use; role `weight`, `scale` of an FP8 or
    MXFP4 weight (NVFP4's, which SGLang widens nowhere, are weights), or `norm` of a compressor; sharded says that
    tensor parallelism divides it; shared_expert, that it is of the one that every token meets; wo_a, that it belongs to
    the attention's first output projection, which SGLang and the step each keep in a form of their own.
    """

    owner: str
    expert: bool
    role: str
    sharded: bool
    shared_expert: bool
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
    shared = ".shared_experts." in name
    return Kind(owner, ".experts." in name, role, _SHARDED.search(name) is not None, shared, ".attn.wo_a." in name)


@dataclass(frozen=True)
class Model:
    """A DeepSeek-V4 model.

    Attributes:
        path: what SGLang gets as `--model-path`.
        config: the parsed config.json.
        tensors: bytes of every tensor as it is stored, by its published name.
        dspark: of the DSpark drafter whose tensors have the MTP layer's place, None without.
    """

    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, int]
    dspark: DSparkConfig | None = None

    @cached_property
    def bytes_of(self) -> Mapping[Kind, int]:
        """Stored bytes of each kind of tensor: a checkpoint has some 70,000 tensors of a dozen kinds."""
        totals: Counter[Kind] = Counter()
        for name, size in self.tensors.items():
            totals[kind_of(name)] += size
        return totals

    @classmethod
    def load(cls, path: str) -> Model:
        """Read a checkpoint directory, a model of the Hugging Face cache, or the known config of a published model.

        Raises:
            LaunchError: there is no such model here, it is not DeepSeek-V4, a file of the checkpoint is missing, or a
                tensor is not what config.json says.
        """
        folder = located(path)
        file = folder / "config.json" if folder is not None else None
        if file is not None and file.is_file():
            config = checked(read_json(file), path, file)
        elif known(path):
            from sglang_sm120.checkpoint.config import model_config

            config = model_config(path)
        else:
            raise LaunchError(f"{folder} has no config.json: give the directory of a DeepSeek-V4 checkpoint.")
        if folder is None or not (folder / INDEX).is_file():
            return cls(path, config, _from_config(config))
        found, needed = headers(folder), _needed(config)
        if bundles_dspark(config):
            # DSpark's stages take the place of the MTP layer under the same prefix.
            needed = {name: entry for name, entry in needed.items() if not name.startswith("mtp.")}
        _compare(found, needed, folder)
        return cls(path, config, _sizes(found))

    def with_dspark(self) -> Model:
        """The model with the DSpark drafter of its files, or of the folder beside them; as it is where there is none.

        Raises:
            LaunchError: the drafter is another model's, or a file of it is missing.
        """
        from sglang_sm120.checkpoint.config import DSPARK_FOLDER, DSparkConfig, ReferenceConfig
        from sglang_sm120.checkpoint.layout import entries

        folder = located(self.path)
        if folder is not None and not bundles_dspark(self.config):
            folder /= DSPARK_FOLDER
        if folder is None or not (file := folder / "config.json").is_file():
            return self
        source, target = checked(read_json(file), str(folder), file), ReferenceConfig.from_json(dict(self.config))
        try:
            dspark = DSparkConfig.from_json(source, target)
        except ValueError as error:
            raise LaunchError(f"{file} is of no drafter for {self.path} ({error}): use the model's own.") from None
        found = {name: entry for name, entry in headers(folder).items() if name.startswith("mtp.")}
        _compare(found, entries(target, dspark), folder)
        rest = {name: size for name, size in self.tensors.items() if not name.startswith("mtp.")}
        return replace(self, tensors={**rest, **_sizes(found)}, dspark=dspark)


def bundles_dspark(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has DSpark's stages in its own files, in the place of the MTP layer, by its config.json."""
    return any(key.startswith("dspark_") for key in config)


def located(path: str) -> Path | None:
    """The directory of a checkpoint or of a model in the Hugging Face cache; None for a model known without either.

    Raises:
        LaunchError: there is no such model here.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    cached = _cached(path)
    if cached is None and not known(path):
        raise LaunchError(
            f"{path} is neither a directory nor a model in the Hugging Face cache: give a checkpoint directory "
            f"or download it first with `hf download`."
        )
    return cached


def known(name: str) -> bool:
    """Whether a published model's config is in the overlay."""
    # Imported where it is used, here and below: doctor runs without the overlay too.
    try:
        from sglang_sm120.checkpoint.config import PUBLISHED
    except ModuleNotFoundError:
        return False
    return name in PUBLISHED


def _cached(name: str) -> Path | None:
    """The newest complete snapshot of a model in the Hugging Face cache; never touches the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def checked(config: dict[str, Any], path: str, file: Path) -> dict[str, Any]:
    """config.json, once every value that is reckoned with is there and of its kind.

    Raises:
        LaunchError: it is another model's, damaged, or of a checkpoint that is quantised otherwise.
    """
    kind = config.get("model_type")
    if kind != MODEL_TYPE:
        raise LaunchError(f"{path} is a model of type {kind}, needed {MODEL_TYPE}: give a DeepSeek-V4 checkpoint.")
    from sglang_sm120.checkpoint.config import ReferenceConfig

    try:
        ReferenceConfig.from_json(config)
    except ValueError as error:
        raise LaunchError(f"{file} is no such model's ({error}): download it again.") from None
    quantised = config.get("quantization_config")
    found = {key: quantised.get(key) for key in _QUANTISED} if isinstance(quantised, dict) else quantised
    if found != _QUANTISED:
        raise LaunchError(
            f"{file} has the quantization_config {found}, needed {_QUANTISED}: use the published checkpoint."
        )
    if config.get("expert_dtype", "fp4") != "fp4":
        raise LaunchError(f"{file} has expert_dtype={config['expert_dtype']!r}: use the published checkpoint (fp4).")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        LaunchError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{path} cannot be read ({error.strerror}): download it again.") from None
    except (ValueError, RecursionError) as error:
        raise LaunchError(f"{path} is not JSON ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise LaunchError(f"{path} holds no JSON object: download it again.")
    return value


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from a checkpoint's index.

    Raises:
        LaunchError: there is no index, or it names no tensors.
    """
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise LaunchError(f"{folder / INDEX} has no weight_map: download it again.")
    return places


def headers(folder: Path) -> dict[str, dict[str, Any]]:
    """Every tensor's entry as in `shard_header`, once the index and the files it names agree about each.

    Raises:
        LaunchError: they do not, or a file cannot be read.
    """
    weight_map = read_index(folder)
    files = {file: shard_header(folder / file) for file in sorted(set(weight_map.values()))}
    lost = sorted(name for name, file in weight_map.items() if name not in files[file])
    if lost:
        file = weight_map[lost[0]]
        raise LaunchError(f"{file} lacks {lost[0]} ({len(lost)} tensors of the index are missing): download it again.")
    extra = sorted(name for file, header in files.items() for name in header if weight_map.get(name) != file)
    if extra:
        raise LaunchError(
            f"{folder / INDEX} does not have {extra[0]} ({len(extra)} tensors of the files): download it again."
        )
    return {name: files[file][name] for name, file in weight_map.items()}


def _sizes(entries: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    """Bytes of every tensor of `headers`."""
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}


def _compare(found: Mapping[str, dict[str, Any]], needed: Mapping[str, Entry], folder: Path) -> None:
    """Raise LaunchError where a tensor that config.json implies is missing, or of another dtype or shape."""
    differing = sorted(name for name in needed if name not in found or _differs(name, found[name], needed[name]))
    if differing:
        name = differing[0]
        there = _words(found[name]["shape"], found[name]["dtype"]) if name in found else "nothing"
        raise LaunchError(
            f"{folder} differs from its config.json in {len(differing)} of {len(needed)} tensors (first {name}: "
            f"{there}, needed {_words(*needed[name])}): use the published checkpoint, or download it again."
        )
    parts = {part for name in needed for part in _PART.findall(name)}
    if beyond := sorted(name for name in found if set(_PART.findall(name)) - parts):
        raise LaunchError(
            f"{folder} has {len(beyond)} tensors of layers or experts that its config.json does not have (first "
            f"{beyond[0]}): use the config.json that was published with them."
        )


def _differs(name: str, found: Mapping[str, Any], needed: Entry) -> bool:
    """Whether SGLang could not take a tensor for the one that is needed; of one value it asks for no shape."""
    shape, dtype = needed
    if tuple(found["shape"]) != shape and not math.prod(found["shape"]) == math.prod(shape) == 1:
        return True
    if dtype in _FLOATS and name.startswith("mtp."):
        return found["dtype"] not in _FLOATS
    return found["dtype"] not in (_PAIRS if dtype in _PAIRS else (dtype,))


def _words(shape: Sequence[int], dtype: str) -> str:
    return f"{dtype} {list(shape)}"


def _size(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * _bits(dtype) // 8


@cache
def _bits(dtype: str) -> int:
    """Bits of a value, which the first number of a dtype's name in safetensors says, but for BOOL: eight."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def shard_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: tensor name -> `dtype`, `shape`, `data_offsets`.

    Raises:
        LaunchError: the file is missing, is no safetensors file, or is shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > file.stat().st_size:
                raise ValueError("it is longer than the file")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            (begin, end), shape = entry["data_offsets"], entry["shape"]
            whole = type(begin) is type(end) is int and all(type(size) is int and size >= 0 for size in shape)
            if not whole or not 0 <= begin <= end or _size(shape, entry["dtype"]) != end - begin:
                raise ValueError(f"the entry of {name}")
    except FileNotFoundError:
        raise LaunchError(f"{file} is missing though the index names it: download it.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise LaunchError(f"{file} has no readable safetensors header ({error}): download it again.") from None
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    found = file.stat().st_size
    if found != 8 + size + end:
        raise LaunchError(f"{file} has {found} bytes, its header says {8 + size + end}: download it again.")
    return header


def _needed(config: dict[str, Any]) -> dict[str, Entry]:
    from sglang_sm120.checkpoint.config import ReferenceConfig
    from sglang_sm120.checkpoint.layout import entries

    return entries(ReferenceConfig.from_json(config))


def _from_config(config: dict[str, Any]) -> dict[str, int]:
    """Bytes of every tensor that a config.json implies."""
    return {name: _size(*entry) for name, entry in _needed(config).items()}
