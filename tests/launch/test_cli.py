"""The command line: what is told before anything long begins, keys, and the launcher where its packages are missing."""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import flag_table
import pytest
from golden_plans import HERE, machine
from telling import refused

from sglang_sm120 import __version__
from sglang_sm120.checkpoint.config import FLASH
from sglang_sm120_launch import cli, flags, request, show
from sglang_sm120_launch.errors import LaunchError
from sglang_sm120_launch.flags import TABLE, Flags, from_table
from sglang_sm120_launch.machine import Machine
from sglang_sm120_launch.model import Model
from sglang_sm120_launch.plan import Plan, make_plan
from sglang_sm120_launch.settings import flag
from sglang_sm120_launch.values import Request

pytestmark = pytest.mark.usefixtures("one_flags")
CONFIGS = sorted((HERE.parents[1] / "configs").glob("*.yaml"))
TWO = str(HERE / "machines" / "2x-rtx-pro-6000.json")
INSTALLED = Flags.installed
ANNOUNCED = "sglang-sm120: importing SGLang for its flags, some ten seconds\n"


def test_a_model_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Before SGLang is imported, which takes long."""
    monkeypatch.setattr(Flags, "installed", Mock(side_effect=AssertionError("SGLang is imported for nothing")))
    assert "/nowhere/model" in refused(["plan", "--model", "/nowhere/model"], capsys)


def test_of_another_release_sglang_is_asked_and_that_is_announced(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A word on stderr before SGLang is imported; stdout is the plan's."""
    # None in sys.modules makes an import fail where it would begin.
    monkeypatch.setitem(sys.modules, "sglang.srt.server_args", None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.24")
    with pytest.raises(ModuleNotFoundError):
        INSTALLED()
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ANNOUNCED


def test_the_demo_is_a_clones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert "no evals/demo.py here, which a wheel does not hold: run this in a clone" in refused(["demo"], capfd)
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals/demo.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    assert cli.main(["demo"]) == 3
    assert capfd.readouterr().out == "['evals/small-deepseek-v4.xz']\n"
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "has no package openai, which `demo` needs: run `make setup`" in refused(["demo"], capfd)


def test_the_table_is_the_installed_releases(sglangs: argparse.ArgumentParser):
    assert json.loads(TABLE.read_text()) == json.loads(flag_table.text(flag_table.table(sglangs))), (
        "the table of flags is old: python tests/launch/flag_table.py"
    )


WORDS = (
    ["--context-length", "65536"], ["--context-length", "64k"], ["--tp", "2"], ["--mem-fraction-static", "0.9"],
    ["--cuda-graph-bs-decode", "1", "2"], ["--disable-radix-cache"], ["--attention-backend", "dsv4"],
    ["--preferred-sampling-params", '{"top_k": 5}'], ["--disable-cuda-graph"], ["--lora-paths", "a=b"],
    ["--attention-backend", "none such"], ["--tp", "two"], ["--context-length", "-1"], ["--max-total-tokens", "1e3"],
    ["--cuda-graph-backend-decode", "full"], ["--monokernel-backend"],
)  # fmt: skip


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_the_table_reads_flags_as_sglang_does(
    words: list[str], sglangs: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
):
    """Where its own kinds of values do not suffice it asks SGLang."""
    monkeypatch.setattr(flags, "imported", lambda: sglangs)

    def read(known: argparse.ArgumentParser) -> object:
        found = Flags(known, "0.5.23")
        try:
            values = found.from_words(words)
            found.check(["--model-path", "m", *words])
        except LaunchError as refusal:
            return str(refusal)
        return values

    assert read(from_table(json.loads(TABLE.read_text())["flags"])) == read(sglangs)


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["--no-lora-strict-loading"], ["--no-lora-strict-loading"]),
        (["--lora-paths", "a=b"], ["--lora-paths", "a=b"]),
        (["--preferred-sampling-params", '{"top_k": 5}'], ["--preferred-sampling-params", '{"top_k": 5}']),
        (["--tp=2", "--disable-radix"], ["--tp-size", "2", "--disable-radix-cache"]),
    ],
    ids=str,
)  # fmt: skip
def test_sglang_gets_what_was_given(words: list[str], typed: list[str], flags: Flags):
    """By canonical names; a switch turned off stays off, and words that SGLang reads as JSON stay words."""
    found = flags.from_words(words)
    assert [word for name, value in found.items() for word in flag(name, value, "").arguments()] == typed


