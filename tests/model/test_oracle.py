"""The oracle against a second reading of the model: numbers worked on paper, and the equations in plain loops."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from serving import CachedOracle, PromptOf
from torch import Tensor

from sglang_sm120.checkpoint.config import ReferenceConfig
from sglang_sm120_reference.attention import rotation
from sglang_sm120_reference.blocks import sinkhorn
from sglang_sm120_reference.checkpoint import Checkpoint
from sglang_sm120_reference.oracle import INDEX_BAND, INDEX_STAKE, ROUTER_GAP, Oracle, Result
from sglang_sm120_reference.write import write_checkpoint

# So narrow that the indexer chooses within a prompt of 140 tokens.
NARROW = 8


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Oracle:
    """The oracle without roundings, in float64, and with a narrow indexer: what equations alone give."""
    oracle = Oracle(checkpoint, real=torch.float64, rounding=lambda x: x)
    object.__setattr__(oracle.config, "index_topk", NARROW)  # the config accepts the published widths only
    return oracle


def test_sinkhorn_by_hand() -> None:
    # exp: (1 1; 3 1). Rows: 1/2 1/2; 3/4 1/4. Columns sum to 5/4, 3/4: 2/5 2/3; 3/5 1/3.
    # Rows sum to 16/15, 14/15: 3/8 5/8; 9/14 5/14. Columns sum to 57/56, 55/56: 7/19 7/11; 12/19 4/11.
    logits = torch.tensor([[1.0, 1], [3, 1]]).log()
    torch.testing.assert_close(sinkhorn(logits, 1, 0.0), torch.tensor([[2 / 5, 2 / 3], [3 / 5, 1 / 3]]))
    torch.testing.assert_close(sinkhorn(logits, 2, 0.0), torch.tensor([[7 / 19, 7 / 11], [12 / 19, 4 / 11]]))


def test_sinkhorn_eps_by_hand() -> None:
    # Softmax 1/2, + 1 = 3/2; columns / (3 + 1) = 3/8; rows / (3/4 + 1) = 3/14; columns / (3/7 + 1) = 3/20.
    torch.testing.assert_close(sinkhorn(torch.zeros(2, 2), 1, 1.0), torch.full((2, 2), 3 / 8))
    torch.testing.assert_close(sinkhorn(torch.zeros(2, 2), 2, 1.0), torch.full((2, 2), 3 / 20))


def _reader(folder: Path, checkpoint: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    """A checkpoint of these tensors only."""
    shutil.copy(checkpoint / "config.json", folder)
    save_file(tensors, folder / "one.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Checkpoint(folder, torch.float32, None)


def test_mxfp4_weight_by_hand(tmp_path: Path, checkpoint: Path) -> None:
    # Low nibble first. 0 … 7 are 0 .5 1 1.5 2 3 4 6, 8 … F their negatives; scale byte 128 is 2, 126 is 1/2.
    row = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2
    weight = torch.tensor([row + 16 * [0x2F]], dtype=torch.uint8).view(torch.int8)
    scale = torch.tensor([[128, 126]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = _reader(tmp_path, checkpoint, {"w.weight": weight, "w.scale": scale}).weight("w.weight")
    first = [0.0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
    assert values.tolist() == [first + first + 16 * [-3, 0.5]]


def test_fp8_weight_by_hand(tmp_path: Path, checkpoint: Path) -> None:
    # Column 128 begins the second block: scale byte 126 is 1/2, 129 is 4. 38 is 1, C0 -2, 7E 448, 01 2^-9.
    weight = torch.zeros(1, 130, dtype=torch.uint8)
    weight[0, :2] = torch.tensor([0x38, 0xC0])
    weight[0, 128:] = torch.tensor([0x7E, 0x01])
    scale = torch.tensor([[126, 129]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors = {"w.weight": weight.view(torch.float8_e4m3fn), "w.scale": scale}
    values = _reader(tmp_path, checkpoint, tensors).weight("w.weight")
    assert values[0, :3].tolist() == [0.5, -1, 0]
    assert values[0, 127:].tolist() == [0, 1792, 2**-7]


def test_missing_tensor_is_named(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(KeyError, match="no tensor absent.weight"):
        _reader(tmp_path, checkpoint, {"w": torch.zeros(1)}).weight("absent.weight")


class Naive:
    """DeepSeek-V4 once more, token by token and head by head in float64, with no part of the oracle.

    Log-probabilities after each token; the margins that come with them. Only what a cache holds is rounded.
    """

    def __init__(self, checkpoint: Path, index_topk: int, shared_limit: float = 10) -> None:
        self.config = json.loads((checkpoint / "config.json").read_text())
        self.index_topk, self.shared_limit = index_topk, shared_limit
        self.stored: dict[str, Tensor] = {}
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                self.stored |= {name: file.get_tensor(name) for name in file.keys()}
        self.w = functools.cache(self._weight)

    def _weight(self, name: str) -> Tensor:
        stored, scale = self.stored[name], self.stored.get(name.replace(".weight", ".scale"))
        if stored.dtype == torch.int8:
            assert scale is not None
            magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
            e2m1 = torch.tensor(magnitudes + [-m for m in magnitudes], dtype=torch.float64)
            values = torch.empty(stored.shape[0], 2 * stored.shape[1], dtype=torch.float64)
            values[:, 0::2], values[:, 1::2] = e2m1[stored.int() & 15], e2m1[stored.int() >> 4 & 15]
            return values * self._power(scale).repeat_interleave(32, 1)
        if stored.dtype == torch.float8_e4m3fn:
            assert scale is not None
            return stored.double() * self._power(scale).repeat_interleave(128, 0).repeat_interleave(128, 1)
        return stored.double()

    @staticmethod
    def _power(scale: Tensor) -> Tensor:
        return torch.exp2(scale.view(torch.uint8).double() - 127)

    def forward(self, tokens: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities [T, V] and each token's residual streams [4, H] before the head."""
        n = len(tokens)
        self.router_gap, self.index_gap, self.stake = [math.inf] * n, [math.inf] * n, [0.0] * n
        streams = [torch.stack(4 * [self.w("embed.weight")[t]]) for t in tokens]
        for layer in range(self.config["num_hidden_layers"]):
            streams = self.layer(f"layers.{layer}.", self.config["compress_ratios"][layer], streams, tokens)
        return torch.stack([self.head("", x) for x in streams]).log_softmax(-1), streams

    def mtp(self, streams: list[Tensor], following: list[int]) -> Tensor:
        mixed = []
        for x, token in zip(streams, following, strict=True):
            e = self.w("mtp.0.e_proj.weight") @ norm(self.w("embed.weight")[token], self.w("mtp.0.enorm.weight"))
            h = [self.w("mtp.0.h_proj.weight") @ norm(x[j], self.w("mtp.0.hnorm.weight")) for j in range(4)]
            mixed.append(torch.stack([e + h[j] for j in range(4)]))
        return torch.stack([self.head("mtp.0.", x) for x in self.layer("mtp.0.", 0, mixed, following)])

    def layer(self, p: str, ratio: int, streams: list[Tensor], tokens: list[int]) -> list[Tensor]:
        for block in ("attn", "ffn"):
            mixed = [self.mix(f"{p}hc_{block}_", x) for x in streams]
            inputs = [norm(x, self.w(f"{p}{block}_norm.weight")) for x, _, _ in mixed]
            if block == "attn":
                outputs = self.attention(p + "attn.", ratio, inputs)
            else:
                outputs = [self.moe(p + "ffn.", t, x, tokens[t]) for t, x in enumerate(inputs)]
            streams = [
                torch.stack([post[k] * f + sum(comb[j, k] * x[j] for j in range(4)) for k in range(4)])
                for x, f, (_, post, comb) in zip(streams, outputs, mixed, strict=True)
            ]
        return streams

    def mixes(self, p: str, x: Tensor) -> Tensor:
        v = x.reshape(-1)
        return self.w(p + "fn") @ v / torch.sqrt((v * v).mean() + 1e-6)

    def mix(self, p: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m, s, b = self.mixes(p, x), self.w(p + "scale"), self.w(p + "base")
        pre = torch.sigmoid(m[:4] * s[0] + b[:4]) + 1e-6
        post = 2 * torch.sigmoid(m[4:8] * s[1] + b[4:8])
        c = (m[8:] * s[2] + b[8:]).reshape(4, 4)
        comb = c.exp() / c.exp().sum(1, keepdim=True) + 1e-6
        comb = comb / (comb.sum(0, keepdim=True) + 1e-6)
        for _ in range(19):
            comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
            comb = comb / (comb.sum(0, keepdim=True) + 1e-6)
        return sum((pre[j] * x[j] for j in range(4)), torch.zeros_like(x[0])), post, comb

    def head(self, p: str, x: Tensor) -> Tensor:
        weights = torch.sigmoid(
            self.mixes(p + "hc_head_", x) * self.w(p + "hc_head_scale") + self.w(p + "hc_head_base")
        )
        y = sum(((weights[j] + 1e-6) * x[j] for j in range(4)), torch.zeros_like(x[0]))
        return self.w("head.weight") @ norm(y, self.w(p + "norm.weight"))

    def attention(self, p: str, ratio: int, xs: list[Tensor]) -> list[Tensor]:
        heads = self.config["num_attention_heads"]
        qr = [norm(self.w(p + "wq_a.weight") @ x, self.w(p + "q_norm.weight")) for x in xs]
        kv = [norm(self.w(p + "wkv.weight") @ x, self.w(p + "kv_norm.weight")) for x in xs]
        keys = [stored_kv(turned(v, t, ratio)) for t, v in enumerate(kv)]
        entries = [stored_kv(v) for v in self.compressed(p + "compressor.", ratio, 512, xs)] if ratio else []
        index_keys = (
            [stored_index(hadamard(v)) for v in self.compressed(p + "indexer.compressor.", 4, 128, xs)]
            if ratio == 4
            else []
        )
        outputs = []
        for t, x in enumerate(xs):
            complete = (t + 1) // ratio if ratio else 0
            chosen = list(range(complete))
            close: list[int] = []
            if ratio == 4 and complete > self.index_topk:
                chosen, close = self.indexed(p + "indexer.", t, x, qr[t], index_keys[:complete])
            seen = torch.stack(keys[max(0, t - 127) : t + 1] + [entries[e] for e in chosen])
            queries = (self.w(p + "wq_b.weight") @ qr[t]).reshape(heads, 512)
            o, share = [], torch.zeros(len(close), dtype=torch.float64)
            for h in range(heads):
                q = turned(norm(queries[h]), t, ratio)
                s = seen @ q / math.sqrt(512)
                sink = self.w(p + "attn_sink")[h]
                total = s.exp().sum() + sink.exp()
                o.append(turned((s.exp() / total) @ seen, t, ratio, -1))
                for i, e in enumerate(close):
                    share[i] = max(share[i], (q @ entries[e] / math.sqrt(512)).exp() / total)
            self.stake[t] = max(self.stake[t], float(share.sum()))
            groups = torch.cat(o).reshape(self.config["o_groups"], -1)
            ranks = self.w(p + "wo_a.weight").reshape(len(groups), self.config["o_lora_rank"], -1)
            low = torch.cat([rank @ group for rank, group in zip(ranks, groups, strict=True)])
            outputs.append(self.w(p + "wo_b.weight") @ low)
        return outputs

    def compressed(self, p: str, ratio: int, dim: int, xs: list[Tensor]) -> list[Tensor]:
        kv = [self.w(p + "wkv.weight") @ x for x in xs]
        gate = [self.w(p + "wgate.weight") @ x + self.w(p + "ape")[t % ratio] for t, x in enumerate(xs)]
        entries = []
        for first in range(0, len(xs) - ratio + 1, ratio):
            block = range(first, first + ratio)
            if ratio == 4:
                before = range(max(0, first - 4), first)
                g = torch.stack([gate[t][:dim] for t in before] + [gate[t][dim:] for t in block])
                v = torch.stack([kv[t][:dim] for t in before] + [kv[t][dim:] for t in block])
            else:
                g, v = torch.stack([gate[t] for t in block]), torch.stack([kv[t] for t in block])
            pooled = (g.exp() / g.exp().sum(0) * v).sum(0)
            entries.append(turned(norm(pooled, self.w(p + "norm.weight")), first, ratio))
        return entries

    def indexed(self, p: str, t: int, x: Tensor, qr: Tensor, keys: list[Tensor]) -> tuple[list[int], list[int]]:
        """The entries with the best scores, and those within the band of the threshold."""
        heads = self.config["index_n_heads"]
        queries = (self.w(p + "wq_b.weight") @ qr).reshape(heads, 128)
        q = [stored_index(hadamard(turned(queries[h], t, 4))) for h in range(heads)]
        w = self.w(p + "weights_proj.weight") @ x / math.sqrt(128) / math.sqrt(heads)
        scores = [sum(w[h] * max(0.0, q[h] @ k) for h in range(heads)).item() for k in keys]
        order = sorted(range(len(keys)), key=lambda e: -scores[e])
        last, rejected = scores[order[self.index_topk - 1]], scores[order[self.index_topk]]
        self.index_gap[t] = min(self.index_gap[t], (last - rejected) / abs(last))
        close = [e for e in range(len(keys)) if abs(scores[e] - last) <= INDEX_BAND * abs(last)]
        return order[: self.index_topk], close

    def moe(self, p: str, t: int, x: Tensor, token: int) -> Tensor:
        score = torch.log1p(torch.exp(self.w(p + "gate.weight") @ x)).sqrt()
        if p + "gate.tid2eid" in self.stored:
            chosen = self.stored[p + "gate.tid2eid"][token].tolist()
        else:
            biased = (score + self.w(p + "gate.bias")).tolist()
            order = sorted(range(len(biased)), key=lambda e: -biased[e])
            chosen = order[:6]
            gap = (biased[order[5]] - biased[order[6]]) / abs(biased[order[5]])
            if p.startswith("layers."):
                self.router_gap[t] = min(self.router_gap[t], gap)
        total = sum(float(score[e]) for e in chosen)
        y = self.expert(p + "shared_experts.", x, self.shared_limit)
        for e in chosen:
            y = y + 1.5 * float(score[e]) / total * self.expert(f"{p}experts.{e}.", x)
        return y

    def expert(self, p: str, x: Tensor, limit: float = 10) -> Tensor:
        gate = (self.w(p + "w1.weight") @ x).clamp(max=limit)
        up = (self.w(p + "w3.weight") @ x).clamp(-limit, limit)
        return self.w(p + "w2.weight") @ (gate / (1 + torch.exp(-gate)) * up)


def norm(v: Tensor, weight: Tensor | None = None) -> Tensor:
    unit = v / torch.sqrt((v * v).mean() + 1e-6)
    return unit if weight is None else unit * weight


@functools.cache
def angles(position: int, ratio: int) -> Tensor:
    """Angles [32] of the channel pairs, in float64."""
    values = []
    for pair in range(32):
        theta = 160_000 if ratio else 10_000
        frequency = theta ** (-pair / 32)
        if ratio:
            # YaRN: how often the pair turns in 65,536 tokens decides, by the pairs that turn 32 times and once.
            fast, slow = (32 * math.log(65_536 / (2 * math.pi * turns)) / math.log(theta) for turns in (32, 1))
            slowed = min(1.0, max(0.0, (pair - math.floor(fast)) / (math.ceil(slow) - math.floor(fast))))
            frequency = frequency / 16 * slowed + frequency * (1 - slowed)
        values.append(position * frequency)
    return torch.tensor(values, dtype=torch.float64)


def turned(v: Tensor, position: int, ratio: int, direction: int = 1) -> Tensor:
    angle = direction * angles(position, ratio)
    out, even, odd = v.clone(), v[-64::2], v[-63::2]
    out[-64::2] = even * angle.cos() - odd * angle.sin()
    out[-63::2] = even * angle.sin() + odd * angle.cos()
    return out


@functools.cache
def hadamard_matrix() -> Tensor:
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)]
    return torch.tensor(rows, dtype=torch.float64) / math.sqrt(128)


