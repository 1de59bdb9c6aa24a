"""port: what another SGLang's wheel asks of the series."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from boxes import CHECKOUT, FILES, FIRST, LATE, SECOND, SGLANG, Box

import conditions
import port
from authoring import fields
from series import Series

NEWER = "9.9.10"
# What the box's own release has become; None: the file is gone.
Changes = dict[str, str | None]


def make_wheel(path: Path, files: Mapping[str, str], version: str = NEWER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"sglang-{version}.dist-info/METADATA", f"Name: sglang\nVersion: {version}\n")
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def ported(box: Box, changes: Changes) -> tuple[int, list[str]]:
    """The exit status and the lines of port with a wheel that differs from the release of the series by `changes`."""
    files = {name: text for name, text in {**FILES, **changes}.items() if text is not None}
    wheel = make_wheel(box.root.parent / f"sglang-{NEWER}-py3-none-any.whl", files)
    result = box.run("port", "--wheel", str(wheel))
    assert result.stderr == "", result.stderr
    return result.returncode, result.stdout.splitlines()


def row(lines: list[str], patch: str) -> tuple[dict[str, int], str]:
    """The counts of a patch by the titles of their columns, and what stands behind them."""
    titles = ("hunks", *port.STATES)
    [line] = [line for line in lines if line.startswith(patch)]
    start = lines[1].index("hunks") + len("hunks") - 8
    end = start + 8 * len(titles)
    cells = [line[start:end][8 * i : 8 * i + 8].strip() for i in range(len(titles))]
    return {title: int(cell or 0) for title, cell in zip(titles, cells, strict=True)}, line[end:].strip()


def counts(hunks: int, **states: int) -> dict[str, int]:
    return dict.fromkeys(port.STATES, 0) | {"hunks": hunks} | {name.replace("_", " "): n for name, n in states.items()}


A = FILES["sglang/a.py"]
NOW_22 = FILES["sglang/sub/b.py"].replace("two = 2", "two = 22")
NOW_11 = A.replace("a1 = 1\n", "a1 = 11\na1b = 12\n")


def of_a(old: str, new: str) -> Changes:
    assert old in A
    return {"sglang/a.py": A.replace(old, new)}


FIRST_PATCH, SECOND_PATCH = "core/01-first.patch", "cpu/02-second.patch"


@pytest.mark.parametrize(
    ("changes", "patch", "found", "note"),
    [
        ({}, FIRST_PATCH, counts(2, as_is=2), ""),
        ({}, SECOND_PATCH, counts(1, as_is=1), ""),
        (of_a("a9 = 9", "a9 = 9\nnew = 1"), SECOND_PATCH, counts(1, offset=1), ""),
        (of_a("a16 = 16", "a16 = 0"), SECOND_PATCH, counts(1, fuzz=1), "fuzz at sglang/a.py:18"),
        (of_a("a19 = 19", "a19 = 0"), SECOND_PATCH, counts(1, fails=1), "fails at sglang/a.py:18"),
        (of_a("a1 = 1\n", ""), FIRST_PATCH, counts(2, as_is=1, fails=1), "fails at sglang/a.py:1"),
        ({"sglang/a.py": NOW_11}, FIRST_PATCH, counts(2, as_is=1, there=1), "there at sglang/a.py:1"),
        (
            {"sglang/a.py": NOW_11, "sglang/sub/b.py": NOW_22}, FIRST_PATCH, counts(2, there=2),
            "looks needless, its lines are there; there at sglang/a.py:1; there at sglang/sub/b.py:1",
        ),
        (
            {"sglang/sub/b.py": None, "sglang/new/b.py": FILES["sglang/sub/b.py"]}, FIRST_PATCH,
            counts(2, as_is=1, fails=1), "sglang/sub/b.py is gone, now in sglang.new.b; fails at sglang/sub/b.py:1",
        ),
    ],
)  # fmt: skip
def test_hunks(box: Box, changes: Changes, patch: str, found: dict[str, int], note: str):
    code, lines = ported(box, changes)
    assert row(lines, patch) == (found, note)
    assert code == (0 if note == "" else 1)
    assert lines[0] == f"SGLang {NEWER} against the series for 9.9.9"
    assert lines[-1] == ("everything applies" if note == "" else "needs work: 1 patches")


def test_lines_that_are_there_although_the_hunk_applies(box: Box):
    """Elsewhere in the file: applied again they would be there twice."""
    changes = {"sglang/a.py": A + LATE}
    code, lines = ported(box, changes)
    assert row(lines, SECOND_PATCH) == (counts(1, as_is=1), "looks needless, its lines are there")
    assert code == 1


OURS = """
from sglang.a import a5, a6 as renamed
from sglang.sub import c
from sglang.sub.c import untouched

