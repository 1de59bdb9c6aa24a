"""What the step sees of SGLang 0.5.23 on a CPU: a loaded DeepSeek-V4, its pools and its attention metadata.

Names, shapes and dtypes are those of SGLang's `models/deepseek_v4.py` and `deepseek_v4_nextn.py` after loading, of
`mem_cache/deepseek_v4_memory_pool.py` and of `layers/attention/deepseek_v4_backend.py`; `test_eagle_cpu.py` compares
them with its servers'. Nothing of SGLang is imported.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_sm120 import ops
from sglang_sm120.checkpoint.config import HEAD_DIM, INDEX_HEAD_DIM, WINDOW, ReferenceConfig
from sglang_sm120.formats import fp8_block, kv_page, mxfp4
from sglang_sm120_reference.attention import rotation
from sglang_sm120_reference.checkpoint import Checkpoint

PAGE = 256
INDEX_PAGE = 64
STALE = 0x42
"""Bytes of a page that nobody wrote yet: 48.6 as bf16 and as fp32, so that reading one changes a result."""


class Rank(NamedTuple):
    """Which part of the heads and of the experts a rank holds: their width's, or whole experts (expert parallelism)."""

    index: int = 0
    count: int = 1
    whole_experts: bool = False


WHOLE = Rank()


def plain_nvfp4(**otherwise: bool) -> SimpleNamespace:
    """What the step asks of SGLang's method for NVFP4 experts, by default with a runner that leaves them plain."""
    asked = ("enable_flashinfer_trtllm_moe", "enable_flashinfer_cutedsl_moe", "load_up_proj_weight_first")
    return SimpleNamespace(**(dict.fromkeys(asked, False) | otherwise))


