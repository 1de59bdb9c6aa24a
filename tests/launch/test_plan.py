"""Plans: golden ones for many machines, and what must hold for any machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from golden_plans import CASES, HERE, machine, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_sm120.checkpoint.config import FLASH
from sglang_sm120.limits import MAX_ROWS
from sglang_sm120_launch import cli, memory
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.fit import GIB, graph_sizes
from sglang_sm120_launch.flags import Flags
from sglang_sm120_launch.machine import LINKS, Gpu, Machine
from sglang_sm120_launch.model import Model
from sglang_sm120_launch.plan import Plan, make_plan
from sglang_sm120_launch.sections import LOADER
from sglang_sm120_launch.show import as_text
from sglang_sm120_launch.values import Request

MODEL = Model.load(FLASH)
COMMS = {"disable-custom-all-reduce", "enable-p2p-check", "NCCL_P2P_DISABLE"}
MEMORY = {
    "mem-fraction-static", "swa-full-tokens-ratio", "context-length", "chunked-prefill-size", "max-running-requests",
    "cuda-graph-bs-decode", "cuda-graph-max-bs-decode",
}  # fmt: skip
PRO = Gpu("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "12.0")
TWO = machine("2x-rtx-pro-6000")
ROOM = ("CUDA context and driver", "NCCL", "operating system (unified memory)")
"""What is taken before SGLang sees a card's memory."""


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str):
    """The whole plan, reasons and budget included; `golden_plans.py` writes them again."""
    kept = json.loads((HERE / "golden" / f"{case}.json").read_text(encoding="utf-8"))
    assert planned(case) == kept


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_planned_twice(case: str):
    """The budget's last line is what stays unused; a plan has no more than there is."""
    if "refused" not in (plan := planned(case)):
        last = plan["budget_bytes"][-1]
        assert last["what"] == "unused" and last["bytes"] >= 0


def test_machines_cover_what_the_plan_tells_apart():
    """At least twelve machines, of which some are refused, each for a reason of its own."""
    refusals = {case: planned(case).get("refused") for case in CASES if "+" not in case}
    refused = {case: text for case, text in refusals.items() if text}
    assert len(refusals) >= 12 and len(set(refused.values())) == len(refused) == 5
    assert all(any(digit.isdigit() for digit in text) for text in refused.values())


@pytest.mark.parametrize("case", CASES)
def test_every_value_has_a_reason_and_parses(case: str, flags: Flags):
    """The flags go through SGLang's own parser; nothing is set twice."""
    plan = planned(case)
    if "refused" in plan:
        return
    names = [entry["name"] for entry in plan["settings"]]
    assert len(names) == len(set(names))
    assert all(len(entry["reason"].split()) > 2 or entry["name"] == "tp-size" for entry in plan["settings"])
    flags.check(plan["command"][plan["command"].index("sglang.launch_server") + 1 :])


def test_v4_pro_takes_sixteen_cards():
    """Eight cards of 96 GB do not hold it; sixteen do, each with whole experts: an eighth of 3,072 channels has whole
    FP8 blocks, a sixteenth not. Smaller sets are told how many they lack."""
    for case in ("2x-rtx-pro-6000+pro", "8x-rtx-pro-6000+pro"):
        assert "use 16 such cards, 8 on each of 2 nodes (`plan --nodes 2`): at TP 16 " in planned(case)["refused"]
    plan = planned("16x-rtx-pro-6000+pro")
    found = {entry["name"]: entry["value"] for entry in plan["settings"]}
    assert {name: found[name] for name in ("tp-size", "ep-size", "nnodes", "SGLANG_SHARED_EXPERT_TP1")} == {
        "tp-size": 16, "ep-size": 16, "nnodes": 2, "SGLANG_SHARED_EXPERT_TP1": "1",
    }  # fmt: skip
    assert found["context-length"] == 1 << 20
    eight = {entry["name"] for entry in planned("8x-h200+pro")["settings"]}
    assert "ep-size" not in eight and "SGLANG_SHARED_EXPERT_TP1" not in eight
    # Flash has as many groups as a node has cards.
    with pytest.raises(LaunchError, match="TP 16 was asked for, and 2 x 8 cards"):
        make_plan(machine("16x-rtx-pro-6000"), MODEL, Request(flags={"tp-size": 16}))


