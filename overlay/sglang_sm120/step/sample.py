"""What SGLang's sampler asks the package: one token a request, where no probability is needed."""

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
    if logits.device not in _devices or info.sampling_seed is not None or info.sampling_mask_batch_indices is not None:
        return None
    from .. import ops

    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).exponential_()
    return ops.sample_token(logits, info.temperatures, noise)
