"""A model on several machines: what `plan --nodes`, `--role` and `--write` say, read back from every kind of file."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from golden_plans import HERE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from telling import refused

from sglang_sm120 import __version__, startup
from sglang_sm120.checkpoint.config import FLASH
from sglang_sm120_launch import cli, writers
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.flags import Flags
from sglang_sm120_launch.model import Model
from sglang_sm120_launch.writers import dynamo, srt_slurm

pytestmark = pytest.mark.usefixtures("one_flags", "one_model")
MACHINES = ("1x-rtx-pro-6000", "2x-rtx-pro-6000", "4x-rtx-pro-6000", "8x-rtx-5090", "gb10-pair", "2x-h200")
TWO, FOUR = (str(HERE / f"machines/{count}x-rtx-pro-6000.json") for count in (2, 4))
PLAN = ["plan", "--model", FLASH]
KEY = "a-key-that-nobody-may-read"
AWKWARD = """it's $(a) "name" ${of} 50%n \\ #1"""
"""A word that every format has to quote."""
Command = tuple[dict[str, str], list[str]]
"""Variables, and the words after `python`."""


@pytest.fixture
def one_model(flash: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are counted once, which takes half of a plan's second."""
    monkeypatch.setattr(Model, "load", lambda path: flash)


def split(words: list[str]) -> Command:
    """A command as the plan prints it."""
    at = words.index("python")
    return dict(word.split("=", 1) for word in words[1:at]), words[at + 1 :]


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """The processes that `plan --json` prints, by name."""
    assert cli.main([*words[:3], "--json", *words[3:]]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)}


def expanded(word: str, doubled: str, sign: str, kept: str = "(?!)") -> str:
    """A word as what reads the file expands it: a doubled sign is one, what `kept` matches stays, all else is wrong."""

    def one(found: re.Match[str]) -> str:
        assert found.group() != sign, f"{word} is expanded at its {sign}"
        return sign if found.group() == doubled else found.group()

    return re.sub(f"{re.escape(doubled)}|{kept}|{re.escape(sign)}", one, word)


def from_compose(files: dict[str, str]) -> dict[str, Command]:
    found = {}
    for text in files.values():
        for name, service in yaml.safe_load(text)["services"].items():
            words = [*service["entrypoint"][1:], *service["command"]]
            variables = {key: value.replace("$$", "$") for key, value in service.get("environment", {}).items()}
            found[name] = variables, [expanded(word, "$$", "$", r"\$\{SGLANG_\w+:\?\}") for word in words]
    return found


def from_systemd(files: dict[str, str]) -> dict[str, Command]:
    found = {}
    for file, text in files.items():
        if not file.endswith(".service"):
            continue
        # systemd leaves comment lines out before it joins lines.
        lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        start = next(line for line in lines.replace("\\\n", " ").splitlines() if line.startswith("ExecStart="))
        words = [expanded(word, "%%", "%") for word in shlex.split(start.removeprefix("ExecStart="))]
        words = [expanded(word, "$$", "$", r"\$\{SGLANG_\w+\}") for word in words]
        variables = shlex.split(files.get(file.replace(".service", ".env"), ""), comments=True)
        assert words[:2] == ["/usr/bin/env", "python"]
        assert ("EnvironmentFile=/etc/" + file.replace(".service", ".env") in text) == bool(variables)
        found[file.removeprefix("sglang-sm120-").removesuffix(".service")] = (
            dict(one.split("=", 1) for one in variables), words[2:],
        )  # fmt: skip
    return found


def from_slurm(files: dict[str, str]) -> dict[str, Command]:
    (text,) = files.values()
    found = {}
    for name, body in re.findall(r"^(\w+)=\(\n(.*?)^\)$", text, re.MULTILINE | re.DOTALL):
        found[name.replace("_", "-")] = split(["env", *shlex.split(body.removeprefix("    env\n"), comments=True)])
    started = re.findall(r'--nodelist=(\S+) --output="%x-%j-(.*).log" "\$\{(\w+)\[@\]\}" &$', text, re.MULTILINE)
    assert [(name, array.replace("_", "-")) for _, name, array in started] == [(name, name) for name in found]
    return found