@pytest.mark.parametrize("model", ("flash", "pro"))
@pytest.mark.parametrize(
    "name", ("1x-rtx-pro-6000", "2x-rtx-pro-6000", "2x-rtx-5090", "8x-rtx-5090", "gb10-pair", "2x-h200", "no-gpu")
)
def test_what_is_advised_fits(name: str, model: str, request: pytest.FixtureRequest):
    """Another plan, for the cards that a refusal names: not refused, and with the cache that was told."""
    model = request.getfixturevalue(model)
    described = machine(name)
    try:
        make_plan(described, model, Request())
    except LaunchError as refusal:
        said = str(refusal)
    else:
        return
    found = re.search(
        r"(?:use|memory,) (\d+) (such cards|NVIDIA[\w ]+)(?:, (\d+) on each of (\d+) nodes(?: \(`plan --nodes \4`\))?)?"
        r": at TP \1 ([\d.]+) GiB of weights and scratch leave ([\d.]+) GiB of each, with a cache of (\d+) tokens",
        said,
    )
    assert found, said
    count, what, local, nodes, taken, left, tokens = found.groups()
    gpu = described.gpus[0] if what == "such cards" else PRO
    assert what in ("such cards", PRO.name) and int(local or count) * int(nodes or 1) == int(count)
    assert not gpu.unified or local == "1"
    host = Machine(
        (gpu,) * int(local or count), 32, described.ram_mib if gpu.unified else 257000, 128500, "switch", True,
        driver="580.95.05", cuda="13.0", nodes=int(nodes or 1),
    )  # fmt: skip
    plan = make_plan(host, model, Request())
    assert plan.fit.pools.full == int(tokens) and plan.value("tp-size") == int(count)
    usable = sum(size for what, size in plan.fit.lines if what in ROOM or what.startswith("memory of"))
    assert (f"{plan.fit.taken / GIB:.1f}", f"{(usable - plan.fit.taken) / GIB:.1f}") == (taken, left)


