"""Tool calls, thinking and log-probabilities: SGLang's own chat serving class, encoder and parsers, in process.

What a model wrote is replayed through the serving class on the small model's tokenizer, whole and in chunks; every
chunking must give what the whole gives (the table: docs/requests.md).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from sglang_sm120_reference import tokenizer as small_tokenizer

PACKED = Path(__file__).parents[2] / "evals/small-deepseek-v4.xz"
MARKER = "｜DSML｜"
STOPPED = {"type": "stop", "matched": 1}  # the id that ends an answer
EOS = 1
LENGTH = {"type": "length", "length": 1}
MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in {"find": {"n": {"type": "number"}, "s": {"type": "string"}}, "ping": {}}.items()
]


def parameter(name: str, value: str, string: bool = True) -> str:
    return f'<{MARKER}parameter name="{name}" string="{str(string).lower()}">{value}</{MARKER}parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<{MARKER}invoke name="{name}">\n{"".join(parameters)}</{MARKER}invoke>\n'


def block(*invokes: str) -> str:
    return f"\n\n<{MARKER}tool_calls>\n{''.join(invokes)}</{MARKER}tool_calls>"


class Answer(NamedTuple):
    """What a client has at the end."""

    reasoning: str
    content: str
    calls: list[tuple[str, str]]
    """Name and arguments of each call."""
    finish: str
    logprobs: list[dict[str, Any]]


def said(content: str = "", *calls: tuple[str, str], reasoning: str = "", finish: str | None = None) -> Answer:
    return Answer(reasoning, content, list(calls), finish or ("tool_calls" if calls else "stop"), [])


class Replay:
    """SGLang's chat serving class over a TokenizerManager that answers with given tokens, in given chunks."""

    def __init__(self, folder: Path, serving: SimpleNamespace, runner: asyncio.Runner) -> None:
        from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
        from sglang.srt.managers.tokenizer_manager import TokenizerManager
        from sglang.srt.parser.template_manager import TemplateManager
        from transformers import AutoTokenizer

        made = TokenizerManager.__new__(TokenizerManager)
        made.tokenizer, made.skip_tokenizer_init = AutoTokenizer.from_pretrained(folder), False
        made.server_args, made.served_model_name, made.model_path = None, "small", str(folder)
        made.request_logger = SimpleNamespace(log_requests=False)
        made.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(architectures=["DeepseekV4ForCausalLM"], model_type="deepseek_v4"),
            get_default_sampling_params=dict,
            is_multimodal=False,
        )
        # What the launcher plans for this model.
        parsers = {"reasoning_parser": "deepseek-v4", "tool_call_parser": "deepseekv4"}
        made.config_value = parsers.__getitem__
        made.create_abort_task, made.generate_request = lambda request: None, self.replay
        self.manager, self.serving, self.runner = made, serving, runner
        self.chat = OpenAIServingChat(made, TemplateManager())
        self.request: Any = None
        """The last request as it went to the scheduler."""

    def ids(self, text: str) -> list[int]:
        """Ids of a text in which each marker is its own token."""
        return self.manager.tokenizer.encode(text, add_special_tokens=False)

    def spelled(self, text: str) -> list[int]:
        """Ids of a text in which no marker is a token: a model that writes about them."""
        return [token for character in text for token in self.ids(character)]

    async def replay(self, request: Any, raw_request: Any) -> Any:
        from sglang.srt.managers.tokenizer_manager import _slice_streaming_output_meta_info

        self.request = request
        state, chunks, end = _state(request), [], 0
        increments = request.stream and self.serving.incremental_streaming_output
        for size in self.sizes if request.stream else [len(self.tokens)]:
            start, end = end, end + size
            last = end == len(self.tokens)
            info = {"id": "0", "prompt_tokens": 3, "cached_tokens": 0, "reasoning_tokens": 0, "weight_version": "1"}
            info |= {"completion_tokens": end, "finish_reason": self.finish if last else None}
            if request.return_logprob:
                new = _scheduler_output(self.tokens, start, end)
                self.manager.convert_logprob_style(info, state, request.top_logprobs_num, None, True, new, 0, last)
            if increments:
                _slice_streaming_output_meta_info(info, start)
            # Without increments a chunk shares SGLang's list, which is longer by the time it is read.
            shared = self.tokens[start:end] if increments else self.tokens
            chunks.append({"text": "", "output_ids": shared, "index": 0, "meta_info": info})
        for chunk in chunks:
            yield chunk

    def send(self, tokens: list[int], finish: dict[str, Any], sizes: list[int] | None, fields: dict[str, Any]) -> Any:
        """The answer's events when streamed in chunks of these sizes, else its response."""
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        self.tokens, self.finish, self.sizes = tokens, finish, sizes
        fields = {"model": "small", "messages": MESSAGES, "stream": sizes is not None} | fields

        async def served() -> Any:
            response = await self.chat.handle_request(ChatCompletionRequest(**fields), None)
            if sizes is None:
                return response
            return [json.loads(line.removeprefix("data: ")) async for line in response.body_iterator if "{" in line]

        return self.runner.run(served())

    def whole(self, tokens: list[int], finish: dict[str, Any], fields: dict[str, Any]) -> Answer:
        (choice,) = self.send(tokens, finish, None, fields).choices
        message = choice.message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        assert [call.index for call in message.tool_calls or []] == list(range(len(calls)))
        logprobs = choice.logprobs.model_dump()["content"] if choice.logprobs else []
        return Answer(message.reasoning_content or "", message.content, calls, choice.finish_reason, logprobs)

    def streamed(
        self, tokens: list[int], finish: dict[str, Any], fields: dict[str, Any], sizes: list[int], increments: bool
    ) -> tuple[Answer, list[dict[str, Any]]]:
        """The answer that the events add up to, and their deltas."""
        self.serving.incremental_streaming_output = increments
        reasoning, content, names, arguments, ends, logprobs = "", "", [], [], [], []
        deltas = []
        for event in self.send(tokens, finish, sizes, fields):
            (choice,) = event["choices"]
            deltas.append(choice["delta"])
            reasoning += choice["delta"].get("reasoning_content") or ""
            content += choice["delta"].get("content") or ""
            for piece in choice["delta"].get("tool_calls") or []:
                if piece["id"] is not None:
                    names.append(piece["function"]["name"])
                    arguments.append("")
                # Only a call's first piece names it, and calls come one after the other.
                assert (piece["id"] is None) == (piece["function"]["name"] is None)
                assert piece["index"] == len(names) - 1
                arguments[-1] += piece["function"]["arguments"]
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
            logprobs += (choice.get("logprobs") or {}).get("content") or []
        (end,) = ends
        return Answer(reasoning, content, list(zip(names, arguments, strict=True)), end, logprobs), deltas


