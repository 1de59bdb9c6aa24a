"""What a user gives a plan: derived, checked, or refused in a sentence with figures; never planned wrongly."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from golden_plans import machine
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_sm120.checkpoint.config import FLASH
from sglang_sm120_launch import show
from sglang_sm120_launch.address import grpc, port_problem, url
from sglang_sm120_launch.checks import port_free
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.flags import Flags
from sglang_sm120_launch.model import Model
from sglang_sm120_launch.plan import Plan, make_plan
from sglang_sm120_launch.settings import SECRET
from sglang_sm120_launch.values import PLANNED, Request

MODEL = Model.load(FLASH)
TWO = machine("2x-rtx-pro-6000")


def planned(place: str = "2x-rtx-pro-6000", mtp: bool = False, **flags: Any) -> Plan:
    """The plan with these flags after `--`, their dashes as underscores."""
    given = {name.replace("_", "-"): value for name, value in flags.items()}
    return make_plan(machine(place), MODEL, Request(flags=given, mtp=mtp))


def refusal(place: str = "2x-rtx-pro-6000", mtp: bool = False, **flags: Any) -> str:
    """The sentence that refuses them."""
    with pytest.raises(LaunchError) as refused:
        planned(place, mtp, **flags)
    text = str(refused.value)
    assert text.endswith(".") and "\n" not in text
    return text


@pytest.mark.parametrize("name", ("EAGLE", "NEXTN", "eagle"))
def test_speculation_by_sglangs_flag_is_mtp(name: str):
    """The same budget, context and further flags as `--mtp`; only the algorithm is the user's word."""
    ours, theirs = planned(mtp=True), planned(speculative_algorithm=name)
    assert theirs.fit == ours.fit and any(what == "draft model" for what, _ in theirs.fit.lines)
    assert theirs.value("speculative-algorithm") == name
    others = [[entry for entry in plan.settings if entry.name != "speculative-algorithm"] for plan in (ours, theirs)]
    assert others[0] == others[1]


@pytest.mark.parametrize(("steps", "tokens"), ((5, None), (None, 6), (5, 6), (1, None), (9, None)))
def test_steps_and_tokens_belong_together(steps: int | None, tokens: int | None):
    """One follows from the other, and the budget is that of the tokens verified."""
    given = {"speculative_num_steps": steps, "speculative_num_draft_tokens": tokens}
    plan = planned(mtp=True, **{name: value for name, value in given.items() if value})
    draft = tokens or (steps or 0) + 1
    assert plan.value("speculative-num-steps") == draft - 1
    assert plan.value("speculative-num-draft-tokens") == draft
    assert plan.fit == planned(mtp=True, speculative_num_draft_tokens=draft).fit


DRAFTS: dict[str, tuple[dict[str, Any], str]] = {
    "no token": ({"speculative_num_draft_tokens": 0}, "is 0: give a whole number of 2"),
    "the verified one alone": ({"speculative_num_draft_tokens": 1}, "is 1: give a whole number of 2"),
    "no step": ({"speculative_num_steps": 0}, "is 0: give"),
    "too many tokens": ({"speculative_num_draft_tokens": 12}, "is 12, and the compressor can take back 10"),
    "too many steps": ({"speculative_num_steps": 10}, "is 10, and the compressor can take back 10"),
    "steps and tokens apart": ({"speculative_num_steps": 3, "speculative_num_draft_tokens": 6}, "one more"),
    "a tree": ({"speculative_eagle_topk": 4}, "eagle-topk is 4"),
    "n-grams": ({"speculative_algorithm": "NGRAM"}, "NGRAM, which is not planned for"),
    "another draft model": ({"speculative_draft_model_path": "x"}, "draft-model-path is x"),
    "adapted": ({"speculative_adaptive": True}, "not planned for"),
}


@pytest.mark.parametrize("case", DRAFTS)
def test_drafts_that_cannot_be(case: str):
    values, words = DRAFTS[case]
    assert words in refusal(mtp=True, **values)


