"""`prove`: the file that it writes, from a child that passes, fails, dies or hangs, and what must not stand in it."""

from __future__ import annotations

import getpass
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from golden_plans import machine
from telling import refused

from sglang_sm120 import ops, parity, registry
from sglang_sm120.tolerance import FP32
from sglang_sm120_launch import cli
from sglang_sm120_launch.commands import prove
from sglang_sm120_launch.machine import Machine
from sglang_sm120_launch.proved import SCHEMA

CHECKOUT = Path(__file__).resolve().parents[2]
FAKE = """
import json, os, signal, sys, time
def say(**found): print("\\n" + json.dumps(found), flush=True)
names = sys.argv[1:] or {names}
gpu = dict(name="A card", compute_capability="12.0", sms=188, memory_mib=97887, kernels="sm120")
gpu["dependent_launches"] = True
say(gpu=gpu, versions=dict(torch="2", cuda="13.0", triton="3"), evidence="measured", ops=names)
for name in names:
    say(op=name, not_run="does not run on sm90" if name.endswith("=off") else None)
    if name.endswith("=off"): continue
    call = dict(call="one", rows=4, context=8192, problem=None, rms=1e-7, largest=1e-6, replay=None, seconds=0.5)
    call |= dict(us=12.4, default_us=20.0) if "=" in name else dict(us=None, default_us=None)
    {act}
    say(**call)
"""
INTERPRETED = """
import os, sys, time
os.environ["TRITON_INTERPRET"] = "1"
import torch
from sglang_sm120 import ops, parity, registry
from sglang_sm120.tolerance import Tolerance
parity.DEVICE, parity.STEPS = torch.device("cpu"), ((2, 2048), (1, 2600))
parity.SILENCE_SECONDS = 60 if sys.argv[1:] else 2
parity.replay = lambda call, seed, provider: None
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None
class Card: name, major, minor, multi_processor_count, total_memory = "Toy", 9, 0, 1, 1 << 30
torch.cuda.get_device_properties = lambda device: Card
ops.with_triton = lambda: ["mhc_post", "router_topk", "mhc_pre", "topk_slots", "indexer_logits"]
ops.with_own = lambda: ["router_topk=twice", "router_topk=wrong", "router_topk=away"]
parity.OWN_STEPS, parity.microseconds = ((3, 2048),), lambda call, provider: len(provider)
router = registry.ops()["router_topk"]
def twice(factor):
    def given(a):
        weights, ids = router.by("triton", **vars(a))
        return weights * factor, ids
    return given
for name, factor, kinds in (("twice", 2.02, "cpu"), ("wrong", 1.0, "cpu"), ("away", 2.0, "sm120")):
    own = registry.Own(twice(2), Tolerance(0.011, 0.011), "doubles")
    router.provider(name, runs_on=kinds, own=own)(twice(factor))
def broken(name, change):
    right = registry.ops()[name].reference
    object.__setattr__(registry.ops()[name], "reference", lambda **given: change(right(**given)))
def hang(result):
    time.sleep(60)
def refuse(result):
    raise ValueError(f"{os.getcwd()}/kernel.py is\\nwrong")
broken("mhc_pre", lambda result: [t * 1.01 for t in parity.tensors(result)])
broken("mhc_post", hang)
broken("topk_slots", refuse)
parity.main()
"""


def schema() -> dict[str, Any]:
    """The one of the page."""
    block = re.search(r"```json\n(.*?)```", (CHECKOUT / "docs/prove.md").read_text(), re.DOTALL)
    assert block is not None
    found: dict[str, Any] = json.loads(block.group(1))
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards, and an empty folder to write to."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(Machine, "detect", lambda: machine("2x-rtx-pro-6000"))