Ask = Callable[..., Answer]


def _state(request: Any) -> Any:
    lists = ("val", "idx")
    names = [f"{side}_{kind}_logprobs" for side in ("input", "output") for kind in ("token", "top", "token_ids")]
    return SimpleNamespace(
        obj=request, input_top_logprobs_scheduler_flat=None, input_top_logprobs_flat_num_rows=-1,
        **{name: [] for name in names}, **{f"{name}_{part}": [] for name in names for part in lists},
    )  # fmt: skip


def _scheduler_output(tokens: list[int], start: int, end: int) -> Any:
    """Log-probabilities of the tokens start .. end - 1, two alternatives each, as a scheduler sends them."""
    rows = range(start, end)
    return SimpleNamespace(
        input_token_logprobs_val=None, input_top_logprobs_val=None, input_top_logprobs_val_flat=None,
        output_token_logprobs_val=[[-i / 8 for i in rows]], output_token_logprobs_idx=[tokens[start:end]],
        output_top_logprobs_val=[[[-i / 8, -i / 4] for i in rows]],
        output_top_logprobs_idx=[[[tokens[i], 300 + i % 300] for i in rows]],
    )  # fmt: skip


def splits(tokens: int, seed: int) -> Iterator[tuple[list[int], bool]]:
    """Sizes of chunks, and whether a chunk holds its own tokens or all so far.

    Sizes are 1, 2, 3 or all tokens at once, those of 2 and 3 from every offset, and drawn as drafts are accepted.
    """
    for size in (1, 2, 3, tokens):
        for first in range(1, size + 1) if size < 4 else [size]:
            sizes = [min(first, tokens)]
            while sum(sizes) < tokens:
                sizes.append(min(size, tokens - sum(sizes)))
            yield sizes, first % 2 == 0
    draw, sizes = random.Random(seed), []
    while sum(sizes) < tokens:
        sizes.append(min(draw.randint(1, 4), tokens - sum(sizes)))
    yield sizes, True


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replay]:
    from sglang.srt.entrypoints.openai import serving_chat, serving_deepseek_recipe

    with PACKED.open("rb") as packed:
        config = json.loads(packed.readline())
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer.write(folder, config["vocab_size"], config["max_position_embeddings"])
    serving = SimpleNamespace(
        incremental_streaming_output=False, default_chat_template_kwargs=None, return_input_ids=False,
        return_output_ids=False, enable_cache_report=False, trust_request_chat_template=False,
        allow_auto_truncate=False, stream_response_default_include_usage=False,
    )  # fmt: skip
    model = SimpleNamespace(revision=None, context_length=None)
    with ExitStack() as stack:
        stack.enter_context(patch.object(serving_chat, "get_serving", lambda: serving))
        stack.enter_context(patch.object(serving_chat, "get_model", lambda: model))
        stack.enter_context(patch.object(serving_deepseek_recipe, "get_serving", lambda: serving))
        # One loop for all: a new one for each request would take longer than the request.
        yield Replay(folder, serving, stack.enter_context(asyncio.Runner()))


