"""The target model's forward: embedding, four residual streams through all layers, head, SGLang's logits processor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from .. import ops
from ..streams import IN_ORDER, Beside, prioritised
from . import weights
from .attention import attention
from .experts import experts
from .metadata import Pass
from .prepare import prepare

STREAMS = 4


class Target:
    """The forward of one loaded `DeepseekV4ForCausalLM`, on this rank's weights."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = prepare(model)
        self._head = weights.head_of(model.model, model.model.norm_eps)
        # SGLang has some where its own forward runs parts beside each other.
        self._streams = prioritised() if model.model.alt_streams else []

    def __call__(self, view: Any, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        """SGLang's `LogitsProcessorOutput` for input_ids int [T] at positions int [T].

        EAGLE gets the streams before the head, DSpark the means of the streams after the layers it asked for.
        """
        from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode

        model = self._model
        captured = model.model.dspark_layers_to_capture
        x = model.model.embed_tokens(input_ids).unsqueeze(1).repeat(1, STREAMS, 1)
        # As SGLang's own forward: beside each other in the graphs alone.
        beside = Beside(self._streams) if get_is_capture_mode() else IN_ORDER
        at = Pass(view, forward_batch, positions, beside)
        x, means = through(self._layers, x, at, input_ids, captured or ())
        hidden = model.model.norm(head(self._head, x))
        return model.logits_processor(
            input_ids,
            hidden,
            model.lm_head,
            forward_batch,
            torch.cat(means, dim=-1) if captured is not None else None,
            hidden_states_before_norm=x.flatten(1) if captured is None else None,
        )


def through(
    layers: Sequence[weights.Layer], x: torch.Tensor, at: Pass, input_ids: torch.Tensor, captured: Collection[int] = ()
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The streams bf16 [T, 4, H] after all layers, and their mean bf16 [T, H] after each of the layers `captured`.

    Each block enters and leaves the streams by x ← post f + combᵀ x; leaving one and entering the next is one op.
    """
    from sglang.srt.layers.moe.utils import post_experts_all_reduce
    from sglang.srt.runtime_context import get_parallel

    of_attention = get_parallel().attn_tp_group
    means: list[torch.Tensor] = []
    f = post = comb = None
    for index, layer in enumerate(layers):
        fn, scale, base, options = layer.attention_mix
        if f is None:
            y, post, comb = ops.mhc_pre(x, fn, scale, base, **options)
        else:
            x, y, post, comb = ops.mhc_post_pre(f, x, post, comb, fn, scale, base, **options)
            if index - 1 in captured:
                means.append(_mean(x))
        f = of_attention.all_reduce(attention(layer.attention, y, at))
        fn, scale, base, options = layer.experts_mix
        x, y, post, comb = ops.mhc_post_pre(f, x, post, comb, fn, scale, base, **options)
        f = post_experts_all_reduce(experts(layer.experts, y, input_ids, at.beside))
    x = ops.mhc_post(f, x, post, comb)
    if len(layers) - 1 in captured:
        means.append(_mean(x))
    return x, means


def head(h: weights.Mix, x: torch.Tensor) -> torch.Tensor:
    """The streams' weighted sum bf16 [T, H], which the final norm follows."""
    return ops.mhc_head(x, h.fn, h.scale, h.base, **h.options)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.float().mean(1).to(x.dtype)