def hadamard(v: Tensor) -> Tensor:
    return hadamard_matrix() @ v


def stored_kv(v: Tensor) -> Tensor:
    """As a KV page gives it back: 7 groups of 64 in FP8 with a power of two, then 64 in bf16."""
    out = v.bfloat16().double()
    for g in range(0, 448, 64):
        scale = 2.0 ** math.ceil(math.log2(max(1e-4, float(v[g : g + 64].abs().max())) / 448))
        out[g : g + 64] = (v[g : g + 64] / scale).float().to(torch.float8_e4m3fn).double() * scale
    return out


def stored_index(v: Tensor) -> Tensor:
    scale = max(1e-4, float(v.abs().max())) / 448
    return (v / scale).float().to(torch.float8_e4m3fn).double() * scale


TOKENS = 140
"""A c128 entry is in sight of 13 of them, 35 c4 entries are there, the first 12 tokens leave the window."""


@pytest.fixture(scope="module")
def second_reading(checkpoint: Path, exact: Oracle, prompt_of: PromptOf) -> tuple[Naive, Result, Tensor, list[Tensor]]:
    naive, tokens = Naive(checkpoint, NARROW), prompt_of(TOKENS, 3)
    logprobs, streams = naive.forward(tokens)
    return naive, exact.forward(tokens), logprobs, streams


