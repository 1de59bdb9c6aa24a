"""Tool calls through OpenAI's API: fifteen requests, each with the calls that are right, argument by argument."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from client import Call, Client, Messages, Reply, ask_all
from report import Row, same_json

FLOOR = 1.0
MAX_TOKENS = 1024


def _tool(name: str, description: str, required: str = "", **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required.split()}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


WEATHER = _tool("get_weather", "The weather of a city now.", "city", city=_text("name of the city, as in the request"))
TIME = _tool("get_time", "The time of day in a city now.", "city", city=_text("name of the city, as in the request"))
CONVERT = _tool(
    "get_temperature", "The temperature of a city now, in a unit.", "city unit", city=_text("name of the city"),
    unit={"type": "string", "enum": ["celsius", "fahrenheit", "kelvin"]},
)  # fmt: skip
ORDER = _tool(
    "create_order", "Creates an order for a customer.", "customer priority",
    priority={"type": "string", "enum": ["low", "normal", "high"]},
    customer={
        "type": "object",
        "properties": {
            "name": _text("full name"),
            "address": {
                "type": "object",
                "properties": {"city": _text("name of the city"), "zip": _text("postal code")},
                "required": ["city", "zip"],
            },
        },
        "required": ["name", "address"],
    },
)  # fmt: skip
CART = _tool(
    "set_cart", "Sets what is in the cart, in the order of the request.", "items",
    items={
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"sku": _text("article number"), "count": {"type": "integer"}},
            "required": ["sku", "count"],
        },
    },
)  # fmt: skip
FLIGHT = _tool(
    "search_flights", "Searches flights. Leave optional fields out unless the user gives them.", "origin destination",
    origin=_text("IATA code"), destination=_text("IATA code"), date=_text("YYYY-MM-DD"), airline=_text("airline"),
)  # fmt: skip
LAMP = _tool(
    "set_lamp", "Sets a lamp.", "id on brightness", id={"type": "integer"}, on={"type": "boolean"},
    brightness={"type": "number", "description": "0 to 1"},
)  # fmt: skip
NOTE = _tool("save_note", "Saves a note word for word.", "text", text=_text("the note, exactly as given"))
STATUS = _tool("server_status", "The state of the server. It takes no arguments.")


class Case(NamedTuple):
    """A conversation and what must come of it: `calls` in any order, or, without any, a text with `says` in it."""

    name: str
    messages: Messages
    tools: tuple[dict[str, Any], ...]
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    says: str = ""
    stream: bool = False


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


CASES = (
    Case("single", _user("What is the weather in Paris?"), (WEATHER,), (("get_weather", {"city": "Paris"}),)),
    Case("choice", _user("What time is it in Lima?"), (WEATHER, TIME, NOTE), (("get_time", {"city": "Lima"}),)),
    Case("parallel, one tool", _user("What is the weather in Rome and what is it in Oslo? Ask for both at once."),
         (WEATHER,), (("get_weather", {"city": "Rome"}), ("get_weather", {"city": "Oslo"}))),
    Case("parallel, two tools", _user("Give me both at once: the weather in Cairo and the time in Cairo."),
         (WEATHER, TIME), (("get_weather", {"city": "Cairo"}), ("get_time", {"city": "Cairo"}))),
    Case("none needed", _user("What is 6 times 7? No tool is needed: answer with the number."), (WEATHER, TIME),
         says="42"),
    Case("enum", _user("How warm is it in Boston, in fahrenheit?"), (CONVERT,),
         (("get_temperature", {"city": "Boston", "unit": "fahrenheit"}),)),
    Case("nested objects", _user("Create an order of high priority for Ada Byron, who lives in Bath, zip 01234."),
         (ORDER,), (("create_order", {"customer": {"name": "Ada Byron", "address": {"city": "Bath", "zip": "01234"}},
                                      "priority": "high"}),)),
    Case("array of objects", _user("Put 2 of article A-17 and then 5 of article B-3 in the cart."), (CART,),
         (("set_cart", {"items": [{"sku": "A-17", "count": 2}, {"sku": "B-3", "count": 5}]}),)),
    Case("required fields only", _user("Search flights from JFK to LHR."), (FLIGHT,),
         (("search_flights", {"origin": "JFK", "destination": "LHR"}),)),
    Case("numbers and booleans", _user("Switch lamp 4 on, at brightness 0.25."), (LAMP,),
         (("set_lamp", {"id": 4, "on": True, "brightness": 0.25}),)),
    Case("unicode", _user("What is the weather in 東京, and in Zürich? Write the names as I do, ask for both at once."),
         (WEATHER,), (("get_weather", {"city": "東京"}), ("get_weather", {"city": "Zürich"}))),
    Case("quotes and markup", _user('Save this note exactly, without the brackets: [say "hi" & <b>C:\\tmp</b>]'),
         (NOTE,), (("save_note", {"text": 'say "hi" & <b>C:\\tmp</b>'}),)),
    Case("no arguments", _user("What is the state of the server?"), (STATUS, WEATHER), (("server_status", {}),)),
    Case("streaming, parallel", _user("What is the weather in Quito and the time in Kyiv? Ask for both at once."),
         (WEATHER, TIME), (("get_weather", {"city": "Quito"}), ("get_time", {"city": "Kyiv"})), stream=True),
    Case("after a result",
         [*_user("What is the weather in Paris?"),
          {"role": "assistant", "content": "", "tool_calls": [
              {"id": "call_1", "type": "function",
               "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
          {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear", "celsius": 23}'}],
         (WEATHER,), says="23"),
)  # fmt: skip


def same_calls(calls: Sequence[Call], wanted: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    """Whether the calls are the wanted ones, each once and none besides, in any order."""
    left = list(calls)
    for name, arguments in wanted:
        match = next((call for call in left if call.name == name and _equal(call.arguments, arguments)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def fault(reply: Reply, case: Case) -> str | None:
    """What is wrong with a reply; None when its calls are the case's, no more and no fewer."""
    if reply.error is not None:
        return reply.error
    shown = ", ".join(f"{call.name}({call.arguments})" for call in reply.calls) or f"no call, but {reply.text[:120]!r}"
    if not same_calls(reply.calls, case.calls):
        return shown
    if not case.calls:
        return None if case.says in reply.text else shown
    if reply.finish != "tool_calls":
        return f"the right calls with finish_reason {reply.finish!r}, needed 'tool_calls'"
    if len({call.id for call in reply.calls if call.id}) < len(reply.calls):
        return "the right calls without an id of its own each"
    return None


def _equal(arguments: str, wanted: dict[str, Any]) -> bool:
    try:
        return same_json(json.loads(arguments), wanted)
    except ValueError:
        return False


def run(client: Client, concurrency: int, floor: float = FLOOR) -> Row:
    """Every case once; raises ServerGone when nothing listens any more."""

    def ask(case: Case) -> Reply:
        return client.chat(case.messages, MAX_TOKENS, stream=case.stream, tools=list(case.tools))

    replies = ask_all(ask, CASES, concurrency, "tool calls")
    faults = {case.name: fault(reply, case) for case, reply in zip(CASES, replies, strict=True)}
    wrong = []
    for case in CASES:
        if faults[case.name] is not None:
            calls = ", ".join(f"{name}({json.dumps(value, ensure_ascii=False)})" for name, value in case.calls)
            wanted = calls or f"no call, a text with {case.says!r}"
            wrong.append({"case": case.name, "expected": wanted, "got": faults[case.name]})
    detail = {"cases": {name: fault is None for name, fault in faults.items()}}
    return Row("tools", "tool calls", len(CASES) - len(wrong), len(CASES), floor=floor, wrong=wrong, detail=detail)
