"""No request ends the server: SGLang's own classes, in process, with what clients send (the table: docs/requests.md).

What only a server shows (the routes, constrained answers, the next answer after a refusal) is in `test_fixes.py`.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest

VOCAB = 1024
CONTEXT = 8000
MAX_BIAS = 1e20


class WordTokenizer:
    """A token a character, with the ids that SGLang reads."""

    eos_token_id = 1
    additional_stop_token_ids = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(character) % VOCAB for character in text]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(map(chr, tokens))


@pytest.fixture(scope="module")
def manager() -> Iterator[Any]:
    """SGLang's TokenizerManager with a configuration, but neither processes nor sockets."""
    from sglang.srt.managers import tokenizer_manager
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    made = tokenizer_manager.TokenizerManager.__new__(tokenizer_manager.TokenizerManager)
    made.model_config = SimpleNamespace(
        vocab_size=VOCAB, is_deepseek_v4_arch=True, is_multimodal=False, joint_head_config=None, pointer_head=None
    )
    made.context_len, made.num_reserved_tokens = CONTEXT, 0
    made.allow_auto_truncate, made.validate_total_tokens, made.is_generation = False, True, True
    made.preferred_sampling_params, made.sampling_params_class = None, SamplingParams
    made.tokenizer, made.tokenized_generate_req_type = WordTokenizer(), TokenizedGenerateReqInput
    made.server_args, made.rid_to_state = None, defaultdict(Mock)
    features = SimpleNamespace(
        enable_encoder_swa_bounded_replay=False, enable_custom_logit_processor=False, enable_watermark=False,
        watermark_key=None, watermark_context_window=None, watermark_enforce_all=False, watermark_default_enabled=False,
    )  # fmt: skip
    with ExitStack() as stack:
        for name, value in {
            "get_exec": SimpleNamespace(features=features),
            "get_disagg": SimpleNamespace(disaggregation_transfer_backend="none"),
            "get_server_return_hidden_states_mode": tokenizer_manager.get_request_return_hidden_states_mode(False),
        }.items():
            stack.enter_context(patch.object(tokenizer_manager, name, lambda value=value: value))
        yield made


