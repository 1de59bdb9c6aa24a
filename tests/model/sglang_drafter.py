"""SGLang's own DSpark drafter on a CPU, in a process of its own: what it proposes for a text, and what the step does.

    python sglang_drafter.py CHECKPOINT IN.pt OUT.pt        with ENVIRONMENT of test_drafter

Its classes load the files and compute, with its torch twins of its kernels. Not its own are the FP8 products and the
experts, for which it has none on a CPU, the pool of keys and the softmax over them; which keys a row sees is its own.
"""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import standin
import torch
import torch.nn.functional as F
from sglang.kernels.ops.layernorm import mhc
from sglang.kernels.ops.speculative.dspark import dspark_attn_metadata as window
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.layers.moe.utils import draft_model_build_scope, initialize_moe_config
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor import forward_context
from sglang.srt.model_loader.loader import get_model_loader
from sglang.srt.models import deepseek_v4_dspark
from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dspark_components.dspark_draft import DraftNoise, sample_draft_block
from sglang.srt.speculative.spec_tp_sync import SpecTpSync

from sglang_sm120 import ops
from sglang_sm120.formats import kv_page
from sglang_sm120.step.draft import Stages
from sglang_sm120_reference.blocks import sinkhorn
from sglang_sm120_reference.drafter import Drafter
from sglang_sm120_reference.oracle import Oracle

WINDOW, ALIGNMENT = 128, 64
_load_weights = deepseek_v4_dspark.DeepseekV4ForCausalLMDSpark.load_weights


class Pool:
    """A slot a position and stage; what is stored is quantised as in a page."""

    uniform_fp8 = False

    def __init__(self) -> None:
        self.slots: dict[int, dict[int, torch.Tensor]] = {}

    def set_swa_key_buffer_radix_fused_norm_rope(
        self, *, layer_id: int, swa_loc: torch.Tensor, kv: torch.Tensor, kv_weight: torch.Tensor, eps: float,
        freqs_cis: torch.Tensor, positions: torch.Tensor,
    ) -> None:  # fmt: skip
        keys = F.rms_norm(kv.float(), kv.shape[-1:], kv_weight.float(), eps)
        deepseek_v4_dspark.apply_rotary_emb(keys[:, None, -64:], freqs_cis[positions])
        stored = kv_page.dequantise(*kv_page.quantise(keys)).float()
        self.slots.setdefault(layer_id, {}).update(zip(swa_loc.tolist(), stored, strict=True))


class Backend:
    """Attention over the slots that SGLang's own index names for each row."""

    def __init__(self, pool: Pool, slots: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor) -> None:
        self._pool, self._slots, self._lengths, self._out = pool, slots, lengths, out

    def get_swa_out_cache_loc(self, forward_batch: Any) -> torch.Tensor:
        return self._out

    def forward(self, *, q: torch.Tensor, layer: Any, attn_sink: torch.Tensor, **_: Any) -> torch.Tensor:
        heads = len(attn_sink)
        out = torch.zeros_like(q)
        for row, (slots, length) in enumerate(zip(self._slots, self._lengths, strict=True)):
            keys = torch.stack([self._pool.slots[layer.layer_id][slot] for slot in slots[:length].tolist()])
            logits = torch.cat((q[row, :heads].float() @ keys.T * layer.scaling, attn_sink[:, None]), 1)
            out[row, :heads] = (logits.softmax(1)[:, :-1] @ keys).to(q.dtype)
        return out


def split(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, streams: int, iterations: int, eps: float
) -> tuple[torch.Tensor, ...]:
    """What SGLang has a TileLang kernel for: mixes [T, 1, 24] to pre and post [T, 1, 4] and comb [T, 1, 4, 4]."""
    sizes = (streams, streams, streams * streams)
    parts = zip(mixes.split(sizes, -1), scale, base.split(sizes), strict=True)
    pre, post, comb = (mix * factor + shift for mix, factor, shift in parts)
    return pre.sigmoid() + eps, 2 * post.sigmoid(), sinkhorn(comb.unflatten(-1, (streams, streams)), iterations, eps)