@pytest.fixture
def ask(replay: Replay, seed: int) -> Ask:
    """The answer to a request whose model wrote this; whatever the chunks, a stream adds up to the same."""

    def asked(
        written: str | list[int], finish: dict[str, Any] = STOPPED, thinking: bool = False, **fields: Any
    ) -> Answer:
        tokens = (replay.ids(written) if isinstance(written, str) else written) + [EOS] * (finish == STOPPED)
        fields = {"tools": TOOLS, "chat_template_kwargs": {"thinking": thinking}} | fields
        fields = {name: value for name, value in fields.items() if value is not None}
        whole = replay.whole(tokens, finish, fields)
        for sizes, increments in splits(len(tokens), seed):
            assert replay.streamed(tokens, finish, fields, sizes, increments)[0] == whole, (sizes, increments)
        return whole

    return asked


@pytest.mark.parametrize(
    "value",
    ["-5", "1.5e-7", "-2E+3", "-0.0", "12345678901234567890123", "null", " 5 ", "\n[1, -2.5e-3]\n",
     '{"a": {"b": [null, "日"]}}', '"a \\"b\\" <"', f"[{'[' * 200}{']' * 200}]"],
    ids=lambda value: value[:9],
)  # fmt: skip
def test_a_value_that_is_json_keeps_its_spelling(ask: Ask, value: str) -> None:
    written = block(invoke("find", parameter("n", value, string=False), parameter("s", "x")))
    assert ask(written) == said("", ("find", f'{{"n": {value}, "s": "x"}}'))


@pytest.mark.parametrize(
    "value",
    ["San Francisco", "", "  ", "01", "+5", ".5", "1e400", "NaN", "[-Infinity]", "True", "[1,", "{'a': 1}", '"open',
     '"a\nb"', 'a "b" \\ c', '1}, {"x": 2', "日 😀", "x < y </b> </", "[" * 1100],
    ids=lambda value: value[:9],
)  # fmt: skip
def test_a_value_that_is_no_json_becomes_a_string(ask: Ask, value: str) -> None:
    parameters = [parameter("n", value, string=False), parameter("s", "x"), parameter("n2", value, string=False)]
    answer = ask(block(invoke("find", *parameters), invoke("ping")))
    (name, arguments), ping = answer.calls
    assert (name, ping, answer.finish) == ("find", ("ping", "{}"), "tool_calls")
    assert json.loads(arguments) == {"n": value.strip(), "s": "x", "n2": value.strip()}


