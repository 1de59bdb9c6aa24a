"""What proposes tokens: the MTP layer, the next token's embedding joined with the target's streams, or DSpark's stages.

Each proposal is verified by the target, so that its head may be rounded: it has the target's in FP8, half the bytes of
the largest weight that a proposal reads.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
from ..formats import e8m0, fp8_block
from . import weights
from .metadata import Pass
from .prepare import prepare
from .target import STREAMS, head, through

ROWS = 8 * fp8_block.BLOCK


class Vocabulary:
    """A head in FP8 blocks, as SGLang's logits processor takes one that has a quantisation of its own."""

    def __init__(self) -> None:
        self._source: torch.Tensor | None = None

    def of(self, lm_head: Any) -> Vocabulary:
        """For this head of SGLang's, bf16 [V, H]. It is the target's, put there after the draft was built.

        Raises:
            RuntimeError: it is another one than before while a CUDA graph is captured.
        """
        if lm_head.weight is not self._source:
            if lm_head.weight.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("sglang_sm120 met the draft's head first in a CUDA graph, needed a pass before it.")
            # In parts, whose fp32 copies are small beside the head.
            parts = [fp8_block.quantise(rows) for rows in lm_head.weight.split(ROWS)]
            self.weight = torch.cat([weight for weight, _ in parts])
            self.scale = torch.cat([e8m0.to_float(scale) for _, scale in parts])
            self._source = lm_head.weight
        return self

    @property
    def quant_method(self) -> Vocabulary:
        """Where SGLang looks for `apply`."""
        return self

    def apply(self, head: Vocabulary, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Logits bf16 [T, V] of x bf16 [T, H]."""
        return ops.fp8_linear(x, self.weight, self.scale)


class Draft:
    """The forward of one loaded `DeepseekV4ForCausalLMNextN`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = prepare(model)
        self._head = weights.head_of(model.model, model.model.rms_norm_eps)
        self._of_token = weights.linear_of(model.model.e_proj)
        self._of_streams = weights.linear_of(model.model.h_proj)
        self._vocabulary = Vocabulary()

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
            self._vocabulary.of(model.lm_head),
            forward_batch,
            hidden_states_before_norm=x.flatten(1),
        )


class Stages:
    """The forward of one loaded `DeepseekV4ForCausalLMDSpark`; the target's states, head and chain are SGLang's."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = prepare(model)

    def __call__(self, view: Any, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        """SGLang's `LogitsProcessorOutput` with the streams bf16 [T, 4, H] of blocks of T rows together.

        The pass's window has the context and all rows of a row's own block, whose keys are stored before attention.
        """
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        x = self._model.embed_tokens(input_ids).unsqueeze(1).repeat(1, STREAMS, 1)
        x, _ = through(self._layers, x, Pass(view, forward_batch, positions), input_ids)
        return LogitsProcessorOutput(next_token_logits=None, hidden_states=x)
