"""A checkpoint in the published format and files, written as fast as the disk takes it: random bytes, no model.

Its tensors have the published names, shapes and dtypes, and its files are cut as the published ones are: the embedding,
one file a layer, what comes behind the layers. No byte means anything; none makes a number that is not finite.
"""

from __future__ import annotations

import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import TensorSpec, serialize_file
from torch import Tensor

from sglang_sm120.checkpoint.config import ReferenceConfig
from sglang_sm120.checkpoint.layout import stored
from sglang_sm120_reference import tokenizer

INDEX = "model.safetensors.index.json"
SLACK = 64 << 20
"""Bytes by which a buffer of random ones is longer than the longest tensor: where a tensor's may begin."""
FINITE: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.float8_e4m3fn: (torch.uint8, 0xF7, 0),
    torch.float8_e8m0fnu: (torch.uint8, 0x07, 0x78),
    torch.bfloat16: (torch.int16, ~0x4000, 0),
    torch.float32: (torch.int32, ~0x4000_0000, 0),
    torch.int32: (torch.int32, 0x07, 0),
    torch.int8: (torch.int8, -1, 0),
}
"""Of a tensor's dtype: the integers that random bits are taken as, a mask for them, and bits that are set.

FP8 stays below its NaN, block scales between 2^-7 and 1, other floats below 2; integers are experts' numbers."""
Stored = dict[str, tuple[tuple[int, ...], torch.dtype]]


def cut(source: dict[str, Any], size: float) -> dict[str, Any]:
    """The `config.json` of this model with its first layers alone, so many that they come nearest to `size` bytes.

    At least one layer; the MTP layer is left out.
    """
    ratios = source["compress_ratios"]

    def first(layers: int) -> dict[str, Any]:
        fewer = {"num_hidden_layers": layers, "compress_ratios": ratios[:layers], "num_nextn_predict_layers": 0}
        return {**source, **fewer}

    cuts = map(first, range(1, source["num_hidden_layers"] + 1))
    return min(cuts, key=lambda one: abs(bytes_of(one) - size))


def bytes_of(source: dict[str, Any]) -> int:
    """Bytes of all tensors of the model that a `config.json` describes."""
    return sum(_bytes(*entry) for one in files_of(source) for entry in one.values())


def files_of(source: dict[str, Any]) -> list[Stored]:
    """The tensors of each file of the model that a `config.json` describes."""
    files: dict[int, Stored] = {}
    place = 0
    for name, entry in stored(ReferenceConfig.from_json(source)).items():
        kind, _, rest = name.partition(".")
        if kind == "layers":
            place = 1 + int(rest.partition(".")[0])
        elif place:
            place = 1 + source["num_hidden_layers"]
        files.setdefault(place, {})[name] = entry
    return list(files.values())


def write(folder: Path, source: dict[str, Any], threads: int) -> list[Path]:
    """Write the checkpoint of a `config.json` into `folder`, synced to the disk; the files with its tensors.

    Each tensor has the bytes from a random place of one buffer of its dtype: equal pages are rare, but a file system
    that keeps equal blocks once finds some.
    """
    files = files_of(source)
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    buffers = _buffers([entry for one in files for entry in one.values()])
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda name, one: _write_file(folder / name, one, buffers), names, files))
    tokenizer.write(folder, source["vocab_size"], source["max_position_embeddings"])
    weights = {tensor: name for name, one in zip(names, files, strict=True) for tensor in one}
    index = {"metadata": {"total_size": bytes_of(source)}, "weight_map": weights}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(source, indent=1))
    return [folder / name for name in names]


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _buffers(tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> dict[torch.dtype, Tensor]:
    """Random bytes for tensors of each dtype."""
    longest: dict[torch.dtype, int] = {}
    for shape, dtype in tensors:
        longest[dtype] = max(longest.get(dtype, 0), _bytes(shape, dtype))
    buffers = {}
    for dtype, size in longest.items():
        integers, mask, bits = FINITE[dtype]
        drawn = torch.empty(-(-(size + SLACK) // 8), dtype=torch.int64).random_()
        buffers[dtype] = drawn.view(integers).bitwise_and_(mask).bitwise_or_(bits)
    return buffers


def _write_file(file: Path, tensors: Stored, buffers: dict[torch.dtype, Tensor]) -> None:
    rng = random.Random(file.name)
    specs = {}
    for name, (shape, dtype) in tensors.items():
        place = rng.randrange(SLACK // dtype.itemsize) * dtype.itemsize
        pointer = buffers[dtype].data_ptr() + place
        size = _bytes(shape, dtype)
        specs[name] = TensorSpec(dtype=str(dtype).removeprefix("torch."), shape=shape, data_ptr=pointer, data_len=size)
    serialize_file(specs, file, metadata={"format": "pt"})
    with file.open("rb") as written:
        os.fsync(written.fileno())
