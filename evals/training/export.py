"""Write trained weights as a checkpoint in the published FP8 + MXFP4 format, and pack one into a small file.

python evals/training/export.py write RUN_DIR CHECKPOINT    from the newest state of a training run
python evals/training/export.py pack CHECKPOINT PACKED      the file that is committed
python evals/training/export.py unpack PACKED CHECKPOINT    the same checkpoint, bit for bit, in seconds
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("evals", "overlay", "reference")]

import torch

from sglang_sm120.checkpoint.config import DSparkConfig, ReferenceConfig
from sglang_sm120.checkpoint.layout import Parameter, Storage, parameters
from sglang_sm120.formats import fp8_block, mxfp4
from sglang_sm120_reference.packed import pack, unpack, write_tensors
from training.model import Weights, stack_name
from training.model import tables as initial_tables
from training.quantise import coarse


def tensors_of(
    weights: Weights, tables: Weights, config: ReferenceConfig, levels: int, dspark: DSparkConfig | None = None
) -> Weights:
    """Every tensor of the checkpoint's or the drafter's files: what `served` computes with, in its stored form."""
    out: Weights = {}
    for p in parameters(config, dspark):
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


def write_run(run: Path, out: Path) -> Path:
    """Write the newest state of a training run as a checkpoint, of a drafter's as the `dspark/` of one."""
    from training import drafter, state, train  # they import this module

    progress, weights, _ = state.load(run)
    if progress.size == drafter.SIZE:
        config, dspark = drafter.configs(run)
        return write_tensors(out, config, tensors_of(weights, {}, config, drafter.LEVELS, dspark), dspark)
    recipe = train.RECIPES[progress.size]
    tables = initial_tables(recipe.config, progress.seed)
    return write_tensors(out, recipe.config, tensors_of(weights, tables, recipe.config, recipe.levels))


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
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