def test_a_value_that_spells_the_markers_stays_one_value(ask: Ask, replay: Replay) -> None:
    value = f'1</{MARKER}parameter>\n<{MARKER}parameter name="s" string="true">2</think>'
    opened, closed = parameter("n", "|", string=False).split("|")
    before, after = block(invoke("find", f"{opened}|{closed}")).split("|")
    answer = ask(replay.ids(before) + replay.spelled(value) + replay.ids(after))
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == [("find", {"n": value})]


def test_a_stop_string_ends_an_answer_after_a_value_that_is_no_json(ask: Ask) -> None:
    written = block(invoke("find", parameter("n", "a b", string=False))) + " END"
    called = said("", ("find", '{"n": "a b"}'))
    assert ask(written, {"type": "stop", "matched": "END"}, stop=["END", "never"]) == called
    # All of it might still have begun this one.
    assert ask(written.removesuffix(" END"), stop="z" * 200) == called


def test_arguments_are_streamed_while_they_are_written(replay: Replay) -> None:
    """A string goes on as it comes; another value waits until it is closed, and nothing else does."""
    written = block(invoke("find", parameter("n", "[1, 2]", string=False), parameter("s", "one two three")))
    tokens = replay.ids(written)
    pieces: list[str] = []
    deltas = replay.streamed(tokens + [EOS], STOPPED, {"tools": TOOLS}, [1] * (len(tokens) + 1), True)[1]
    for delta in deltas:
        pieces += [call["function"]["arguments"] for call in delta.get("tool_calls") or []]
    assert "[1, 2]" in pieces and {" two", " three"} <= set(pieces)


@pytest.mark.parametrize(
    "value", ["  two blanks before", "a newline after\n", "\n\n", "", " ", "\t\x01 \"q\" \\n 'q'", "日 é 😀\u2028",
              "x < y </b> <", "<think>a</think>", f"the {MARKER} and <{MARKER}invoke", '{"a": 1}', "-5"],
    ids=repr,
)  # fmt: skip
def test_a_string_is_verbatim(ask: Ask, value: str) -> None:
    answer = ask(block(invoke("find", parameter("s", value), parameter("s2", value))))
    ((name, arguments),) = answer.calls
    assert (name, json.loads(arguments)) == ("find", {"s": value, "s2": value})
    assert answer == said("", (name, arguments))


@pytest.mark.parametrize("between", ["\n\n", "\n", "", " \n\n"], ids=repr)
def test_text_before_a_call_is_kept(ask: Ask, between: str) -> None:
    written = "Let me see." + between + block(invoke("ping"), invoke("find", parameter("s", "x"))).lstrip("\n")
    calls = [("ping", "{}"), ("find", '{"s": "x"}')]
    assert ask(written) == said("Let me see." + between.rstrip("\n"), *calls)


@pytest.mark.parametrize("text", ["a <", "a </", "a\n\n<", "<", "a <｜", f"if x <{MARKER[0]}", "a\n\n", "x < y <t"])
def test_text_that_ends_as_a_marker_begins_is_kept(ask: Ask, text: str) -> None:
    assert ask(text) == said(text)
    assert ask(text + "</think>b", thinking=True) == said("b", reasoning=text.rstrip("\n"))
    assert ask(text, LENGTH) == said(text, finish="length")


