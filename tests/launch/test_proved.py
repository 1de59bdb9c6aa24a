"""What comes of a file of `prove`: the choice, its table, the plan that takes it, the page, two files side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from golden_plans import load, machine
from telling import refused
from test_prove import schema

from sglang_sm120 import tuned as overlay_tuned
from sglang_sm120.checkpoint.config import FLASH
from sglang_sm120.limits import tuned_table
from sglang_sm120_launch import cli, proved, tuned
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.plan import make_plan
from sglang_sm120_launch.sections import LOADER
from sglang_sm120_launch.values import Request

CARD = "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"
TABLE = "NVIDIA_RTX_PRO_6000_Blackwell_Workstation_Edition.json"


def point(what: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("requests", "tokens", "of", "predicted", "problem"))
    return {"what": what, "value": value, "unit": unit, **empty, **more}


def server(name: str, *points: dict[str, Any], **more: Any) -> dict[str, Any]:
    modes = [*(["extend"] if "prefill=" in name else []), "decode"]
    facts = {"verdict": "pass", "not_run": None, "ended": None, "seconds": 9.0, "about": "128 experts", "modes": modes}
    return {"server": name, **facts, "points": list(points), **more}


def prefill(*rates: float) -> list[dict[str, Any]]:
    lengths = (1024, 8192, 32768)
    return [point("prefill", rate, "tokens/s", tokens=n) for n, rate in zip(lengths, rates, strict=True)]


def op(name: str, verdict: str = "pass", us: float | None = None) -> dict[str, Any]:
    call = {"call": "one", "rows": 4096, "context": 8192, "problem": None, "rms": 1e-7, "largest": 1e-6}
    call |= {"replay": None, "us": us, "default_us": us and 20.0, "seconds": 0.5}
    return {"op": name, "verdict": verdict, "not_run": None, "ended": None, "seconds": 1.0, "calls": [call]}


def report(**changes: Any) -> dict[str, Any]:
    """Two cards on which the step prefills faster than SGLang, and mxfp8 faster still; all that decides is right."""
    gpu = {"name": CARD, "compute_capability": "12.0", "sms": 188, "memory_mib": 97887, "kernels": "sm120"}
    card = {"name": CARD, "memory_mib": 97887, "compute_capability": "12.0", "used_mib": 0, "power_limit_w": 600}
    decode = [
        point("decode", 7.7, "ms", requests=1, tokens=1024, predicted=7.0),
        point("decode", 20.0, "ms", requests=8, tokens=1024, predicted=12.0),
    ]
    recall = point("recall: far recall", 415, "answers", requests=16, of=418)
    found = {
        "schema": proved.SCHEMA, "verdict": "pass", "evidence": "measured", "seconds": 600.0, "commit": "abc",
        "cards": [card | {"unified": False}] * 2, "link": "switch", "p2p": True,
        "gpu": gpu | {"dependent_launches": True}, "doctor": {"schema": 1, "status": "ok", "checks": []},
        "versions": dict.fromkeys(("sglang-sm120", "sglang", "driver", "torch", "cuda", "triton"), "1"),
        "prediction": {"formula": "weights(b) + rest(b)", "off": 0.15},
        "ops": [op("mxfp4_moe"), op("mxfp4_moe=mxfp8", us=12.0)],
        "servers": [
            server("model", *decode, *prefill(100, 1000, 1000)),
            server("recall", recall),
            server("recall, EAGLE", point("accepted", 3.84, "tokens")),
            server("recall, prefill=sglang", verdict="fail", ended="ValueError: so | narrow", about=None, modes=[]),
            server("recall, prefill=mxfp8", recall),
            server("model, prefill=overlay", *prefill(90, 1100, 1040)),
            server("model, prefill=mxfp8", *prefill(80, 1200, 1200)),
        ],
        "left_out": None, "choice": None,
    }  # fmt: skip
    found |= changes
    return {**found, "choice": proved.choice(found)}


def with_prefill(side: str, *rates: float, without: str = "", **more: Any) -> dict[str, Any]:
    """The report with other rates of one side, and without another one."""
    dropped = {f"model, prefill={one}" for one in (side, without)}
    servers = [one for one in report()["servers"] if one["server"] not in dropped]
    return report(servers=[*servers, server(f"model, prefill={side}", *prefill(*rates), **more)])


def but(*changed: str, **changes: Any) -> dict[str, Any]:
    """The report in which these servers and ops are otherwise."""
    found = report()
    entries = [
        [one | (changes if (one.get("op") or one["server"]) in changed else {}) for one in found[many]]
        for many in ("ops", "servers")
    ]
    return report(ops=entries[0], servers=entries[1])


def test_the_sample_is_what_prove_writes():
    jsonschema.validate(report(), schema())


@pytest.mark.parametrize(
    ("found", "by"),
    {
        "the fastest": (report(), "mxfp8"),
        "slower at the longest": (with_prefill("mxfp8", 200, 1200, 1000), "overlay"),
        "a hair faster": (with_prefill("overlay", 90, 1020, 1020, without="mxfp8"), "sglang"),
        "faster where it is short": (with_prefill("overlay", 900, 900, 900), "mxfp8"),
        "a server that failed": (with_prefill("mxfp8", 80, 1200, 1200, verdict="fail"), "overlay"),
        "a provider's op that is wrong": (but("mxfp4_moe=mxfp8", verdict="fail"), "overlay"),
        "an op that is wrong": (but("mxfp4_moe", verdict="fail"), "sglang"),
        "recall that is wrong": (but("recall", verdict="fail"), "sglang"),
        "recall that was not run": (but("recall", verdict="not run"), "sglang"),
        "recall that is wrong with mxfp8": (but("recall, prefill=mxfp8", verdict="fail"), "overlay"),
        "recall that is wrong without the step": (but("recall, prefill=sglang", verdict="fail"), "mxfp8"),
        "SGLang's own fails": (but("model", verdict="fail", points=[]), "mxfp8"),
        "SGLang's own fails, and mxfp8": (but("model", "model, prefill=mxfp8", verdict="fail", points=[]), "overlay"),
        "SGLang's own": (with_prefill("overlay", 90, 900, 900, without="mxfp8"), "sglang"),
    }.values(),
)  # fmt: skip
def test_the_choice(found: dict[str, Any], by: str):
    assert found["choice"]["by"] == by and found["choice"]["table"] == TABLE
    assert found["choice"]["chunk"] is None, "no prompt was one chunk of each size"
    assert found["choice"]["variables"] == tuned.PREFILLS[by]


@pytest.mark.parametrize(
    ("rates", "chunk"),
    [({2048: 970, 4096: 990, 8192: 1000}, 2048), ({2048: 969, 4096: 990, 8192: 1000}, 4096),
     ({2048: 900, 4096: 969, 8192: 1000}, 8192), ({2048: 900, 4096: 1000, 8192: 100, 32_768: 9000}, 4096),
     ({2048: 970, 8192: 1000}, None), ({}, None)],
)  # fmt: skip
def test_the_chunk(rates: dict[int, float], chunk: int | None):
    """The shortest that is nearly as fast as the best one; a prompt of several chunks has no say."""
    assert proved.chunk(rates) == chunk


def chunked(**rates: float) -> dict[str, Any]:
    """`report` with the rates of mxfp8's prompts of one chunk."""
    found = report()
    points = [point("prefill", rate, "tokens/s", tokens=int(size[1:])) for size, rate in rates.items()]
    servers = [one | {"points": [*one["points"], *points]} if one["server"] == "model, prefill=mxfp8" else one
               for one in found["servers"]]  # fmt: skip
    return report(servers=servers)