def admit(manager: Any, **request: Any) -> list[Any]:
    """What goes to the scheduler for a /generate request, one for each prompt and sample.

    Raises:
        ValueError: which every route answers with status 400.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    request.setdefault("input_ids", [5, 6, 7])
    batch = GenerateReqInput(**request)
    batch.normalize_batch_and_arguments()
    admitted = []
    for one in [batch] if batch.is_single else [batch[i] for i in range(len(batch.rid))]:
        manager._validate_one_request(one, one.input_ids)
        admitted.append(manager._create_tokenized_object(one, None, one.input_ids))
    return admitted


def test_keys_are_hidden_where_the_arguments_are_shown() -> None:
    from sglang.srt.entrypoints.engine import _server_args_for_logging
    from sglang.srt.server_args import ServerArgs

    secrets = {"api_key": "aaaa1", "admin_api_key": "bbbb2", "ssl_keyfile_password": "cccc3"}
    shown = _server_args_for_logging(ServerArgs(model_path="dummy", **secrets))
    assert {shown[name] for name in secrets} == {"<redacted>"} and shown["model_path"] == "dummy"
    assert not any(secret in str(shown) for secret in secrets.values())


@pytest.mark.parametrize(
    ("field", "hostile"),
    [
        ("stop_token_ids", [VOCAB]), ("stop_token_ids", [9999999]), ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**63]), ("logit_bias", {"5": 1e300}), ("logit_bias", {"5": -1e300}),
        ("logit_bias", {"5": math.nan}), ("logit_bias", {"5": math.inf}), ("logit_bias", {"5": 1.01e20}),
        ("logit_bias", {str(VOCAB): 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"x": 1}),
        ("temperature", math.nan), ("temperature", math.inf), ("temperature", 1e300), ("temperature", -1.0),
        ("repetition_penalty", 1e-300), ("repetition_penalty", math.nan), ("repetition_penalty", 0.0),
        ("top_k", 2**31), ("top_k", 2**63), ("top_k", 0), ("top_p", math.nan), ("min_p", math.nan),
        ("frequency_penalty", math.inf), ("presence_penalty", math.nan), ("sampling_seed", 2**63),
        ("stop_regex", "("), ("stop_regex", ["a", "[z-a]"]), ("stop_regex", "a{99999999999999999999}"),
        ("n", 0), ("n", -1), ("n", 2**31), ("n", 4097),
    ],
    ids=str,
)  # fmt: skip
def test_a_sampling_parameter_out_of_range_is_refused_by_name(manager: Any, field: str, hostile: Any) -> None:
    with pytest.raises(ValueError, match=field) as refused:
        admit(manager, sampling_params={field: hostile, "max_new_tokens": 2})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "edge",
    [
        {"stop_token_ids": [0, VOCAB - 1], "min_new_tokens": 2}, {"logit_bias": {"5": MAX_BIAS, "1023": -MAX_BIAS}},
        {"temperature": MAX_BIAS}, {"temperature": 0}, {"repetition_penalty": 1e-6}, {"repetition_penalty": 2},
        {"top_k": -1}, {"top_k": 2**30}, {"stop_regex": "a|[b-d]{2,}"}, {"n": 1}, {"n": None}, {"stop": "end"},
    ],
    ids=str,
)  # fmt: skip
def test_the_last_value_in_range_is_admitted(manager: Any, edge: dict[str, Any]) -> None:
    (request,) = admit(manager, sampling_params={"max_new_tokens": 2} | edge)
    assert request.sampling_params.max_new_tokens == 2


def test_the_last_bias_is_finite_at_the_least_temperature_and_penalty() -> None:
    import torch

    logit = torch.tensor([MAX_BIAS], dtype=torch.float32)
    assert (logit / 1e-6 / 1e-6).isfinite().all()


@pytest.mark.parametrize("stop", ["", [""], ["", "end"]], ids=str)
@pytest.mark.parametrize("field", ["stop", "stop_regex"])
def test_an_empty_stop_string_is_unset(manager: Any, field: str, stop: Any) -> None:
    (request,) = admit(manager, sampling_params={field: stop})
    held = request.sampling_params.stop_strs if field == "stop" else request.sampling_params.stop_regex_strs
    assert held == [kept for kept in ["end"] if kept in stop]


def test_the_length_of_a_stop_regex_fits_the_message_to_the_scheduler(manager: Any) -> None:
    nested = "a"
    for _ in range(4):
        nested = f"({nested}{{4294967290}})"
    (request,) = admit(manager, sampling_params={"stop_regex": nested})
    assert request.sampling_params.stop_regex_max_len == 2**30


@pytest.mark.parametrize(
    ("field", "hostile", "limit"),
    [
        ("top_logprobs_num", 1000000, f"[0, {VOCAB}]"), ("top_logprobs_num", VOCAB + 1, f"[0, {VOCAB}]"),
        ("top_logprobs_num", -1, f"[0, {VOCAB}]"), ("logprob_start_len", -5, f"[-1, {CONTEXT}]"),
        ("logprob_start_len", -2, f"[-1, {CONTEXT}]"), ("logprob_start_len", 2**63, f"[-1, {CONTEXT}]"),
        ("token_ids_logprob", [99999], f"[0, {VOCAB})"), ("token_ids_logprob", [-1], f"[0, {VOCAB})"),
        ("positional_embed_overrides", 5, "PositionalEmbeds"), ("session_params", {"x": 1}, ".x cannot be 1"),
        ("session_params", {"id": [[]]}, ".id cannot be [[]]"), ("session_params", {"x": None}, ".x cannot be None"),
        ("session_params", {"id": "s", "offset": True}, ".offset cannot be True"),
        ("session_params", {"id": "s", "offset": -1}, f"[0, {CONTEXT}]"),
        ("session_params", {"id": "s", "offset": 2**70}, f"[0, {CONTEXT}]"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("prompts", [[5, 6, 7], [[5, 6], [7]]], ids=["one prompt", "two prompts"])
def test_a_field_that_reaches_a_tensor_or_a_slice_is_refused_by_name(
    manager: Any, prompts: Any, field: str, hostile: Any, limit: str
) -> None:
    if field == "positional_embed_overrides" and isinstance(prompts[0], list):
        hostile = [hostile] * 2
    with pytest.raises(ValueError, match=field) as refused:
        admit(manager, input_ids=prompts, return_logprob=True, **{field: hostile})
    assert limit in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "edge", [{"top_logprobs_num": VOCAB}, {"top_logprobs_num": 0}, {"logprob_start_len": -1}, {"logprob_start_len": 3}]
)
def test_the_last_log_probability_in_range_is_admitted(manager: Any, edge: dict[str, int]) -> None:
    (request,) = admit(manager, return_logprob=True, **edge)
    assert {name: getattr(request, name) for name in edge} == edge


def test_the_parameters_of_a_session_are_admitted(manager: Any) -> None:
    given = {"id": "s", "rid": None, "offset": 3, "replace": True, "drop_previous_output": False}
    (request,) = admit(manager, session_params=given)
    assert {name: getattr(request.session_params, name) for name in given} == given


@pytest.mark.parametrize(
    "field",
    ["sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "rid",
     "return_hidden_states"],
)  # fmt: skip
@pytest.mark.parametrize(("prompts", "entries"), [([5, 6], 0), ([5, 6], 1), ([[5], [6]], 1), ([[5], [6]], 3)], ids=str)
def test_a_list_that_does_not_match_the_prompts_is_refused(
    manager: Any, prompts: Any, entries: int, field: str
) -> None:
    given = {"sampling_params": [{}] * 3, "token_ids_logprob": [[5]] * 3, "rid": ["a", "b", "c"]}
    values = (given | {"return_hidden_states": [False] * 3}).get(field, [1] * 3)
    if field == "token_ids_logprob" and not entries:
        # An empty list of ids has always meant none.
        assert admit(manager, input_ids=prompts, token_ids_logprob=[])[0].token_ids_logprob is None
        return
    with pytest.raises(ValueError, match=f"{field} is a list of {entries}"):
        admit(manager, input_ids=prompts, **{field: values[:entries]})
    assert len(admit(manager, input_ids=[[5], [6]], **{field: values[:2]})) == 2


PER_PROMPT = ("lora_path", "lora_id", "bootstrap_host", "bootstrap_port", "bootstrap_pair_key", "decode_tp_size")


@pytest.mark.parametrize("field", PER_PROMPT)
def test_a_list_for_one_prompt_is_refused(manager: Any, field: str) -> None:
    """In the scheduler a list of `lora_id` met the text of a cache key, which ended it."""
    with pytest.raises(ValueError, match=f"{field} needs an entry for each prompt"):
        admit(manager, **{field: [None]})
    (request,) = admit(manager, **{field: None})
    assert getattr(request, field, None) is None


@pytest.mark.parametrize(
    ("field", "hostile"),
    [(field, values) for field in (*PER_PROMPT[:4], "video_data", "audio_data") for values in ([], ["1"] * 3)]
    + [("modalities", ["image"]), ("lora_id", "a"), ("positional_embed_overrides", 5),
       ("positional_embed_overrides", [None]), ("token_indices_to_pool", [[1]]),
       ("multi_item_delimiter_indices", "ab")],
    ids=str,
)  # fmt: skip
def test_every_entry_per_prompt_fits_the_batch(manager: Any, field: str, hostile: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} needs an entry for each prompt"):
        admit(manager, input_ids=[[5], [6]], **{field: hostile})
    assert len(admit(manager, input_ids=[[5], [6]], **{field: [None, None]})) == 2


@pytest.mark.parametrize("prompts", [{"text": []}, {"input_embeds": []}, {"input_embeds": [[]]}], ids=str)
def test_a_batch_without_a_prompt_is_refused(manager: Any, prompts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="text and input_embeds cannot be empty|input_embeds cannot have an empty"):
        admit(manager, input_ids=None, **prompts)


def test_two_prompts_in_one_are_refused(manager: Any) -> None:
    """With one in a list the other was cut into pieces."""
    with pytest.raises(ValueError, match="Either text, input_ids or input_embeds"):
        admit(manager, text=["a", "b"], input_ids=[5, 6])


def test_an_embedding_is_refused_before_its_fields_are_read(manager: Any) -> None:
    from sglang.srt.managers.io_struct import EmbeddingReqInput

    hostile = EmbeddingReqInput(text=["a", "b"], rid="not a list", lora_id="a")
    with patch.multiple(manager, create=True, is_generation=True, auto_create_handle_loop=lambda: None):
        with pytest.raises(ValueError, match="runs no embedding model"):
            asyncio.run(anext(manager.generate_request(hostile)))


def test_random_numbers_are_admitted_or_refused_by_name(manager: Any, seed: int) -> None:
    """Whatever is admitted fits the tensors and messages that SGLang makes of it."""
    import torch

    draw = random.Random(seed)
    numbers = [0, 1, -1, 2, 2**31, -(2**31) - 1, 2**63, -(2**63), 10**30, 0.5, 1e-300, 1e38, 1e39, 1e300, -1e300,
               math.nan, math.inf, -math.inf]  # fmt: skip
    tensors = {"temperature": torch.float32, "top_p": torch.float32, "min_p": torch.float32, "top_k": torch.int32,
               "repetition_penalty": torch.float32, "frequency_penalty": torch.float32,
               "presence_penalty": torch.float32}  # fmt: skip
    refused = 0
    for _ in range(500):
        given = {name: draw.choice(numbers) for name in draw.sample(sorted(tensors), 2)}
        bias = {str(draw.randrange(VOCAB)): draw.choice(numbers)}
        stop = [int(draw.choice([number for number in numbers if math.isfinite(number)]))]
        for name, value in given.items():
            if name == "top_k" and isinstance(value, float):
                # The JSON contract of /generate admits whole numbers alone.
                given[name] = 1
        try:
            (request,) = admit(manager, sampling_params=given | {"logit_bias": bias, "stop_token_ids": stop})
        except ValueError as error:
            assert any(name in str(error) for name in [*given, "logit_bias", "stop_token_ids"]), error
            refused += 1
            continue
        held = request.sampling_params
        for name, dtype in tensors.items():
            assert torch.tensor([getattr(held, name)], dtype=dtype).isfinite().all(), (name, getattr(held, name))
        assert torch.tensor(list(held.logit_bias.values()), dtype=torch.float32).isfinite().all()
        assert torch.tensor([held.repetition_penalty], dtype=torch.float32).item() > 0
        assert all(0 <= token < VOCAB for token in held.stop_token_ids)
    assert 50 < refused < 500


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({"max_new_tokens": "2"}, 'string "2"'), ({"max_new_tokens": 2.5}, "floating point `2.5`"),
        ({"n": "2"}, 'string "2"'), ({"stop": 5}, "integer `5`"), ({"nope": 1}, "unknown field `nope`"),
        ({"stop_token_ids": [1.5]}, "floating point `1.5`"), ({"logit_bias": {"5": "a"}}, 'string "a"'),
        ({"top_k": 1e300}, "floating point"), ({"json_schema": {}}, "expected a string"),
    ],
    ids=str,
)  # fmt: skip
def test_the_contract_of_generate_refuses_wrong_types(parameters: dict[str, Any], found: str) -> None:
    from sglang.srt.entrypoints.api_contract import generate_contract_error

    error = generate_contract_error({"input_ids": [5], "stream": False, "sampling_params": {"n": 1} | parameters})
    assert error is not None and found in error
    assert error.startswith(f"sampling_params.{next(iter(parameters))}: ")
    assert generate_contract_error({"input_ids": [5], "sampling_params": {"max_new_tokens": 2}}) is None


@pytest.mark.parametrize(
    ("field", "hostile"),
    [
        ("stop", 5),
        ("max_tokens", 2.5),
        ("n", "x"),
        ("stop_token_ids", ["a"]),
        ("messages", 5),
        ("response_format", "a"),
    ],
)
def test_the_chat_model_refuses_wrong_types(field: str, hostile: Any) -> None:
    from pydantic import ValidationError
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(ValidationError, match=field):
        ChatCompletionRequest(**(body | {field: hostile}))
    assert ChatCompletionRequest(**(body | {"n": "2"})).n == 2


@pytest.mark.parametrize(
    ("tokens", "status"),
    [([VOCAB], 400), ([-1], 400), ([2**63], 400), ([[5], [5, 99999]], 400), ([0, VOCAB - 1], 200), ([], 200),
     ([[5], []], 200)],
    ids=str,
)  # fmt: skip
def test_only_ids_of_the_vocabulary_are_detokenized(manager: Any, tokens: Any, status: int) -> None:
    from sglang.srt.entrypoints.openai.protocol import DetokenizeRequest
    from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingDetokenize

    request = DetokenizeRequest(tokens=tokens)
    answer = asyncio.run(OpenAIServingDetokenize(manager)._handle_non_streaming_request(request, request, None))
    if status == 200:
        assert answer.text == ([chr(5), ""] if tokens == [[5], []] else "".join(map(chr, tokens)))
    else:
        assert answer.status_code == status
        assert json.loads(answer.body)["message"].startswith(f"tokens must be in [0, {VOCAB - 1}], got ")


def history(arguments: Any) -> dict[str, Any]:
    function = {"name": "f"} | ({} if arguments is ... else {"arguments": arguments})
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    return {"messages": [{"role": "user", "content": "hi"}, call], "thinking": False}


@pytest.mark.parametrize("arguments", ["[]", "null", "5", '"a"', "true", [], 5], ids=repr)
def test_arguments_of_a_past_call_that_are_no_object_are_refused(arguments: Any) -> None:
    from sglang.srt.parser.deepseek_recipe_renderer import pre_normalize

    with pytest.raises(ValueError, match=r"function\.arguments of a tool call must be a JSON object, got \w+\.$"):
        pre_normalize(history(arguments))


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [("", "{}"), (None, "{}"), (..., "{}"), ({}, "{}"), ('{"a": 1}', '{"a": 1}'), ({"a": 1}, '{"a":1}'),
     ('{"a": ', '{"a": '), ("[" * 100000, "[" * 100000)],
    ids=lambda value: repr(value)[:9],
)  # fmt: skip
def test_other_arguments_of_a_past_call_are_rendered(arguments: Any, rendered: str) -> None:
    from sglang.srt.parser.deepseek_recipe_renderer import pre_normalize

    call = pre_normalize(history(arguments))["messages"][1]["tool_calls"][0]
    assert call["function"] == {"name": "f", "arguments": rendered}


def test_the_role_function_is_refused() -> None:
    from sglang.srt.parser.deepseek_recipe_renderer import MODEL_NAMES, load_deepseek_recipe, pre_normalize

    recipe = load_deepseek_recipe()
    options = recipe.ConversionOptions()
    body = {"messages": [{"role": "user", "content": "hi"}], "thinking": False}
    recipe.ChatCompletionRequest(pre_normalize(body) | {"model": MODEL_NAMES["dsv4"]}).convert(options)
    body["messages"].append({"role": "function", "name": "f", "content": "x"})
    with pytest.raises(ValueError, match="unknown variant `function`"):
        recipe.ChatCompletionRequest(pre_normalize(body) | {"model": MODEL_NAMES["dsv4"]}).convert(options)


class ByteTokenizer:
    """xgrammar's view of a vocabulary: every byte, and one token that ends the answer."""

    def init_xgrammar(self) -> tuple[Any, None]:
        from xgrammar import TokenizerInfo, VocabType

        return TokenizerInfo([bytes([i]) for i in range(256)] + [b"</s>"], VocabType.RAW, stop_token_ids=[256]), None


