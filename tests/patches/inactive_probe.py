"""Prints, as JSON, what touched functions return for a model that is not DeepSeek-V4, on CPU.

Run by `test_inactive.py` with SGLang's pristine package and with the patched one.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import sglang
import torch
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.deep_gemm_wrapper import configurer
from sglang.srt.layers.moe.utils import initialize_moe_config
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from sglang.srt.models.deepseek_v2 import DeepseekV2MoE
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from torch import Tensor


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def outcome(function: Callable[[], object]) -> object:
    """The result, or the error it ends in: both have to be upstream's."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def moe_of_deepseek_v3() -> str:
    """DeepSeek-V3's mixture of experts: same file and class as V4's, other routing."""
    config = types.SimpleNamespace(
        hidden_size=128, moe_intermediate_size=128, hidden_act="silu", num_hidden_layers=2,
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
        topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    layer = DeepseekV2MoE(config, layer_id=1)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.1)
    return digest(layer.forward_normal(torch.randn(5, 128)))


def fp8_linear() -> object:
    """A block-scaled FP8 layer of any model."""
    method = Fp8LinearMethod(Fp8Config(True, "dynamic", weight_block_size=[128, 128]))
    layer = torch.nn.Module()
    method.create_weights(layer, 256, [256], 256, 256, torch.bfloat16, weight_loader=None)
    layer.weight.data = torch.randn(256, 256).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(2, 2, dtype=torch.float32)
    method.process_weights_after_loading(layer)
    # Upstream's kernels need a GPU; where the call goes, and with what, is seen in their place.
    method.w8a8_block_fp8_linear = lambda **call: digest(call["input"]) + digest(call["weight_scale"])
    x = torch.randn(3, 256)
    return [digest(layer.weight), digest(layer.weight_scale_inv), outcome(lambda: method.apply(layer, x))]


def deepgemm_by_architecture() -> dict[str, object]:
    """Whether DeepGEMM is chosen on other GPUs, as if it were installed."""
    configurer._is_cuda = True
    chosen = {}
    for sm in (80, 90, 100, 103):
        configurer.get_device_sm = lambda sm=sm: sm
        chosen[str(sm)] = outcome(configurer._compute_enable_deep_gemm)
    return chosen


def main() -> None:
    server_args = ServerArgs(model_path="dummy", device="cpu")
    set_global_server_args_for_scheduler(server_args)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
    initialize_model_parallel(backend="gloo")
    initialize_moe_config(server_args)
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.inference_mode():
        print(json.dumps({
            "sglang": sglang.__file__,
            "moe": moe_of_deepseek_v3(),
            "fp8_linear": fp8_linear(),
            "deepgemm": deepgemm_by_architecture(),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