def test_the_chunk_of_whose_prefill_is_chosen(folder: Path):
    """From the report to its page, the card's table and a plan."""
    found = chunked(_2048=1100, _4096=1190)
    jsonschema.validate(found, schema())
    assert (found["choice"]["by"], found["choice"]["chunk"]) == ("mxfp8", 4096)
    assert "in chunks of 4,096 tokens" in proved.page(found)
    (folder / TABLE).write_text(proved.table(chunked(_2048=1000, _4096=1100)))
    assert tuned.prefill(CARD) == (tuned.PREFILLS["mxfp8"], 8192)
    two, flash = machine("2x-rtx-pro-6000"), load(FLASH)
    plan = make_plan(two, flash, Request(measured={CARD: tuned.prefill(CARD)}))
    assert plan.value("chunked-prefill-size") == 8192
    [why] = [one.reason for one in plan.settings if one.name == "chunked-prefill-size"]
    assert "which `prove` wrote" in why
    given = Request(measured={CARD: tuned.prefill(CARD)}, flags={"chunked-prefill-size": 1024})
    assert make_plan(two, flash, given).value("chunked-prefill-size") == 1024
    one = Request(measured={CARD: tuned.prefill(CARD)}, env={"SGLANG_SM120_PREFILL": "sglang"})
    assert make_plan(two, flash, one).value("chunked-prefill-size") == 4096, "the user has all in hand"


