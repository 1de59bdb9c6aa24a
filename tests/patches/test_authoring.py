"""lint and refresh: what a maintainer of the series runs; and what the installed packages may import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
from boxes import CHECKOUT, FIRST, HEADER, PATCHSET, SECOND, VERSION, Box
from hypothesis import given
from hypothesis import strategies as st

import authoring

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
    box.write_series(p01_first=FIRST.replace(f"{field}: ", f"X-{field}: "), p02_second=SECOND)
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
    box.write_series(p01_first=FIRST.replace(old, new), p02_second=SECOND)
    code, message = lint(box)
    assert code == 1 and "01-first.patch" in message and problem in message


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
    patch = box.root / "patches" / VERSION / "01-first.patch"
    patch.write_text(HEADER.format(text="Do it.", version=VERSION) + body)
    code, message = lint(box)
    assert code == 1 and "01-first.patch" in message and problem in message


def test_the_series_file_is_checked(box: Box):
    folder = box.root / "patches" / VERSION
    (folder / "series").write_text("02-second.patch\n01-first.patch\n02-second.patch\n")
    (folder / "03-extra.patch").write_text(FIRST)
    (folder / "Bad_Name.patch").write_text(FIRST)
    code, message = lint(box)
    assert code == 1
    for problem in ("02-second.patch is listed more than once", "03-extra.patch is not listed", "not in the order"):
        assert problem in message
    (folder / "series").write_text("Bad_Name.patch\n")
    assert "NN-kebab-name" in lint(box)[1]
    (folder / "series").write_text("04-gone.patch\n")
    assert "04-gone.patch" in lint(box)[1]


def test_a_stale_lock_is_found(box: Box):
    patch = box.root / "patches" / VERSION / "01-first.patch"
    patch.write_text(patch.read_text().replace("first lines", "very first lines"))
    code, message = lint(box)
    assert code == 1 and "refresh" in message


def test_refresh_moves_offsets_and_keeps_the_header(box: Box):
    folder = box.root / "patches" / VERSION
    good = (folder / "02-second.patch").read_text()
    moved = good.replace("@@ -18,7 +18,7 @@", "@@ -3,7 +3,7 @@ made up")
    (folder / "02-second.patch").write_text(moved.replace("a/sglang/a.py", "a/sglang/a.py\t2020-01-01"))
    box.done("refresh")
    # The first patch adds a line above.
    assert (folder / "02-second.patch").read_text() == good
    assert "@@ -18,7 +18,7 @@" in good


def test_refresh_works_from_a_patched_site(box: Box):
    box.done("apply")
    before = (box.root / "sglang.lock").read_bytes()
    box.done("refresh")
    assert (box.root / "sglang.lock").read_bytes() == before
    box.write_series(p01_second=SECOND)
    assert list(json.loads((box.root / "sglang.lock").read_text())["files"]) == ["sglang/a.py"]


@pytest.mark.parametrize("path", ["sglang/../../evil.py", "/etc/passwd", "other/a.py"])
def test_refresh_stays_inside_sglang(box: Box, path: str):
    patch = box.root / "patches" / VERSION / "01-first.patch"
    patch.write_text(f"Description: x\n\n--- a/{path}\n+++ b/{path}\n@@ -1 +1 @@\n-a0 = 0\n+a0 = 1\n")
    assert path in box.refused("refresh") or "no file" in box.refused("refresh")


@given(st.lists(LINE), st.lists(LINE), st.booleans(), st.booleans())
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
