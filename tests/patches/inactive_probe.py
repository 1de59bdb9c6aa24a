"""What functions that the series touches return for a model that is not DeepSeek-V4, on CPU.

Part of `resolution_probe.py`, which runs with the released SGLang and with the patched one.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any
from unittest import mock


def outcome(function: Callable[[], object]) -> object:
    """The result, or the error it ends in: both have to be upstream's."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def prompts(model: Any) -> list[object]:
    """How prompts are judged, usable ones and those which DeepSeek-V4's would be refused for."""
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    manager = TokenizerManager.__new__(TokenizerManager)
    manager.model_config, manager.context_len = model, model.context_len
    manager.num_reserved_tokens, manager.allow_auto_truncate, manager.validate_total_tokens = 0, False, True
    manager.is_generation = True

    def judge(ids: list[int]) -> object:
        request = GenerateReqInput(input_ids=ids, sampling_params={"max_new_tokens": 4})
        return outcome(lambda: manager._validate_one_request(request, ids))

    return [judge(ids) for ids in ([1, 2], [], [-1], [model.vocab_size], [1] * model.context_len)]


def first_request(server_args: Any) -> dict[str, Any]:
    """The request that a server sends itself before it says ready."""
    from sglang.srt.entrypoints import http_server

    sent: dict[str, Any] = {}

    def answer(url: str, **arguments: Any) -> Any:
        sent.update(arguments.get("json") or {})
        info = {"model_type": "llama", "is_generation": True, "architectures": ["LlamaForCausalLM"]}
        return types.SimpleNamespace(status_code=200, text="", json=lambda: info)

    # SGLang ends its own processes where the request fails.
    names = {"kill_process_tree": mock.DEFAULT, "_global_state": mock.DEFAULT}
    with (
        mock.patch.multiple(http_server.requests, get=answer, post=answer),
        mock.patch.multiple(http_server, **names) as replaced,
    ):
        assert http_server._execute_server_warmup(server_args), "the request failed"
    replaced["kill_process_tree"].assert_not_called()
    return sent


def longest_prompt(model: Any) -> object:
    """What a worker tells the scheduler, with a window pool too small for DeepSeek-V4."""
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

    pool = SWATokenToKVPoolAllocator.__new__(SWATokenToKVPoolAllocator)
    pool._size_swa, pool.page_size, pool._swa_req_ring = 256, 256, False
    runner = mock.MagicMock()
    runner.token_to_kv_pool_allocator, runner.effective_logical_max_total_num_tokens = pool, 2048
    worker = TpModelWorker.__new__(TpModelWorker)
    for name, value in {"model_config": model, "_model_runner": runner, "dllm_algorithm": None}.items():
        setattr(worker, name, value)
    worker.random_seed, worker.device = 0, "cpu"
    return outcome(lambda: [number for number in worker.get_worker_info() if isinstance(number, int)])


def results(folder: str) -> dict[str, object]:
    """Everything that is asked, for the model whose config.json is in `folder`."""
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=folder, device="cpu")
    publish(server_args, role="tokenizer")
    model = model_config_of(server_args)
    return {
        "prompts": prompts(model),
        "first request": first_request(server_args),
        "longest prompt": longest_prompt(model),
    }