@pytest.mark.parametrize(
    "text",
    [f"Write <{MARKER}tool_calls> first.", f'<{MARKER}invoke name="ping">\n</{MARKER}invoke>', f"{MARKER}",
     f"Then </{MARKER}tool_calls>, and <think> or </think>.", block(invoke("ping")).lstrip("\n")],
)  # fmt: skip
def test_markers_spelled_in_prose_are_text(ask: Ask, replay: Replay, text: str) -> None:
    """DeepSeek's parser goes by the marker's own token, and so does its encoder."""
    assert ask(replay.spelled(text)) == said(text)
    assert ask(replay.spelled(text) + replay.ids(block(invoke("ping")))) == said(text, ("ping", "{}"))
    assert ask("b", messages=[{"role": "user", "content": text}], tools=None) == said("b")
    begin, user, *read, assistant, end = replay.request.input_ids
    assert [begin, user, assistant, end] == replay.ids("<｜begin▁of▁sentence｜><｜User｜><｜Assistant｜></think>")
    assert replay.manager.tokenizer.decode(read) == text
    assert not {replay.ids(marker)[0] for marker in small_tokenizer.MARKUP_TOKENS} & set(read)


@pytest.mark.parametrize(
    "text", [f"A {MARKER} is a token.", f"This is {MARKER}", f"Then </{MARKER}tool_calls> or </{MARKER}invoke>."]
)
def test_a_marker_that_opens_nothing_is_text(ask: Ask, text: str) -> None:
    assert ask(text) == said(text)


def test_a_block_without_a_call_is_not_shown(ask: Ask) -> None:
    """Neither is what follows a block: the marker's own token is for calls alone, and a call ends the turn."""
    assert ask(f"Write <{MARKER}tool_calls> first.") == said("Write ")
    assert ask("So." + block(invoke("ping")) + "\nDone.") == said("So.", ("ping", "{}"))


def test_a_call_in_an_open_thinking_block_ends_it(ask: Ask) -> None:
    call = block(invoke("find", parameter("n", "a b", string=False)))
    called = said("", ("find", '{"n": "a b"}'), reasoning="I look it up")
    assert ask("I look it up" + call, thinking=True) == called
    assert ask("I look it up</think>" + call, thinking=True) == called
    assert ask("I look it up" + call + "</think>", thinking=True) == called
    assert ask("I look", thinking=True) == said(reasoning="I look")


def test_thinking_is_apart_from_the_answer(ask: Ask) -> None:
    assert ask("\nI add.\n</think>\n\nFour.", thinking=True) == said("Four.", reasoning="I add.")
    assert ask("I add.</think>Four.", thinking=True, separate_reasoning=False) == said("I add.Four.")
    assert ask("I add.</think>Four.", thinking=True, stream_reasoning=False) == said("Four.", reasoning="I add.")


def test_a_call_of_an_unknown_tool_reaches_the_client(ask: Ask) -> None:
    """The client answers it with an error, which the model can read."""
    calls = [("nosuch", '{"s": "x"}'), ("ping", "{}")]
    assert ask(block(invoke("nosuch", parameter("s", "x")), invoke("ping"))) == said("", *calls)


