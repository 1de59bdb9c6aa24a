"""Whole requests with hostile values, for every route of SGLang's FastAPI app: what a fuzz test of a server sends.

Routes, their fields and who may call them are read from the app, so that a route of a later release is drawn as well.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from random import Random
from typing import Any, NamedTuple
from urllib.parse import quote

Schema = Mapping[str, Any]


class Raw(NamedTuple):
    """JSON that no Python value stands for."""

    text: str


class Route(NamedTuple):
    """One method of one path.

    `schema` is the JSON schema of the body or None, `inputs` are the names in the path and the query, `names` are those
    that a refusal may give, and `administrative` says that SGLang asks for more than a client's authority.
    """

    method: str
    path: str
    schema: Schema | None
    inputs: tuple[str, ...]
    names: frozenset[str]
    administrative: bool


class Request(NamedTuple):
    """What is sent, and to which route."""

    route: Route
    path: str
    query: dict[str, str]
    content: bytes

    def __str__(self) -> str:
        return f"{self.route.method} {self.path[:80]} {self.query} {self.content[:600]!r}"


# Values that a JSON parser takes; one in a body lets the fields beside it be looked at.
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, 2**63, -(2**63), 2**64, 0.5, 2.5, -0.0,
    1e20, 1e300, -1e300, 1e-300, "", " ", "a", "2", "nan", "(", "\x00", "é漢🦄\u202e", "<｜User｜>", "a" * 100_000,
    "../../etc/passwd", [], [[]], [None], [""], ["a"], [0], [-1], [2**31], [2**63], [1e300], [True], [[0], [1]], [{}],
    list(range(2000)), {}, {"": None}, {"a": {"b": []}}, {"5": 1e300}, Raw("[" * 200 + "]" * 200),
    Raw('{"a":' * 200 + "1" + "}" * 200), Raw('{"a": 1, "a": "2"}'),
]  # fmt: skip
# Values with which a whole body is no JSON to SGLang's parser, or too deep for it.
UNPARSED: list[Any] = [math.nan, math.inf, -math.inf, Raw("1e999"), "\ud800", ["\udfff"], Raw("[" * 5000 + "]" * 5000),
                       Raw("0x1"), Raw("'a'"), Raw("")]  # fmt: skip
NO_OBJECTS: list[Any] = [
    *HOSTILE,
    *UNPARSED,
    Raw("{"),
    Raw('{"a": 1,}'),
    Raw("{'a': 1}"),
    Raw("\x00"),
    Raw("[" * 100_000),
]

# Without a small limit a request asks for every token of the context, which a CPU takes a minute for.
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "num_predict")
LIMIT_VALUES: list[Any] = [1, 2, 3, 1, 2, 3, 0, -1, 2.5, "2", 2**31, 2**63, 1e300, [], {}, ""]

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
MESSAGES = [{"role": "user", "content": "hi"}]
HISTORY = [
    *MESSAGES,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "x", "tool_call_id": "1"},
]
# Values with which a request gets past the first check; the schema draws what is not named here.
USABLE: dict[str, list[Any]] = {
    "model": ["m"], "prompt": [[5, 6], "hi", [[5], [6, 7]], ["a", "b"]], "text": ["hi", ["a", "b"]],
    "input_ids": [[5, 6], [[5], [6, 7]]], "messages": [MESSAGES, HISTORY],
    "input": ["hi", ["a", "b"], [5, 6], MESSAGES], "tokens": [[5, 6], [[5], [6]]], "query": ["hi", [5, 6]],
    "documents": [["a", "b"]], "items": [["a", "b"], [[5], [6]]], "label_token_ids": [[5, 6]], "tools": [TOOLS],
    "tool_choice": ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}],
    "regex": ["[0-9]{2}", "(", "a|"], "ebnf": ['root ::= "a"', 'root ::= "a" b\nb ::= b', "root ::= root"],
    "json_schema": ["{}", '{"enum": [5]}', '{"$ref": "#"}', "{", "5", "[]"],
    "structural_tag": ["{}", '{"structures": [], "triggers": []}'], "stop_regex": ["a", "[", "(a{9999}){9999}"],
    "instances": [[{"text": "hi"}], [{"input_ids": [5, 6]}, {}]], "capacity_of_str_len": [100],
    "tool_call_parser": ["deepseekv4", "llama3", "x"], "reasoning_parser": ["deepseek-v4", "deepseek-r1", "x"],
    "state": ["hi"],
    "questions": [[{"id": "q", "type": "yes_no", "question": "a?"}], {"q": {"type": "binary", "prompt": "a?"}}],
    "session_id": ["s"], "session_params": [{"id": "s"}, {"id": "s", "replace": True}, {"id": "s", "offset": -1}],
    "logprobs": [True, 1], "top_logprobs": [1], "return_logprob": [True], "top_logprobs_num": [1], "stream": [True],
    "n": [2], "best_of": [2], "echo": [True], "logprob_start_len": [0], "token_ids_logprob": [[5, 6]],
}  # fmt: skip
# Of these a request has one, besides the fields that its schema requires.
PROMPTS = {"messages", "prompt", "text", "input_ids", "input", "tokens"}
PLAIN: dict[Any, list[Any]] = {
    "integer": [0, 1, 2, -1, 7, 1023, 1024, 8192, 2**31, 2**63], "number": [0, 1, 0.5, -1, 2.5, 1e-6, 1e300, 2**63],
    "string": ["a", "hi", "", "5", "auto", "é漢🦄"], "boolean": [True, False],
}  # fmt: skip
OPTIONS = ["temperature", "top_p", "top_k", "seed", "stop", "repeat_penalty", "num_ctx", "presence_penalty", "nope"]
# What is refused without being a field: the body as a whole, and what this server or its model cannot do.
SUBJECTS = frozenset([
    "JSON", "Field required", "Input should be a dictionary", "Extra inputs", "The prompt", "Each document",
    "Input length", "token count", "Token ID", "grammar",
    "chat template", "embedding model", "LoRA", "session id", "the session", "logit processor", "hidden states",
])  # fmt: skip
TEXTS = ["", "a", "-1", "2.5", "nan", "1e999", str(2**63), "é漢", "\x00", "%", "a" * 4000]


def routes() -> list[Route]:
    """Every method of every path of SGLang's app, in its order."""
    from sglang.srt.entrypoints.http_server import app

    return [route for entry in _entries(app.routes) for route in _methods(entry)]


