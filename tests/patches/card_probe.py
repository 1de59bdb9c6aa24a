"""What functions that the series touches return for tensors of a CUDA card, up to their kernels and through them.

Part of `resolution_probe.py`, which runs with the released SGLang and with the patched one. The tensors lie in this
machine's memory and say that they do not: Triton's kernels run interpreted, others write down what they are given.
"""

from __future__ import annotations

import contextlib
import hashlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BATCH, NODES = 3, 4


class Card(Tensor):
    """A tensor that says that it is not on a CPU."""

    is_cpu = False


def card(*values: Tensor) -> Any:
    found = [value.as_subclass(Card) for value in values]
    return found[0] if len(found) == 1 else found


def written(value: Any) -> Any:
    """A value as JSON keeps it, tensors as dtype, shape and a digest of their bytes."""
    if isinstance(value, Tensor):
        data = value.as_subclass(Tensor).contiguous().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if isinstance(value, dict):
        return {name: written(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [written(part) for part in value]
    return value if isinstance(value, int | float | str | None) else repr(value)


class Recorder:
    """Stands in for a kernel or a class: keeps what each call gives it, and returns what `answer` says."""

    def __init__(self, answer: Callable[..., Any] = lambda *_, **__: None) -> None:
        self.calls: list[Any] = []
        self._answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(written([list(args), kwargs]))
        return self._answer(*args, **kwargs)


@contextlib.contextmanager
def on_sm90(*modules: Any) -> Iterator[None]:
    """`modules` see a platform of CUDA devices of sm_90."""
    from sglang.srt.runtime_context import override_platform

    facts = {"is_cuda": True, "device_sm": 90, "is_sm120": False, "is_blackwell": False}
    device = types.SimpleNamespace(device="cuda")
    with contextlib.ExitStack() as stack:
        stack.enter_context(override_platform(**facts))
        for module in modules:
            if hasattr(module, "_is_cuda"):
                stack.enter_context(mock.patch.object(module, "_is_cuda", True))
            # The released module may not have the name.
            stack.enter_context(mock.patch.object(module, "get_device", lambda: device, create=True))
        yield


def table() -> tuple[Tensor, Tensor, Tensor]:
    """`req_to_token`, rows of it, and tokens of each request."""
    slots = torch.randperm(6 * 64).view(6, 64).int()
    return slots, torch.tensor([4, 1, 3]), torch.tensor([7, 30, 21])


def drafts() -> dict[str, Any]:
    """EAGLE's tree for verification, and what a verification accepts: chains and trees."""
    from sglang.kernels.ops.speculative import spec_tree

    found = {}
    for top_k in (1, 2):
        parents = torch.tensor([[-1, 0, 1]] * BATCH) if top_k == 1 else torch.tensor([[-1, 0]] * BATCH)
        chosen = torch.tensor([[0, 1, 2]] * BATCH)
        made = [torch.full((BATCH, NODES), -1) for _ in range(3)]
        mask = torch.ones(BATCH * NODES * NODES, dtype=torch.bool)
        positions = torch.zeros(BATCH * NODES, dtype=torch.int64)
        out = card(mask, positions, *made)
        # The branch without a CUDA kernel, which behaves like it.
        with mock.patch.object(spec_tree, "_is_xpu", True):
            spec_tree.build_tree_kernel_efficient_func(
                *card(parents, chosen, torch.tensor([5, 9, 2])), *out, top_k, 3, NODES, spec_tree.TreeMaskMode(1)
            )
        candidates, target = torch.randint(3, (2, BATCH, NODES))
        accepted = [torch.zeros(BATCH * NODES, dtype=torch.int32), torch.full((BATCH, NODES), -1, dtype=torch.int32)]
        accepted.append(torch.zeros(BATCH, dtype=torch.int32))
        arguments = (*card(*accepted, candidates), *out[2:], card(target))
        kernel = Recorder()
        tree = types.SimpleNamespace(verify_tree_greedy=kernel)
        with (
            mock.patch.object(spec_tree, "_is_cuda", True),
            mock.patch.dict("sys.modules", {"sglang.kernels.ops.speculative.tree": tree}),
        ):
            spec_tree.verify_tree_greedy_func(*arguments, topk=top_k)
        assert len(kernel.calls) == 1
        with mock.patch.object(spec_tree, "_is_xpu", True):
            result = spec_tree.verify_tree_greedy_func(*arguments, topk=top_k)
        found[f"{top_k} a step"] = written([out, kernel.calls, result])
    return found


def slots() -> dict[str, Any]:
    """Where new tokens are stored, and where the last one is."""
    from sglang.kernels.ops.speculative import cache_locs
    from sglang.srt.mem_cache import allocation

    cells, rows, lengths = card(*table())
    new, drafted = card(torch.randperm(BATCH * NODES)), card(torch.full((BATCH * NODES,), -7))
    with on_sm90(cache_locs, allocation):
        found = {
            "extend": cache_locs.assign_extend_cache_locs_func(
                rows, cells, lengths, lengths + NODES, BATCH, NODES, "cpu"
            ),
        }
        cache_locs.assign_draft_cache_locs_contiguous_func(rows, cells, lengths, drafted, 1, NODES)
        found["draft"] = drafted
        allocation.assign_req_to_token_pool_func(rows, cells, lengths, lengths + NODES, new, BATCH)
        found["table"] = cells
        for backend in ("fa3", "torch_native"):
            with mock.patch.object(allocation, "attention_backends", lambda backend=backend: (backend, backend)):
                found[f"last {backend}"] = allocation.get_last_loc(cells, rows, lengths)
    return written(found)


def between_passes() -> dict[str, Any]:
    """What one pass of a speculating server hands to the next."""
    from sglang.kernels.ops.speculative import eagle, gather_spec_extras
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    bonus = card(torch.zeros(BATCH, dtype=torch.int32))
    tokens, accepted = torch.randint(50, (BATCH, NODES)).int(), torch.tensor([1, 4, 2]).int()
    eagle.fill_bonus_tokens_func(*card(tokens, accepted), bonus, NODES, BATCH)
    buffers = [torch.rand(8, 1), torch.randint(50, (8, 1)), torch.randint(50, (8,)).int(), torch.rand(8, 4, 6)]
    _, rows, lengths = card(*table())
    gathered = gather_spec_extras.gather_spec_extras(rows, *card(*buffers))
    states = [card(torch.rand(8 * 16, 32)) for _ in range(3)]
    pool = DeepSeekV4TokenToKVPool.__new__(DeepSeekV4TokenToKVPool)
    pool.compress_state_pools = [None] + [
        types.SimpleNamespace(ratio=ratio, ring_size=16, kv_score_buffer=types.SimpleNamespace(kv_score=state))
        for ratio, state in zip((4, 128, 128), states, strict=True)
    ]
    pool.clear_unaccepted_c128_draft_states(rows, lengths, card(accepted), NODES)
    return written({"bonus": bonus, "gathered": gathered, "rings": states})


def process_groups() -> list[Any]:
    """How a group of ranks is made on a backend of a card."""
    from sglang.srt.distributed import parallel_state

    found = Recorder()
    with mock.patch.object(parallel_state, "GroupCoordinator", found):
        for backend in ("nccl", "mooncake"):
            parallel_state.init_model_parallel_group([[0, 1]], 0, backend, group_name="tp")
    return found.calls


def deepseek_v4() -> dict[str, Any]:
    """DeepSeek-V4's own classes on a card of sm_90, where SGLang serves it by itself."""
    from sglang.kernels.ops.attention.dsv4 import compress, metadata_kernel
    from sglang.srt.layers.attention import deepseek_v4_backend as backend
    from sglang.srt.models import deepseek_v4

    cells, rows, lengths = card(*table())
    found: dict[str, Any] = {}
    plans = Recorder(lambda *_: torch.zeros(BATCH, 16, dtype=torch.uint8))
    module = types.SimpleNamespace(plan_decode=plans)
    full_to_swa = card(torch.randperm(6 * 64))
    with mock.patch.object(compress, "_jit_compress_plan_module", lambda: module):
        for ratio in (4, 128):
            plan = compress.CompressorDecodePlan.generate(ratio, rows, cells, full_to_swa, lengths, 256, 8)
            found[f"plan {ratio}"] = written(plan)
    found["plans"] = plans.calls
    pages = card(torch.randint(9, (BATCH, 2)).int())
    found["compression"] = written(
        metadata_kernel.init_compression_metadata(lengths.int(), lengths - 1, lengths * 3, pages, 256)
    )
    own = backend.DeepseekV4AttnBackend.__new__(backend.DeepseekV4AttnBackend)
    own.trtllm_attn, own.forward_metadata = False, types.SimpleNamespace(late_layer_tail=None)
    extend = types.SimpleNamespace(is_extend_without_speculative=lambda: True)
    batch = types.SimpleNamespace(forward_mode=extend)
    interface = types.SimpleNamespace(get_mla_metadata=lambda: ("scheduled", None))
    with (
        on_sm90(backend),
        mock.patch.object(backend, "is_cp_active", lambda _: False),
        mock.patch.dict("sys.modules", {"sglang.kernels.ops.attention.flash_mla_interface": interface}),
    ):
        found["flash mla"] = backend._create_flashmla_metadata()
        found["sparse prefill"] = own._use_sparse_prefill(batch, num_qo_tokens=1 << 20)
    weights = [torch.rand(4, 4) for _ in range(2)]
    hollow = [torch.nn.Module() for _ in range(2)]
    for part, weight in zip(hollow, weights, strict=True):
        part.weight = torch.nn.Parameter(weight)
    model = types.SimpleNamespace(model=types.SimpleNamespace(embed_tokens=hollow[0]), lm_head=hollow[1])
    device = mock.MagicMock()
    with mock.patch.object(torch, "get_device_module", lambda: device):
        deepseek_v4.DeepseekV4ForCausalLM.set_embed_and_head(model, *card(*weights))
    found["device"] = [name for name, *_ in device.method_calls]
    assert found["flash mla"] == "scheduled" and found["sparse prefill"] and found["device"] and len(plans.calls) == 2
    return found


def results() -> dict[str, Any]:
    found = {}
    for probe in (drafts, slots, between_passes, process_groups, deepseek_v4):
        torch.manual_seed(0)
        found[f"{probe.__name__.replace('_', ' ')} on a card"] = probe()
    return found