def product(method: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    scale = layer.weight_scale_inv.repeat_interleave(128, 0)[: len(layer.weight)].repeat_interleave(128, 1)
    return (x.float() @ (layer.weight.float() * scale[:, : layer.weight.shape[1]]).T).to(x.dtype)


def load(checkpoint: str) -> Any:
    """The drafter, with the target's embedding and head."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    publish(ServerArgs(model_path=checkpoint, device="cpu"), role="scheduler", ranks=SpawnRanks(world_rank=0))
    parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    parallel_state.initialize_model_parallel(backend="gloo")
    initialize_moe_config()
    config = ModelConfig(f"{checkpoint}/dspark", is_draft_model=True, speculative_algorithm="DSPARK")
    initialize_dp_attention(config)
    with draft_model_build_scope():
        model = get_model_loader(LoadConfig(), config).load_model(
            model_config=config, device_config=DeviceConfig("cpu")
        )
    return model


def poisoned(model: Any, weights: Any) -> None:
    """Load over bytes that no checkpoint has: NaN, and in experts fifteens."""
    for parameter in model.parameters():
        if parameter.dim():
            parameter.data.view(torch.uint8).fill_(0xFF)
    _load_weights(model, weights)


def untouched(parameter: torch.Tensor) -> bool:
    if parameter.dtype == torch.int8:
        return bool((parameter == -1).all(-1).any())
    return bool(parameter.float().isnan().any())


def vocabulary(target: Oracle) -> dict[str, Any]:
    """The target's embedding and head, as SGLang's modules."""
    found: dict[str, Any] = {}
    for name, kind in (("embed", VocabParallelEmbedding), ("head", ParallelLMHead)):
        weight = target._w(f"{name}.weight").bfloat16()
        found[name] = kind(*weight.shape, params_dtype=torch.bfloat16)
        found[name].weight.data.copy_(weight)
    return {"embed_tokens": found["embed"], "lm_head": found["head"]}


class Asked(NamedTuple):
    """One block: its ids and positions [G], and the slots [G, 192] that SGLang's index names for each row, how many.

    Slots are positions: request 0 has them in order.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor


def asked(model: Any, ids: list[int], anchor: int) -> Asked:
    gamma = model.gamma
    positions, every = anchor + torch.arange(gamma), torch.arange(len(ids) + gamma)
    gathered = window.compute_dspark_window_gather(
        seq_lens_casual=positions + 1, req_pool_indices_repeated=torch.zeros(gamma, dtype=torch.int64),
        block_size=gamma, swa_window=WINDOW,
    )  # fmt: skip
    slots, lengths = window.build_dspark_swa_page_indices(
        req_to_token=every[None], full_to_swa_mapping=every, offsets=gathered.offsets, invalid=gathered.invalid,
        req_pool_indices_per_request=gathered.req_pool_indices_per_request, out_loc=positions,
        context_lens=gathered.context_lens, block_size=gamma, swa_window=WINDOW, page_index_aligned_size=ALIGNMENT,
    )  # fmt: skip
    block = torch.tensor([ids[anchor]] + [model.config.dspark_noise_token_id] * (gamma - 1))
    return Asked(block, positions, slots, lengths)


def of_sglang(model: Any, drafter: Drafter, features: torch.Tensor, at: Asked) -> torch.Tensor:
    """The streams [G, 4, H] that SGLang's forward leaves."""
    pool, before = Pool(), torch.arange(int(at.positions[0]))
    deepseek_v4_dspark._resolve_dspark_pool = lambda: pool
    model.write_target_hidden_kv(main_hidden=features[before], swa_loc=before, positions=before, pool=pool)
    forward_context.get_attn_backend = lambda: Backend(pool, at.slots, at.lengths, at.positions)
    mode = SimpleNamespace(is_idle=lambda: False, is_decode=lambda: False, is_target_verify=lambda: True)
    for stage, layer in enumerate(model.stages):
        layer._run_ffn = lambda x, _, stage=stage: drafter._moe(f"mtp.{stage}.ffn.", x.float(), at.ids)[0].to(x.dtype)
    return model(at.ids, at.positions, SimpleNamespace(forward_mode=mode)).hidden_states


def of_the_step(model: Any, stages: Stages, features: torch.Tensor, at: Asked) -> torch.Tensor:
    """The same of the step, on pages; the context's keys are of SGLang's projections, as in a server."""
    pool = standin.Pool([0] * model.num_stages, pages=2, requests=1, rings=(16, 256))
    before = torch.arange(int(at.positions[0]))
    kvs = model.project_commit_kv(main_hidden=features[before], pool=Pool())
    for stage, kv in zip(model.stages, kvs, strict=True):
        a, pages = stage.self_attn, pool.get_swa_key_buffer_radix(stage.self_attn.layer_id).view(torch.uint8)
        ops.k_norm_rope_store(
            kv, a.kv_norm.weight, a.eps, a.freqs_cis, before, before, pages, pool.get_swa_key_page_size()
        )
    core = SimpleNamespace(swa_page_indices=at.slots, swa_topk_lengths=at.lengths)
    view = SimpleNamespace(
        kv_pool=SimpleNamespace(pool=pool), metadata=SimpleNamespace(core_attn_metadata=core),
        swa_out_cache_loc=lambda _: at.positions,
    )  # fmt: skip
    return stages(view, at.ids, at.positions, None).hidden_states


def proposals(model: Any, hidden: torch.Tensor, at: Asked) -> dict[str, torch.Tensor]:
    """Tokens [G], logits [G, V] and confidence [G] of a block's streams, as SGLang's worker makes them."""
    base, features = model.compute_base_logits(hidden)
    anchors = at.ids[:1]
    drawn = sample_draft_block(
        base_logits=base.view(1, model.gamma, -1), anchor_tokens=anchors, draft_hidden=None, sampling_info=None,
        markov_head=model.markov_head, noise=DraftNoise(key=0, offset=torch.zeros(1, dtype=torch.int64)),
        device=torch.device("cpu"), tp_sync=SpecTpSync(get_parallel().tp_group), greedy_draft=False,
    )  # fmt: skip
    confidence, _ = model.compute_confidence(
        anchor_tokens=anchors, draft_tokens=drawn.draft_tokens, confidence_features=features
    )
    return {"tokens": drawn.draft_tokens[0], "logits": drawn.corrected_logits[0].float(), "confidence": confidence[0]}


@torch.no_grad()
def main(checkpoint: str, given: str, found: str) -> None:
    text = torch.load(given)
    warned: list[str] = []
    deepseek_v4_dspark.logger.warning = lambda said, *values: warned.append(said % values)
    deepseek_v4_dspark.DeepseekV4ForCausalLMDSpark.load_weights = poisoned
    Fp8LinearMethod.apply, mhc.hc_split_sinkhorn = product, split
    model = load(checkpoint)
    target = Oracle(checkpoint)
    drafter = Drafter(target)
    model.attach_shared_modules(**vocabulary(target))
    missed = [name for name, parameter in model.named_parameters() if untouched(parameter)]
    blocks = [asked(model, text["tokens"], anchor) for anchor in text["anchors"]]
    theirs = [proposals(model, of_sglang(model, drafter, text["features"], at), at) for at in blocks]
    stages = Stages(model)
    ours = [proposals(model, of_the_step(model, stages, text["features"], at), at) for at in blocks]
    results = {
        whose: {name: torch.stack([block[name] for block in made]) for name in made[0]}
        for whose, made in (("sglang", theirs), ("step", ours))
    }
    torch.save({**results, "warned": warned, "missed": missed}, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
