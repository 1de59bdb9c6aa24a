"""DeepSeek-V4 on a CPU: the server's settings, and torch twins of SGLang's kernels that make the attention metadata."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from ..limits import CPU_SERVER, EAGLE, require_kept

logger = logging.getLogger(__name__)

# SGLang's choices of kernels that a CPU does not have. The schedulers inherit them.
_SWITCHES = {
    "SGLANG_FP8_PAGED_MQA_LOGITS_TORCH": "1",
    "SGLANG_OPT_DEEPGEMM_HC_PRENORM": "0",
    "SGLANG_OPT_FP8_WO_A_GEMM": "0",
    "SGLANG_OPT_USE_TILELANG_MHC_PRE": "0",
    "SGLANG_OPT_USE_TOPK_V2": "0",
    # Compiling a draft step takes longer than a demo.
    "TORCHDYNAMO_DISABLE": "1",
}


def cpu_defaults(server_args: Any) -> dict[str, object]:
    """Set the environment that the schedulers inherit; return the server arguments to use.

    Args:
        server_args: SGLang's `ServerArgs`, whose fields are what the user gave.

    Raises:
        ValueError: SGLang's engine for CPUs is asked for, speculation that a CPU does not serve, or more draft tokens
            than a rejection can take back.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        raise ValueError("SGLANG_USE_CPU_ENGINE is 1, whose packed weights the step cannot read: unset it.")
    require_kept(server_args.speculative_num_draft_tokens)
    algorithm = server_args.speculative_algorithm
    if (algorithm or EAGLE[0]).upper() not in EAGLE:
        raise ValueError(f"speculative_algorithm is {algorithm}, but a CPU serves EAGLE only: use it or leave it out.")
    if server_args.speculative_use_rejection_sampling:
        raise ValueError("--speculative-use-rejection-sampling needs a GPU: leave it out, EAGLE samples without it.")
    for name, value in _SWITCHES.items():
        found = os.environ.get(name)
        if found is not None and found != value:
            logger.warning("%s=%s is replaced by %s: on a CPU sglang_sm120 serves DeepSeek-V4.", name, found, value)
        os.environ[name] = value
    cores = cores_of_ranks(server_args.tp_size)
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, cpus)) for cpus in cores))
    # More threads than cores make OpenMP's barriers spin against each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(min(map(len, cores))))
    defaults = {name: value for name, value in CPU_SERVER.items() if getattr(server_args, name) in (None, False)}
    # There is nothing to capture, and EAGLE looks for its device's graphs.
    graphs = with_phase(resolving_view(server_args).cuda_graph_config, Phase.DECODE, backend=Backend.DISABLED)
    return {**defaults, "cuda_graph_config": graphs}


def cores_of_ranks(tp_size: int) -> list[list[int]]:
    """CPU ids for each rank, equally many; ranks share cores when there are fewer cores than ranks."""
    cpus = sorted(os.sched_getaffinity(0))
    share = max(1, len(cpus) // tp_size)
    return [[cpus[(rank * share + i) % len(cpus)] for i in range(share)] for rank in range(tp_size)]


def cpu_compression_metadata(
    seq_lens: torch.Tensor,
    positions: torch.Tensor,
    out_slots: torch.Tensor,
    page_table: torch.Tensor | None,
    page_size: int,
    with_slots: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Where each row's finished blocks of 4 and of 128 tokens go, and which entries of 128 it sees.

    Args:
        seq_lens: int32 [T], tokens that a row sees, itself included.
        positions: int32 [T], one less.
        out_slots: int [<= T], the rows' own slots in the full pool.
        page_table: int32 [T, P], pages of `page_size` tokens of the row's request; read with `with_slots` only.

    Returns:
        For ratio 4, then 128: slots int64 of out_slots' shape (0 where no block ends), the block's first position, how
        many entries the row sees, and that number or 1 if larger, int32 [T] each; then slots int32 [T, P * page_size
        / 128] of ratio 128, -1 behind the last entry, or None. As SGLang's `init_compression_metadata`.
    """
    result: list[torch.Tensor | None] = []
    for ratio in (4, 128):
        ends = seq_lens[: len(out_slots)] % ratio == 0
        count = (seq_lens // ratio).int()
        slots = torch.where(ends, out_slots.long() // ratio, 0)
        result += [slots, (positions // ratio * ratio).int(), count, count.clamp(min=1)]
    if not with_slots or page_table is None:
        return (*result, None)
    entries = page_size // 128
    slots = (page_table.unsqueeze(-1) * entries + torch.arange(entries, dtype=torch.int32)).flatten(1)
    seen = torch.arange(slots.shape[1]) < (seq_lens // 128).unsqueeze(1)
    return (*result, torch.where(seen, slots, -1).int())
