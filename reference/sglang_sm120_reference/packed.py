"""A checkpoint or a DSpark drafter with given tensors in the published format, and the same packed into one small file.

The file is the config as one line of JSON, then the planes of all tensors in the layout's order, compressed: the first
bytes of a tensor's elements, then the second ones and so on, since like bytes compress together. Everything else in a
checkpoint follows from the config.

    PYTHONPATH=reference python -m sglang_sm120_reference.packed PACKED OUT_DIR

writes the checkpoint that PACKED holds.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_sm120.checkpoint.config import DSPARK, DSparkConfig, ReferenceConfig
from sglang_sm120.checkpoint.layout import stored

from . import tokenizer
from .config_file import config_json, load_config, load_dspark

SHARD = "model-00001-of-00001.safetensors"

# Literals one by one, no context and no position bits: the planes hold symbols without order.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]


def stored_bytes(config: ReferenceConfig, dspark: DSparkConfig | None = None) -> int:
    """Bytes of all tensors in the published format, without headers, config and tokenizer."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in stored(config, dspark).values())


def write_tensors(
    out: Path, config: ReferenceConfig, tensors: dict[str, Tensor], dspark: DSparkConfig | None = None
) -> Path:
    """Write a checkpoint directory as `write` does, with these tensors; it answers greedily unless asked.

    With `dspark` the directory of a drafter. Raises FileExistsError when `out` holds files, ValueError when the tensors
    are not the config's.
    """
    expected = stored(config, dspark)
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise ValueError(f"{len(wrong)} tensors are not the layout's, first {wrong[0]}: export with the same config")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty, a checkpoint needs its own directory: choose another one")
    in_order = {name: tensors[name].contiguous() for name in expected}
    save_file(in_order, out / SHARD, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in in_order.values())},
        "weight_map": dict.fromkeys(in_order, SHARD),
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config_json(config, dspark), indent=2) + "\n")
    if dspark is not None:
        return out
    tokenizer.write(out, config.vocab_size, config.max_position_embeddings)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return out


def pack(checkpoint: Path, packed: Path) -> int:
    """Compress a directory of `write_tensors` into one file; its bytes."""
    config = load_config(checkpoint)
    source = json.loads((checkpoint / "config.json").read_text())
    dspark = load_dspark(checkpoint, config) if f"{DSPARK}block_size" in source else None
    tensors = load_file(checkpoint / SHARD)
    planes = b"".join(_planes(tensors[name]) for name in stored(config, dspark))
    body = lzma.compress(planes, format=lzma.FORMAT_RAW, filters=_FILTERS)
    packed.write_bytes(json.dumps(source).encode() + b"\n" + body)
    return packed.stat().st_size


def unpack(packed: Path, out: Path) -> Path:
    """Write the checkpoint that was packed, bit for bit, into the new or empty directory `out`.

    Raises OSError when the file cannot be read or `out` holds files, ValueError when it is no packed checkpoint.
    """
    head, _, body = packed.read_bytes().partition(b"\n")
    try:
        source = json.loads(head)
        config = ReferenceConfig.from_json(source)
        dspark = DSparkConfig.from_json(source, config) if f"{DSPARK}block_size" in source else None
        planes = memoryview(bytearray(lzma.decompress(body, format=lzma.FORMAT_RAW, filters=_FILTERS)))
    except (ValueError, KeyError, lzma.LZMAError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{packed} is no packed checkpoint ({reason}): take the file from the repository again"
        ) from None
    if len(planes) != (needed := stored_bytes(config, dspark)):
        raise ValueError(f"{packed} holds {len(planes)} bytes of tensors, its config needs {needed}: "
                         "take the file from the repository again")  # fmt: skip
    tensors, start = {}, 0
    for name, (shape, dtype) in stored(config, dspark).items():
        size = torch.Size(shape).numel() * dtype.itemsize
        columns = torch.frombuffer(planes, dtype=torch.uint8, count=size, offset=start).view(dtype.itemsize, -1)
        tensors[name] = columns.T.contiguous().flatten().view(dtype).view(shape)
        start += size
    return write_tensors(out, config, tensors, dspark)


def _planes(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).view(-1, tensor.itemsize).T.contiguous().numpy().tobytes()


def main(argv: list[str] | None = None) -> int:
    """Unpack for the command line; exit status 1 when that fails."""
    parser = argparse.ArgumentParser(prog="packed", description="Write the checkpoint that a packed file holds.")
    parser.add_argument("packed", type=Path, metavar="PACKED", help="a checkpoint in one file")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new or empty directory")
    arguments = parser.parse_args(argv)
    try:
        print(unpack(arguments.packed, arguments.out))
    except (OSError, ValueError) as error:
        print(f"packed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