@pytest.mark.parametrize("name", ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens"))
def test_drafts_that_nothing_makes(name: str):
    """SGLang takes these flags without an algorithm and drafts nothing."""
    assert "nothing drafts: add --mtp" in refusal(**{name: 4})


FRACTIONS: dict[str, dict[str, Any]] = {
    "99 %": {"mem_fraction_static": 0.99},
    "95 % with drafts": {"mem_fraction_static": 0.95, "mtp": True},
    "a little too much": {"mem_fraction_static": 0.87, "place": "8x-rtx-5090"},
}


@pytest.mark.parametrize("case", FRACTIONS)
def test_a_fraction_that_leaves_too_little(case: str):
    """Refused with figures, and the fraction that it names is planned."""
    text = refusal(**FRACTIONS[case])
    assert text.count("GiB") == 1 and f"is {FRACTIONS[case]['mem_fraction_static']} and leaves" in text
    [fraction, context] = re.findall(r"give ([\d.]+) or less with --context-length (\d+)", text)[0]
    plan = planned(**FRACTIONS[case] | {"mem_fraction_static": float(fraction), "context_length": int(context)})
    assert plan.fit.lines[-1][1] >= 0


@settings(max_examples=25)
@given(
    place=st.sampled_from(("2x-rtx-pro-6000", "8x-rtx-5090", "4x-rtx-pro-6000", "gb10-pair", "2x-h200")),
    static=st.floats(0.5, 0.999),
    mtp=st.booleans(),
    context=st.sampled_from((None, 4096, 200000)),
    requests=st.sampled_from((None, 1, 16)),
)
def test_no_fraction_is_planned_twice(
    place: str, static: float, mtp: bool, context: int | None, requests: int | None
):  # fmt: skip
    """Whatever the user's fraction is, what stays unused is never negative."""
    given = {"mem_fraction_static": static, "context_length": context, "max_running_requests": requests}
    try:
        plan = planned(place, mtp, **{name: value for name, value in given.items() if value})
    except LaunchError as refused:
        assert "GiB" in str(refused)
        return
    assert plan.fit.lines[-1][1] >= 0 and plan.value("mem-fraction-static") == static


OUT_OF_RANGE: dict[str, tuple[dict[str, Any], str]] = {
    "no request": ({"max_running_requests": 0}, "max-running-requests is 0"),
    "fewer than none": ({"max_running_requests": -3}, "max-running-requests is -3"),
    "no context": ({"context_length": 0}, "context-length is 0"),
    "more than the model has": ({"context_length": 1048577}, "1048577 and the model has 1048576"),
    "no chunks": ({"chunked_prefill_size": -1}, "is -1, prefill in one piece"),
    "empty chunks": ({"chunked_prefill_size": 0}, "is 0, prefill in one piece"),
    "no token": ({"max_total_tokens": 0}, "max-total-tokens is 0"),
    "no graph": ({"cuda_graph_max_bs_decode": 0}, "cuda-graph-max-bs-decode is 0"),
    "graphs of nothing": ({"cuda_graph_bs_decode": (0, 1)}, "give whole numbers of 1 or more"),
    "no rank": ({"tp_size": 0}, "tp-size is 0"),
    "no host": ({"nnodes": 0}, "nnodes is 0"),
    "a rank before the first": ({"node_rank": -1}, "node-rank is -1"),
    "all memory": ({"mem_fraction_static": 1.0}, "give a number between 0 and 1"),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_what_is_out_of_range(case: str):
    values, words = OUT_OF_RANGE[case]
    assert words in refusal(**values)


def test_a_short_context_is_the_bound():
    """What each request can have is what the user gave, and the budget counts no more."""
    plan = planned(context_length=512)
    assert set(plan.fit.concurrency().values()) == {512} and plan.fit.context == 512


OTHERS: dict[str, Any] = {
    "dp-size": 2, "page-size": 64, "attention-backend": "triton", "decode-attention-backend": "fa3",
    "prefill-attention-backend": "fa3", "kv-cache-dtype": "bfloat16", "dsv4-attn-backend": "trtllm",
    "speculative-adaptive": True,
}  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
def test_what_the_budget_does_not_know(name: str, flags: Flags):
    """Another value is not planned for; each known one is, and SGLang's parser takes both."""
    assert f"--{name} is {OTHERS[name]}, which is not planned for" in refusal(**{name: OTHERS[name]})
    for value in PLANNED[name]:
        flags.check(planned(**{name: value}).arguments())


@pytest.mark.parametrize("port", (-1, 0, 1, 55535, 55536, 60000, 65535, 65536, 99999))
def test_one_rule_for_ports(port: int):
    """Doctor and plan agree; SGLang 0.5.23 wants a second port above only where its gRPC server is asked for."""
    good = 0 < port <= 65535
    assert (port_problem(port) is None) == good
    assert ("out of range" in port_free("127.0.0.1", port).found) == (not good)
    if good:
        assert planned(port=port).value("port") == port
    else:
        assert "port is" in refusal(port=port)
    assert (port_problem(port, grpc=True) is None) == (good and port <= 55535)


def test_the_grpc_servers_port_is_sglangs():
    """It is derived where the flags ask for that server and give no port of its own."""
    for values, derived in (({}, False), ({"grpc-mode": True}, True), ({"smg-grpc-mode": True, "grpc-port": 1}, False)):
        assert grpc(values.get) == derived
    assert "from 1 to 55535" in refusal(port=60000, smg_grpc_mode=True)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "http://127.0.0.1:30000"),
        ({"host": "0.0.0.0", "port": 4}, "http://127.0.0.1:4"),
        ({"host": "::"}, "http://[::1]:30000"),
        ({"host": "::1"}, "http://[::1]:30000"),
        ({"host": "fd00::7", "ssl-certfile": "a.pem"}, "https://[fd00::7]:30000"),
        ({"host": "box", "ssl-certfile": "a.pem", "port": 443}, "https://box:443"),
    ],
)
def test_where_the_server_is_reached(flags: dict[str, Any], expected: str):
    assert url(flags.get) == expected


