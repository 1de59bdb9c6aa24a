"""What ends or freezes SGLang as released is refused here: `patches/0.5.23/fixes`, through HTTP on a CPU."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import fuzzed_requests
import httpx
import hypothesis
import pytest
from fuzzed_requests import Request
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving import CachedOracle, PromptOf, ask, assert_equal

from local_server import LocalServer

# Three pages of window, and a prompt is prefilled at once: its pages and one more have to be less than that.
SERVER_ARGS = ("--max-total-tokens", "8192", "--swa-full-tokens-ratio", "0.1", "--chunked-prefill-size", "-1",
               "--mem-fraction-static", "0.5", "--log-requests", "--log-requests-level", "1",
               # Of a fuzzed request that names no limit a CPU would compute 128 tokens.
               "--preferred-sampling-params", '{"max_new_tokens": 2}', "--admin-api-key", "authority")  # fmt: skip
PAGE = 256
AT_ONCE = 32
ENDS_NOWHERE = {"ebnf": 'root ::= "a" b\nb ::= b', "max_new_tokens": 4}
MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
USABLE: dict[str, dict[str, Any]] = {
    "/generate": {"input_ids": [5, 6]}, "/v1/completions": {"model": "m", "prompt": [5, 6], "max_tokens": 2},
    "/vertex_generate": {"instances": [{"input_ids": [5, 6]}]}, "/api/generate": {"model": "m", "prompt": "hi"},
    "/parse_function_call": {"text": "hi", "tools": []}, "/separate_reasoning": {"text": "hi"},
    "/v1/messages/count_tokens": MESSAGES, "/v1/responses": {"input": "hi"},
}  # fmt: skip


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
        ("/v1/completions", {"max_tokens": "x"}, '"max_tokens: Input should be a valid integer'),
        ("/generate", {"lora_id": [None]}, "lora_id needs an entry for each prompt"),
        ("/generate", {"text": ["a", "b"]}, "Either text, input_ids or input_embeds"),
        ("/generate", {"input_ids": None, "input_embeds": []}, "input_embeds cannot be empty"),
        ("/generate", {"sampling_params": ENDS_NOWHERE}, "The grammar allows no further token"),
        ("/vertex_generate", {"parameters": {"stream": 5}}, "stream: invalid type"),
        ("/vertex_generate", {"parameters": {"no_logs": "x"}}, "parameters.no_logs: Input should be a valid boolean"),
        ("/api/generate", {"options": {"num_predict": "2"}}, "sampling_params.max_new_tokens: invalid type"),
        ("/api/generate", {"options": {"num_predict": 2, "top_k": 2**40}}, "top_k must be"),
        ("/parse_function_call", {"tool_call_parser": "x"}, "Unsupported tool_call_parser"),
        ("/separate_reasoning", {"reasoning_parser": "x"}, "Unsupported reasoning_parser"),
        ("/v1/messages/count_tokens", {"output_config": "x"}, "output_config: "),
        ("/v1/messages/count_tokens", {"tools": [{"type": 5}]}, "tools.0.custom.name: Field required"),
        ("/generate", {"session_params": {"id": [[]]}}, "session_params.id cannot be [[]]"),
        ("/v1/responses", {"tool_choice": {}}, "validation error for ChatCompletionRequest model Input should be"),
    ],
)
def test_a_hostile_request_is_refused_and_the_next_is_answered(
    server: LocalServer, path: str, body: dict[str, Any], sentence: str
) -> None:
    refused = httpx.post(server.url + path, json=USABLE[path] | body, timeout=120)
    assert refused.status_code == 400, refused.text
    assert sentence in refused.text and "\\n" not in refused.text
    assert post(server, input_ids=[0, 1023]).status_code == 200


def test_a_body_that_is_no_object_is_refused(server: LocalServer) -> None:
    for path in ("/generate", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/invocations"):
        for body in ('["a"]', "null"):
            headers = {"Content-Type": "application/json"}
            refused = httpx.post(server.url + path, content=body, headers=headers, timeout=120)
            assert refused.status_code == 400, refused.text
            assert "The body must be a JSON object." in refused.text


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


def send(client: httpx.Client, request: Request) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return client.request(
        request.route.method, request.path, params=request.query, content=request.content, headers=headers
    )


def test_whatever_a_client_sends_is_answered_or_refused(
    server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf, pytestconfig: pytest.Config
) -> None:
    """Of every 32 requests sent at once one is honest, and its answer the oracle's."""
    clients = [route for route in fuzzed_requests.routes() if not route.administrative]
    honest = prompt_of(12, seed)
    statuses: Counter[int | str] = Counter()
    faults: list[str] = []

    # A kept connection is closed after five seconds, at times just when the next request is sent. A thousand samples of
    # one prompt take minutes here.
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=server.url, timeout=900, limits=limits) as client, ThreadPoolExecutor(AT_ONCE) as pool:

        @hypothesis.seed(seed)
        @settings(max_examples=pytestconfig.getoption("--fuzzed") // AT_ONCE, database=None,
                  phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
        @given(st.randoms(use_true_random=True))
        def send_at_once(random: Random) -> None:
            beside = pool.submit(ask, server, honest, new_tokens=2)
            sent = [fuzzed_requests.draw(clients, random) for _ in range(AT_ONCE - 1)]
            for request, answer in zip(sent, [pool.submit(send, client, request) for request in sent], strict=True):
                try:
                    status, text = answer.result().status_code, answer.result().text
                except httpx.HTTPError as error:
                    assert server.alive(), "the server ended beside\n" + "\n".join(map(str, sent))
                    status, text = repr(error), ""
                statuses[status] += 1
                fault = fuzzed_requests.fault(request, status, text) if isinstance(status, int) else "no answer"
                if fault:
                    faults.append(f"{fault}: {status} {text[:300]} to {request}")
            assert_equal(beside.result(), oracle)
            statuses["honest"] += 1

        send_at_once()
    print(f"answers by status: {statuses}")
    assert not faults, "\n".join(faults)
    # A test of refusals alone would show little, and so would one of answers.
    assert statuses[200] > len(clients) / 2 and statuses[400] > statuses[200]


def test_an_administrative_route_needs_authority(server: LocalServer, seed: int) -> None:
    """Which are administrative SGLang says itself; with a key set it asks for it before it reads the request."""
    administrative = [route for route in fuzzed_requests.routes() if route.administrative]
    assert {"/update_weights_from_disk", "/flush_cache", "/abort_request"} < {route.path for route in administrative}
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for route in administrative:
            answer = send(client, fuzzed_requests.draw([route], Random(seed)))
            # SGLang overlooks the mark of these two and asks for no key; without elastic EP they do nothing.
            known = "elastic_ep" in route.path
            assert answer.status_code == 401 or (known and answer.status_code < 500), (route, answer.text)
    assert post(server, input_ids=[0, 1023]).status_code == 200


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