def _entries(found: Sequence[Any]) -> Iterator[Any]:
    for entry in found:
        included = getattr(entry, "original_router", None)
        yield from [entry] if included is None else _entries(included.routes)


def _methods(entry: Any) -> Iterator[Route]:
    from pydantic import TypeAdapter
    from sglang.srt.utils.auth import AuthLevel

    level = getattr(entry.endpoint, "_auth_level", AuthLevel.NORMAL)
    schema, inputs = None, ()
    if body := getattr(entry, "body_field", None):
        schema = TypeAdapter(body.field_info.annotation).json_schema()
        _describe_dictionaries(schema)
    if dependant := getattr(entry, "dependant", None):
        inputs = tuple(field.name for field in dependant.path_params + dependant.query_params)
    # Most routes make a /generate request of theirs, whose fields it refuses by its own names.
    names = {*_names(schema or {}), *inputs, *_generate_names()}
    # A web socket has no method: it is asked for as a page.
    for method in sorted(getattr(entry, "methods", None) or {"GET"}):
        yield Route(method, entry.path, schema, inputs, frozenset(names), level is not AuthLevel.NORMAL)


@cache
def _generate_names() -> frozenset[str]:
    from pydantic import TypeAdapter
    from sglang.srt.managers.io_struct import GenerateReqInput

    schema = TypeAdapter(GenerateReqInput).json_schema()
    _describe_dictionaries(schema)
    return frozenset(_names(schema))


def _names(schema: Any) -> Iterator[str]:
    """The names of all properties, of nested objects too."""
    for key, value in schema.items() if isinstance(schema, dict) else ():
        if key == "properties":
            yield from value
        yield from _names(value)
        for entry in value if isinstance(value, list) else ():
            yield from _names(entry)


def _describe_dictionaries(schema: dict[str, Any]) -> None:
    """The fields of what SGLang's models call a dictionary and read as one of its structures."""
    import msgspec
    from sglang.srt.managers.io_struct import SessionParams
    from sglang.srt.sampling.sampling_params import SamplingParams

    for name, structure in (("sampling_params", SamplingParams), ("session_params", SessionParams)):
        known = schema.get("properties", {}).get(name)
        if known is not None:
            names = [field.encode_name for field in msgspec.structs.fields(structure)]
            known["anyOf"] = [{"type": "object", "properties": {name: {} for name in names}}]
            if name == "sampling_params":
                known["anyOf"][0]["properties"].update(dict.fromkeys(["max_new_tokens", "stop", "stop_regex"], {}))
                known["anyOf"].append({"type": "array", "items": known["anyOf"][0]})


def encode(value: Any) -> str:
    """JSON with NaN, escaped surrogates and `Raw` text."""
    match value:
        case Raw():
            return value.text
        case dict():
            return "{" + ", ".join(f"{json.dumps(key)}: {encode(entry)}" for key, entry in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(encode, value)) + "]"
        case _:
            return json.dumps(value)