def test_nothing_to_choose():
    """One prefill alone, on a Hopper card the step's, and one without SGLang's own."""
    alone = server("model", *prefill(1, 2, 3), modes=["decode", "extend"])
    assert proved.prefills(report(servers=[alone])) == {"overlay": {1024: 1, 8192: 2, 32768: 3}}
    assert report(servers=[alone])["choice"] is None
    assert but("model", "model, prefill=mxfp8", verdict="not run", points=[])["choice"] is None
    assert but("model", "recall", verdict="fail", points=[])["choice"] is None
    assert "Nothing to choose between." in proved.page(report(servers=[alone]))


def test_code_for_another_card_has_a_table_of_its_own():
    gpu = report()["gpu"] | {"name": "NVIDIA H200", "compute_capability": "9.0"}
    assert report(gpu=gpu)["choice"]["table"] == "NVIDIA_H200-sm120-lowering.json"
    assert report(gpu=gpu | {"kernels": "sm90"})["choice"]["table"] == "NVIDIA_H200.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tables lie."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    return tmp_path


def test_the_table_keeps_what_was_tuned(folder: Path):
    """It is a table as the overlay reads it, and the plan takes its choice."""
    entry = {"family": "indexer_logits", "shape": {"width": 16384, "heads": 64}, "rows": 1,
             "config": {"block": 64, "programs_per_sm": 4, "warps": 4}}  # fmt: skip
    (folder / TABLE).write_text(json.dumps({"gpu": "old", "copy_bytes_per_s": 5, "entries": [entry]}))
    text = proved.table(report())
    (folder / TABLE).write_text(text)
    assert len(overlay_tuned.load(folder / TABLE)) == 1 and json.loads(text)["copy_bytes_per_s"] == 5
    assert json.loads(text)["prefill"]["evidence"] == "measured"
    assert tuned.prefill(CARD) == (tuned.PREFILLS["mxfp8"], None) and tuned.prefill("another") == ({}, None)
    (folder / TABLE).unlink()
    (folder / TABLE).write_text(proved.table(report()))
    assert overlay_tuned.load(folder / TABLE) == {} and tuned.prefill(CARD).variables == tuned.PREFILLS["mxfp8"]


