"""lint and refresh: what a maintainer of the series runs; and what the installed packages may import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
from boxes import CHECKOUT, FIRST, HEADER, PATCHSET, SECOND, VERSION, Box, tree
from hypothesis import example, given
from hypothesis import strategies as st

import authoring
import series as patch_series

LINE = st.sampled_from(["", "x", "y", "    return x", "def f():", "x\x0cy", "é\u2028"])


def lint(box: Box) -> tuple[int, str]:
    command = [sys.executable, str(PATCHSET), "lint", "--root", str(box.root)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stderr


def test_a_good_series_passes(box: Box):
    assert lint(box) == (0, "")


@pytest.mark.parametrize("field", authoring.FIELDS)
def test_a_header_field_is_needed(box: Box, field: str):
    box.write_series(core_01_first=FIRST.replace(f"{field}: ", f"X-{field}: "), cpu_02_second=SECOND)
    code, message = lint(box)
    assert code == 1 and field in message


LONG = "x = '" + "1" * 120 + "'"
MANY = "".join(f"+m{line} = 0\n" for line in range(41))


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("+a1b = 12", "+def f(): pass", "defines something"),
        ("+a1b = 12", "+    async def f(): pass", "defines something"),
        ("+a1b = 12", "+class A: pass", "defines something"),
        ("+a1b = 12", "+@triton.jit", "defines something"),
        ("+a1b = 12", "+f = lambda: 1", "defines something"),
        ("+a1b = 12", f"+{LONG}", "over 120 characters"),
        ("+a1b = 12", "+a1b = 12 ", "white space at the end"),
        ("@@ -1,4 +1,5 @@\n a0 = 0\n", f"@@ -1,4 +1,46 @@\n a0 = 0\n{MANY}", "at most 40"),
        ("Change the first lines.", "Change the first lines. And another thing.", "one sentence"),
        ("Change the first lines.", "Change the first lines", "one sentence"),
        (f"SGLang {VERSION}", "SGLang 9.9.8", "Applies-To"),
    ],
)
def test_a_rule_is_kept(box: Box, old: str, new: str, problem: str):
    assert old in FIRST
    box.write_series(core_01_first=FIRST.replace(old, new), cpu_02_second=SECOND)
    code, message = lint(box)
    assert code == 1 and "core/01-first.patch" in message and problem in message


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        ("sglang/a.py has a1b", None),
        ("sglang/a.py:C.f lacks a1 = 1;\n sglang/sub/b.py has (two|three)", None),
        ("sglang/a.py a1b", "'sglang/a.py a1b' is not FILE[:SYMBOL] has|lacks REGEX"),
        ("other/a.py has a1b", "is not FILE"),
        ("sglang/a.py has a1b; upstream mends it", "'upstream mends it' is not FILE"),
        ("sglang/a.py lacks (a1b", "has no regular expression"),
    ],
)
def test_a_drop_check_has_its_form(box: Box, check: str, problem: str | None):
    first = FIRST.replace("Drop-When: never\n", f"Drop-When: never\nDrop-Check: {check}\n")
    box.write_series(core_01_first=first, cpu_02_second=SECOND)
    code, message = lint(box)
    if problem is None:
        assert (code, message) == (0, "")
    else:
        assert code == 1 and "core/01-first.patch: Drop-Check: " in message and problem in message


@pytest.mark.parametrize(
    "body, problem",
    [
        ("--- a/sglang/a.py\n+++ b/sglang/a.py\n@@ -1,3 +1,4 @@\n a0 = 0\n", "does not parse"),
        ("", "changes no file"),
        ("--- /dev/null\n+++ b/sglang/new.py\n@@ -0,0 +1 @@\n+x = 1\n", "added"),
        ("--- a/sglang/a.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-a0 = 0\n", "removed"),
        ("--- a/sglang/a.py\n+++ b/sglang/d.py\n@@ -1 +1 @@\n-a0 = 0\n+a0 = 1\n", "sglang/"),
        ("--- a/other/a.py\n+++ b/other/a.py\n@@ -1 +1 @@\n-a0 = 0\n+a0 = 1\n", "is not named"),
        ("".join(f"--- a/sglang/{n}.py\n+++ b/sglang/{n}.py\n@@ -1 +1 @@\n-0\n+1\n" for n in "vwxyz"), "5 files"),
    ],
)
def test_a_bad_body_is_named(box: Box, body: str, problem: str):
    patch = box.series / "core/01-first.patch"
    patch.write_text(HEADER.format(text="Do it.", version=VERSION) + body)
    code, message = lint(box)
    assert code == 1 and "core/01-first.patch" in message and problem in message


def test_the_series_file_is_checked(box: Box):
    series, twice = box.series / "series", "cpu/02-second.patch is listed more than once"
    series.write_text("cpu/02-second.patch\ncore/01-first.patch\ncpu/02-second.patch\n")
    (box.series / "core/03-extra.patch").write_text(FIRST)
    (box.series / "core/Bad_Name.patch").write_text(FIRST)
    (box.series / "other").mkdir()
    (box.series / "other/04-x.patch").write_text(FIRST)
    code, message = lint(box)
    assert code == 1
    for problem in (twice, "core/03-extra.patch is not listed", "other/04-x.patch is not listed", "not in the order"):
        assert problem in message
    series.write_text("core/Bad_Name.patch\n")
    assert "NN-kebab-name" in lint(box)[1]
    series.write_text("other/04-x.patch\n")
    assert "other/04-x.patch is in none of the groups core, fixes, cpu, speed" in lint(box)[1]
    series.write_text("core/04-gone.patch\n")
    assert "core/04-gone.patch" in lint(box)[1]


@pytest.mark.parametrize(
    "line, problem",
    [
        ("from sglang_sm120.hooks import (answer, more)", "sglang_sm120.hooks has no more"),
        ("from sglang_sm120.ops import answer", "imports sglang_sm120.ops, needed sglang_sm120.hooks alone"),
        ("    import sglang_sm120", "imports sglang_sm120, needed"),
        ("import torch", "imports torch, needed"),
        ("from sglang.srt.environ import envs", None),
        ("from sglang_sm120.hooks import answer as _answer  # noqa: F401", None),
        ("from sglang_sm120.hooks import (answer as a, answer)", None),
    ],
)
def test_a_patch_imports_hooks_and_sglang_alone(box: Box, line: str, problem: str | None):
    box.write_series(core_01_first=FIRST.replace("+a1b = 12", f"+{line}"), cpu_02_second=SECOND)
    code, message = lint(box)
    if problem is None:
        assert (code, message) == (0, "")
    else:
        assert code == 1 and f"core/01-first.patch: {problem}" in message


def test_an_import_over_several_lines_is_read(box: Box):
    lines = "+from sglang_sm120.hooks import (\n+    answer,  # once\n+    more,\n+)"
    first = FIRST.replace("+a1b = 12", lines).replace("@@ -1,4 +1,5 @@", "@@ -1,4 +1,8 @@")
    box.write_series(core_01_first=first, cpu_02_second=SECOND)
    assert "has no more" in lint(box)[1]


def test_a_hook_that_nobody_asks_for_is_named(box: Box):
    hooks = box.root / "overlay/sglang_sm120/hooks.py"
    hooks.write_text(hooks.read_text() + "\n\nclass Unused: ...\n\n\ndef _helper() -> None: ...\n")
    message = lint(box)[1]
    assert "sglang_sm120.hooks offers Unused, which neither a patch nor an entry point asks for" in message
    assert "_helper" not in message


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("sglang_sm120.hooks:answer", None),
        ("sglang_sm120.hooks:more", "entry point a of sglang.srt.plugins: sglang_sm120.hooks has no more"),
        ("sglang_sm120.plugin:answer", "names sglang_sm120.plugin, needed sglang_sm120.hooks alone"),
    ],
)
def test_sglangs_plugin_loader_is_given_hooks(box: Box, target: str, problem: str | None):
    project, hooks = box.root / "pyproject.toml", box.root / "overlay/sglang_sm120/hooks.py"
    entries = project.read_text().replace("sglang_sm120.hooks:answer", target)
    project.write_text(f'{entries}b = "sglang_sm120.hooks:check"\n[other]\nc = "d:e"\n')
    hooks.write_text(hooks.read_text() + "def check(): ...\n")
    code, message = lint(box)
    assert (code, message) == (0, "") if problem is None else code == 1 and problem in message


@pytest.mark.parametrize("source", [None, "def other(): ...\n", "def more():\n    answer = 1\n", "answer = 42\n"])
def test_a_hook_is_defined_where_it_says(box: Box, source: str | None):
    package = box.root / "overlay/sglang_sm120"
    (package / "hooks.py").write_text('_DEFINED_IN = {"answer": "step.cpu"}\n')
    (package / "step").mkdir()
    if source is not None:
        (package / "step/cpu.py").write_text(source)
    problem = "sglang_sm120.hooks says that sglang_sm120.step.cpu defines answer, which it does not"
    assert (problem in lint(box)[1]) == (source != "answer = 42\n")


@pytest.mark.parametrize(
    ("line", "source"),
    [
        ("from sglang.srt.utils import is_cpu", "sglang.srt.utils"),
        ("def f():\n    import sglang.srt.utils", "sglang.srt.utils"),
        ("import sglang as s", "sglang"),
        ("from importlib import import_module\nimport_module('sglang.srt.utils')", "sglang.srt.utils"),
        ("import sglang_sm120.ops\nfrom . import sglang", None),
    ],
)
def test_what_knows_sglang_sits_in_the_step(box: Box, line: str, source: str | None):
    package = box.root / "overlay/sglang_sm120"
    for name in ("hooks", "registry", "ops/sinkhorn/triton", "ops/sinkhorn/sglang", "plugin", "step/weights"):
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as text:
            text.write(f"{line}\n")
    code, message = lint(box)
    modules = ("hooks", "registry", "ops.sinkhorn.triton", "ops.sinkhorn.sglang", "plugin", "step.weights")
    named = [module for module in modules
             if f"sglang_sm120.{module} imports {source}: what knows SGLang belongs into sglang_sm120.step" in message]
    assert named == ([] if source is None else ["hooks", "registry", "ops.sinkhorn.triton"])


@pytest.mark.parametrize(("limit", "problem"), [("MAX_PATCHES", "2 patches"), ("MAX_ADDED_LINES", "add 6 lines")])
def test_the_series_stays_small(box: Box, monkeypatch: pytest.MonkeyPatch, limit: str, problem: str):
    authoring.lint(box.root)
    monkeypatch.setattr(authoring, limit, 1)
    with pytest.raises(patch_series.Refused, match=f"{problem}, at most 1"):
        authoring.lint(box.root)


def test_the_overlays_lock_is_the_series_own(box: Box):
    placed = box.root / "overlay/sglang_sm120/sglang.lock"
    placed.unlink()
    placed.write_bytes(box.lock.read_bytes())
    assert "is not a link" in lint(box)[1]


def test_a_stale_lock_is_found(box: Box):
    patch = box.series / "core/01-first.patch"
    patch.write_text(patch.read_text().replace("first lines", "very first lines"))
    code, message = lint(box)
    assert code == 1 and "refresh" in message


def test_refresh_moves_offsets_and_keeps_the_header(box: Box):
    folder = box.series
    good = (folder / "cpu/02-second.patch").read_text()
    moved = good.replace("@@ -18,7 +18,9 @@", "@@ -3,7 +3,9 @@ made up")
    (folder / "cpu/02-second.patch").write_text(moved.replace("a/sglang/a.py", "a/sglang/a.py\t2020-01-01"))
    box.done("refresh")
    # The first patch adds a line above.
    assert (folder / "cpu/02-second.patch").read_text() == good
    assert "@@ -18,7 +18,9 @@" in good


def test_refresh_works_from_a_patched_site(box: Box):
    box.done("apply")
    before = (box.lock).read_bytes()
    box.done("refresh")
    assert (box.lock).read_bytes() == before
    box.write_series(cpu_02_second=SECOND)
    assert list(json.loads((box.lock).read_text())["files"]) == ["sglang/a.py"]


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        # Lines beyond the hunk's count, another hunk's head misspelt: GNU patch takes each for a remark.
        (" a22 = 22\n", " a22 = 22\n+more = 1\n", "more = 1"),
        (" a22 = 22\n", " a22 = 22\n@ -26,2 +28,3 @@\n a25 = 25\n+more = 1\n a26 = 26\n", "more = 1"),
        (" a22 = 22\n", " a22 = 22\n+\n", ""),
    ],
    ids=["line", "hunk", "blank line"],
)
def test_refresh_drops_no_part_of_a_patch(box: Box, old: str, new: str, lost: str):
    patch = box.series / "cpu/02-second.patch"
    text = SECOND.replace(old, new)
    patch.write_text(text)
    assert f"cpu/02-second.patch has the line {lost!r}" in box.refused("refresh")
    assert patch.read_text() == text


@pytest.mark.parametrize("dropped", [0, 1])
def test_refresh_writes_no_patch_without_a_hunk(box: Box, monkeypatch: pytest.MonkeyPatch, dropped: int):
    diff = authoring.diff

    def forgetful(file: str, old: bytes, new: bytes) -> str:
        head, *hunks = diff(file, old, new).split("@@ -")
        del hunks[dropped:]
        return "@@ -".join([head, *hunks])

    third = "\n@@ -28,3 +30,3 @@\n a27 = 27\n-a28 = 28\n+a28 = 0\n a29 = 29\n"
    box.write_series(cpu_02_second=SECOND.rstrip("\n") + third)
    before = tree(box.root)
    monkeypatch.setattr(authoring, "diff", forgetful)
    with pytest.raises(patch_series.Refused, match=r"cpu/02-second\.patch"):
        authoring.refresh(patch_series.Site.open(box.site), box.root)
    assert tree(box.root) == before


@pytest.mark.parametrize("path", ["sglang/../../evil.py", "/etc/passwd", "other/a.py"])
def test_refresh_stays_inside_sglang(box: Box, path: str):
    patch = box.series / "core/01-first.patch"
    patch.write_text(f"Description: x\n\n--- a/{path}\n+++ b/{path}\n@@ -1 +1 @@\n-a0 = 0\n+a0 = 1\n")
    assert path in box.refused("refresh") or "no file" in box.refused("refresh")


@given(st.lists(LINE), st.lists(LINE), st.booleans(), st.booleans())
@example(["x", *"0123456", "y", *"0123456", "x"], ["y", *"0123456", *"0123456", "x", "x"], True, True)
def test_gnu_patch_turns_old_into_new_by_our_diff(tmp_path_factory, old, new, end_old, end_new):
    """Any two texts, with and without a line end at the end of the file; both ways at fuzz 0."""
    before = ("\n".join(old) + "\n" * end_old).encode()
    after = ("\n".join(new) + "\n" * end_new).encode()
    made = authoring.diff("sglang/f.py", before, after)
    assert (made == "") == (before == after)
    if not before or not after or before == after:
        # An empty side is a new or a removed file to GNU patch; lint refuses both.
        return
    folder = tmp_path_factory.mktemp("diff")
    (folder / "sglang").mkdir()
    (folder / "sglang/f.py").write_bytes(before)
    for reverse, wanted in (([], after), (["-R"], before)):
        subprocess.run(["patch", "-p1", "-F0", "-s", *reverse], cwd=folder, input=made.encode(), check=True)
        assert (folder / "sglang/f.py").read_bytes() == wanted


def test_an_insertion_slides_down_as_in_git():
    before = b"a\n\nb\n"
    after = b"a\n\nnew\n\nb\n"
    lines = authoring.diff("sglang/f.py", before, after).splitlines()
    assert [line for line in lines[3:]] == [" a", " ", "+new", "+", " b"]


def test_what_is_installed_imports_nothing_that_is_not() -> None:
    folders = ("reference", "evals", "bench", "tests", "tests/evals", "tests/ops")
    absent = {path.stem for folder in folders for path in (CHECKOUT / folder).iterdir()} | {"evals", "tests"}
    assert {"sglang_sm120_reference", "accuracy", "bench", "cases"} <= absent
    imports = []
    for package in ("overlay/sglang_sm120", "launch/sglang_sm120_launch"):
        for path in sorted((CHECKOUT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                imports += [(path.name, name.partition(".")[0]) for name in names]
    assert len(imports) > 100
    assert [found for found in imports if found[1] in absent] == []