@pytest.mark.parametrize(
    ("name", "flags", "used", "said"),
    [
        ("2x-rtx-pro-6000", {"max-total-tokens": 10}, 0, "; leave out --max-total-tokens."),
        ("2x-rtx-pro-6000", {"mem-fraction-static": 0.5}, 0, "; leave out --mem-fraction-static."),
        ("2x-rtx-pro-6000", {"chunked-prefill-size": 655360}, 0, "; leave out --chunked-prefill-size."),
        ("2x-rtx-pro-6000", {}, 90_000, "; free what other processes hold, 87.9 GiB of a card."),
        ("2x-rtx-pro-6000", {"max-total-tokens": 10}, 90_000,
         "; leave out --max-total-tokens and free what other processes hold."),
        ("1x-rtx-pro-6000", {"max-total-tokens": 10}, 0, " and leave out --max-total-tokens."),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_is_told(name: str, flags: dict[str, Any], used: int, said: str):
    """A value that the user gave, or others' memory: what to leave out or to free, not more cards."""
    there = machine(name)
    there = replace(there, gpus=tuple(replace(gpu, used_mib=used) for gpu in there.gpus))
    with pytest.raises(LaunchError) as refusal:
        make_plan(there, MODEL, Request(flags=flags))
    assert str(refusal.value).endswith(said) and str(refusal.value).count("; use") == ("1x" in name)


def test_a_machine_of_several_nodes_is_told_no_command(request: pytest.FixtureRequest):
    """Its file fixes their number, so that `--nodes` of another one is refused."""
    with pytest.raises(LaunchError, match=", 1 on each of 16 nodes: at TP 16 "):
        make_plan(machine("gb10-pair"), request.getfixturevalue("pro"), Request())


def test_the_prediction_is_of_the_sums_that_are_made():
    """As the user has them: without a figure for them there is none."""
    assert make_plan(TWO, MODEL, Request()).prediction
    assert make_plan(TWO, MODEL, Request(flags={"disable-custom-all-reduce": True})).prediction is None


def v4_pro() -> list[tuple[list[str], str]]:
    """Rows of docs/launcher.md on V4-Pro: arguments, and what is said."""
    text = (HERE.parents[1] / "docs/launcher.md").read_text(encoding="utf-8").split("## V4-Pro")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (none|`([a-z\d-]+\.json)(?: --nodes (\d))?`).* \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 6
    return [
        ([*(["--machine", file] if file else []), *(["--nodes", nodes] if nodes else [])], said)
        for _, file, nodes, said in rows
    ]


@pytest.mark.parametrize("row", v4_pro(), ids=lambda row: " ".join(row[0]))
def test_the_documents_table_of_v4_pro(
    row: tuple[list[str], str], one_flags: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Every figure of a row is one of what its command prints."""
    words, said = row
    words = [str(HERE / "machines" / word) if word.endswith(".json") else word for word in words]
    monkeypatch.setattr(Machine, "detect", lambda: machine("no-gpu"))
    status = cli.main(["plan", "--model", "deepseek-ai/DeepSeek-V4-Pro", *words])
    told = "".join(capsys.readouterr())
    assert (status == 0) == ("a cache" in said and not said.startswith("use"))
    printed = set(re.findall(r"\d+(?:\.\d+)?", told.replace("SGLang", "")))
    figures = re.findall(r"\d[\d,]*(?:\.\d+)?", re.sub(r"\(96 GB\)|GB10|RTX PRO 6000", "", said))
    assert figures and {figure.replace(",", "") for figure in figures} <= printed


def changes(before: Machine, after: Machine, request: Request | None = None) -> set[str]:
    """Names of settings whose value differs between the plans of two machines."""
    one, two = (
        {entry.name: entry.value for entry in make_plan(each, MODEL, request or Request()).settings}
        for each in (before, after)
    )
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}


FACTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "power limit": ({"gpus": (replace(PRO, power_limit_w=300),) * 2}, set()),
    "cores": ({"cpus": 8}, set()),
    "host memory": ({"ram_mib": 64000}, set()),
    "newer driver": ({"driver": "590.10", "cuda": "13.1"}, set()),
    "container": ({"container": True}, set()),
    "small /dev/shm with peer access": ({"shm_mib": 64}, set()),
    "root ports": ({"link": "root"}, set()),
    "different sockets": ({"link": "system"}, COMMS - {"NCCL_P2P_DISABLE"} | {"SGLANG_ENABLE_PCIE_IPC_ALLREDUCE"}),
    "no peer access": ({"p2p": False}, COMMS),
    "IOMMU": ({"iommu": "translated"}, COMMS),
    "IOMMU passes through": ({"iommu": "passthrough"}, set()),
    "no peer access, small /dev/shm": ({"p2p": False, "shm_mib": 64}, COMMS | {"NCCL_SHM_DISABLE"}),
    "NVLink": ({"link": "nvlink"}, COMMS - {"NCCL_P2P_DISABLE", "disable-custom-all-reduce"}),
    "some memory in use": (
        {"gpus": (PRO, replace(PRO, used_mib=4000))},
        {"context-length", "mem-fraction-static"},
    ),
    "more memory in use": (
        {"gpus": (PRO, replace(PRO, used_mib=10000))},
        MEMORY - {"swa-full-tokens-ratio", "chunked-prefill-size"},
    ),
    "a third, smaller card": (
        {"gpus": (PRO, PRO, Gpu("NVIDIA GeForce RTX 5090", 32607, "12.0"))},
        {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"},
    ),
}


@pytest.mark.parametrize("fact", FACTS)
def test_one_fact_changes_only_what_depends_on_it(fact: str):
    """Exactly these settings differ from the plan for two RTX PRO 6000 behind a switch."""
    values, expected = FACTS[fact]
    assert changes(TWO, replace(TWO, **values)) == expected


def test_mtp_changes_speculation_and_memory_alone():
    """Draft flags appear, memory gives way to the draft model; graphs still count requests."""
    with_mtp = make_plan(TWO, MODEL, Request(mtp=True))
    before = {entry.name: entry.value for entry in make_plan(TWO, MODEL, Request()).settings}
    after = {entry.name: entry.value for entry in with_mtp.settings}
    differing = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name for name in differing if not name.startswith("speculative-")} <= MEMORY
    assert after["speculative-num-draft-tokens"] == 4
    assert after["cuda-graph-max-bs-decode"] == after["max-running-requests"]
    assert after["context-length"] < before["context-length"]


def holds(plan: Plan) -> None:
    """What every plan owes its user."""
    fit = plan.fit
    assert fit.pools.swa >= fit.window_needed == -(-fit.chunk // 256) * 256 + 512 * fit.requests
    assert 1024 <= fit.context < fit.pools.full
    assert max(fit.graphs, default=2) <= max(2, fit.requests) and fit.graphs != (1,)
    assert list(fit.graphs) == sorted(set(fit.graphs))
    assert all(entry.reason for entry in plan.settings)
    assert sum(size for _, size in fit.lines[:-1]) == fit.lines[-1][1]


@settings(max_examples=40)
@given(
    count=st.integers(1, 8),
    memory=st.integers(16000, 200000),
    used=st.integers(0, 20000),
    link=st.sampled_from(LINKS),
    p2p=st.booleans(),
    mtp=st.booleans(),
    nodes=st.sampled_from((1, 2)),
    chunk=st.sampled_from((None, 256, 1000, 8192)),
    requests=st.sampled_from((None, 2, 17, 200)),
    context=st.sampled_from((None, 4096, 200000)),
)
def test_any_machine_is_served_or_refused_with_numbers(
    count: int, memory: int, used: int, link: str, p2p: bool, mtp: bool, nodes: int,
    chunk: int | None, requests: int | None, context: int | None,
):  # fmt: skip
    """What the user gives stays, what the plan adds fits; otherwise the sentence says by how much it does not."""
    several = count > 1
    place = replace(
        TWO,
        gpus=(replace(PRO, memory_mib=memory, used_mib=used),) * count,
        link=link if several else None,
        p2p=p2p if several else None,
        nodes=nodes,
    )
    given_flags = {"chunked-prefill-size": chunk, "max-running-requests": requests, "context-length": context}
    wanted = {name: value for name, value in given_flags.items() if value is not None}
    try:
        plan = make_plan(place, MODEL, Request(flags=wanted, mtp=mtp))
    except LaunchError as refusal:
        assert "GiB" in str(refusal) and str(refusal).endswith(".")
        return
    holds(plan)
    assert {name: plan.value(name) for name in wanted} == wanted
    assert plan.fit.lines[-1][1] >= 0


@pytest.mark.parametrize("requests", [*range(1, 40), 64, 100, 160, 500])
def test_graph_sizes(requests: int):
    """Every small size, then growing steps, the largest exactly; one size alone only where one request runs."""
    sizes = graph_sizes(requests)
    assert sizes[: min(requests, 8)] == tuple(range(1, min(requests, 8) + 1)) and sizes[-1] == requests
    assert all(b - a <= max(1, a // 4) for a, b in zip(sizes, sizes[1:], strict=False))


def test_little_memory_never_leaves_one_graph_alone():
    """People captured size 1 alone, and four streams together were slower than one."""
    found = set()
    for mib in range(23000, 33000, 250):
        try:
            plan = make_plan(replace(TWO, gpus=(replace(PRO, memory_mib=mib),) * 8), MODEL, Request())
        except LaunchError:
            continue
        found.add(plan.fit.graphs)
    assert (1, 2) in found and len(found) > 2
    assert all(graphs[:2] == (1, 2) for graphs in found)


def test_the_users_values_win():
    """The command line over a config, a config over the plan; the reason says so."""
    request = Request(
        config="x.yaml",
        config_flags={"context-length": 65536, "max-running-requests": 8},
        flags={"context-length": 32768},
        env={"NCCL_P2P_DISABLE": "0"},
    )
    plan = make_plan(TWO, MODEL, request)
    assert (plan.value("context-length"), plan.value("max-running-requests")) == (32768, 8)
    assert (plan.fit.context, plan.fit.requests) == (32768, 8), "what fits was judged by other values"
    assert plan.environment()["NCCL_P2P_DISABLE"] == "0"
    reasons = {entry.name: entry.reason for entry in plan.settings}
    assert "command line" in reasons["context-length"] and "x.yaml" in reasons["max-running-requests"]


@pytest.mark.parametrize(
    ("flags", "numbers"),
    {
        "context": ({"context-length": 1000000, "mem-fraction-static": 0.86}, ("897792", "1000256")),
        "requests": ({"max-running-requests": 500}, ("172544", "256256")),
        "ranks": ({"tp-size": 3}, ("TP 3", "up to 2")),
        "fraction": ({"mem-fraction-static": 0.7}, ("GiB",)),
    }.values(),
)
def test_what_does_not_fit_is_refused_with_the_numbers(flags: dict[str, Any], numbers: tuple[str, ...]):
    """Both what is there and what would be needed."""
    with pytest.raises(LaunchError) as refusal:
        make_plan(TWO, MODEL, Request(flags=flags))
    assert all(number in str(refusal.value) for number in numbers)


def test_the_step_is_the_plugins():
    """The rows that it takes, and that it serves the drafts of `--mtp`."""
    from sglang.kernels.plugin_kernels.nvidia.spec import Feature

    from sglang_sm120.plugin import SPEC

    assert SPEC.max_rows == MAX_ROWS
    assert Feature.SPECULATIVE_DECODING in SPEC.features


@pytest.mark.parametrize(
    "request_",
    [
        Request(flags={"load-format": "dummy"}), Request(flags={"weight-loader-prefetch-checkpoints": True}),
        Request(config_flags={"model-loader-extra-config": "{}"}), Request(env={"SGLANG_SM120": "0"}),
        Request(env={LOADER: "0"}),
    ],
)  # fmt: skip
def test_weights_are_read_as_the_user_wants(request_: Request):
    """With the step by our reader, but where a flag asks for another way, or its variable says no."""
    assert make_plan(TWO, MODEL, Request()).environment()[LOADER] == "1"
    assert make_plan(TWO, MODEL, request_).environment().get(LOADER, "0") == "0"


def test_the_step_in_an_unpatched_sglang():
    """One flag more, and a bf16 `wo_a` less room; on a card that is none of SM12x SGLang serves alone."""
    patched, released = (make_plan(TWO, MODEL, Request(patched=patched)) for patched in (True, False))
    assert released.value("enable-nvidia-megakernel") is True
    names = [entry.name for entry in released.settings if entry.name != "enable-nvidia-megakernel"]
    assert names == [entry.name for entry in patched.settings]
    taken = dict(released.fit.lines)[memory.WO_A]
    assert memory.WO_A not in dict(patched.fit.lines) and patched.fit.pools.full > released.fit.pools.full
    size = f"takes {-taken / GIB:.2f} GiB in bf16 too"
    assert size in str(patched.fit.other_budget) and size in str(released.fit.other_budget)
    assert size in as_text(patched) and "`make apply` saves" in as_text(released)
    hopper = make_plan(machine("2x-h200"), MODEL, Request(patched=False))
    assert hopper.value("enable-nvidia-megakernel") is None and "none of SM12x" in hopper.notes[0]
    assert hopper.fit.other_budget is None


def test_what_prefill_takes():
    """SGLang's own scores of its indexer grow with chunk and context; the step's prefill takes none of that."""
    ours, theirs = (
        dict(make_plan(TWO, MODEL, Request(env=env)).fit.lines) for env in ({"SGLANG_SM120_PREFILL": "overlay"}, {})
    )
    scores = "indexer scores (SGLang's prefill)"
    assert -theirs[scores] == 4096 * (1048576 * 4 // 4 + 1048576 // 256 * 12)
    assert {what for what in theirs if what not in ours} == {
        scores, "experts' workspace (SGLang's prefill)", "window pages again (SGLang's prefill)",
    }  # fmt: skip
    assert ours["cache pools"] < theirs["cache pools"] < 0
    short = dict(make_plan(TWO, MODEL, Request(flags={"context-length": 65536})).fit.lines)
    assert short[scores] * 16 == theirs[scores]


@pytest.mark.parametrize(("draft", "graphs"), ((4, (1, 64)), (10, (1, 64))))
def test_more_rows_than_the_step_takes(draft: int, graphs: tuple[int, int]):
    """256 rows are 64 requests of 4 tokens and 25 of 10: the reason says from where on SGLang serves."""
    request = Request(mtp=True, flags={"speculative-num-draft-tokens": draft, "cuda-graph-bs-decode": graphs})
    [reason] = [s.reason for s in make_plan(TWO, MODEL, request).settings if s.name == "cuda-graph-max-bs-decode"]
    assert ("more than 25 requests without the step" in reason) == (draft == 10), reason


def test_drafts_that_cannot_be_served():
    """More tokens than the compressor can take back, and a checkpoint whose drafts are DSpark's."""
    with pytest.raises(LaunchError, match="is 11, and the compressor can take back 10 tokens"):
        make_plan(TWO, MODEL, Request(mtp=True, flags={"speculative-num-draft-tokens": 11}))
    dspark = replace(MODEL, config={**MODEL.config, "dspark_block_size": 5})
    with pytest.raises(LaunchError, match="DSpark.s stages in place of the MTP layer: give --dspark instead"):
        make_plan(TWO, dspark, Request(mtp=True))