class Norm:
    """An RMS norm of bf16 activations, with SGLang's names."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.variance_epsilon = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.variance_epsilon).to(x.dtype)


class Weights:
    """The modules of one rank, made of a checkpoint's tensors."""

    def __init__(self, checkpoint: Path, rank: Rank = WHOLE) -> None:
        self._raw, self._config = _reader(checkpoint)
        self._rank = rank

    def target(self) -> SimpleNamespace:
        """`DeepseekV4ForCausalLM`."""
        config = self._config
        layers = [
            self._layer(f"layers.{i}.", i, config.compress_ratios[i], hashed=i < config.num_hash_layers)
            for i in range(config.num_hidden_layers)
        ]
        body = SimpleNamespace(
            **self._ends(""), layers=layers, norm=self._norm("norm"), norm_eps=config.rms_norm_eps,
            dspark_layers_to_capture=None, alt_streams=None,
        )  # fmt: skip
        return SimpleNamespace(model=body, lm_head=self._lm_head(), logits_processor=logits_processor)

    def draft(self) -> SimpleNamespace:
        """`DeepseekV4ForCausalLMNextN`."""
        body = SimpleNamespace(
            **self._ends("mtp.0."), rms_norm_eps=self._config.rms_norm_eps,
            enorm=self._norm("mtp.0.enorm"), hnorm=self._norm("mtp.0.hnorm"),
            e_proj=self._linear("mtp.0.e_proj"), h_proj=self._linear("mtp.0.h_proj"),
            decoder=self._layer("mtp.0.", 0, 0, hashed=False),
            shared_head=SimpleNamespace(norm=self._norm("mtp.0.norm")),
        )  # fmt: skip
        return SimpleNamespace(model=body, lm_head=self._lm_head(), logits_processor=logits_processor)

    def _lm_head(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self._raw("head.weight"))

    def _ends(self, prefix: str) -> dict[str, Any]:
        embedding = self._raw("embed.weight")
        head = {f"hc_head_{part}": self._raw(f"{prefix}hc_head_{part}") for part in ("fn", "scale", "base")}
        return {"embed_tokens": lambda ids: embedding[ids], "hc_eps": self._config.hc_eps, **head}

    def _layer(self, prefix: str, layer_id: int, ratio: int, hashed: bool) -> SimpleNamespace:
        config = self._config
        mixes = [f"hc_{block}_{part}" for block in ("attn", "ffn") for part in ("fn", "scale", "base")]
        return SimpleNamespace(
            layer_id=layer_id, rms_norm_eps=config.rms_norm_eps, hc_eps=config.hc_eps,
            hc_sinkhorn_iters=config.hc_sinkhorn_iters,
            input_layernorm=self._norm(prefix + "attn_norm"), post_attention_layernorm=self._norm(prefix + "ffn_norm"),
            self_attn=self._attention(prefix + "attn.", layer_id, ratio), mlp=self._experts(prefix + "ffn.", hashed),
            **{name: self._raw(prefix + name) for name in mixes},
        )  # fmt: skip

    def _attention(self, prefix: str, layer_id: int, ratio: int) -> SimpleNamespace:
        config, count = self._config, self._rank.count
        freqs_cis = rotation(config, ratio, 4096, torch.float32)
        sink = self._rows(self._raw(prefix + "attn_sink"))
        wo_a = fp8_block.dequantise(self._raw(prefix + "wo_a.weight"), self._raw(prefix + "wo_a.scale"))
        return SimpleNamespace(
            layer_id=layer_id, compress_ratio=ratio, n_local_heads=config.num_attention_heads // count,
            n_local_groups=config.o_groups // count, q_lora_rank=config.q_lora_rank, o_lora_rank=config.o_lora_rank,
            eps=config.rms_norm_eps, softmax_scale=HEAD_DIM**-0.5, freqs_cis=freqs_cis,
            wqkv_a=self._linear(prefix + "wq_a", prefix + "wkv"), q_norm=self._norm(prefix + "q_norm"),
            wq_b=self._linear(prefix + "wq_b", cut=self._rows), kv_norm=self._norm(prefix + "kv_norm"),
            wo_a=SimpleNamespace(weight=self._rows(wo_a.bfloat16())),
            wo_b=self._linear(prefix + "wo_b", cut=self._columns), _local_attn_sink=lambda heads: sink[:heads],
            compressor=self._compressor(prefix + "compressor.", ratio, HEAD_DIM, freqs_cis) if ratio else None,
            indexer=self._indexer(prefix + "indexer.", freqs_cis) if ratio == 4 else None,
        )  # fmt: skip

    def _indexer(self, prefix: str, freqs_cis: Tensor) -> SimpleNamespace:
        heads = self._config.index_n_heads
        return SimpleNamespace(
            n_heads=heads, index_topk=self._config.index_topk, wq_b=self._linear(prefix + "wq_b"), freqs_cis=freqs_cis,
            weights_proj=SimpleNamespace(weight=self._raw(prefix + "weights_proj.weight")),
            weight_scale=INDEX_HEAD_DIM**-0.5 * heads**-0.5,
            compressor=self._compressor(prefix + "compressor.", 4, INDEX_HEAD_DIM, freqs_cis),
        )  # fmt: skip

    def _compressor(self, prefix: str, ratio: int, head_dim: int, freqs_cis: Tensor) -> SimpleNamespace:
        ape = self._raw(prefix + "ape")
        if ratio == 4:  # rows of both halves one after the other, in the parameter's shape
            ape = torch.cat(ape.chunk(2, -1)).view(ape.shape)
        norm = Norm(self._raw(prefix + "norm.weight").float(), self._config.rms_norm_eps)
        both = torch.cat([self._raw(prefix + name) for name in ("wkv.weight", "wgate.weight")])
        return SimpleNamespace(
            ratio=ratio, head_dim=head_dim, ape=ape, norm=norm, freqs_cis=freqs_cis,
            wkv_gate=SimpleNamespace(weight=both),
        )  # fmt: skip

    def _experts(self, prefix: str, hashed: bool) -> SimpleNamespace:
        config, rank = self._config, self._rank
        ids = list(range(config.n_routed_experts))
        rows, columns = self._rows, self._columns
        if rank.whole_experts:
            ids, rows, columns = ids[len(ids) // rank.count * rank.index :][: len(ids) // rank.count], _whole, _whole

        def stacked(names: Sequence[str], end: str, cut: Callable[[Tensor], Tensor]) -> torch.nn.Parameter:
            found = [torch.cat([cut(self._raw(f"{prefix}experts.{i}.{name}.{end}")) for name in names]) for i in ids]
            tensor = torch.stack(found)
            return torch.nn.Parameter(tensor.float() if end == "scale" else tensor, requires_grad=False)

        def mxfp4_() -> dict[str, Any]:
            return {
                "w13_weight": stacked(("w1", "w3"), "weight", rows), "w2_weight": stacked(("w2",), "weight", columns),
                "w13_weight_scale_inv": stacked(("w1", "w3"), "scale", rows),
                "w2_weight_scale_inv": stacked(("w2",), "scale", columns),
            }  # fmt: skip

        def nvfp4() -> dict[str, Any]:
            """As SGLang keeps them with --moe-runner-backend flashinfer_mxfp4 (`test_nvfp4.py`)."""
            layer: dict[str, Any] = {"quant_method": plain_nvfp4()}
            for owner, names, cut in (("w13", ("w1", "w3"), rows), ("w2", ("w2",), columns)):
                layer[f"{owner}_weight"] = stacked(names, "weight", cut)
                layer[f"{owner}_weight_scale"] = stacked(names, "weight_scale", cut)
                layer[f"{owner}_weight_scale"].data = mxfp4.swizzle_scales(layer[f"{owner}_weight_scale"].data)
                factors = stacked(names, "weight_scale_2", lambda factor: factor.view(1)).data
                layer[f"{owner}_weight_scale_2"] = torch.nn.Parameter(factors.squeeze(1), requires_grad=False)
            return layer

        shared = prefix + "shared_experts."
        gate = SimpleNamespace(
            weight=self._raw(prefix + "gate.weight"),
            e_score_correction_bias=None if hashed else self._raw(prefix + "gate.bias"),
        )
        return SimpleNamespace(
            is_hash=hashed, gate=gate, top_k=config.num_experts_per_tok,
            routed_scaling_factor=config.routed_scaling_factor,
            topk=SimpleNamespace(**({"tid2eid": self._raw(prefix + "gate.tid2eid")} if hashed else {})),
            experts=SimpleNamespace(
                num_local_experts=len(ids), moe_ep_rank=rank.index if rank.whole_experts else 0,
                **(nvfp4() if config.nvfp4_experts and prefix.startswith("layers.") else mxfp4_()),
            ),
            shared_experts=SimpleNamespace(
                swiglu_limit=config.swiglu_limit, down_proj=self._linear(shared + "w2", cut=self._columns),
                gate_up_proj=self._linear(shared + "w1", shared + "w3", cut=self._rows),
            ),
        )  # fmt: skip

    def _linear(self, *names: str, cut: Callable[[Tensor], Tensor] | None = None) -> SimpleNamespace:
        """FP8 linears whose rows are joined; `cut` takes the rank's part of each."""
        cut = cut or _whole
        return SimpleNamespace(
            weight=torch.cat([cut(self._raw(name + ".weight")) for name in names]),
            weight_scale_inv=torch.cat([cut(self._raw(name + ".scale").float()) for name in names]),
        )

    def _norm(self, name: str) -> Norm:
        return Norm(self._raw(name + ".weight"), self._config.rms_norm_eps)

    def _rows(self, x: Tensor) -> Tensor:
        return x.chunk(self._rank.count)[self._rank.index].contiguous()

    def _columns(self, x: Tensor) -> Tensor:
        return x.chunk(self._rank.count, 1)[self._rank.index].contiguous()


@cache
def _reader(checkpoint: Path) -> tuple[Callable[[str], Tensor], ReferenceConfig]:
    """Gives a tensor by its published name, and reads it once."""
    opened = Checkpoint(checkpoint, torch.float32, None)
    return cache(opened.raw), opened.config


def _whole(x: Tensor) -> Tensor:
    return x


def logits_processor(
    input_ids: Tensor, hidden_states: Tensor, lm_head: Any, logits_metadata: Any,
    aux_hidden_states: Tensor | None = None, hidden_states_before_norm: Tensor | None = None,
) -> SimpleNamespace:  # fmt: skip
    """Logits of all rows, fp32 [T, V], rounded to bf16 as SGLang's head returns them; and what else was given."""
    if method := getattr(lm_head, "quant_method", None):
        logits = method.apply(lm_head, hidden_states, None).float()
    else:
        logits = (hidden_states.float() @ lm_head.weight.float().T).bfloat16().float()
    return SimpleNamespace(
        logits=logits, aux_hidden_states=aux_hidden_states, hidden_states_before_norm=hidden_states_before_norm
    )


class Pool:
    """`DeepSeekV4TokenToKVPool` of `pages` pages of 256 tokens and as many of the window; rings of 4 and 128."""

    def __init__(self, ratios: Sequence[int], pages: int, requests: int, rings: tuple[int, int]) -> None:
        self._ratios = ratios
        self._window, self._extra, self._index, self._states, self._index_states = ({} for _ in range(5))
        for layer_id, ratio in enumerate(ratios):
            self._window[layer_id] = _stale(pages, kv_page.page_bytes(PAGE))
            if ratio:
                self._extra[layer_id] = _stale(pages, kv_page.page_bytes(PAGE // ratio))
                # SGLang's rings have rows that nobody addresses at the end.
                rows = ratio + (pages * rings[0] if ratio == 4 else requests * rings[1])
                self._states[layer_id] = _ring(rows, HEAD_DIM * (4 if ratio == 4 else 2))
            if ratio == 4:
                self._index[layer_id] = _stale(pages, INDEX_PAGE * (INDEX_HEAD_DIM + 4))
                self._index_states[layer_id] = _ring(rows, INDEX_HEAD_DIM * 4)

    def get_swa_key_buffer_radix(self, layer_id: int) -> Tensor:
        return self._window[layer_id].view(torch.float8_e4m3fn)

    def get_swa_key_page_size(self) -> int:
        return PAGE

    def get_extra_key_buffer(self, layer_id: int) -> Tensor:
        return self._extra[layer_id].view(torch.float8_e4m3fn)

    def get_extra_key_page_size(self, layer_id: int) -> int:
        return PAGE // self._ratios[layer_id]

    def get_index_k_with_scale_buffer(self, layer_id: int) -> Tensor:
        return self._index[layer_id]

    def get_attention_compress_states(self, layer_id: int) -> SimpleNamespace:
        return self._states[layer_id]

    def get_indexer_compress_states(self, layer_id: int) -> SimpleNamespace:
        return self._index_states[layer_id]


def _stale(pages: int, size: int) -> Tensor:
    return torch.full((pages, size), STALE, dtype=torch.uint8)


def _ring(rows: int, width: int) -> SimpleNamespace:
    return SimpleNamespace(kv_score_buffer=SimpleNamespace(kv_score=torch.full((rows, width), 3.0)))


class New(NamedTuple):
    """Tokens of one request in a pass, `prefix` of it being in the cache."""

    request: int
    prefix: int
    tokens: list[int]


class Server:
    """A step and the cache that SGLang's scheduler would give it: requests 1, 2, … of `length` tokens each.

    As in SGLang, page 0 takes what padding rows store, and request 0 is theirs. generator: shuffles the pages.
    rings: rows of the compressors' rings of ratio 4 (a window page) and 128 (a request); 16 and 256 with drafts.
    """

    def __init__(
        self, step: Callable[..., Any], ratios: Sequence[int], requests: int, length: int, generator: torch.Generator,
        index_topk: int = 512, rings: tuple[int, int] = (8, 128),
    ) -> None:  # fmt: skip
        self._step, self._ratios, self._topk, self._rings = step, ratios, index_topk, rings
        each = -(-length // PAGE)
        pages = 1 + requests * each
        within = torch.arange(PAGE)
        order = 1 + torch.randperm(pages - 1, generator=generator)
        self._req_to_token = torch.zeros(1 + requests, each * PAGE, dtype=torch.int32)
        self._req_to_token[1:] = (order.view(requests, each, 1) * PAGE + within).flatten(1)
        window = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(pages - 1, generator=generator)))
        self._full_to_swa = (window.unsqueeze(1) * PAGE + within).flatten()
        self.pool = Pool(ratios, pages, 1 + requests, rings)

    def copy(self) -> Server:
        """The same step with a cache of its own, as full as this one."""
        twin = copy.copy(self)
        twin.pool, twin._req_to_token = copy.deepcopy(self.pool), self._req_to_token.clone()
        return twin

    def share(self, owner: int, request: int, length: int) -> None:
        """A prefix hit: the first `length` tokens of `request`, whole pages, are those of `owner`."""
        assert length % PAGE == 0
        self._req_to_token[request, :length] = self._req_to_token[owner, :length]

    def extend(self, *new: New, **extra: Any) -> SimpleNamespace:
        """Chunks of prompts, or drafts to be verified."""
        return self._pass(new, False, **extra)

    def decode(self, *new: New, **extra: Any) -> SimpleNamespace:
        """One token of each request."""
        return self._pass(new, True, **extra)

    def _pass(
        self,
        new: Sequence[New],
        is_decode: bool,
        padding: int = 0,
        spare: int = 0,
        slot: int = 0,
        spec_info: Any = None,
    ) -> SimpleNamespace:
        """What the logits processor got, without the rows of padding.

        padding: rows of no request in the pass, which store to `slot`; spare: rows that only the metadata has, which
        SGLang made for a larger batch.
        """
        rows = sum(len(one.tokens) for one in new)
        empty = [New(0, 0, [0])] * (padding + spare)
        requests = torch.tensor([one.request for one in (*new, *empty) for _ in one.tokens])
        positions = torch.cat([one.prefix + torch.arange(len(one.tokens)) for one in (*new, *empty)])
        slots = self._req_to_token[requests, positions].long()
        metadata = self._metadata(requests, positions, slots, [*new, *empty] if is_decode else list(new), is_decode)
        here = rows + padding
        stored = self._full_to_swa[slots[:here]].int()
        stored[rows:] = slot
        kept = SimpleNamespace(pool=self.pool, request_window=None, get_swa_key_bytes_per_token=lambda: kv_page.TOKEN)
        view = SimpleNamespace(metadata=metadata, kv_pool=kept, swa_out_cache_loc=lambda batch: stored)
        ids = torch.tensor([token for one in new for token in one.tokens] + [0] * padding)
        out = self._step(view, ids, positions[:here], SimpleNamespace(spec_info=spec_info))
        got = {name: value for name, value in vars(out).items() if value is not None}
        assert all(len(value) == here and value.isfinite().all() for value in got.values())
        return SimpleNamespace(**{name: value[:rows] for name, value in got.items()})

    def _metadata(
        self, requests: Tensor, positions: Tensor, slots: Tensor, new: list[New], is_decode: bool
    ) -> SimpleNamespace:
        """`DSV4Metadata` of rows that hold the tokens at `positions` of `requests`."""
        seen = positions + 1
        window = positions.unsqueeze(1) - torch.arange(WINDOW)
        full = self._req_to_token[requests.unsqueeze(1), window.clamp(min=0)].long()
        ends = torch.arange(self._req_to_token.shape[1] // 128) * 128 + 127
        far = self._req_to_token[requests][:, ends] // 128
        width = -(-self._topk // 64) * 64
        sparse = {
            4: torch.full((len(seen), width), 5, dtype=torch.int32),  # the indexer's, written by each layer
            128: torch.where(ends < seen.unsqueeze(1), far, -1).int(),
        }
        lengths = {4: (seen // 4).clamp(1, self._topk).int(), 128: (seen // 128).clamp(min=1).int()}
        table = (self._req_to_token[requests][:, ::PAGE] // PAGE).int()
        core = {
            "c4_topk_lengths_raw": (seen // 4).int(), "c4_sparse_page_indices": sparse[4],
            "c4_out_loc": torch.where(seen % 4 == 0, slots // 4, 0),
            "c128_out_loc": torch.where(seen % 128 == 0, slots // 128, 0),
        }  # fmt: skip
        metadata = {
            "indexer_metadata": SimpleNamespace(page_table=table),
            "c4_compress_metadata": self._plan(4, new, is_decode, len(seen)),
            "c128_compress_metadata": self._plan(128, new, is_decode, len(seen)),
        }
        if not any(self._ratios):  # the draft layer's
            core, metadata = dict.fromkeys(core), dict.fromkeys(metadata)
        core |= {
            "swa_page_indices": torch.where(window < 0, -1, self._full_to_swa[full]).int(),
            "swa_topk_lengths": seen.clamp(max=WINDOW).int(),
            "sparse_page_indices": sparse.__getitem__, "sparse_topk_lengths": lengths.__getitem__,
        }  # fmt: skip
        return SimpleNamespace(core_attn_metadata=SimpleNamespace(**core), **metadata)

    def _plan(self, ratio: int, new: list[New], is_decode: bool, rows: int) -> SimpleNamespace:
        ends = torch.tensor([one.prefix + len(one.tokens) for one in new])
        lengths = torch.tensor([len(one.tokens) for one in new])
        requests = torch.tensor([one.request for one in new])
        ring = (self._req_to_token, self._full_to_swa, PAGE, self._rings[ratio == 128])
        if is_decode:
            return SimpleNamespace(is_decode=True, plan_d=ops.compress_decode_plan(ratio, requests, ends, *ring))
        plan_c, plan_w = ops.compress_prefill_plan(ratio, requests, ends, lengths, *ring)
        # In a captured pass SGLang's plans have a row for each token, the rest of them its `invalid()`.
        no_c, no_w = (torch.tensor([row], dtype=torch.int32).view(torch.uint8) for row in ([-1, 0, -1, -1], [-1, -1]))
        plan_c = torch.cat((plan_c, no_c.expand(rows - len(plan_c), -1)))
        plan_w = torch.cat((plan_w, no_w.expand(rows - len(plan_w), -1)))
        return SimpleNamespace(is_decode=False, plan_c=plan_c, plan_w=plan_w)


class Ranks:
    """Ranks in threads of this process, whose `all_reduce` adds up what each of them has, in bf16."""

    def __init__(self) -> None:
        self.capturing = False
        self._here = threading.local()
        self._meet = threading.Barrier(1)
        self._parts: list[Tensor] = []

    def run(self, *functions: Callable[[], Any]) -> list[Any]:
        """What each rank's function returned. Raises what made a rank end, which breaks the barrier for the others."""
        self._meet, self._parts = threading.Barrier(len(functions), timeout=60), [torch.empty(0)] * len(functions)

        def rank(index: int) -> Any:
            self._here.index = index
            torch.set_grad_enabled(False)
            try:
                return functions[index]()
            except BaseException:
                self._meet.abort()
                raise

        with ThreadPoolExecutor(len(functions)) as pool:
            started = [pool.submit(rank, index) for index in range(len(functions))]
        causes = [one for one in started if not isinstance(one.exception(), threading.BrokenBarrierError | None)]
        return [one.result() for one in causes or started]

    def all_reduce(self, x: Tensor) -> Tensor:
        index = getattr(self._here, "index", None)
        if index is None:  # a single rank
            return x
        self._parts[index] = x
        self._meet.wait()
        total = torch.stack(self._parts).sum(0)
        self._meet.wait()
        return total


def stub_sglang(patch: pytest.MonkeyPatch) -> Ranks:
    """Put stubs in place of what the step asks SGLang for: its sums over ranks, and whether a graph is captured."""
    ranks = Ranks()
    context, utils = ModuleType("sglang.srt.runtime_context"), ModuleType("sglang.srt.layers.moe.utils")
    capture = ModuleType("sglang.srt.model_executor.runner_utils.capture_mode")
    capture.get_is_capture_mode = lambda: ranks.capturing  # type: ignore[attr-defined]
    context.get_parallel = lambda: SimpleNamespace(attn_tp_group=ranks)  # type: ignore[attr-defined]
    utils.post_experts_all_reduce = ranks.all_reduce  # type: ignore[attr-defined]
    for stub in (context, utils, capture, ModuleType("sglang.srt.models.deepseek_v4")):
        patch.setitem(sys.modules, stub.__name__, stub)
    return ranks
