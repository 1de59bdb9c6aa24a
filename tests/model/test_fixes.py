"""What ends or freezes SGLang as released is refused here: `patches/0.5.23/fixes`, through HTTP on a CPU."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from serving import CachedOracle, PromptOf, ask, assert_equal

from local_server import LocalServer

# Three pages of window, and a prompt is prefilled at once: its pages and one more have to be less than that.
SERVER_ARGS = ("--max-total-tokens", "8192", "--swa-full-tokens-ratio", "0.1", "--chunked-prefill-size", "-1",
               "--mem-fraction-static", "0.5", "--log-requests", "--log-requests-level", "1")  # fmt: skip
PAGE = 256


def post(server: LocalServer, **prompt: Any) -> httpx.Response:
    body = prompt | {"sampling_params": {"max_new_tokens": 2, "temperature": 0}}
    return httpx.post(f"{server.url}/generate", json=body, timeout=120)


def test_the_servers_first_request_samples(server: LocalServer) -> None:
    first = next(line for line in server.log.read_text().splitlines() if "Receive: " in line)
    assert "'temperature': 0.7" in first and "'top_p': 0.9" in first


@pytest.mark.parametrize("tokens", [PAGE + 1, 1000])
def test_a_prompt_that_never_fits_the_window_pool_is_refused(
    server: LocalServer, tokens: int, seed: int, prompt_of: PromptOf
) -> None:
    assert "swa=768" in server.log.read_text()
    refused = post(server, input_ids=prompt_of(tokens, seed))
    assert refused.status_code == 400, refused.text
    assert f"Input length ({tokens} tokens) exceeds" in refused.text


def test_the_longest_prompt_is_served(
    server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf
) -> None:
    assert_equal(ask(server, prompt_of(PAGE, seed), new_tokens=2), oracle)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({"text": ""}, "The prompt is empty"),
        ({"input_ids": [5, 1024]}, "ids from 5 to 1024; valid range is [0, 1024)"),
        ({"input_ids": [-1, 5]}, "ids from -1 to 5; valid range is [0, 1024)"),
        ({"input_ids": [[5, 6], [7, 99999]]}, "ids from 7 to 99999; valid range is [0, 1024)"),
    ],
    ids=["empty", "too large", "negative", "one of two"],
)
def test_an_unusable_prompt_is_refused(server: LocalServer, prompt: dict[str, Any], sentence: str) -> None:
    refused = post(server, **prompt)
    assert refused.status_code == 400, refused.text
    assert sentence in refused.text
    assert post(server, input_ids=[0, 1023]).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/generate", {"return_logprob": True, "top_logprobs_num": 1000000}, "top_logprobs_num must be in [0, 1024]"),
        ("/v1/completions", {"logprobs": 1000000}, "top_logprobs_num must be in [0, 1024]"),
        ("/generate", {"return_logprob": True, "logprob_start_len": -5}, "logprob_start_len must be in [-1, "),
        ("/v1/completions", {"stop_token_ids": [9999999], "min_tokens": 2}, "stop_token_ids must be in [0, 1023]"),
        ("/generate", {"sampling_params": {"logit_bias": {"5": 1e300}}}, "logit_bias must be within +-1e+20"),
        ("/generate", {"sampling_params": {"stop_regex": "("}}, "stop_regex '('"),
        ("/generate", {"sampling_params": {"nope": 1}}, "unknown field `nope`"),
        ("/generate", {"sampling_params": []}, "sampling_params is a list of 0"),
        ("/generate", {"positional_embed_overrides": 5}, "positional_embed_overrides holds no"),
        ("/generate", {"sampling_params": {"json_schema": '{"$ref": "#"}'}}, "It allows no first token"),
        ("/v1/completions", {"n": 0}, "n must be in [1, 4096]"),
    ],
)
def test_a_hostile_request_is_refused_and_the_next_is_answered(
    server: LocalServer, path: str, body: dict[str, Any], sentence: str
) -> None:
    prompt = {"input_ids": [5, 6]} if path == "/generate" else {"model": "m", "prompt": [5, 6], "max_tokens": 2}
    refused = httpx.post(server.url + path, json=prompt | body, timeout=120)
    assert refused.status_code == 400, refused.text
    assert sentence in refused.text
    assert post(server, input_ids=[0, 1023]).status_code == 200


def test_a_lone_surrogate_is_refused(server: LocalServer) -> None:
    for path, field in (("/generate", "text"), ("/v1/completions", "prompt")):
        body = f'{{"model": "m", "{field}": "a\\ud800"}}'
        refused = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=120)
        assert refused.status_code == 400, refused.text
        assert "surrogate" in refused.text


def test_a_cpu_server_keeps_to_a_grammar(server: LocalServer) -> None:
    """SGLang's own since 0.5.23: before, the scheduler ended in the bit mask."""
    for grammar in ({"regex": "[0-9]{3}"}, {"json_schema": '{"enum": [[407, 312]]}'}):
        body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 64, "temperature": 1} | grammar}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        text = answer.json()["text"]
        if "regex" in grammar:
            assert len(text) == 3 and text.isdecimal()
        elif answer.json()["meta_info"]["finish_reason"]["type"] == "stop":
            assert json.loads(text) == [407, 312]


def test_after_all_refusals_the_answer_is_the_oracles(
    server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf
) -> None:
    assert_equal(ask(server, prompt_of(90, seed), new_tokens=4), oracle)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("pages", "chunk", "longest"), [(3, -1, PAGE), (3, None, PAGE), (9, None, 7 * PAGE), (3, 512, 8000 - 7)]
)
def test_how_long_a_prompt_may_be(pages: int, chunk: int | None, longest: int) -> None:
    assert worker_info(pages, chunk) == longest + 1


def test_a_window_pool_that_holds_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="The window pool holds 512 tokens, but no prompt fits into less than 768"):
        worker_info(2, 512)


def worker_info(pages: int, chunk: int | None) -> int:
    """From which length on SGLang refuses prompts, for a window pool of so many pages and 8,000 tokens of context."""
    from sglang.srt.managers import tp_worker

    kv = SimpleNamespace(size=0, max_context_len=0)
    runner = SimpleNamespace(
        swa_max_total_num_tokens=pages * PAGE, logical_max_total_num_tokens=8192, max_running_requests=8,
        effective_logical_max_total_num_tokens=8192, token_to_kv_pool_allocator=None, token_to_kv_pool=kv,
        req_to_token_pool=kv, forward_stream=None,
    )  # fmt: skip
    config = SimpleNamespace(context_len=8000, is_deepseek_v4_arch=True)
    worker = SimpleNamespace(model_runner=runner, model_config=config, dllm_algorithm=None, random_seed=0, device="cpu")
    schedule = SimpleNamespace(chunked_prefill_size=chunk, page_size=PAGE, max_prefill_tokens=0, max_queued_requests=0)
    memory = SimpleNamespace(enable_unified_memory=False)
    with patch.multiple(tp_worker, get_schedule=lambda: schedule, get_memory=lambda: memory):
        return tp_worker.TpModelWorker.get_worker_info(worker)[5]
