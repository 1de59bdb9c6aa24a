"""Write a DeepSeek-V4 checkpoint in the published format.

    PYTHONPATH=reference python -m sglang_sm120_reference.write OUT_DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sglang_sm120.checkpoint.config import DSPARK_FOLDER, DSparkConfig, ReferenceConfig
from sglang_sm120.checkpoint.layout import Parameter, parameters

from . import tokenizer, weights
from .config_file import config_json

SHARD_BYTES = 1 << 30


class _Shards:
    """Collects tensors and writes a file whenever `limit` bytes are together, so that memory stays bounded."""

    def __init__(self, out: Path, limit: int) -> None:
        self._out, self._limit = out, limit
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self.total_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        size = sum(t.nbytes for t in tensors.values())
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending |= {name: t.contiguous() for name, t in tensors.items()}
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> dict[str, str]:
        """Write what is left and give the files their final names; tensor name -> file name."""
        if self._pending:
            self._flush()
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._files):
            final = f"model-{i + 1:05d}-of-{len(self._files):05d}.safetensors"
            self._part(i).rename(self._out / final)
            weight_map |= dict.fromkeys(names, final)
        return weight_map

    def _part(self, i: int) -> Path:
        return self._out / f"part-{i:05d}.safetensors"

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def write_checkpoint(
    out: str | Path,
    config: ReferenceConfig | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    dspark: DSparkConfig | None = None,
) -> Path:
    """Write a checkpoint into the new or empty directory `out` and return it.

    `config` defaults to the small model; `dspark` puts a drafter beside it, into `out/dspark`. Equal arguments give
    equal bytes. One shard (`shard_bytes`, 1 GiB by default) and one tensor in fp32 are in memory at a time. Raises
    FileExistsError when `out` holds files, ValueError where the config is none we can fill with values.
    """
    config = config or ReferenceConfig()
    weights.check(config)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty, a checkpoint needs its own directory: choose another one")
    _write_weights(out, parameters(config), config, seed, shard_bytes)
    tokenizer.write(out, config.vocab_size, config.max_position_embeddings)
    _write_json(out / "generation_config.json", _GENERATION)
    _write_json(out / "config.json", config_json(config))
    if dspark is not None:
        (folder := out / DSPARK_FOLDER).mkdir()
        # Or the stages would have the MTP layer's values, whose names they share.
        _write_weights(folder, parameters(config, dspark), dspark.stage(config), seed + 1, shard_bytes)
        _write_json(folder / "config.json", config_json(config, dspark))
    return out


def _write_weights(
    out: Path, listed: Iterable[Parameter], config: ReferenceConfig, seed: int, shard_bytes: int
) -> None:
    shards = _Shards(out, shard_bytes)
    for parameter in listed:
        shards.add(weights.draw(parameter, config, seed))
    index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": shards.close()}
    _write_json(out / "model.safetensors.index.json", index)


_GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def drafter_of(config: ReferenceConfig, layers: Sequence[int], **changes: Any) -> DSparkConfig:
    """A drafter with the experts of `config` that sees these of its layers. Raises ValueError where it lacks one."""
    experts = {name: getattr(config, name) for name in ("n_routed_experts", "num_experts_per_tok")}
    dspark = DSparkConfig(target_layer_ids=tuple(layers), **experts, **changes)
    return DSparkConfig.from_json(config_json(config, dspark), config)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when written, 1 when it failed, 2 for misuse."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_sm120_reference.write",
        description="Write a DeepSeek-V4 checkpoint with random weights in the published format.",
    )
    parser.add_argument("out", type=Path, help="new or empty directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--like",
        type=Path,
        metavar="CONFIG_JSON",
        help="take all dimensions from this config.json instead of the small defaults",
    )
    parser.add_argument(
        "--ratios",
        type=_numbers,
        metavar="R,R,...",
        help="compress ratio of each layer (0, 4 or 128), the MTP layer's 0 left out; sets the number of layers",
    )
    parser.add_argument(
        "--mtp",
        action=argparse.BooleanOptionalAction,
        help="with or without an MTP layer; otherwise as the config says (the small one has it)",
    )
    parser.add_argument(
        "--dspark",
        type=_numbers,
        metavar="L,L,...",
        help=f"a DSpark drafter in OUT/{DSPARK_FOLDER}, which sees the streams after these layers of the target",
    )
    parser.add_argument("--nvfp4-experts", action="store_true", help="the layers' routed experts in NVFP4")
    names = ("hidden_size", "vocab_size", "num_attention_heads", "n_routed_experts", "max_position_embeddings")
    for name in names:
        parser.add_argument("--" + name.replace("_", "-"), type=int, metavar="N")
    args = parser.parse_args(argv)
    try:
        config = ReferenceConfig.from_json(json.loads(args.like.read_text())) if args.like else ReferenceConfig()
        changed: dict[str, Any] = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
        ratios = args.ratios or config.compress_ratios[: config.num_hidden_layers]
        mtp = config.num_nextn_predict_layers if args.mtp is None else int(args.mtp)
        changed |= {
            "compress_ratios": ratios + (0,) * mtp,
            "num_hidden_layers": len(ratios),
            "num_nextn_predict_layers": mtp,
            "nvfp4_experts": args.nvfp4_experts or config.nvfp4_experts,
        }
        config = dataclasses.replace(config, **changed)
        dspark = args.dspark and drafter_of(config, args.dspark)
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))
    try:
        write_checkpoint(args.out, config, args.seed, dspark=dspark)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