# The oracle tabulates RoPE angles in fp32, off by up to 140 * 2^-24: that moves a few cached channels by one
# FP8 or bf16 step at most. Measured: 1.6e-5, of streams of 3 (RMS) 6e-6.
SECOND_READING = 2e-3


def test_logprobs_of_the_second_reading(second_reading: tuple[Naive, Result, Tensor, list[Tensor]]) -> None:
    _, result, logprobs, streams = second_reading
    assert (result.logprobs.double() - logprobs).abs().max() < SECOND_READING
    assert (result.hidden - torch.stack(streams)).square().mean().sqrt() < SECOND_READING


def test_margins_of_the_second_reading(second_reading: tuple[Naive, Result, Tensor, list[Tensor]]) -> None:
    naive, result, _, _ = second_reading
    torch.testing.assert_close(result.router_gap, torch.tensor(naive.router_gap), atol=SECOND_READING, rtol=0)
    choosing = torch.tensor(naive.index_gap).isfinite()
    assert choosing.sum() == TOKENS - (4 * (NARROW + 1) - 1)
    torch.testing.assert_close(result.index_gap, torch.tensor(naive.index_gap), atol=SECOND_READING, rtol=0)
    torch.testing.assert_close(result.index_stake, torch.tensor(naive.stake), atol=SECOND_READING, rtol=0)


