"""The MTP layer that proposes tokens: the next token's embedding joined with the target's streams, then one layer.

On a GPU SGLang's own forward drafts, which cannot run on a CPU, nor where the experts lie in another card's layout.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
from . import weights
from .metadata import Pass
from .prepare import prepare
from .target import head, through


class Draft:
    """The forward of one loaded `DeepseekV4ForCausalLMNextN`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = prepare(model)
        self._head = weights.head_of(model.model, model.model.rms_norm_eps)
        self._of_token = weights.linear_of(model.model.e_proj)
        self._of_streams = weights.linear_of(model.model.h_proj)

    def __call__(self, view: Any, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        """SGLang's `LogitsProcessorOutput`; the batch's `spec_info` holds the target's streams bf16 [T, 4H].

        x_j = W_e norm(embed(token)) + W_h norm(X_j)  for each stream j
        """
        model, draft = self._model, self._model.model
        token, norm = draft.embed_tokens(input_ids), draft.enorm
        of_token = ops.fp8_linear(token, *self._of_token, norm.weight, norm.variance_epsilon)
        before = forward_batch.spec_info.hidden_states.view(*token.shape[:1], -1, token.shape[1])
        of_streams = ops.fp8_linear(before, *self._of_streams, draft.hnorm.weight, draft.hnorm.variance_epsilon)
        at = Pass(view, forward_batch, positions)
        x, _ = through(self._layers, of_token.unsqueeze(1) + of_streams, at, input_ids)
        return model.logits_processor(
            input_ids,
            draft.shared_head.norm(head(self._head, x)),
            model.lm_head,
            forward_batch,
            hidden_states_before_norm=x.flatten(1),
        )