def proved(code: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What stands in the file when the child runs this code."""
    monkeypatch.setattr(prove, "KERNELS", ("-c", code))
    assert cli.main(["prove"]) == expected
    return written()


def written(*more: str) -> dict[str, Any]:
    """What stands in the file, beside which are its page and `more`."""
    found: dict[str, Any] = json.loads(Path("prove.json").read_text())
    jsonschema.validate(found, schema())
    assert sorted(path.name for path in Path().iterdir()) == sorted(["prove.json", "prove.md", *more])
    return found


def fake(act: str, *names: str) -> str:
    return FAKE.format(names=list(names), act=act)


def test_all_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Whatever doctor finds: the port of a server that runs here is taken."""
    found = proved(fake("print('a warning', end='')", "a", "b"), 0, monkeypatch)
    assert (found["verdict"], found["evidence"], found["gpu"]["kernels"]) == ("pass", "measured", "sm120")
    assert [card["compute_capability"] for card in found["cards"]] == ["12.0", "12.0"]
    assert [(op["op"], op["verdict"], len(op["calls"])) for op in found["ops"]] == [("a", "pass", 1), ("b", "pass", 1)]
    assert {check["name"] for check in found["doctor"]["checks"]} > {"gpu", "driver", "patches", "nccl"}
    out = capsys.readouterr().out
    assert re.search(r"^a +pass  1 of 1 calls in \d+ s$", out, re.MULTILINE) and "prove.json" in out


def test_the_schema_is_what_is_written(monkeypatch: pytest.MonkeyPatch):
    """Of every object that the page closes, each key is there: a key that is renamed on one side is found."""
    found, page = proved(fake("", "a"), 0, monkeypatch), schema()["properties"]
    op, call = page["ops"]["items"], page["ops"]["items"]["properties"]["calls"]["items"]
    assert found["servers"] == [] and found["choice"] is None and "no bench/proof.py here" in found["left_out"]
    assert set(page) == set(found) and page["gpu"]["properties"].keys() == found["gpu"].keys()
    assert op["properties"].keys() == found["ops"][0].keys()
    assert call["properties"].keys() == found["ops"][0]["calls"][0].keys()
    assert set(page["versions"]["required"]) == set(found["versions"])
    server, choice = page["servers"]["items"], page["choice"]
    point = server["properties"]["points"]["items"]
    for closed in (schema(), page["cards"]["items"], page["gpu"], op, call, server, point, page["prediction"], choice):
        assert closed["additionalProperties"] is False and set(closed["required"]) == set(closed["properties"])
    assert page["schema"]["const"] == SCHEMA


def test_one_that_does_not_run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """It is listed with its reason and fails nothing; one that runs is timed beside the default."""
    found = proved(fake("", "a", "a=off", "a=on"), 0, monkeypatch)
    assert [op["verdict"] for op in found["ops"]] == ["pass", "not run", "pass"] and found["verdict"] == "pass"
    assert (found["ops"][1]["not_run"], found["ops"][1]["calls"]) == ("does not run on sm90", [])
    out = capsys.readouterr().out
    assert re.search("^a=off +not run: does not run on sm90$", out, re.MULTILINE)
    assert re.search("^a=on .* µs beside the default's: 4 rows 12 / 20$", out, re.MULTILINE)


@pytest.mark.parametrize("key", ("problem", "replay"))
def test_one_that_fails(key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = proved(fake(f"call |= {{'{key}': 'too far off'}} if name == 'b' else {{}}", "a", "b", "c"), 1, monkeypatch)
    assert [op["verdict"] for op in found["ops"]] == ["pass", "fail", "pass"] and found["verdict"] == "fail"
    assert found["ops"][1]["calls"][0][key] == "too far off"
    assert "0 of 1 calls in 0 s; one, 4 rows, context 8192: too far off" in capsys.readouterr().out


def test_what_nothing_chooses_decides_nothing(monkeypatch: pytest.MonkeyPatch):
    found = proved(fake("call |= {'problem': 'too far off'} if '=' in name else {}", "a", "a=own"), 0, monkeypatch)
    assert [op["verdict"] for op in found["ops"]] == ["pass", "fail"] and found["verdict"] == "pass"


@pytest.mark.parametrize(
    ("act", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV: it said nothing"),
        ("sys.exit('no more memory')", "status 1: no more memory"),
    ],
)
@pytest.mark.parametrize("at", ("a", "b", "c"))
def test_a_child_that_dies(act: str, why: str, at: str, monkeypatch: pytest.MonkeyPatch):
    """The op that it was at failed, the others were run."""
    found = proved(fake(f"if name == {at!r}: {act}", "a", "b", "c"), 1, monkeypatch)
    assert [op["op"] for op in found["ops"]] == ["a", "b", "c"]
    for op in found["ops"]:
        if op["op"] == at:
            assert op["verdict"] == "fail" and op["calls"] == [] and op["ended"].endswith(why)
        else:
            assert op["verdict"] == "pass" and op["ended"] is None and len(op["calls"]) == 1


def test_a_card_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was found before is written, and each op that could not run says why."""
    code = """import sys\nif sys.argv[1:]: print('{"none": "no card any more"}'); sys.exit()\n"""
    found = proved(code + fake("if name == 'b': sys.exit(3)", "a", "b", "c", "d"), 1, monkeypatch)
    assert [op["verdict"] for op in found["ops"]] == ["pass", "fail", "fail", "fail"]
    assert [op["ended"] for op in found["ops"][2:]] == ["no card any more"] * 2


def test_nothing_private_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By doctor, by an error or by the last words of a process."""
    home = tmp_path / "ann lee"
    (home / "cuda").mkdir(parents=True)
    for name, value in {"HOME": home, "TRITON_CACHE_DIR": home / "cache", "CUDA_HOME": home / "cuda",
                        "NCCL_COMM_ID": "annshost:5000", "NCCL_TOPO_FILE": home / "topology", "NCCL_DEBUG_SUBSYS": "7",
                        }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    said = f"{home}/kernel.py and {sys.prefix}/lib and /opt/a.cu, line 7"
    act = f"call['problem'] = {said!r}; print({said!r}, flush=True); name == 'b' and sys.exit(1)"
    found = proved(fake(act, "a", "b"), 1, monkeypatch)
    text = Path("prove.json").read_text()
    private = {str(home), "ann", "lee", str(tmp_path), sys.prefix, str(CHECKOUT), "a.cu", "annshost", "topology"}
    private |= {word for word in (socket.gethostname(), getpass.getuser()) if word not in ("root", "localhost")}
    assert not [word for word in private if word in text]
    assert found["ops"][0]["calls"][0]["problem"] == "… and … and … line 7"
    assert found["ops"][1]["ended"] == "the process ended with status 1: … and … and … line 7"
    checks = {check["name"]: check["found"] for check in found["doctor"]["checks"]}
    assert checks["disk"].endswith("free for …") and checks["shm"].startswith("/dev/shm ")
    assert checks["nccl"].endswith("NCCL_COMM_ID=… NCCL_DEBUG_SUBSYS=7 NCCL_TOPO_FILE=…")


@pytest.mark.parametrize(
    "text",
    ("GPU-1a2b3c4d", "MIG-1a2b3c4d-0000-1111-2222-333344445555", "MIG-GPU-1a2b3c4d-0000-1111-2222-333344445555/1/2",
     "1A2B3C4D-0000-1111-2222-333344445555", "10.0.0.5", "192.168.10.255", "fe80::1", "2001:db8:0:1:2:3:4:5",
     "::ffff:10.1.2.3"),
)  # fmt: skip
def test_addresses_and_uuids_are_not_written(text: str):
    for before, after in (("", ""), ("to ", "."), ("[", "]:5000"), ("(", ", 3)")):
        said = prove.public(before + text + after)
        assert "…" in said and not set(re.findall("[0-9a-f]{4}", said)) & {"1a2b", "2222", "2001", "fe80"}
        assert not re.search(r"\d\.\d|::\d|db8", said) and said.endswith(after) | ("/" in text)


@pytest.mark.parametrize(
    "text",
    ("127.0.0.1:30000 is taken", "0.0.0.0", "at ::1 and ::", "PCI 0000:01:00.0", "12:30:45", "c10::Error: torch::add",
     "NCCL 2.27.7, driver 580.65.06", "commit 1a2b3c4d5e6f-dirty", "a GPU-accelerated op", "std::bad_alloc"),
)  # fmt: skip
def test_what_is_none_stays(text: str):
    assert prove.public(text) == text


def test_a_uuid_for_a_card(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Refused before anything runs, as a number that is not there is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a2b3c4d")
    assert "CUDA_VISIBLE_DEVICES is 'GPU-1a2b3c4d': give card numbers" in refused(["prove"], capsys)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7")
    assert "CUDA_VISIBLE_DEVICES is 0,7 and NVML sees not so many cards" in refused(["prove"], capsys)
    assert list(Path().iterdir()) == []


def test_host_and_user_are_not_written(monkeypatch: pytest.MonkeyPatch):
    """As words of their own: what only begins like them stays, and so do names that say nothing."""
    monkeypatch.setattr(prove.platform, "node", lambda: "anns-host.example")
    monkeypatch.setattr(prove, "_user", lambda: "ann")
    assert prove.public("ann@anns-host.example: annotated") == "…@…: annotated"
    monkeypatch.setattr(prove, "_user", lambda: "root")
    assert prove.public("a root complex") == "a root complex"


@pytest.mark.parametrize("out", ("there.json", "none/such.json", "prove.txt"))
def test_a_file_that_cannot_be_written(out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Told before anything is looked at; what is there stays."""
    Path("there.json").write_text("mine")
    assert out in refused(["prove", "--out", out], capsys)
    assert Path("there.json").read_text() == "mine" and len(list(Path().iterdir())) == 1


@pytest.mark.parametrize("name", ("prove.md", "prove.model.log"))
def test_a_page_stays(name: str, capsys: pytest.CaptureFixture[str]):
    Path(name).write_text("mine")
    assert f"{name} is there already" in refused(["prove"], capsys) and Path(name).read_text() == "mine"


def test_no_time(capsys: pytest.CaptureFixture[str]):
    assert "--seconds is 0: give 1 or more" in refused(["prove", "--seconds", "0"], capsys)


def test_a_run_that_is_interrupted_at_once_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prove, "collect", interrupted)
    assert cli.main(["prove"]) == 130 and list(Path().iterdir()) == []


def killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of three ops that is stopped in the second one; its child notes which ops it began."""
    act = "open('began', 'a').write(name)"
    begin = prove._begin

    def interrupted(*given: Any) -> Any:
        entry = begin(*given)
        if entry["op"] == "b":
            raise KeyboardInterrupt
        return entry

    with monkeypatch.context() as patch:
        patch.setattr(prove, "KERNELS", ("-c", fake(act + "; time.sleep(60 * (name == 'b'))", "a", "b", "c")))
        patch.setattr(prove, "_begin", interrupted)
        assert cli.main(["prove"]) == 130
    assert sorted(path.name for path in Path().iterdir()) == ["began", "prove.json.part"]
    monkeypatch.setattr(prove, "KERNELS", ("-c", fake(act, "of another run")))


def test_an_interrupted_run_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What was done is not done again, what was not is, and nothing is left beside the file and its page."""
    killed(monkeypatch)
    assert "kept in prove.json.part: the same command goes on from there" in capsys.readouterr().err
    Path("began").write_text("")
    assert cli.main(["prove"]) == 0
    found = written("began")
    assert [(op["op"], len(op["calls"])) for op in found["ops"]] == [("a", 1), ("b", 1), ("c", 1)]
    assert Path("began").read_text() == "bc" and found["gpu"]["name"] == "A card"


@pytest.mark.parametrize("at", ("prove.md", "prove.json"))
def test_an_end_that_is_interrupted_goes_on(at: str, monkeypatch: pytest.MonkeyPatch):
    write = prove._write

    def interrupted(path: Path, text: str) -> None:
        write(path, text)
        if path.name == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prove, "KERNELS", ("-c", fake("", "a")))
        patch.setattr(prove, "_write", interrupted)
        assert cli.main(["prove"]) == 130
    monkeypatch.setattr(prove, "KERNELS", ("-c", "raise SystemExit(3)"))
    assert Path(at).exists() and cli.main(["prove"]) == 0
    assert [op["op"] for op in written()["ops"]] == ["a"]


def test_a_figure_that_json_has_not(monkeypatch: pytest.MonkeyPatch):
    found = proved(fake("call['rms'], call['largest'] = float('nan'), float('inf')", "a"), 0, monkeypatch)
    assert (found["ops"][0]["calls"][0]["rms"], found["ops"][0]["calls"][0]["largest"]) == (None, None)


def test_changed_files_do_not_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(prove, "commit", lambda: "abc-dirty")
    killed(monkeypatch)
    assert "goes on" not in capsys.readouterr().err
    assert "begun with commit abc-dirty, with changed files that may have changed" in refused(["prove"], capsys)


@pytest.mark.parametrize("what", ("cards", "versions", "commit", "variables"))
def test_another_machine_does_not_go_on(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    killed(monkeypatch)
    capsys.readouterr()
    kept = Path("prove.json.part").read_text()
    if what == "cards":
        monkeypatch.setattr(Machine, "detect", lambda: machine("2x-rtx-5090"))
    elif what == "versions":
        monkeypatch.setattr(prove, "__version__", "9")
    elif what == "commit":
        monkeypatch.setattr(prove, "commit", lambda: "another")
    else:
        monkeypatch.setenv("SGLANG_SM120_FORCE", "1")
    assert f"prove.json.part was begun with {what} " in refused(["prove"], capsys)
    assert Path("prove.json.part").read_text() == kept and not Path("prove.json").exists()


@pytest.mark.parametrize("text", ("", "[]", "{}", '{"same": 1}', "without", '{"seconds": "1", "waiting": []}'))
def test_a_damaged_part(text: str, capsys: pytest.CaptureFixture[str]):
    if text == "without":
        text = json.dumps({"same": prove.identity(machine("2x-rtx-pro-6000")), "seconds": 1})
    Path("prove.json.part").write_text(text)
    assert "prove.json.part is not what an interrupted `prove` leaves" in refused(["prove"], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["prove"]) == 1 and list(Path().iterdir()) == []
    assert re.fullmatch(r"sglang-sm120 prove: torch sees no CUDA device, .*\.\n", capsys.readouterr().err)


def test_the_real_child(monkeypatch: pytest.MonkeyPatch):
    """In Triton's interpreter: an op that hangs, one that is right, one that differs, one whose reference raises.

    And one with a trial, and providers that double the right result, one by 2.02 within its own tolerance, one not, one
    of another card.
    """
    found = proved(INTERPRETED, 1, monkeypatch)
    hung, right, differs, raised, tried, twice, wrong, away = found["ops"]
    assert (hung["op"], hung["verdict"], hung["calls"]) == ("mhc_post", "fail", []) and "SIGALRM" in hung["ended"]
    assert (right["op"], right["verdict"]) == ("router_topk", "pass")
    assert [(call["rows"], call["context"]) for call in right["calls"]] == [(2, 2048), (1, 2600)]
    assert all(0 <= call["rms"] < 1e-5 for call in right["calls"])
    assert all("RMS error" in call["problem"] and 5e-3 < call["rms"] < 2e-2 for call in differs["calls"])
    assert [call["problem"] for call in raised["calls"]] == ["ValueError: … is wrong"] * 2
    assert [call["call"] for call in tried["calls"]] == ["c4", "c4, FP8 operands"] * 2 and tried["verdict"] == "pass"
    assert all(0 <= call["rms"] < 1e-5 for call in tried["calls"])
    assert (twice["op"], twice["verdict"], wrong["verdict"]) == ("router_topk=twice", "pass", "fail")
    (call,) = twice["calls"]
    assert (call["rows"], call["us"], call["default_us"]) == (3, 5, 6) and 0.009 < call["rms"] < 0.011
    assert (away["verdict"], away["not_run"], away["calls"]) == ("not run", "does not run on cpu, needs sm120", [])
    assert right["not_run"] is None and right["calls"][0]["us"] is None
    assert found["evidence"] == "emulated" and found["gpu"]["kernels"] == "sm90"


def test_a_replay_takes_lengths_as_long_as_the_first(choice: tuple[Any, torch.Tensor]):
    call, most = choice[0], int(choice[0].arguments["lengths"].max())
    change = parity.changing(call, torch.Generator().manual_seed(1), 0)
    drawn = []
    for _ in range(60):
        change()
        drawn.append(int(call.arguments["lengths"].max()))
    assert max(drawn) <= most and max(drawn[-8:]) > most // 2


def test_errors_beyond_fp32_can_be_written():
    nothing = torch.full((3,), -torch.inf)
    assert parity.difference(nothing, nothing, FP32) == parity.Verdict(None)
    assert "3 values are not finite" in str(parity.difference(torch.zeros(3), nothing, FP32).problem)
    verdict = parity.difference(torch.tensor([1.0, -3e38]), torch.tensor([1.0, 3e38]), FP32)
    assert verdict.problem is not None and (verdict.rms, verdict.largest) == (None, None)


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, torch.Tensor]:
    """A call that chooses, and what its reference chooses: 512 of 650 entries."""
    monkeypatch.setattr(parity, "DEVICE", torch.device("cpu"))
    (call,) = parity.calls_of("indexer_topk", 2, 2, 2600, 0)
    return call, parity.reference_result(call)[0]


def test_a_wrong_choice_is_found(choice: tuple[Any, torch.Tensor]):
    """Too few, out of order, one twice, a worse one; the reference's own is right."""
    call, slots = choice
    scores = ops.SPECS["indexer_topk"].scores
    assert parity.selection_problem(call, slots) is None and scores is not None
    fewer, swapped, twice = slots.clone(), slots.clone(), slots.clone()
    fewer[0, -1] = -1
    swapped[1, :2] = slots[1, :2].flip(0)
    twice[0, 1] = twice[0, 0]
    assert "another number" in str(parity.selection_problem(call, fewer))
    assert "ascending" in str(parity.selection_problem(call, swapped))
    assert "twice" in str(parity.selection_problem(call, twice))
    arguments = {name: value for name, value in call.arguments.items() if name != "k"}
    logits = registry.ops()[scores].reference(**arguments)
    page_size, table = call.arguments["page_size"], call.arguments["page_table"]
    entries = torch.arange(650)
    all_slots = table[0, entries // page_size] * page_size + entries % page_size
    worst = logits[0, :650].topk(512, largest=False).indices.sort().values
    worse = slots.clone()
    worse[0] = all_slots[worst]
    assert "higher than a chosen" in str(parity.selection_problem(call, worse))