def from_kubernetes(files: dict[str, str]) -> dict[str, Command]:
    (text,) = files.values()
    documents = list(yaml.safe_load_all(text))
    services = {one["metadata"]["name"]: one["spec"]["selector"] for one in documents if one["kind"] == "Service"}
    found = {}
    for one in documents:
        if one["kind"] == "Service":
            continue
        spec, name = one["spec"], one["metadata"]["name"].removeprefix("sglang-")
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels == services[spec.get("serviceName", one["metadata"]["name"])]
        (main,) = spec["template"]["spec"]["containers"]
        variables = {entry["name"]: entry["value"] for entry in main["env"] if "value" in entry}
        for rank in range(spec["replicas"]):
            words = [expanded(word, "$$(", "$(", r"\$\((?:NODE_RANK|SGLANG_\w+)\)") for word in main["args"]]
            words = [str(rank) if word == "$(NODE_RANK)" else word for word in words]
            node = f"{name}-node{rank}" if spec["replicas"] > 1 else name
            found[node] = variables, [*main["command"][1:], *words]
    return found


READERS = {"compose": from_compose, "systemd": from_systemd, "slurm": from_slurm, "kubernetes": from_kubernetes}


def written(format: str, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The files of a plan; each says for which release it is, and none holds the key."""
    assert cli.main([*words[:3], "--write", str(folder), "--format", format, *words[3:]]) == 0
    said = capsys.readouterr().out
    files = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    for name, text in files.items():
        assert any(line.startswith(writers.RELEASE) and __version__ in line for line in text.splitlines()[:2]), name
        assert name in said and KEY not in text + said
    return files


@st.composite
def deployments(draw: st.DrawFn) -> list[str]:
    """Arguments of `plan` for more than one machine."""
    machine = draw(st.sampled_from(MACHINES))
    nodes = 2 if machine == "gb10-pair" else draw(st.sampled_from((1, 2, 4)))
    role = draw(st.sampled_from((None, "prefill", "decode", "all")))
    prefill, decode = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    count = nodes * (prefill + decode if role else 1)
    hosts = draw(st.permutations([f"gpu-{index}.lan" for index in range(count)]))
    words = ["--nodes", str(nodes), "--hosts", ",".join(hosts)]
    words += ["--role", role, "--prefill", str(prefill)] if role else []
    return ["--machine", str(HERE / f"machines/{machine}.json"), *words]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deployments(), st.sampled_from(list(READERS)))
def test_files_hold_the_commands_that_the_plan_prints(
    flags: Flags, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str],
    words: list[str], format: str,
) -> None:  # fmt: skip
    """Process by process: variables, module and words; those of servers go through the table of SGLang's flags."""
    words = [*PLAN, *words, "--", "--api-key", KEY, "--served-model-name", AWKWARD]
    folder = tmp_path_factory.mktemp("w") / "new"
    code, (plan, told) = cli.main(words), capsys.readouterr()
    if code == 2 or (format == "kubernetes" and "CUDA_VISIBLE_DEVICES" in plan):
        # What does not fit or divides nothing is refused alike; Kubernetes chooses a machine's cards itself.
        sentence = refused([*words[:3], "--write", str(folder), "--format", format, *words[3:]], capsys)
        assert sentence == told if code == 2 else "chooses cards" in sentence
        assert not folder.exists()
        return
    found = READERS[format](written(format, words, folder, capsys))
    if format == "kubernetes":
        words = with_pods(words)
    for name, one in planned(words, capsys).items():
        variables, command = split(["env", *one["command"]] if one["command"][0] != "env" else one["command"])
        read_variables, read = found.pop(name)
        if "--api-key" in command:
            at = command.index("--api-key") + 1
            assert re.fullmatch(r"\$[{(]?SGLANG_API_KEY(:\?)?[)}]?", read[at]), read[at]
            read[at] = command[at]
        assert (read_variables, read) == (variables, command)
        if one["role"] != "router":
            flags.check(read[2:])
    assert not found


def with_pods(words: list[str]) -> list[str]:
    """The arguments with the pods' names in the hosts' place."""
    at = words.index("--hosts") + 1
    nodes, count = int(words[words.index("--nodes") + 1]), words[at].count(",") + 1
    servers = ["server"]
    if "--role" in words:
        prefill = int(words[words.index("--prefill") + 1])
        servers = [f"prefill{index}" for index in range(prefill)]
        servers += [f"decode{index}" for index in range(count // nodes - prefill)]
    pods = [f"sglang-{server}-{rank}.sglang-{server}" for server in servers for rank in range(nodes)]
    return [*words[:at], ",".join(pods), *words[at + 1 :]]


@pytest.mark.parametrize("role", (None, "all"))
def test_what_srt_slurm_and_dynamo_start(role: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan's flags and variables but for those that they hand out themselves, for every server."""
    words = [*PLAN, "--machine", TWO, "--nodes", "2", *(["--role", role, "--prefill", "2"] if role else [])]
    words += ["--hosts", ",".join(f"h{index}" for index in range(10 if role else 2))]
    processes = planned(words, capsys)
    (recipe,) = map(yaml.safe_load, written("srt-slurm", words, tmp_path / "srt", capsys).values())
    (graph,) = map(yaml.safe_load, written("dynamo", words, tmp_path / "dynamo", capsys).values())
    components = {one["name"]: one for one in graph["spec"]["components"]}
    assert recipe["schema"] == 2 and recipe["engine"] == "sglang"
    assert recipe["frontend"]["type"] == ("sglang-router" if role else "sglang")
    counts = {"prefill": 2, "decode": 3} if role else {"server": 1}
    assert set(components) == {"Frontend", *({"server": "worker"}.get(one, one) for one in counts)}
    for kind, count in counts.items():
        one = processes[f"{kind}0-node0" if role else "server-node0"]
        variables, command = split(one["command"])
        flags = [entry for entry in one["plan"]["settings"] if entry["kind"] == "flag" and entry["value"] is not False]
        entry = recipe["roles"][{"server": "agg"}.get(kind, kind)]
        assert (entry["nodes"], entry["workers"], entry["gpus"], entry["env"]) == (2 * count, count, 4, variables)
        kept = {flag["name"]: flag["value"] for flag in flags if flag["name"] not in srt_slurm.DECIDED}
        assert entry["args"] == kept and recipe["resources"]["gpus_per_node"] == 2
        part = components[{"server": "worker"}.get(kind, kind)]
        (main,) = part["podTemplate"]["spec"]["containers"]
        assert (part["replicas"], part["multinode"], part["type"]) == (count, {"nodeCount": 2}, part["name"])
        assert main["resources"] == {"limits": {"nvidia.com/gpu": "2"}}
        assert {entry["name"]: entry["value"] for entry in main["env"]} == variables
        left, words_left = {*dynamo.DECIDED, "tool-call-parser"}, []
        for index, word in enumerate(command[2:], 2):
            name = next(name for name in reversed(command[: index + 1]) if name.startswith("--"))
            words_left += [] if name[2:] in left else [word]
        # Dynamo 1.6.1 ends where both tool parsers are given, and takes one for thinking of SGLang's beside its own.
        assert dynamo.RUNTIME == "1.6.1"
        args = main["args"]
        for name in ("--dyn-tool-call-parser", "--dyn-reasoning-parser"):
            at = args.index(name)
            assert args[at + 1] == "deepseek_v4"
            args = args[:at] + args[at + 2 :]
        assert args == words_left and args[args.index("--reasoning-parser") + 1] == "deepseek-v4"


def test_ranks_and_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    """Two prefill servers and a decode server of two machines each."""
    words = [*PLAN, "--machine", TWO, "--nodes", "2", "--role", "all", "--prefill", "2", "--hosts", "a,b,c,d,e,f"]
    found = planned(words, capsys)
    assert [one["host"] for one in found.values()] == ["a", "b", "c", "d", "e", "f", "a"]
    for server, first in {"prefill0": "a", "prefill1": "c", "decode0": "e"}.items():
        for rank in (0, 1):
            command = found[f"{server}-node{rank}"]["command"]
            got = {name: command[command.index(name) + 1] for name in ("--dist-init-addr", "--node-rank", "--nnodes")}
            assert got == {"--dist-init-addr": f"{first}:20000", "--node-rank": str(rank), "--nnodes": "2"}
            assert command[command.index("--disaggregation-mode") + 1] == server[:-1]
            assert f"SGLANG_SM120_VERSION={__version__}" in command
    router = found["router"]["command"]
    text = " ".join(router)
    assert "--prefill http://a:30000 8998 --prefill http://c:30000 8998 --decode http://e:30000" in text
    assert found["router"]["plan"] is None
    # A lost one leaves nobody to ask again; with two there is another.
    assert "--disable-retries" in router
    two = planned([*PLAN, "--machine", TWO, "--role", "all", "--hosts", "a,b,c"], capsys)
    assert "--disable-retries" not in two["router"]["command"] and "decode1" in two
    for role, names in (("prefill", 5), ("decode", 2)):
        part = planned([*words[:8], role, *words[9:]], capsys)
        assert len(part) == names and all(part[name] == found[name] for name in part)


def test_the_transfer_follows_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """RDMA devices where they are up, TCP elsewhere; what the user asks for stays."""

    def of(machine: str, *more: str) -> list[str]:
        words = [*PLAN, "--machine", str(HERE / f"machines/{machine}.json"), "--role", "all", "--", *more]
        return next(iter(planned(words, capsys).values()))["command"]

    tcp = of("2x-rtx-pro-6000")
    assert "mooncake_tcp" in tcp and "--disaggregation-ib-device" not in tcp
    nixl = of("2x-rtx-pro-6000", "--disaggregation-transfer-backend", "nixl")
    assert "nixl" in nixl and "mooncake_tcp" not in nixl


def test_another_release_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every process of a deployment is told, looked at before SGLang's files are."""
    monkeypatch.delenv(startup.VERSION, raising=False)
    assert startup.other_release() is None
    monkeypatch.setenv(startup.VERSION, __version__)
    assert startup.other_release() is None
    monkeypatch.setenv(startup.VERSION, "9.9.9")
    with pytest.raises(SystemExit, match=f"VERSION is 9.9.9 and sglang-sm120 {__version__} is installed"):
        startup.check()


MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a host too few": (["--nodes", "2", "--hosts", "a"], ("names 1", "spans 2")),
    "a host without a name": (["--hosts", "a,,b"], ("'a,,b'",)),
    "a host twice": (["--hosts", "a,a"], ("a twice",)),
    "a host that is a path": (["--hosts", "a,b/c"], ("'a,b/c'", "host names")),
    "a host that ends a word": (["--hosts", 'a"b,c;d'], ("host names",)),
    "a host by IPv6": (["--hosts", "fe80::1,fe80::2"], ("IPv4",)),
    "no nodes": (["--nodes", "0"], ("--nodes is 0",)),
    "nodes that divide nothing": (["--nodes", "3"], ("3 nodes", "divides")),
    "hosts that are no multiple": (["--nodes", "2", "--role", "all", "--hosts", "a,b,c"], ("names 3", "multiple of 2")),
    "prefill without decode": (["--role", "prefill", "--hosts", "a"], ("none is left to decode", "2 or more")),
    "decode without prefill": (["--role", "decode", "--prefill", "2", "--hosts", "a,b"], ("none is left to decode",)),
    "a count of a role that is not there": (["--prefill", "1"], ("--role",)),
    "a rank by hand": (["--nodes", "2", "--", "--node-rank", "1"], ("--node-rank", "leave it out")),
    "a mode by hand": (["--role", "all", "--", "--disaggregation-mode", "prefill"], ("--disaggregation-mode",)),
    "two numbers of nodes": (["--nodes", "2", "--", "--nnodes", "4"], ("--nodes is 2", "4")),
    "a folder without a format": (["--write", "DIR"], ("--format", "slurm")),
    "a format without a folder": (["--format", "slurm"], ("--write",)),
    "machines without names": (["--role", "all", "--write", "DIR", "--format", "systemd"], ("--hosts",)),
    "a part of a job": (["--role", "decode", "--write", "DIR", "--format", "slurm"], ("--role all",)),
    "a part of a recipe": (["--role", "decode", "--write", "DIR", "--format", "srt-slurm"], ("decode: give all",)),
    "a key in a recipe": (
        ["--write", "DIR", "--format", "dynamo", "--", "--api-key", KEY], ("SGLANG_API_KEY", "Dynamo"),
    ),
    "a parser that Dynamo has by no known name": (
        ["--write", "DIR", "--format", "dynamo", "--", "--tool-call-parser", "hermes"], ("hermes", "deepseekv4"),
    ),
    "cards that others choose": (
        ["--machine", FOUR, "--gpus", "2,3", "--write", "DIR", "--format", "kubernetes"], ("cards 2,3", "--machine"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, and nothing is written."""
    words, parts = MISTAKES[mistake]
    words = [str(tmp_path / "new") if word == "DIR" else word for word in words]
    sentence = refused([*PLAN, "--machine", TWO, *words], capsys)
    assert all(part in sentence for part in parts) and KEY not in sentence, sentence
    assert not (tmp_path / "new").exists()


def test_a_folder_that_takes_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in the place of a folder above it: one sentence, and nothing half done."""
    (tmp_path / "file").write_text("mine")
    words = [*PLAN, "--machine", TWO, "--format", "compose", "--write"]
    for place in ("file", "file/below"):
        assert "--write names" in refused([*words, str(tmp_path / place)], capsys)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


def test_a_checkpoint_by_a_relative_path(
    flash: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are read elsewhere."""
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(Model, "load", lambda path: replace(flash, path=path))
    monkeypatch.chdir(tmp_path)
    words = ["plan", "--model", "model", "--machine", TWO, "--write", "new", "--format", "compose"]
    assert cli.main(words) == 0
    capsys.readouterr()
    (text,) = (file.read_text() for file in (tmp_path / "new").iterdir())
    assert str(tmp_path / "model") in text


def test_files_are_all_there_or_none(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with pytest.raises(LaunchError, match="nothing can be written"):
        writers._write(tmp_path, {"first": "text", "second": "text"})
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


@pytest.mark.parametrize("text", ["\udcff", "no space"])
def test_folders_of_files_that_could_not_be_written_go(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-way: the second file has no UTF-8, or the disk is full; a folder that was there stays."""
    (tmp_path / "mine").mkdir()
    if text == "no space":
        opened, full = Path.open, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened, full)[self.name == "second"](self, *a, **k))
    with pytest.raises(LaunchError, match="^--write names .*, where nothing can be written"):
        writers._write(tmp_path / "mine/new/below", {"first": "text", "second": text})
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An unset variable of a shell is no name of the present folder."""
    monkeypatch.chdir(tmp_path)
    words = [*PLAN, "--machine", TWO, "--format", "compose", "--write"]
    assert "--write is '', which names no folder: name one, or ." in refused([*words, ""], capsys)
    assert not list(tmp_path.iterdir())
    assert cli.main([*words, "."]) == 0 and list(tmp_path.iterdir())


def test_who_may_use_the_server_is_told_with_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PLAN, "--machine", TWO, "--format", "compose", "--write"]
    assert cli.main([*words, str(tmp_path / "open")]) == 0
    assert capsys.readouterr().out.count("no API key") == 1
    assert cli.main([*words, str(tmp_path / "closed"), "--", "--api-key", KEY]) == 0
    assert "no API key" not in capsys.readouterr().out


def test_roles_of_one_folder_have_one_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prefill and decode planned apart, each for its machine; another release's files, or the same again: refused."""
    hosts = ["--machine", TWO, "--hosts", "a,b", "--write", str(tmp_path), "--format", "systemd"]
    assert cli.main([*PLAN, *hosts, "--role", "prefill"]) == 0
    capsys.readouterr()
    prefill = {file: file.read_text() for file in tmp_path.iterdir()}
    unit = tmp_path / "sglang-sm120-prefill0.service"
    unit.write_text(prefill[unit].replace(__version__, "9.9.9"))
    sentence = refused([*PLAN, *hosts, "--role", "decode"], capsys)
    assert "sglang-sm120 9.9.9, sglang 0.5.23" in sentence and set(tmp_path.iterdir()) == set(prefill)
    unit.write_text(prefill[unit])
    assert cli.main([*PLAN, *hosts, "--role", "decode"]) == 0
    capsys.readouterr()
    assert "sglang-sm120-decode0.service" in {file.name for file in tmp_path.iterdir()}
    assert "nothing is overwritten" in refused([*PLAN, *hosts, "--role", "decode"], capsys)
    assert {file: file.read_text() for file in prefill} == prefill


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_takes_the_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PLAN, "--machine", TWO, "--nodes", "2", "--role", "all", "--hosts", "a,b,c,d", "--", "--api-key", KEY]
    units = [str(tmp_path / name) for name in written("systemd", words, tmp_path, capsys) if name.endswith(".service")]
    found = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert found.returncode == 0 and "sglang" not in found.stderr, found.stderr


def test_a_job_ends_with_its_first_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script run by bash, with an `srun` that starts here, and where the router's fails at once."""
    words = [*PLAN, "--machine", TWO, "--role", "all"]
    (text,) = written("slurm", words, tmp_path / "new", capsys).values()
    tools = {
        "scontrol": "printf '%s\\n' x y",
        "srun": 'printf "%s\\n" "$*" >> "$OUT"; case "$*" in *sglang_router*) sleep 1; exit 3;; esac; exec sleep 60',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script, out = tmp_path / "job", tmp_path / "out"
    script.write_text(text)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "x,y", "OUT": str(out)}
    ended = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 3, ended.stderr
    lines = sorted(out.read_text().splitlines())
    assert len(lines) == 3 and {"--nodelist=x", "--nodelist=y"} <= set(" ".join(lines).split())
    assert "--prefill http://x:30000 8998 --decode http://y:30000" in " ".join(lines)
