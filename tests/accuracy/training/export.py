"""Write trained weights as a checkpoint in the published FP8 + MXFP4 format, and pack one into a small file.

python tests/accuracy/training/export.py write RUN_DIR CHECKPOINT    from the newest state of a training run
python tests/accuracy/training/export.py pack CHECKPOINT PACKED      the file that is committed
python tests/accuracy/training/export.py unpack PACKED CHECKPOINT    the same checkpoint, bit for bit, in seconds
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[3] / "overlay")]

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training.model import Weights, stack_name
from training.model import tables as initial_tables
from training.quantise import coarse

from sglang_sm120.formats import fp8_block, mxfp4
from sglang_sm120.reference import tokenizer
from sglang_sm120.reference.config import ReferenceConfig
from sglang_sm120.reference.layout import Parameter, Storage, parameters, stored

SHARD = "model-00001-of-00001.safetensors"

# Literals one by one, no context and no position bits: the planes hold symbols without order.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]


def stored_bytes(config: ReferenceConfig) -> int:
    """Bytes of all tensors in the published format, without headers, config and tokenizer."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in stored(config).values())


def tensors_of(weights: Weights, tables: Weights, config: ReferenceConfig, levels: int) -> Weights:
    """Every tensor of the checkpoint files: what `served` computes with, in its stored form."""
    out: Weights = {}
    for p in parameters(config):
        out |= {p.name: tables[p.name]} if p.storage is Storage.INT32 else _stored(p, weights, levels)
    return out


def _stored(p: Parameter, weights: Weights, levels: int) -> Weights:
    if p.storage is Storage.MXFP4:
        expert = int(p.name.partition(".experts.")[2].partition(".")[0])
        packed, scale = mxfp4.quantise(weights[stack_name(p.name)][expert])
        return {p.name: packed.view(torch.int8), p.scale_name: scale}
    value = weights[p.name]
    if p.storage is Storage.FP8:
        values, scale = fp8_block.quantise(coarse(value, levels) if levels else value)
        return {p.name: values, p.scale_name: scale}
    if p.storage is Storage.BF16:
        return {p.name: value.bfloat16()}
    return {p.name: value.bfloat16().float() if value.dim() > 1 else value}


def write_trained(out: Path, config: ReferenceConfig, tensors: Weights) -> Path:
    """Write a checkpoint directory as `reference.write` does, with these tensors.

    Raises FileExistsError when `out` holds files, ValueError when the tensors are not the config's.
    """
    expected = stored(config)
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
    tokenizer.write(out, config.vocab_size, config.max_position_embeddings)
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    # Recall has one right answer: greedy unless a request says otherwise.
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
    return out


def pack(checkpoint: Path, packed: Path) -> int:
    """Compress a checkpoint of `write_trained` into one file; its bytes."""
    config = ReferenceConfig.load(checkpoint)
    tensors = load_file(checkpoint / SHARD)
    planes = b"".join(_planes(tensors[name]) for name in stored(config))
    body = lzma.compress(planes, format=lzma.FORMAT_RAW, filters=_FILTERS)
    packed.write_bytes(json.dumps(config.to_json()).encode() + b"\n" + body)
    return packed.stat().st_size


def unpack(packed: Path, out: Path) -> Path:
    """Write the checkpoint that was packed into the new or empty directory `out`."""
    head, _, body = packed.read_bytes().partition(b"\n")
    config = ReferenceConfig.from_json(json.loads(head))
    planes = memoryview(bytearray(lzma.decompress(body, format=lzma.FORMAT_RAW, filters=_FILTERS)))
    if len(planes) != stored_bytes(config):
        raise ValueError(f"{packed} holds {len(planes)} bytes of tensors, its config needs {stored_bytes(config)}: "
                         "take the file from the repository again")  # fmt: skip
    tensors, start = {}, 0
    for name, (shape, dtype) in stored(config).items():
        size = torch.Size(shape).numel() * dtype.itemsize
        columns = torch.frombuffer(planes, dtype=torch.uint8, count=size, offset=start).view(dtype.itemsize, -1)
        tensors[name] = columns.T.contiguous().flatten().view(dtype).view(shape)
        start += size
    return write_trained(out, config, tensors)


def write_run(run: Path, out: Path) -> Path:
    """Write the newest state of a training run as a checkpoint."""
    from training import state, train  # they import this module

    progress, weights, _ = state.load(run)
    recipe = train.RECIPES[progress.size]
    tables = initial_tables(recipe.config, progress.seed)
    return write_trained(out, recipe.config, tensors_of(weights, tables, recipe.config, recipe.levels))


def _planes(tensor: Tensor) -> bytes:
    """The first bytes of all elements, then the second ones and so on: like bytes compress together."""
    return tensor.flatten().view(torch.uint8).view(-1, tensor.itemsize).T.contiguous().numpy().tobytes()


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when done, 1 when it failed, 2 for misuse."""
    parser = argparse.ArgumentParser(prog="export.py", description="Write, pack or unpack the trained checkpoint.")
    parser.add_argument("verb", choices=("write", "pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.verb == "write":
            print(write_run(args.source, args.target))
        elif args.verb == "pack":
            print(f"{args.target}: {pack(args.source, args.target):,} bytes")
        else:
            print(unpack(args.source, args.target))
    except (OSError, ValueError, lzma.LZMAError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
