"""DeepSeek-V4 over a whole prompt in plain PyTorch, straight from the checkpoint files.

The model in one place, without pages, batches or parallelism: what a server's log-probabilities are judged
against. Activations are rounded to bf16 where a server stores them, everything in between is `real` (fp32).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .attention import Attention, IndexMargin, Rounding, rms_norm
from .blocks import Blocks, to_bf16
from .checkpoint import Checkpoint
from .defects import Defect

LOGPROB_TOLERANCE = 0.05
"""How far a correct implementation's log-probability of a next token may lie from the oracle's.

Roundings to bf16 and FP8 that fall the other way add up. Measured on the small checkpoint, five prompts of 2,600
tokens: the oracle in float64 differs by at most 0.025, with an error of 2^-20 before every rounding by 0.036.
The defects of `Defect` differ by ten tolerances and more.
"""

ROUTER_GAP = 0.02
"""Relative distance of choices 6 and 7 up to which rounding may swap them: it moved the distance by 0.0125."""

INDEX_BAND = 0.06
"""Relative distance from the indexer's threshold up to which rounding may select or drop an entry.

Scores are sums of clipped FP8 dot products: of the entries that changed sides 99 % lay within 0.04.
"""

INDEX_STAKE = 0.1
"""Share of a head's softmax within INDEX_BAND from which on another selection may show.

Below it, scores with an error of 3 % (RMS) moved no log-probability by more than 0.012.
"""


@dataclass
class Result:
    """One forward pass over T tokens.

    logprobs fp32 [T, V]: log-softmax after each token. hidden [T, 4, H]: the residual streams that enter the
    LM head; captured: those after each layer asked for, by its number. router_gap [T]: smallest (choice 6 -
    choice 7) / |choice 6| of score + bias over the scored layers. index_gap, index_stake [T]: the indexer's
    margins (`attention.IndexMargin`), worst c4 layer.
    """

    logprobs: Tensor
    hidden: Tensor
    router_gap: Tensor
    index_gap: Tensor
    index_stake: Tensor
    captured: dict[int, Tensor]

    def decided(self) -> Tensor:
        """bool [T]: where a correct implementation must agree within LOGPROB_TOLERANCE.

        Elsewhere rounding alone may choose another expert, or another compressed entry that attention would
        look at.
        """
        return (self.router_gap > ROUTER_GAP) & (self.index_stake < INDEX_STAKE)


class Oracle(Blocks):
    """The model of one checkpoint directory.

    clamp_shared: clamp the shared expert like the routed ones, as SGLang does; the published reference does
    not. hide_c4: attention sees no c4 entries, so that c128 entries alone tell what lies behind the window.
    defect: make this one mistake. real: dtype of the arithmetic between roundings. rounding: replaces the
    rounding to bf16; keeps the dtype. device: where it computes; results are on the CPU.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        clamp_shared: bool = True,
        hide_c4: bool = False,
        defect: Defect | None = None,
        real: torch.dtype = torch.float32,
        rounding: Rounding = to_bf16,
        device: str = "cpu",
    ) -> None:
        super().__init__(Checkpoint(directory, real, defect, device), clamp_shared, real, rounding, defect)
        self.directory, self._device = Path(directory), torch.device(device)
        self._hide_c4 = hide_c4

    @torch.inference_mode()
    def forward(self, token_ids: list[int] | Tensor, capture: Collection[int] = ()) -> Result:
        """The model over one prompt; `capture` lists the layers after which the streams are wanted.

        Raises ValueError when the prompt is empty or holds an id out of range.
        """
        with self._device:
            result = self._forward(self._ids(token_ids).to(self._device), capture)
        parts = {name: part.cpu() for name, part in vars(result).items() if isinstance(part, Tensor)}
        return replace(result, **parts, captured={layer: x.cpu() for layer, x in result.captured.items()})

    @torch.inference_mode()
    def mtp_logits(self, hidden: Tensor, next_tokens: list[int] | Tensor) -> Tensor:
        """Logits [T, V] of the MTP layer: `hidden` of a Result and the token that follows each position.

        Raises ValueError when the checkpoint has no MTP layer, or the tokens are not T ids in range.
        """
        if "mtp.0.e_proj.weight" not in self._weights:
            raise ValueError("the checkpoint has no MTP layer: write one with num_nextn_predict_layers 1")
        tokens = self._ids(next_tokens)
        if len(tokens) != len(hidden):
            raise ValueError(f"{len(tokens)} next_tokens came with {len(hidden)} positions: pass one for each")
        with self._device:
            return self._mtp(hidden.to(self._device), tokens.to(self._device)).cpu()

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """The n most probable next tokens, one after the other; a full forward pass each."""
        tokens = list(prompt)
        for _ in range(n):
            tokens.append(int(self.forward(tokens).logprobs[-1].argmax()))
        return tokens[len(prompt) :]

    def _forward(self, tokens: Tensor, capture: Collection[int]) -> Result:
        streams = self._w("embed.weight")[tokens].unsqueeze(1).repeat(1, self.config.hc_mult, 1)
        router_gap = torch.full((len(tokens),), math.inf)
        index = IndexMargin(router_gap.clone(), torch.zeros(len(tokens)))
        captured: dict[int, Tensor] = {}
        for layer in range(self.config.num_hidden_layers):
            ratio = self.config.compress_ratios[layer]
            streams, gap, margin = self._layer(f"layers.{layer}.", ratio, streams, tokens)
            router_gap = torch.minimum(router_gap, gap)
            index.gap = torch.minimum(index.gap, margin.gap)
            index.stake = torch.maximum(index.stake, margin.stake)
            if layer in capture:
                captured[layer] = streams
        logits = self._head("", streams)
        return Result(logits.float().log_softmax(-1), streams, router_gap, index.gap, index.stake, captured)

    def _mtp(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        eps = self.config.rms_norm_eps
        e = self._round(rms_norm(self._w("embed.weight")[tokens], self._w("mtp.0.enorm.weight"), eps))
        h = self._round(rms_norm(hidden, self._w("mtp.0.hnorm.weight"), eps))
        projected = self._linear(e, "mtp.0.e_proj").unsqueeze(1)
        streams = self._round(projected + self._linear(h, "mtp.0.h_proj"))
        streams, _, _ = self._layer("mtp.0.", 0, streams, tokens)
        return self._head("mtp.0.", streams)

    def _ids(self, token_ids: list[int] | Tensor) -> Tensor:
        tokens = torch.as_tensor(token_ids, dtype=torch.int64)
        if tokens.numel() == 0 or tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"the prompt needs one or more ids in 0 .. {self.config.vocab_size - 1}")
        return tokens

    def _layer(self, prefix: str, ratio: int, streams: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, IndexMargin]:
        hide = self._hide_c4 and ratio == 4
        attention = Attention(
            self._weights, prefix + "attn.", ratio, self._real, self._round, self._defect, INDEX_BAND, hide_entries=hide
        )
        x, post, comb = self._mhc_pre(prefix, "attn", streams)
        out, margin = attention(x)
        streams, gap = self._experts(prefix, self._mhc_post(out, streams, post, comb), tokens)
        return streams, gap, margin