@pytest.fixture(scope="module")
def grammars() -> Any:
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

    return XGrammarGrammarBackend(ByteTokenizer(), vocab_size=257)


LOOP = {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}
TREE = {"type": "object", "properties": {"a": {"$ref": "#"}}}


@pytest.mark.parametrize("schema", [{"$ref": "#"}, LOOP], ids=str)
def test_a_schema_that_refers_to_itself_alone_is_refused(grammars: Any, schema: dict[str, Any]) -> None:
    from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject

    refused = grammars.dispatch_json(json.dumps(schema))
    assert isinstance(refused, InvalidGrammarObject)
    assert refused.error_message == "It allows no first token."


def test_a_recursive_schema_is_compiled(grammars: Any) -> None:
    grammar = grammars.dispatch_json(json.dumps(TREE))
    for byte in b'{"a": {"a": {}}}':
        grammar.accept_token(byte)


def test_a_grammar_that_ends_nowhere_never_leaves_an_empty_mask(grammars: Any) -> None:
    """An empty mask makes every logit minus infinity, and sampling from that ends the scheduler."""
    grammar = grammars.dispatch_ebnf('root ::= "a" b\nb ::= b')
    mask = grammar.allocate_vocab_mask(257, 2, "cpu")
    grammar.fill_vocab_mask(mask, 1)
    assert mask[1].count_nonzero() == 1 and mask[1, ord("a") // 32] == 1 << (ord("a") % 32)
    grammar.accept_token(ord("a"))
    grammar.fill_vocab_mask(mask, 1)
    assert mask[1].any()
    with pytest.raises(ValueError, match="^The grammar allows no further token.$"):
        grammar.accept_token(ord("b"))


def test_a_token_against_the_grammar_stays_a_fault_of_the_server(grammars: Any) -> None:
    with pytest.raises(ValueError, match="Tokens not accepted"):
        grammars.dispatch_ebnf('root ::= "a"').accept_token(ord("b"))


def test_why_a_grammar_is_refused_is_one_line(grammars: Any) -> None:
    refused = grammars.dispatch_regex("(a")
    assert "parenthesis is not closed" in refused.error_message and "\n" not in refused.error_message
