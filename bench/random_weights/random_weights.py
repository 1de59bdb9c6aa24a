"""On PYTHONPATH of a server with `--load-format dummy`: random weights in which tokens differ, as in a real model.

SGLang's own dummy values are so small that every token chooses the same experts, its packed experts are whatever the
memory held, and no bf16 `wo_a` of them is made of FP8 blocks. A plugin of SGLang's, for benchmarks only.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FP8_STD, FP8_SCALE = 64.0, 2.0**-12
"""Values that fill E4M3's range, and the block scale that makes them 1/√4096: a product of unit rows stays near 1."""
EXPERT_SCALE = 2.0**-8
"""Random E2M1 values have a root mean square of 3: as above."""
CHUNK = 1 << 28
WAITS = "random_weights: this process waits for its gate"
"""Each process of a server says so in its log."""


def register() -> None:
    """Replace what SGLang's dummy loader fills a model with; called in each of its processes."""
    from sglang.srt.model_loader import loader

    loader.initialize_dummy_weights = fill
    gate, parent = os.environ.get("RANDOM_WEIGHTS_GATE"), multiprocessing.parent_process()
    if gate and parent is not None:
        print(WAITS, flush=True)
        wait_for(Path(gate), parent.is_alive)


def wait_for(gate: Path, alive: Callable[[], bool]) -> None:
    """Return when the file is there. A scheduler has imported everything by then, and not touched the GPU.

    Raises:
        SystemExit: the process that started this one is not `alive` any more.
    """
    while not gate.exists():
        if not alive():
            raise SystemExit(1)
        time.sleep(0.05)


@torch.no_grad()
def fill(model: torch.nn.Module, *_: Any, **__: Any) -> None:
    """Give each tensor of `model` values of its own, the same in every process.

    Norms are one, block scales powers of two, `wo_a` in bf16 what a checkpoint in FP8 would give. Tables of integers
    and single numbers, the cache's scales, stay as SGLang made them.
    """
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 0:
            continue
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
        for part in tensor.data.view(-1).split(CHUNK):
            _fill(name, part, tensor.dim(), generator)


def _fill(name: str, part: torch.Tensor, dims: int, generator: torch.Generator) -> None:
    expert = ".experts." in name
    if name.endswith("weight_scale_inv"):
        part.copy_(torch.full_like(part, EXPERT_SCALE if expert else FP8_SCALE, dtype=torch.float32))
    elif part.dtype in (torch.int8, torch.uint8):
        part.view(torch.uint8).random_(0, 256, generator=generator)
    elif not part.dtype.is_floating_point:
        return
    elif "norm" in name:
        part.fill_(1)
    else:
        drawn = torch.empty(part.shape, device=part.device).normal_(generator=generator)
        fp8 = part.dtype == torch.float8_e4m3fn
        if fp8 or "wo_a" in name:
            values = (drawn * FP8_STD).clamp(-448, 448).to(torch.float8_e4m3fn)
            drawn = values.float() * (1 if fp8 else FP8_SCALE)
        elif dims > 1:
            drawn *= FP8_STD * FP8_SCALE
        part.copy_(drawn)
