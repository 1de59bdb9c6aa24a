"""The checkpoint's tensors read onto the card by safetensors' own threads, in place of SGLang's mapped files.

SGLang's default loader maps the files, and whoever copies a tensor to the card waits for the disk, page by page. Here
threads of safetensors read ahead of that into pinned memory and on to the card (`safe_open.prefetch`), and SGLang's
`load_weights` takes its parts there, device to device. Tensors are read whole: of one that ranks share each reads all.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

SWITCH = "SGLANG_SM120_LOADER"
"""Variable that turns this on, with 1."""
DEVICE = "cuda"
"""Where safetensors' threads can put what they read."""
TARGET, DRAFT = "DeepseekV4ForCausalLM", "DeepseekV4ForCausalLMNextN"
PORTION = 1 << 30
"""Bytes that are asked for at once, and lie on the card until SGLang has taken them; a larger tensor is one portion."""
IN_FLIGHT = 2
"""Portions that are read or taken at a time."""
THREADS = 8
"""Threads that read one portion."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def wanted() -> bool:
    """Whether the variable asks for it.

    Raises:
        ValueError: it has another value than 0 and 1. SGLang logs what a plugin raises, and reads by itself.
    """
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {value!r} and needs 0 or 1.")
    return value == "1"


def serve() -> None:
    """Have SGLang's default loader hand out what `weights` gives; called by SGLang's plugin loader in each process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    place = "sglang.srt.model_loader.loader.DefaultModelLoader._get_all_weights"
    HookRegistry.register(place, weights, HookType.AROUND)


def weights(original: Callable[..., Any], loader: Any, model_config: Any, model: torch.nn.Module) -> Any:
    """Names and tensors of DeepSeek-V4 for a CUDA device; for all else what SGLang's loader gives."""
    config, kind = loader.load_config, type(model).__name__
    device = next(model.parameters()).device
    plain = config.load_format in ("auto", "safetensors") and config.draft_model_idx is None
    if kind not in (TARGET, DRAFT) or device.type != DEVICE or not plain:
        return original(loader, model_config, model)
    _, files, are_safetensors = loader._prepare_weights(model_config.model_path, model_config.revision, False)
    if not are_safetensors:
        return original(loader, model_config, model)
    return tensors(files, taken_by(model, drafts=kind == DRAFT), device)


def taken_by(model: torch.nn.Module, drafts: bool) -> Callable[[str], bool]:
    """Whether a rank's model takes the tensor of a name; of an MTP layer's tensors, the draft's alone.

    With expert parallelism the tensors of other ranks' experts are left out, unless SGLang may move experts; but for
    input scales, which it wants of all.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.runtime_context import get_exec

    moe = get_exec().moe
    moves = moe.enable_eplb or moe.ep_num_redundant_experts or moe.init_expert_location != "trivial"
    experts = None if moves else next((one for one in model.modules() if isinstance(one, FusedMoE)), None)

    def takes(name: str) -> bool:
        if name.startswith("mtp.") != drafts:
            return False
        found = None if name.endswith("input_scale") else _EXPERT.search(name)
        return not (found and experts) or experts._map_global_expert_id_to_local_expert_id(int(found[1])) >= 0

    return takes


def tensors(files: Sequence[str], takes: Callable[[str], bool], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, on `device`, of everything in these files that is taken; in no certain order.

    At most IN_FLIGHT portions lie on the device, and what the consumer keeps.

    Raises:
        ValueError: nothing in the files is taken.
    """
    portions = [(handle, names, size) for file in files for handle, names, size in _portions(file, takes)]
    if not portions:
        raise ValueError(f"{len(files)} files hold no tensor of this model by its published name: unset {SWITCH}.")
    total, began = sum(size for _, _, size in portions), time.monotonic()
    todo = iter(portions)
    flying: deque[Any] = deque()
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    try:
        shown = {"desc": "Reading weights", "unit": "B", "unit_scale": True, "mininterval": 1}
        with tqdm(total=total, disable=not is_first, **shown) as bar:
            while True:
                while len(flying) < IN_FLIGHT and (portion := next(todo, None)) is not None:
                    handle, names, _ = portion
                    flying.append(handle.prefetch(dict.fromkeys(names), device=str(device), threads=THREADS))
                if not flying:
                    break
                for name, tensor in flying[0]:
                    bar.update(tensor.nbytes)
                    yield name, tensor
                    del tensor  # or it would keep its portion's memory
                flying.popleft().close()
    finally:
        for one in flying:
            one.close()
    spent = time.monotonic() - began
    logger.info("sglang_sm120: %.2f GB of weights read in %.2f s, %.2f GB/s.", total / 1e9, spent, total / spent / 1e9)


def _portions(file: str, takes: Callable[[str], bool]) -> Iterator[tuple[Any, list[str], int]]:
    """An opened file, names of tensors of it that follow each other, and their bytes: together up to PORTION."""
    handle = safe_open(file, "pt", backend="pread")
    names: list[str] = []
    size = 0
    for name in filter(takes, handle.offset_keys()):
        first, end = handle.get_tensor_meta(name).data_offsets
        if names and size + end - first > PORTION:
            yield handle, names, size
            names, size = [], 0
        names.append(name)
        size += end - first
    if names:
        yield handle, names, size
