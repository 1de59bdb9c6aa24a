"""What SGLang's samplers ask the package: one token a row of logits, where no probability is needed."""

from __future__ import annotations

from typing import Any

import torch

_devices: set[torch.device] = set()


def serve(device: torch.device) -> None:
    """From now on `sampled` draws from logits on `device`, whose kernels are ready.

    Not where SGLang is told to draw otherwise than by Gumbel's maxima.
    """
    from sglang.srt.environ import envs

    if envs.SGLANG_OPT_USE_GUMBEL_SAMPLE.get():
        _devices.add(device)


def sampled(logits: torch.Tensor, info: Any) -> torch.Tensor | None:
    """A token a row of logits fp32 [T, V], int32 [T], or None: SGLang is to draw.

    It draws where nothing is served here, with seeds, and when a request wants to know the tokens that could be drawn.

    Args:
        info: SGLang's `SamplingBatchInfo` of a batch without top-k, top-p and min-p.
    """
    return _drawn(logits, info) if _draws(logits, info) else None


def drawn_targets(logits: torch.Tensor, info: Any) -> torch.Tensor | None:
    """The target's token behind each node of a verification, int64 [T], or None: SGLang is to verify.

    Drawn ones, rank 0's: drafts that are these are accepted. The token behind a node is then its draft d with the
    target's probability p(d), and each other token t with p(t), as after SGLang's
    `tree_speculative_sampling_target_only` of a chain with both thresholds at 1.

    Args:
        logits: fp32 [T, V], T / B rows a request.
        info: SGLang's `SamplingBatchInfo` of B requests.
    """
    if not _draws(logits, info) or info.is_all_greedy or info.need_top_k_sampling or info.need_top_p_sampling:
        return None
    from sglang.srt.runtime_context import get_parallel, get_spec

    spec = get_spec()
    thresholds = (spec.speculative_accept_threshold_single, spec.speculative_accept_threshold_acc)
    if thresholds != (1, 1) or spec.speculative_eagle_topk != 1 or spec.speculative_use_rejection_sampling:
        return None
    return get_parallel().tp_group.broadcast(_drawn(logits, info).long(), src=0)


def _draws(logits: torch.Tensor, info: Any) -> bool:
    return logits.device in _devices and info.sampling_seed is None and info.sampling_mask_batch_indices is None


def _drawn(logits: torch.Tensor, info: Any) -> torch.Tensor:
    from .. import ops

    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).exponential_()
    return ops.sample_token(logits, info.temperatures, noise)