def test_a_block_that_is_left_open_is_no_tool_calls_finish(replay: Replay) -> None:
    """Cut after any token: a call that is not whole says so by its finish reason, streamed or not."""
    parameters = [parameter("n", "a b", string=False), parameter("s", "x y")]
    written = replay.ids("Now." + block(invoke("find", *parameters), invoke("ping")))
    calls = [("find", '{"n": "a b", "s": "x y"}'), ("ping", "{}")]
    finishes = set()
    for cut in range(len(replay.ids("Now.")), len(written) + 1):
        finish = STOPPED if cut % 4 else LENGTH
        tokens = written[:cut] + [EOS] * (finish == STOPPED)
        answer = replay.whole(tokens, finish, {"tools": TOOLS})
        sizes = [cut % 3 + 1] * (len(tokens) // (cut % 3 + 1))
        sizes += [len(tokens) - sum(sizes)] * (sum(sizes) < len(tokens))
        assert replay.streamed(tokens, finish, {"tools": TOOLS}, sizes, cut % 2 == 0)[0] == answer
        assert answer.content.rstrip("<\n") == "Now."
        whole = bool(answer.calls) and answer.calls == calls[: len(answer.calls)]
        assert answer.finish == ("tool_calls" if whole and finish == STOPPED else finish["type"])
        finishes.add((answer.finish, len(answer.calls)))
    assert finishes == {("stop", 0), ("stop", 1), ("tool_calls", 1), ("tool_calls", 2), ("stop", 2),
                        ("length", 0), ("length", 1), ("length", 2)}  # fmt: skip


@pytest.mark.parametrize("tag", ['name="n">5', 'name="n" string="yes">5', 'name="n\nm" string="true">5'])
def test_a_tag_that_is_malformed_is_no_tool_calls_finish(ask: Ask, tag: str) -> None:
    answer = ask(block(invoke("find", f"<{MARKER}parameter {tag}</{MARKER}parameter>\n")))
    assert answer.finish == "stop" and len(answer.calls) == 1


def prompt(ask: Ask, replay: Replay, **fields: Any) -> str:
    ask("b", **fields)
    return str(replay.manager.tokenizer.decode(replay.request.input_ids))


def test_without_tool_choice_no_tools_are_rendered_and_no_calls_read(ask: Ask, replay: Replay) -> None:
    call = block(invoke("find", parameter("n", "a b", string=False))).lstrip("\n")
    assert ask(call, tool_choice="none") == said(call)
    assert replay.request.sampling_params.get("structural_tag") is None
    assert prompt(ask, replay, tool_choice="none") == prompt(ask, replay, tools=None)
    assert '"name": "find"' in prompt(ask, replay, tool_choice="auto")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_developer_message_is_a_system_message(ask: Ask, replay: Replay, thinking: bool) -> None:
    rendered = {}
    for role in ("developer", "system"):
        for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
            messages = [{"role": role, "content": content}, *MESSAGES]
            rendered[role, type(content)] = prompt(ask, replay, messages=messages, thinking=thinking)
    (text,) = set(rendered.values())
    assert "Be brief." in text and text.endswith("<think>" if thinking else "</think>")


@pytest.mark.parametrize("default", [True, False, None])
@pytest.mark.parametrize("asked", [True, False, None])
def test_thinking_by_default_is_an_environment_variable(
    ask: Ask, replay: Replay, monkeypatch: pytest.MonkeyPatch, default: bool | None, asked: bool | None
) -> None:
    """The prompt, the parser and the grammar, which waits for the end of thinking, agree."""
    if default is not None:
        monkeypatch.setenv("SGLANG_DEFAULT_THINKING", str(int(default)))
    else:
        monkeypatch.delenv("SGLANG_DEFAULT_THINKING", raising=False)
    thinks = bool(default if asked is None else asked)
    answer = ask("a</think>b", chat_template_kwargs=None if asked is None else {"thinking": asked})
    assert answer == (said("b", reasoning="a") if thinks else said("ab"))
    end = replay.ids("<think>" if thinks else "</think>")
    assert (replay.request.input_ids[-1:], replay.request.require_reasoning) == (end, thinks)


@pytest.mark.parametrize("tops", [0, 2])
def test_each_token_of_a_chunk_has_its_own_log_probabilities(ask: Ask, replay: Replay, tops: int) -> None:
    """With MTP a chunk holds several tokens, some of which nothing visible comes from."""
    written = "I think.</think>So:" + block(invoke("find", parameter("n", "a b", string=False)))
    answer = ask(written, thinking=True, logprobs=True, top_logprobs=tops)
    tokens = [*replay.ids(written), EOS]
    decode = replay.manager.tokenizer.decode
    assert [(entry["token"], entry["logprob"]) for entry in answer.logprobs] == [
        (decode([token]), -i / 8) for i, token in enumerate(tokens)
    ]
    alternatives = [[(top["token"], top["logprob"]) for top in entry["top_logprobs"]] for entry in answer.logprobs]
    assert alternatives == [
        [(decode([token]), -i / 8), (decode([300 + i % 300]), -i / 4)][:tops] for i, token in enumerate(tokens)
    ]