SECRETS = ("api-key", "admin-api-key", "ssl-keyfile-password")


@pytest.mark.parametrize("name", SECRETS)
def test_a_key_is_never_printed(name: str):
    """Neither in the table, in JSON nor in the command; the server gets it."""
    plan = planned(**{name: "s3cr3t"})
    assert ["--" + name, "s3cr3t"] == plan.arguments()[plan.arguments().index("--" + name) :][:2]
    for text in (show.as_text(plan), show.as_json(plan)):
        assert "s3cr3t" not in text and f"--{name}" in text and "********" in text


def test_every_secret_flag_is_known(flags: Flags):
    """Those of SGLang's flags that are named like one."""
    named = {action.option_strings[0][2:] for action in flags.known._actions}
    assert {name for name in named if SECRET.search(name)} == {*SECRETS}


def test_no_gpu_is_said():
    """A model too large for the host is refused because no GPU was seen, not because a CPU is small."""
    assert refusal("no-gpu").startswith(
        "No NVIDIA GPU was found, so the plan is for the CPU (--machine FILE.json plans for another): "
    )
    assert "No NVIDIA GPU" not in refusal("no-gpu", device="cpu")


@pytest.mark.parametrize("tp", (3, 5, 16))
def test_ranks_on_a_cpu_divide_the_model(tp: int):
    """As on cards."""
    big = replace(machine("no-gpu"), ram_mib=1 << 21)
    with pytest.raises(LaunchError, match=f"TP {tp} was asked for.* up to 8"):
        make_plan(big, MODEL, Request(flags={"tp-size": tp}))
    assert make_plan(big, MODEL, Request(flags={"tp-size": 2})).value("tp-size") == 2
