"""A DSpark drafter in plain PyTorch: a block of proposals from what the target's layers left, and what they are worth.

The drafter is a folder of its own beside the target's files, `dspark/`, with embedding and head of the target. It never
runs over the text: of each token it knows the mean of the target's streams after some layers, which becomes the keys
and values of its stages. A pass takes the last committed token, the anchor, and noise tokens after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sglang_sm120.checkpoint.config import DSPARK_FOLDER, HEAD_DIM, WINDOW

from .attention import Attention, rms_norm, rotation
from .blocks import Blocks
from .checkpoint import Checkpoint
from .config_file import load_dspark
from .oracle import Oracle


@dataclass
class Drafted:
    """Of A anchors, each with a block of G proposals.

    tokens int64 [A, G]. logits fp32 [A, G, V]: of which each token is the largest, given the one before it.
    confidence fp32 [A, G]: the probability that a token is accepted when those before it were, by the drafter.
    """

    tokens: Tensor
    logits: Tensor
    confidence: Tensor


class Drafter(Blocks):
    """The drafter in `directory`, by default the `dspark/` of the target's; it computes as its target does.

    Raises ValueError when it is none for this target.
    """

    def __init__(self, target: Oracle, directory: str | Path | None = None) -> None:
        folder = Path(directory or target.directory / DSPARK_FOLDER)
        weights = Checkpoint(folder, target._real, target._defect, str(target._device))
        super().__init__(weights, target._clamp_shared, target._real, target._round, target._defect)
        self.dspark = load_dspark(folder, target.config)
        self.config = self.dspark.stage(weights.config)
        self._target, self._device = target, target._device
        self._last = f"mtp.{self.dspark.stages - 1}."

    @torch.inference_mode()
    def context(self, captured: Mapping[int, Tensor]) -> list[Tensor]:
        """Each stage's keys [T, 512] of T tokens from position 0 on, from a `Result`'s streams [T, 4, H] after layers.

        Raises KeyError where a layer of the drafter's was not captured.
        """
        with self._device:
            means = [captured[i].to(self._device).mean(1) for i in self.dspark.target_layer_ids]
            x = self._linear(self._round(torch.cat(means, 1)), "mtp.0.main_proj")
            x = self._round(rms_norm(x, self._w("mtp.0.main_norm.weight"), self.config.rms_norm_eps))
            turn = rotation(self.config, 0, len(x), self._real)
            return [self._attention(stage).keys(x, turn) for stage in range(self.dspark.stages)]

    @torch.inference_mode()
    def drafts(self, context: Sequence[Tensor], tokens: Sequence[int], anchors: Sequence[int]) -> Drafted:
        """The proposals after the token at each of the positions `anchors`, with the context before it alone.

        Raises ValueError where an anchor lies before the first token of a context, or behind its end.
        """
        if not anchors or min(anchors) < 1 or max(anchors) > len(context[0]) or max(anchors) >= len(tokens):
            raise ValueError(f"the anchors {list(anchors)} need a token each and context before it: give 1 and more")
        with self._device:
            ids = torch.tensor([tokens[at] for at in anchors])
            drafted = self._block(context, ids, torch.tensor(anchors))
        return Drafted(*(part.cpu() for part in drafted))

    def replay(self, tokens: Sequence[int], prompt: int) -> list[int]:
        """What each verification of a greedy answer commits: the proposals that are right and the token after them.

        tokens: the prompt, of `prompt` tokens, and the target's own greedy answer, whose first token comes from the
        prefill. The mean of the result is SGLang's accepted length, the last verification cut at the answer's end.
        """
        result = self._target.forward(list(tokens), self.dspark.target_layer_ids)
        context, at, lengths = self.context(result.captured), prompt, []
        while at < len(tokens) - 1:
            proposed = self.drafts(context, tokens, [at]).tokens[0].tolist()
            following = tokens[at + 1 :]
            right = next(
                (n for n, (a, b) in enumerate(zip(proposed, following, strict=False)) if a != b), len(proposed)
            )
            lengths.append(min(right + 1, len(following)))
            at += lengths[-1]
        return lengths

    def _block(self, context: Sequence[Tensor], anchor_ids: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.dspark.block_size
        positions = anchors.unsqueeze(1) + torch.arange(size)
        ids = torch.full_like(positions, self.dspark.noise_token_id)
        ids[:, 0] = anchor_ids
        turn = rotation(self.config, 0, int(positions.max()) + 1, self._real)[positions.flatten()]
        streams = self._w("embed.weight")[ids.flatten()].unsqueeze(1).repeat(1, self.config.hc_mult, 1)
        for stage, keys in enumerate(context):
            prefix, attention = f"mtp.{stage}.", self._attention(stage)
            x, post, comb = self._mhc_pre(prefix, "attn", streams)
            out = self._attend(attention, x, turn, keys, anchors)
            streams, _ = self._experts(prefix, self._mhc_post(out, streams, post, comb), ids.flatten())
        x = self._collapsed(self._last, streams)
        base = self._logits(self._last, x).view(*ids.shape, -1).float()
        return self._chain(base, x.view(*ids.shape, -1), anchor_ids)

    def _attend(self, attention: Attention, x: Tensor, turn: Tensor, keys: Tensor, anchors: Tensor) -> Tensor:
        """x [A G, H], each block's rows, to [A G, H]: all rows see the window before the anchor, and all of the block.

        Its own rows' keys are of the stage's input, not of the target.
        """
        _, q = attention.queries(x, turn)
        before = anchors.unsqueeze(1) + torch.arange(-WINDOW, 0)
        own = attention.keys(x, turn).unflatten(0, (len(anchors), -1))
        values = torch.cat((keys[before.clamp(min=0)], own), 1)
        q = q.unflatten(0, (len(anchors), -1))
        logits = torch.einsum("aghd,akd->aghk", q, values) * HEAD_DIM**-0.5
        logits[..., :WINDOW].masked_fill_((before < 0)[:, None, None], -torch.inf)
        sink = attention.sink.expand(*logits.shape[:-1]).unsqueeze(-1)
        shares = torch.cat((logits, sink), -1).softmax(-1)[..., :-1]
        return attention.output(torch.einsum("aghk,akd->aghd", shares, values).flatten(0, 1), turn)

    def _chain(self, base: Tensor, x: Tensor, anchor_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, logits and confidence, one after another, of base logits [A, G, V] and their source x [A, G, H]."""
        embed, project = (self._w(f"{self._last}markov_head.markov_{w}.weight") for w in ("w1", "w2"))
        previous, tokens, logits, latents = anchor_ids, [], [], []
        for row in base.unbind(1):
            latents.append(embed[previous])
            logits.append(row + self._round(latents[-1] @ project.T).float())
            previous = logits[-1].argmax(-1)
            tokens.append(previous)
        confidence = torch.full(base.shape[:2], torch.nan)
        if self.dspark.confidence:
            features = torch.cat((x, torch.stack(latents, 1)), -1)
            confidence = (features @ self._w(f"{self._last}confidence_head.proj.weight").T).sigmoid().squeeze(-1)
        return torch.stack(tokens, 1), torch.stack(logits, 1), confidence.float()

    def _attention(self, stage: int) -> Attention:
        return Attention(
            self._weights, f"mtp.{stage}.attn.", 0, self._real, self._round, self._defect, 0.0, hide_entries=False
        )

    def _w(self, name: str) -> Tensor:
        return self._target._w(name) if name in ("embed.weight", "head.weight") else super()._w(name)
