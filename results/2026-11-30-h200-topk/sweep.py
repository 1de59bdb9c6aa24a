"""Times of `topk_slots` by configuration: `PYTHONPATH=overlay:bench:launch python sweep.py OUT.jsonl`.

On a Hopper card under SM120 lowering. Each result is compared with the reference first; a graph has four sets.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import bench
from sglang_sm120 import kernels, tuned
from sglang_sm120.ops.topk_slots import topk_slots, triton
from sglang_sm120.parity import DEVICE
from sm120_lowering import install


def configurations(rows: int, width: int, k: int) -> Iterator[triton.Config]:
    for tile, warps in triton.WARPS.items():
        again = triton._handed_on(width, k, tile)
        if 2048 <= tile <= width and (tile == width or again <= triton.LARGEST_TILE):
            yield triton.Config(tile, warps, triton.WARPS[min(again, triton.LARGEST_TILE)])
    if rows >= 32:
        yield triton.Config(512, 2, 0, stream=True)
        yield triton.Config(1024, 4, 0, stream=True)


def call(rows: int, width: int, k: int, seed: int) -> dict[str, object]:
    rng = torch.Generator(device=DEVICE).manual_seed(seed)
    return {
        "logits": torch.randn(rows, width, device=DEVICE, generator=rng),
        "lengths": torch.full((rows,), width - 3, device=DEVICE, dtype=torch.int32),
        "page_table": torch.randperm(rows * width // 64, device=DEVICE, generator=rng).int().view(rows, -1),
        "k": k,
    }


def main() -> None:
    install()
    kernels.reserve("topk_slots", 96 << 20, DEVICE)
    with Path(sys.argv[1]).open("w") as out:
        for k, counts in ((512, (1, 8, 16, 32, 64, 128, 256)), (1024, (8, 64, 256))):
            for rows in counts:
                for width in (8192, 16384, 32768, 65536):
                    sets = [call(rows, width, k, seed) for seed in range(4)]
                    usual = triton.config(rows, width, k, kernels.sms(DEVICE))
                    for config in dict.fromkeys((usual, *configurations(rows, width, k))):
                        if triton._tuned_refusal((width, k), rows, config):
                            continue
                        with tuned.using({triton.TUNED.key((width, k), rows): config}):
                            assert torch.equal(topk_slots.by("triton", **sets[0]), topk_slots.reference(**sets[0]))
                            us = bench.microseconds([lambda a=a: topk_slots.by("triton", **a) for a in sets])
                        told = {"k": k, "rows": rows, "width": width, **config._asdict(), "usual": config == usual}
                        print(json.dumps({**told, "us": round(us, 2)}), file=out, flush=True)


if __name__ == "__main__":
    main()