def lazily():
    from importlib import import_module
    return import_module("sglang.sub.b")
"""


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({}, []),
        (
            of_a("a5 = 5\n", "") | {"sglang/d.py": "if 1:\n    a5 = 5\n", "sglang/e.py": "from sglang.d import a5\n"},
            ["sglang.a.a5 is gone, now in sglang.d"],
        ),
        (of_a("a6 = 6\n", ""), ["sglang.a.a6 is gone"]),
        (of_a("a6 = 6\n", "def f():\n    a6 = 6\n"), ["sglang.a.a6 is gone"]),
        (of_a("a6 = 6\n", "try:\n    a6 = 6\nexcept ImportError:\n    pass\n"), []),
        (of_a("a6 = 6\n", "try:\n    pass\nexcept ImportError:\n    a6 = 6\n"), []),
        (of_a("a6 = 6\n", "if 0:\n    pass\nelse:\n    a6 = 6\n"), []),
        (of_a("a6 = 6\n", "with f() as a6:\n    pass\n"), []),
        (of_a("a6 = 6\n", "async def a6(): ...\n"), []),
        (of_a("a6 = 6\n", "from sglang.d import a6\n") | {"sglang/d.py": "a6 = 6\n"}, []),
        (of_a("a6 = 6\n", "from sglang.d import *\n") | {"sglang/d.py": "a6 = 6\n"}, []),
        (
            of_a("a6 = 6\n", "from sglang.d import *\n") | {"sglang/d.py": "def f(a6): ...\n"},
            ["sglang.a.a6 is gone"],
        ),
        (of_a("a6 = 6\n", "def __getattr__(name): ...\n"), []),
        (
            {"sglang/sub/c.py": None, "sglang/c.py": FILES["sglang/sub/c.py"]},
            ["sglang.sub.c is gone, now in sglang.c", "sglang.sub.c.untouched is gone, now in sglang.c"],
        ),
        ({"sglang/sub/c.py": "class untouched: ...\n"}, []),
    ],
)
def test_names_that_our_source_imports(box: Box, changes: Changes, lost: list[str]):
    source = box.root / "overlay/sglang_sm120/step/weights.py"
    source.parent.mkdir()
    source.write_text(OURS)
    code, lines = ported(box, changes)
    assert f"5 names that our source and our patches take from SGLang, {len(lost)} moved or gone" in lines
    assert [line for line in lines if " is gone" in line] == [
        f"{line} (asked for by overlay/sglang_sm120/step/weights.py)" for line in lost
    ]
    assert code == (1 if lost else 0)


def test_names_that_a_patch_imports_or_uses(box: Box):
    """What a hunk takes from lines that it does not bring along applies well, and fails when it runs."""
    taken = "+from sglang.sub.c import untouched\n+a1b = [taken for untouched in (helper, a3, len)]"
    box.write_series(core_01_first=FIRST.replace("+a1b = 12", taken).replace("+1,5", "+1,6"))
    with_helper = A.replace("a29 = 29\n", "def helper(): ...\ntaken = 1\n")
    assert ported(box, {"sglang/a.py": with_helper})[0] == 0
    code, lines = ported(box, {"sglang/a.py": A, "sglang/sub/c.py": "", "sglang/sub/d.py": "def helper(): ...\n"})
    assert row(lines, FIRST_PATCH) == (counts(2, as_is=2), "")
    assert [line for line in lines if " is gone" in line] == [
        "sglang.sub.c.untouched is gone (asked for by the patched sglang/a.py)",
        "sglang.a.helper is gone, now in sglang.sub.d (asked for by the patched sglang/a.py)",
        "sglang.a.taken is gone (asked for by the patched sglang/a.py)",
    ]
    assert code == 1 and lines[-1] == "needs work: 3 names"


GONE = "Drop-Check names sglang/sub/c.py:Count.up, which is gone"
CHECK = (
    "Drop-When: upstream counts itself\n"
    "Drop-Check: sglang/sub/c.py:Count.up has \\+= \\d;\n sglang/sub/c.py lacks \"by hand\"\n"
)
NEEDLESS = "looks needless by its Drop-Check (upstream counts itself)"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("class Count:\n    def up(self):\n        self.n = 1\n", ""),
        ("class Count:\n    def up(self):\n        self.n += 1\n", NEEDLESS),
        ('class Count:\n    def up(self):\n        self.n += 1\n"by hand"\n', ""),
        ("class Count:\n    def down(self):\n        self.n += 1\n", GONE),
        ("class Count:\n    def up(self): ...\n    def down(self):\n        self.n += 1\n", ""),
        (None, f"{GONE}; Drop-Check names sglang/sub/c.py, which is gone"),
    ],
)
def test_a_drop_check(box: Box, text: str | None, note: str):
    box.write_series(cpu_02_second=SECOND.replace("Drop-When: never\n", CHECK))
    code, lines = ported(box, {"sglang/sub/c.py": text})
    assert row(lines, SECOND_PATCH) == (counts(1, as_is=1), note)
    assert code == (1 if note else 0)
    assert not any("without a Drop-Check" in line for line in lines)


def test_a_drop_when_without_a_check_is_to_be_read(box: Box):
    box.write_series(cpu_02_second=SECOND.replace("Drop-When: never", "Drop-When: upstream mends it"))
    assert f"without a Drop-Check, read their Drop-When: {SECOND_PATCH}" in ported(box, {})[1]


def test_a_file_in_a_newer_pythons_syntax(box: Box):
    (box.root / "overlay/sglang_sm120/more.py").write_text("from sglang.sub.c import untouched\n")
    code, lines = ported(box, {"sglang/sub/c.py": "untouched = a ?? b\n"})
    assert code == 1 and any(line.startswith("not read, ") and line.endswith("sglang/sub/c.py") for line in lines)
    assert lines[-1] == "needs work: 1 files that were not read"


@pytest.mark.parametrize(
    ("wheel", "problem"),
    [
        (None, "no wheel was named, needed the path of another SGLang's"),
        ("absent.whl", "absent.whl is not a file"),
        ("0.5.99", "run `python3 -m pip download --no-deps --only-binary :all: sglang==0.5.99`"),
        ("text.whl", "is no whole zip archive"),
        ("torn.whl", "is no whole zip archive"),
        ("other.whl", "holds no package sglang with its METADATA"),
        ("bare.whl", "holds no package sglang with its METADATA"),
    ],
)
def test_what_is_no_wheel(box: Box, tmp_path: Path, wheel: str | None, problem: str):
    (tmp_path / "text.whl").write_text("a page of a proxy")
    for name, files in (("other.whl", {"six.py": ""}), ("torn.whl", FILES)):
        make_wheel(tmp_path / name, files)
    data = (tmp_path / "torn.whl").read_bytes()
    (tmp_path / "torn.whl").write_bytes(data.replace(b"a7 = 7", b"a7 = 8"))
    with zipfile.ZipFile(tmp_path / "bare.whl", "w") as archive:
        archive.writestr("sglang/__init__.py", "")
    path = [] if wheel is None else ["--wheel", str(tmp_path / wheel) if wheel.endswith(".whl") else wheel]
    assert problem in box.refused("port", *path, code=2)


def test_nothing_leaves_the_folder(box: Box, tmp_path: Path):
    wheel = make_wheel(tmp_path / "evil.whl", {**FILES, "sglang/../../evil.py": "x", "/sglang/evil.py": "x"})
    assert box.run("port", "--wheel", str(wheel)).returncode == 0
    assert not list(tmp_path.parent.rglob("evil.py")) and not Path("/sglang").exists()


def real_wheel(folder: Path, site: Path, changes: Mapping[str, str]) -> Path:
    sources = {path.relative_to(site).as_posix(): path for path in (site / "sglang").rglob("*.py")}
    return make_wheel(
        folder / "sglang.whl", {name: path.read_text() for name, path in sources.items()} | dict(changes), SGLANG
    )


def test_the_release_of_the_series(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    series = Series.load(CHECKOUT / "patches")
    assert port.report(CHECKOUT, str(real_wheel(tmp_path, pristine, {})))
    lines = capsys.readouterr().out.splitlines()
    for patch in series.patches:
        found, note = row(lines, series.name(patch))
        assert found["hunks"] == found["as is"] == patch.read_text().count("\n@@ ") and note == ""
    [names] = [re.match(r"(\d+) names .*, 0 moved or gone", line) for line in lines if " names that our source" in line]
    assert names and int(names.group(1)) > 30
    checks = [conditions.parse(fields(patch.read_text()).get(conditions.FIELD, "")) for patch in series.patches]
    assert sum(map(bool, checks)) >= 10


def test_a_release_that_has_moved_on(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A hunk's context is another, a name of ours has moved, and one defect is mended as the patch would mend it."""
    series = Series.load(CHECKOUT / "patches")
    params, utils, chat = (
        "sglang/srt/sampling/sampling_params.py", "sglang/srt/layers/moe/utils.py",
        "sglang/srt/entrypoints/openai/serving_chat.py",
    )  # fmt: skip
    text = {name: (pristine / name).read_text() for name in (params, utils, chat)}
    mended = text[chat].replace(
        '        if self.reasoning_parser == "iquest_q1":\n            return IQ',
        "        # Mended.\n"
        '        if self.chat_encoding_spec in ("dsv32", "dsv4", "dsv41"):\n'
        "            # Their encoders open the thinking block by this alone.\n"
        "            return bool(self._thinking_requested(request))\n\n"
        '        if self.reasoning_parser == "iquest_q1":\n            return IQ',
    )
    moved = text[utils].replace("def post_experts_all_reduce(", "def post_experts_reduce(")
    changes = {
        params: text[params].replace("if not 0.0 < self.repetition_penalty <= 2.0:", "if self.repetition_penalty > 2:"),
        utils: moved,
        "sglang/srt/layers/moe/reduce.py": "def post_experts_all_reduce(x): ...\n",
        chat: mended,
    }
    assert all(changes[name] != text[name] for name in text)
    assert not port.report(CHECKOUT, str(real_wheel(tmp_path, pristine, changes)))
    lines = capsys.readouterr().out.splitlines()
    found, note = row(lines, "fixes/43-sampling-parameters-in-range.patch")
    assert found["fails"] == 1 and found["as is"] == 7 and note == f"fails at {params}:272"
    found, note = row(lines, "fixes/55-default-thinking-reaches-grammar.patch")
    assert found["there"] == 1
    assert note.startswith(
        "looks needless, its lines are there; looks needless by its Drop-Check (_get_reasoning_from_request asks "
    )
    [line] = [line for line in lines if line.startswith("sglang.srt.layers.moe.utils.post_experts_all_reduce")]
    assert "is gone, now in sglang.srt.layers.moe.reduce (asked for by overlay/sglang_sm120/step/target.py)" in line
    assert lines[-1] == "needs work: 2 patches, 1 names"
    untouched = set(map(series.name, series.patches)) - {line.split()[0] for line in lines if "at sglang/" in line}
    assert all(row(lines, name)[1] == "" for name in untouched) and len(untouched) == len(series.patches) - 2