def test_a_plan_asks_nothing_of_sglang(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Of the published model, which need not be on disk, it is there in seconds."""
    monkeypatch.setattr(Flags, "installed", INSTALLED)
    monkeypatch.setattr(flags, "imported", Mock(side_effect=AssertionError("SGLang is imported for nothing")))
    words = ["--context-length", "65536", "--tp", "2", "--speculative-num-draft-tokens", "3"]
    assert cli.main(["plan", "--model", FLASH, "--machine", TWO, "--mtp", "--", *words]) == 0


@pytest.mark.parametrize("command", ("plan", "serve", "bench", "kernels", "prove"))
def test_the_launcher_alone_on_a_bare_python(command: str, tmp_path: Path):
    """One sentence that names what is missing and what to do; `doctor` reports there instead."""
    code = f"import sys; sys.path.insert(0, {str(HERE.parents[1] / 'launch')!r}); "
    code += "from sglang_sm120_launch.cli import main; sys.exit(main(sys.argv[1:]))"
    bare = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run([*bare, command], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "make setup" in done.stderr
    if command == "plan":
        (tmp_path / "config.json").write_text('{"model_type": "deepseek_v4"}')
        words = ["doctor", "--model", "."]
        done = subprocess.run([*bare, *words], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr == "" and "sglang-sm120 is not installed" in done.stdout
        assert done.stdout.count("not looked at") == 2, "patches and checkpoint"


def test_the_max_q_edition_is_planned(capsys: pytest.CaptureFixture[str]):
    """It differs in power alone, so the plan by the other edition's config is the plan without a config."""
    place = str(HERE / "machines" / "2x-rtx-pro-6000-max-q.json")
    [path] = (path for path in CONFIGS if ".2x-rtx-pro-6000." in path.name)
    plans = []
    for words in ([], ["--config", str(path)]):
        assert cli.main(["plan", "--json", "--model", FLASH, "--machine", place, *words]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["pools"] == plans[1]["pools"] and plans[0]["budget_bytes"] == plans[1]["budget_bytes"]


@pytest.mark.parametrize("variable", ("SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"))
def test_a_key_from_the_environment(variable: str, flash: Model, monkeypatch: pytest.MonkeyPatch):
    """The server gets it and the plan does not print it; a flag wins, and another machine's plan has none."""
    monkeypatch.setattr(Machine, "detect", classmethod(lambda cls: machine("2x-rtx-pro-6000")))
    monkeypatch.setattr(Model, "load", lambda path: flash)
    parser = argparse.ArgumentParser()
    request.configure(parser)
    name = variable.removeprefix("SGLANG_").lower().replace("_", "-")

    def plan(*words: str) -> Plan:
        wanted = request.read(parser.parse_args(["--model", FLASH, *words]), {variable: "s3cr3t"})
        return make_plan(wanted.machine, wanted.model, wanted.request)

    assert plan().value(name) == "s3cr3t" and "s3cr3t" not in show.as_text(plan()) + show.as_json(plan())
    [reason] = (entry.reason for entry in plan().settings if entry.name == name)
    assert variable in reason
    assert plan("--", f"--{name}", "mine").value(name) == "mine"
    assert plan("--machine", TWO).value(name) is None


@pytest.mark.parametrize(
    ("words", "key", "told"),
    [
        ([], None, False), (["--host", "localhost"], None, False), (["--host", "::1"], None, False),
        (["--host", "127.0.0.2"], None, False), (["--host", "0.0.0.0"], None, True), (["--host", "::"], None, True),
        (["--host", "box.lan", "--port", "8000"], None, True), (["--host", "0.0.0.0"], "s3cr3t", False),
        (["--host", "0.0.0.0", "--api-key", "s3cr3t"], None, False),
    ],
    ids=str,
)  # fmt: skip
def test_a_server_that_anybody_may_use_is_told(words: list[str], key: str | None, told: bool, flash: Model):
    """One line that names the port and the variable; none where a key is set, or where other machines get no answer."""
    given, keys = Flags.installed().from_words(words), {"api-key": key} if key else {}
    wanted = request.Wanted(machine("2x-rtx-pro-6000"), flash, Request(flags=given, keys=keys), Flags.installed())
    notes = wanted.check(make_plan(wanted.machine, flash, wanted.request)).notes
    found = [note for note in notes if note.startswith("Everybody who reaches port")]
    assert len(found) == told and all(str(given.get("port", 30000)) in note for note in found)
    assert all("SGLANG_API_KEY" in note for note in found)


@pytest.mark.parametrize("words", (("--nodes", "2"), ("--role", "all")))
def test_a_deployment_is_told_too(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    """Its servers listen everywhere."""
    assert cli.main(["plan", "--model", FLASH, "--machine", TWO, *words]) == 0
    assert "Everybody who reaches port 30000" in capsys.readouterr().out


def test_doctor_of_a_model_that_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One sentence with the command; of a downloaded one the cache's folder is checked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert f"`hf download {FLASH} --local-dir DIR`" in refused(["doctor", "--model", FLASH], capsys)
    assert "nobody/nothing" in refused(["doctor", "--model", "nobody/nothing"], capsys)
    cached = tmp_path / "models--deepseek-ai--DeepSeek-V4-Flash"
    (cached / "snapshots/0123").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123")
    (cached / "snapshots/0123/config.json").write_text('{"model_type": "llama"}')
    assert cli.main(["doctor", "--model", FLASH]) == 1
    assert "snapshots/0123 is a model of type llama" in capsys.readouterr().out


def test_versions(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"sglang-sm120 {__version__}, sglang 0.5.23\n"


def _sentences() -> Iterator[tuple[str, str]]:
    """Where an error for the user is made, and its text with each value as `…`; but for those made elsewhere."""
    for file in sorted(Path(cli.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("LaunchError", "Failed", "_Stopped"):
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                words = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts]
                if words != ["…"]:
                    yield f"{file.name}:{node.lineno}", "".join(words)


def test_every_error_says_what_to_do():
    """After its last colon: doctor shows it in a line of its own."""
    found = list(_sentences())
    assert len(found) > 100
    assert [one for one in found if not re.search(r": (…|\S.*[.…])$", one[1])] == []