def test_mtp_of_the_second_reading(
    second_reading: tuple[Naive, Result, Tensor, list[Tensor]], exact: Oracle, prompt_of: PromptOf
) -> None:
    naive, result, _, streams = second_reading
    following = prompt_of(TOKENS, 3)[1:]
    logits = exact.mtp_logits(result.hidden[:-1], following)
    assert logits.shape == (TOKENS - 1, exact.config.vocab_size)
    assert (logits - naive.mtp(streams[:-1], following)).abs().max() < SECOND_READING


def test_shared_expert_without_clamp(checkpoint: Path, exact: Oracle, prompt_of: PromptOf) -> None:
    # As in the published reference; the default follows SGLang.
    free = Oracle(checkpoint, clamp_shared=False, real=torch.float64, rounding=lambda x: x)
    tokens = prompt_of(16, 6)
    hidden = free.forward(tokens).hidden
    _, streams = Naive(checkpoint, NARROW, shared_limit=math.inf).forward(tokens)
    assert (hidden - torch.stack(streams)).abs().max() < SECOND_READING
    assert (hidden - exact.forward(tokens).hidden).abs().max() > 10 * SECOND_READING


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_rotation_far_out(ratio: int) -> None:
    # Two fp32 roundings of the frequency, one of the angle: 65,536 * 2^-23 = 0.008.
    positions = [0, 1, 4095, 65_535]
    table = rotation(ReferenceConfig(), ratio, 65_536, torch.float64)[positions]
    for row, position in zip(table, positions, strict=True):
        angle = angles(position, ratio)
        torch.testing.assert_close(row, torch.polar(torch.ones_like(angle), angle), atol=1.6e-2, rtol=0)