def test_a_plan_takes_it(folder: Path):
    """With its reason, with room for the step's prefill; with one of its variables the user has all in hand."""
    two, flash = machine("2x-rtx-pro-6000"), load(FLASH)
    overlay, mxfp8 = ({CARD: tuned.Prefill(tuned.PREFILLS[side])} for side in ("overlay", "mxfp8"))
    plan = make_plan(two, flash, Request(measured=mxfp8))
    asked = make_plan(two, flash, Request(env={"SGLANG_SM120_PREFILL": "overlay"}))
    read = {LOADER: "1"}
    assert plan.environment() == tuned.PREFILLS["mxfp8"] | read and plan.fit == asked.fit
    assert plan.value("disable-prefill-cuda-graph") is True
    reasons = {one.name: one.reason for one in plan.settings if one.kind == "env"}
    assert "65 rows" in reasons["SGLANG_SM120_PROVIDER"] and "65 rows" not in reasons["SGLANG_SM120_PREFILL"]
    assert all("which `prove` wrote" in reason for name, reason in reasons.items() if name != LOADER)
    for given in ({"SGLANG_SM120_PREFILL": "sglang"}, {"SGLANG_SM120_PROVIDER": "mxfp8"}):
        for request in (Request(measured=mxfp8, env=given), Request(measured=overlay, config_env=given)):
            own = make_plan(two, flash, request)
            assert own.environment() == given | read and own.fit != asked.fit
    absent = make_plan(two, flash, Request(measured=overlay, env={"SGLANG_SM120": "0"}))
    assert absent.environment() == {"SGLANG_SM120": "0"}


def test_the_cards_that_are_chosen_decide(folder: Path):
    """On a machine with another too; where their names differ nothing is taken."""
    flash, mixed, two = load(FLASH), machine("mixed-cards"), machine("2x-rtx-pro-6000")
    measured = {gpu.name: tuned.Prefill(tuned.PREFILLS["overlay"]) for gpu in mixed.gpus}
    three = replace(two, gpus=(mixed.gpus[1], *two.gpus))
    for known, taken in ((measured, True), ({three.gpus[0].name: measured[CARD]}, False)):
        chosen = make_plan(three, flash, Request(measured=known)).environment()
        assert chosen["CUDA_VISIBLE_DEVICES"] == "1,2" and ("SGLANG_SM120_PREFILL" in chosen) == taken
    differ = make_plan(mixed, flash, Request(measured=measured)).environment()
    assert differ["CUDA_VISIBLE_DEVICES"] == "0,2" and "SGLANG_SM120_PREFILL" not in differ


@pytest.mark.parametrize("command", ("plan", "serve"))
def test_both_commands_read_it(
    command: str, folder: Path, one_flags: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sglang_sm120_launch.machine.Machine.detect", lambda: machine("2x-rtx-pro-6000"))
    (folder / tuned_table(CARD)).write_text('{"prefill": {"by": "overlay"}, "entries": []}')
    dry = ["--dry-run"] if command == "serve" else []
    assert cli.main([command, "--model", FLASH, *dry]) == 0
    assert "SGLANG_SM120_PREFILL" in capsys.readouterr().out
    described = str(Path(__file__).parent / "machines/2x-rtx-pro-6000.json")
    assert cli.main([command, "--model", FLASH, "--machine", described, *dry]) == 0
    assert "SGLANG_SM120_PREFILL" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "no JSON object"), ("[]", "no JSON object"), ('{"prefill": {"by": "x"}}', "names the prefill 'x'"),
     ('{"prefill": {"by": "sglang", "chunk": 3000}}', "names a chunk of 3000 tokens"),
     ('{"prefill": {"by": "sglang", "chunk": [1]}}', "names a chunk of [1] tokens"),
     ('{"prefill": {}}', "names the prefill None"), ('{"prefill": {"by": []}}', "names the prefill []")],
)  # fmt: skip
def test_a_table_that_is_damaged(text: str, said: str, folder: Path):
    (folder / TABLE).write_text(text)
    with pytest.raises(LaunchError) as refusal:
        tuned.prefill(CARD)
    assert said in str(refusal.value) and str(refusal.value).count(". ") == 0


