"""What SGLang's memory pool asks the package after a verification: the refused drafts' states cleared in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from ..ops.clear_draft_states import Layers

_devices: set[torch.device] = set()
_read: WeakKeyDictionary[Any, tuple[Layers, int]] = WeakKeyDictionary()


def serve(device: torch.device) -> None:
    """From now on `clear_draft_states` clears the states of pools on `device`, whose kernel is ready."""
    _devices.add(device)


def clear_draft_states(
    pool: Any, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, accept_lens: torch.Tensor, num_draft_tokens: int
) -> bool:
    """Clear refused drafts' states in every ratio-128 layer of SGLang's pool, or say False: SGLang is to do it.

    The arguments are those of the pool's `clear_unaccepted_c128_draft_states`, the lengths those of `ops`'.

    Raises:
        ValueError: the layers' rings are not alike, in one sentence.
    """
    if req_pool_indices.device not in _devices:
        return False
    from .. import ops

    if pool not in _read:
        if (found := _layers(pool)) is None:
            return False
        _read[pool] = found
    layers, ring_size = _read[pool]
    ops.clear_draft_states(layers, req_pool_indices, seq_lens, accept_lens, ring_size, num_draft_tokens)
    return True


def _layers(pool: Any) -> tuple[Layers, int] | None:
    """The ratio-128 layers' states and the slots of a ring, which stay where they are while the pool lives."""
    from ..ops.clear_draft_states import Layers

    states = [states for states in pool.compress_state_pools if states is not None and states.ratio == 128]
    if not states:
        return None
    rings = sorted({of_layer.ring_size for of_layer in states})
    if len(rings) > 1:
        raise ValueError(f"The rings of ratio 128 have {', '.join(map(str, rings))} slots and need equally many.")
    return Layers.of([of_layer.kv_score_buffer.kv_score for of_layer in states]), rings[0]