@pytest.mark.parametrize("length", [1, 4, 127, 128, 131, 200])
def test_a_prefix_is_its_own_prompt(exact: Oracle, prompt_of: PromptOf, length: int) -> None:
    # Without roundings, shapes of the matrix products make no difference beyond float64.
    tokens = prompt_of(260, 4)
    whole, prefix = exact.forward(tokens), exact.forward(tokens[:length])
    assert (whole.logprobs[:length] - prefix.logprobs).abs().max() < 1e-5
    torch.testing.assert_close(whole.hidden[:length], prefix.hidden, atol=1e-9, rtol=1e-9)
    assert torch.equal(whole.decided()[:length], prefix.decided())


def test_captured_streams_are_those_that_a_shallower_model_ends_with(exact: Oracle, prompt_of: PromptOf) -> None:
    tokens, layers = prompt_of(20, 9), exact.config.num_hidden_layers
    whole = exact.forward(tokens, capture=range(layers))
    try:
        for layer in range(layers):
            object.__setattr__(exact.config, "num_hidden_layers", layer + 1)
            assert torch.equal(whole.captured[layer], exact.forward(tokens).hidden)
    finally:
        object.__setattr__(exact.config, "num_hidden_layers", layers)


@pytest.mark.parametrize("place", [0, 3, 127, 128, 200, 259])
def test_a_later_token_changes_nothing_earlier(exact: Oracle, prompt_of: PromptOf, place: int, seed: int) -> None:
    tokens = prompt_of(260, 4)
    other = prompt_of(260, seed)
    before, after = exact.forward(tokens), exact.forward(tokens[:place] + other[place:])
    assert place == 0 or (before.hidden[:place] - after.hidden[:place]).abs().max() < 1e-9
    assert (before.hidden[place] - after.hidden[place]).abs().max() > 1e-2