class _Values:
    """Draws values of a schema, every second one hostile."""

    def __init__(self, random: Random, root: Schema) -> None:
        self._random = random
        self._root = root

    def chance(self, of: int) -> bool:
        return self._random.randrange(of) == 0

    def one_of(self, values: Sequence[Any]) -> Any:
        return self._random.choice(values)

    def some_of(self, names: Iterable[str], most: int) -> list[str]:
        ordered = sorted(names)
        return self._random.sample(ordered, min(len(ordered), self._random.randint(1, most)))

    def field(self, name: str, schema: Schema, depth: int = 0) -> Any:
        if name in LIMITS:
            return self.one_of(LIMIT_VALUES)
        if name == "options":
            return {"num_predict": self.one_of(LIMIT_VALUES), self.one_of(OPTIONS): self.one_of(HOSTILE)}
        if self.chance(60):
            return self.one_of(UNPARSED)
        if self.chance(3):
            return self.one_of(HOSTILE)
        if name in USABLE and self.chance(2):
            return self.one_of(USABLE[name])
        return self._value(schema, depth + 1)

    def fields(self, schema: Schema) -> Mapping[str, Schema]:
        return self._resolved(schema).get("properties", {})

    def _resolved(self, schema: Schema) -> Schema:
        # `true` is a schema too, which every value follows.
        if not isinstance(schema, dict):
            return {}
        while "$ref" in schema:
            schema = self._root["$defs"][schema["$ref"].rpartition("/")[2]]
        return schema

    def usable_body(self) -> dict[str, Any]:
        """What a request of this schema cannot do without, and few tokens."""
        schema = self._resolved(self._root)
        fields = self.fields(schema)
        names = set(schema.get("required", ()))
        if not names & PROMPTS:
            names.update(self.some_of(PROMPTS & fields.keys(), 1))
        body = {
            name: self.one_of(USABLE[name]) if name in USABLE else self._value(fields[name], 1)
            for name in sorted(names)
        }
        body |= {name: 2 for name in LIMITS if name in fields}
        body |= {"sampling_params": {"max_new_tokens": 2}} if "sampling_params" in fields else {}
        return body | ({"options": {"num_predict": 2}} if "options" in fields else {})

    def _value(self, schema: Schema, depth: int) -> Any:
        schema = self._resolved(schema)
        if depth > 6 or self.chance(8):
            return self.one_of(HOSTILE)
        for union in ("anyOf", "oneOf", "allOf"):
            if union in schema:
                return self._value(self.one_of(schema[union]), depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.one_of(schema["enum"])
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            entries = schema.get("items", {})
            return [self._value(entries, depth + 1) for _ in range(self._random.randrange(3))]
        return self.one_of(PLAIN.get(kind, HOSTILE))

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        fields = self.fields(schema)
        names = {*schema.get("required", ()), *self.some_of(fields, 3), *fields.keys() & {"max_new_tokens"}}
        drawn = {name: self.field(name, fields.get(name, {}), depth) for name in sorted(names)}
        if not fields or self.chance(8):
            drawn[self.one_of(["a", "", "5", "é"])] = self._value(schema.get("additionalProperties") or {}, depth + 1)
        return drawn


def request(route: Route, random: Random) -> Request:
    """A usable request to the route with one to four fields of its schema drawn anew."""
    values = _Values(random, route.schema or {})
    path, query = route.path, {}
    for name in route.inputs:
        text = values.one_of(TEXTS)
        if f"{{{name}" in path:
            start, _, rest = path.partition(f"{{{name}")
            path = start + quote(text, safe="") + rest.partition("}")[2]
        elif values.chance(2):
            query[name] = text
    if route.schema is None or values.chance(30):
        return Request(route, path, query, encode(values.one_of(NO_OBJECTS)).encode())
    body = values.usable_body()
    fields = values.fields(route.schema)
    for name in values.some_of(fields, values.one_of([1, 1, 1, 2, 2, 4])):
        body[name] = values.field(name, fields[name])
    if body and values.chance(20):
        del body[values.one_of(sorted(body))]
    if values.chance(20):
        body[values.one_of(["nope", "", "\x00", "é"])] = values.one_of(HOSTILE)
    content = encode(body)
    if body and values.chance(20):
        twice = json.dumps(values.one_of(sorted(body)))
        content = f"{content[:-1]}, {twice}: {encode(values.one_of(HOSTILE))}}}"
    return Request(route, path, query, content.encode())


def draw(among: Sequence[Route], random: Random) -> Request:
    """A request to one of the routes given, as often to each as its body has fields."""
    weights = [1 + len(_Values(random, route.schema or {}).fields(route.schema or {})) for route in among]
    return request(random.choices(among, weights)[0], random)


def fault(sent: Request, status: int, text: str) -> str | None:
    """What is wrong with an answer, None if nothing: it is one, or refuses in one sentence that names the field."""
    if status >= 500 or re.search(r'"code": ?5\d\d', text):
        return "status 5xx"
    if status < 400:
        return None
    try:
        sentence = _sentence(json.loads(text))
    except ValueError:
        return "a refusal that is no JSON"
    if "\n" in sentence.strip():
        return "a refusal of more than one line"
    # An absent page has no fields.
    if status == 404 or sent.route.schema is None:
        return None
    names = "|".join(map(re.escape, sent.route.names | SUBJECTS))
    return None if re.search(rf"\b({names})\b", sentence, re.IGNORECASE) else "a refusal that names no field"


def _sentence(refusal: Any) -> str:
    """The sentence of an error in OpenAI's, Anthropic's or SGLang's form; a System One error is a list of them."""
    while isinstance(refusal, dict) and (inner := refusal.keys() & {"error", "message", "detail"}):
        refusal = refusal[min(inner)]
    return refusal if isinstance(refusal, str) else json.dumps(refusal)