def test_the_page():
    """Cards, ratios, error bars, what failed and why, in tables that nothing breaks, and the logs that stay here."""
    recall = point("recall: far recall", 415, "answers", requests=16, of=418, problem="needed 99.5%")
    failed = but("recall", verdict="fail", points=[recall]) | {"verdict": "fail"}
    failed["choice"] = report()["choice"]
    text = proved.page(failed, ["prove.recall.log"])
    assert text.startswith("# sglang-sm120 prove: fail\n\nMeasured.\n") and f"\n2 × {CARD}, link switch" in text
    assert "**private**, not to be sent unread: `prove.recall.log`." in text
    assert "private" not in proved.page(report())
    assert "| model | 1 | 1,024 | 7.70 | 7.00 (5.95 to 8.05) | 1.10 | yes |" in text
    assert "| model | 8 | 1,024 | 20.00 | 12.00 (10.20 to 13.80) | 1.67 | no |" in text
    assert "| mxfp8 | 80 | 1,200 | 1,200 |" in text and "fastest prefill: mxfp8" in text
    assert "| recall | far recall | 16 | 415 of 418 | needed 99.5% |" in text
    assert "recall, EAGLE: 3.84 tokens a verification" in text
    assert "| `mxfp4_moe=mxfp8` | pass | 1 | 1.0e-07 | 4096 rows 12 / 20 |" in text
    assert "| recall, prefill=sglang | fail: ValueError: so / narrow |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| recall") and "fail" in line}
    assert widths == {7}


def test_the_page_of_cards_that_differ():
    one, two = report()["cards"]
    assert f"\n1 × {CARD} and 1 × another, link" in proved.page(report(cards=[one, two | {"name": "another"}]))


def test_the_page_of_another_card_says_so_first():
    gpu = report()["gpu"] | {"name": "NVIDIA H200", "compute_capability": "9.0"}
    text = proved.page(report(evidence="emulated", gpu=gpu, servers=[], left_out="no clone here"))
    assert text.splitlines()[2].startswith("**Emulated**: no SM12x card; kernels compiled for sm120 on NVIDIA H200.")
    assert "Measured" not in text and "Left out: no clone here." in text and "prediction" not in text


def compared(a: Any, b: Any, tmp_path: Path) -> list[str]:
    words = ["compare"]
    for name, one in (("a", a), ("b", b)):
        (tmp_path / f"{name}.json").write_text(one if isinstance(one, str) else json.dumps(one))
        words.append(str(tmp_path / f"{name}.json"))
    return words


def test_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = (but("recall", verdict="fail") | {"verdict": "fail", "commit": commit} for commit in ("abc", "def"))
    b["servers"][0]["points"][0]["value"] = 3.85
    b["servers"][0]["about"] = "64 experts"
    b["ops"][1]["calls"][0]["us"] = 24.0
    b["versions"]["driver"] = "2"
    assert cli.main(compared(a, b, tmp_path)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    ratios = {" ".join(words[: words.index("->") - 1]): words[-1] for words in lines if "->" in words}
    assert ratios["model: decode, 1 at once, 1,024 tokens"] == "0.50x"
    assert ratios["mxfp4_moe=mxfp8: one, 4,096 rows"] == "2.00x"
    assert ratios["model, prefill=overlay: prefill, 8,192 tokens"] == "1.00x"
    assert not any("far recall" in name for name in ratios)
    text = "\n".join(" ".join(words) for words in lines)
    assert "B: fail, measured" in text and "commit def" in text and "A failed: recall" in text
    assert "versions differ: driver 1 and 2" in text and "model differs: 128 experts and 64 experts" in text


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (report() | {"schema": 2}, "is of schema 2 of `prove`, needed 3"),
        (report() | {"servers": 7}, "is damaged: run `prove` again"),
        (report() | {"servers": [{}]}, "is damaged: run `prove` again"),
        (report(servers=[server("model", point("decode", float("nan"), "ms"))]), "is damaged"),
        (report(servers=[], ops=[op("a")]), "have no time in common"),
        ({"schema": 1, "points": []}, "of `prove` and the other file is not: name two of one kind"),
        ("{", "is not JSON"),
        ("[]", "holds no JSON object: name a result of `bench` or `prove`"),
    ],
)
@pytest.mark.parametrize("first", (True, False))
def test_two_files_that_cannot_be_compared(
    first: bool, other: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if not first and isinstance(other, dict) and "points" in other:
        said = "damaged (complete, model"
    pair = (report(), other) if first else (other, report())
    assert said in refused(compared(*pair, tmp_path), capsys)
