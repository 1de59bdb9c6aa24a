"""What building the step takes beside SGLang's weights, six layers of the real width in SM120's layout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.step import prepare as takes

LAYERS = 6
MORE = 0.02
"""Of what is left at the end: what may be there for a moment."""
NEEDED = 24 << 30
"""Six layers of 256 experts at TP 1 are 20 GiB."""


def linear(n: int, k: int) -> SimpleNamespace:
    weight = torch.zeros(n, k, dtype=torch.float8_e4m3fn, device="cuda")
    return SimpleNamespace(weight=weight, weight_scale_inv=torch.ones(-(-n // 128), -(-k // 128), device="cuda"))


def layer_of(c: dict[str, int], layer_id: int) -> SimpleNamespace:
    """A layer without compression, named as SGLang's on an SM120."""
    hidden, experts, inter, heads = (
        c[name] for name in ("hidden_size", "n_routed_experts", "moe_intermediate_size", "num_attention_heads")
    )
    groups, rank = c["o_groups"], c["o_lora_rank"]
    names = [f"hc_{block}_{name}" for block in ("attn", "ffn") for name in ("fn", "scale", "base")]
    mix = {name: torch.zeros(3, device="cuda") for name in names}
    norm = SimpleNamespace(weight=torch.ones(hidden, device="cuda"))
    wo_a = torch.randn(groups * rank, heads * c["head_dim"] // groups, device="cuda").to(torch.float8_e4m3fn).bfloat16()
    attention = SimpleNamespace(
        layer_id=layer_id, compress_ratio=0, n_local_heads=heads, n_local_groups=groups, q_lora_rank=c["q_lora_rank"],
        eps=1e-6, softmax_scale=1.0, freqs_cis=None, q_norm=norm,
        wqkv_a=linear(c["q_lora_rank"] + c["head_dim"], hidden),
        wq_b=linear(heads * c["head_dim"], c["q_lora_rank"]), kv_norm=norm, _local_attn_sink=lambda count: None,
        wo_a=SimpleNamespace(weight=wo_a), wo_b=linear(hidden, groups * rank), compressor=None, indexer=None,
    )  # fmt: skip
    packed = {"dtype": torch.uint8, "device": "cuda"}
    routed = SimpleNamespace(
        w13_weight=torch.zeros(experts, 2 * inter, hidden // 2, **packed),
        w13_weight_scale_inv=torch.zeros(experts, 2 * inter, hidden // 32, **packed),
        w2_weight=torch.zeros(experts, hidden, inter // 2, **packed),
        w2_weight_scale_inv=torch.zeros(experts, hidden, inter // 32, **packed),
        _dsv4_mxfp4_backend="flashinfer_cutlass_sm120", num_local_experts=experts, moe_ep_rank=0,
    )  # fmt: skip
    shared = SimpleNamespace(swiglu_limit=10.0, gate_up_proj=linear(2 * inter, hidden), down_proj=linear(hidden, inter))
    mlp = SimpleNamespace(
        experts=routed, shared_experts=shared, is_hash=True, top_k=6, routed_scaling_factor=1.5,
        topk=SimpleNamespace(tid2eid=None), gate=SimpleNamespace(weight=torch.zeros(experts, hidden, device="cuda")),
    )  # fmt: skip
    return SimpleNamespace(
        layer_id=layer_id, self_attn=attention, mlp=mlp, input_layernorm=norm, post_attention_layernorm=norm,
        hc_eps=1e-6, hc_sinkhorn_iters=20, rms_norm_eps=1e-6, **mix,
    )  # fmt: skip


@pytest.mark.parametrize("is_patched", [True, False])
def test_nothing_but_wo_a_is_copied(is_patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a patched SGLang the FP8 one takes the bf16 one's place, elsewhere it lies beside it."""
    if (free := torch.cuda.mem_get_info()[0]) < NEEDED:
        pytest.skip(f"{free >> 20} MiB of GPU memory are free, needed {NEEDED >> 20}")
    monkeypatch.setattr(takes, "patched", lambda: is_patched)
    config = model_config()
    layers = [layer_of(config, index) for index in range(LAYERS)]
    bf16 = sum(layer.self_attn.wo_a.weight.nbytes for layer in layers)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = takes.prepare(SimpleNamespace(model=SimpleNamespace(layers=layers)))
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    taken = sum(part.nbytes for layer in kept for part in layer.attention.wo_a)
    print(f"before {before / 1e9:.2f} GB, after {after / 1e9:.2f}, at most {peak / 1e9:.2f}; "
          f"wo_a {bf16 / 1e9:.2f} and {taken / 1e9:.2f}")  # fmt: skip
    expected = before + taken - (bf16 if is_patched else 0)
    assert abs(after - expected) <= 1 << 20
    # The bf16 ones of the layers that come later are still there in the beginning.
    assert peak <= max(after, before) * (1 + MORE)