def test_forward_repeats_itself(oracle: CachedOracle, short_prompt: list[int]) -> None:
    first, again = oracle(short_prompt), oracle.oracle.forward(short_prompt)
    assert torch.equal(first.logprobs, again.logprobs)
    assert torch.equal(first.hidden, again.hidden)


def test_logprobs_are_distributions(oracle: CachedOracle, short_prompt: list[int]) -> None:
    logprobs = oracle(short_prompt).logprobs
    assert logprobs.dtype == torch.float32
    # 1,024 terms of fp32.
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(len(short_prompt)), atol=1e-5, rtol=0)


def test_greedy_takes_the_most_probable(oracle: CachedOracle, prompt_of: PromptOf) -> None:
    prompt = prompt_of(6, 5)
    first = int(oracle.oracle.forward(prompt).logprobs[-1].argmax())
    second = int(oracle.oracle.forward([*prompt, first]).logprobs[-1].argmax())
    assert oracle.oracle.greedy(prompt, 2) == [first, second]


def test_decided_by_hand() -> None:
    nothing = torch.zeros(5, 1)
    router_gap = torch.tensor([math.inf, 2 * ROUTER_GAP, ROUTER_GAP / 2, 1.0, 1.0])
    stake = torch.tensor([0.0, INDEX_STAKE / 2, 0.0, 2 * INDEX_STAKE, INDEX_STAKE])
    result = Result(nothing, nothing, router_gap, torch.zeros(5), stake, {})
    # A narrow index gap alone leaves a position decided: attention may not look at the entry at all.
    assert result.decided().tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("bad", [[], [-1], [3, 1024]], ids=["none", "negative", "too large"])
def test_ids_out_of_range(oracle: CachedOracle, bad: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ids in 0 \.\. 1023"):
        oracle.oracle.forward(bad)


@pytest.mark.parametrize("bad", [[1, 2], [1, 2, 3, 4], [1, 2, 1024]], ids=["few", "many", "too large"])
def test_mtp_needs_one_next_token_each(oracle: CachedOracle, bad: list[int]) -> None:
    hidden = oracle.oracle.forward([5, 6, 7]).hidden
    with pytest.raises(ValueError, match="next_tokens|ids in"):
        oracle.oracle.mtp_logits(hidden, bad)


def test_mtp_absent(tmp_path: Path) -> None:
    config = ReferenceConfig(num_hidden_layers=1, num_nextn_predict_layers=0, compress_ratios=(0,))
    oracle = Oracle(write_checkpoint(tmp_path / "small", config))
    result = oracle.forward([5])
    with pytest.raises(ValueError, match="no MTP layer"):
        oracle.mtp_logits(result.hidden, [6])
