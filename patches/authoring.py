"""The maintainer's side of the series: lint the patches, and rewrite them and their lock after a change."""

from __future__ import annotations

import difflib
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Dict, List, Tuple

import atomic
import conditions
import doors
from series import LOCK, Refused, Series, Site, placed_series, released, run_patches, sha256

# In the order in which they are applied.
GROUPS = ("core", "fixes", "cpu", "speed")
# 26 and 350 would do for the step alone; the rest are repairs, which leave as SGLang takes them.
MAX_PATCHES = 30
MAX_ADDED_LINES = 420
FIELDS = ("Description", "Origin", "Forwarded", "Applies-To", "Drop-When")
MAX_CHANGED_LINES = 40
MAX_FILES = 4
MAX_LINE = 120
CONTEXT = 3
# before[i1:i2] becomes after[j1:j2].
Change = Tuple[int, int, int, int]
# A patch redirects, the overlay computes: an added line defines no function, class or kernel.
DEFINITION = re.compile(r"\s*(async\s+def|def|class)\s|.*(@\s*(triton|tilelang)\.|__global__|=\s*lambda\b)")


def refresh(site: Site, root: Path) -> None:
    """Re-diff every patch, in order, against the released files of `site`, and rewrite the lock.

    Headers are kept. A site to which a placed series is applied serves too: that series is taken back on copies.
    Raises Refused when the released bytes cannot be had, a patch does not apply at fuzz 0, or a change would be lost.
    """
    series = Series.load(root / "patches", require_lock=False)
    site.require_version(series)
    touches = {patch: touched(patch.read_text(encoding="utf-8")) for patch in series.patches}
    before = released(site, sorted({file for files in touches.values() for file in files}), placed_series(site))
    contents, rewritten = dict(before), {}
    for patch, files in touches.items():
        old = {file: contents[file] for file in files}
        new = run_patches((patch,), old, atomic.stage_dir(site.folder))
        body = "".join(diff(file, old[file], new[file]) for file in sorted(files))
        if not body:
            raise Refused(f"{series.name(patch)} changes nothing: drop it from the series")
        for text in (patch.read_text(encoding="utf-8"), body):
            _require_whole(series.name(patch), text, old, new)
        rewritten[patch] = (header(patch.read_text(encoding="utf-8")) + body).encode("utf-8")
        contents.update(new)
    for patch, data in rewritten.items():
        if patch.read_bytes() != data:
            patch.write_bytes(data)
    lock = {
        "sglang": series.version,
        "patches": {series.name(patch): sha256(data) for patch, data in rewritten.items()},
        "files": {file: {"before": sha256(before[file]), "after": sha256(contents[file])} for file in before},
    }
    (series.folder / LOCK).write_text(json.dumps(lock, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"refreshed {len(rewritten)} patches to {len(before)} files")


def _require_whole(name: str, text: str, old: Dict[str, bytes], new: Dict[str, bytes]) -> None:
    """Raise Refused unless the lines that a patch's text adds and removes are those that turn `old` into `new`.

    What GNU patch takes for a remark, a hunk with a wrong head or lines beyond its count, it passes over in silence.
    """
    body = re.sub(r"^--- .*\n\+\+\+ .*\n", "", text[_body_start(text) :], flags=re.MULTILINE)
    signs = {"+": 1, "-": -1}
    surplus: Counter[str] = Counter()
    for line in body.split("\n"):
        surplus[line[1:]] += signs.get(line[:1], 0)
    for contents, sign in ((old, -1), (new, 1)):
        for data in filter(None, contents.values()):
            for line in data.decode("utf-8").removesuffix("\n").split("\n"):
                surplus[line] -= sign
    lost = [line for line, times in surplus.items() if times]
    if lost:
        raise Refused(
            f"{name} has the line {lost[0].strip()!r} in a hunk that is not applied as it stands: correct its head"
        )


def lint(root: Path) -> None:
    """Check every patch of the checkout against the rules of the series; raises Refused with all that is wrong."""
    series = Series.load(root / "patches")
    listed = [series.name(patch) for patch in series.patches]
    problems = [f"{name} is listed more than once" for name in sorted({n for n in listed if listed.count(n) > 1})]
    problems += [f"{series.name(path)} is not listed in series" for path in sorted(series.folder.rglob("*.patch"))
                 if series.name(path) not in listed]
    foreign = [name for name in listed if name.split("/", 1)[0] not in GROUPS]
    problems += [f"{name} is in none of the groups {', '.join(GROUPS)}" for name in foreign]
    if not foreign and listed != sorted(listed, key=lambda name: (GROUPS.index(name.split("/", 1)[0]), name)):
        problems.append(f"series is not in the order of its groups ({', '.join(GROUPS)}) and of the patch numbers")
    if len(listed) > MAX_PATCHES:
        problems.append(f"{len(listed)} patches, at most {MAX_PATCHES}")
    added = {patch: _added_lines(patch) for patch in series.patches}
    total = sum(map(len, added.values()))
    if total > MAX_ADDED_LINES:
        problems.append(f"the patches add {total} lines, at most {MAX_ADDED_LINES}")
    for patch in series.patches:
        problems += [f"{series.name(patch)}: {problem}" for problem in _patch_problems(patch, series.version)]
    placed = root / "overlay" / doors.PACKAGE / LOCK
    if placed.resolve() != (series.folder / LOCK).resolve():
        problems.append(f"{placed} is not a link to {series.folder / LOCK}")
    problems += doors.problems(root, {series.name(patch): lines for patch, lines in added.items()})
    if problems:
        raise Refused("the series breaks its rules: " + "; ".join(problems))
    series.require_locked_patches()
    print(f"{len(listed)} patches with {total} added lines follow the rules")


def header(text: str) -> str:
    """Everything before the first file of a patch, ending in one blank line."""
    return text[: _body_start(text)].rstrip("\n") + "\n\n"


def touched(text: str) -> List[str]:
    """The files a patch changes, from its `+++ b/` lines; raises Refused for a file outside sglang/."""
    files = re.findall(r"^--- .*\n\+\+\+ (?:b/)?([^\t\n]+)", text[_body_start(text) :], re.MULTILINE)
    for file in files:
        if not file.startswith("sglang/") or ".." in file.split("/"):
            raise Refused(f"a patch names {file}, needed a path below b/sglang/: correct it")
    return files


def file_diffs(text: str) -> List[Tuple[str, str]]:
    """Each file that a patch changes, with its part of the patch."""
    parts = re.split(r"^(?=--- .*\n\+\+\+ )", text[_body_start(text) :], flags=re.MULTILINE)
    return [(file, part) for part in parts for file in touched(part)]


def diff(file: str, old: bytes, new: bytes) -> str:
    """A unified diff with three lines of context and no time stamps; empty when nothing changed."""
    before, after = (list(io.StringIO(data.decode("utf-8"), newline="\n")) for data in (old, new))
    opcodes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    changes = [(i1, i2, j1, j2) for tag, i1, i2, j1, j2 in opcodes if tag != "equal"]
    limits = [change[0] for change in changes[1:]] + [len(before)]
    hunks: List[List[Change]] = []
    for change in (_slide_down(change, limit, before, after) for change, limit in zip(changes, limits)):
        if hunks and change[0] - hunks[-1][-1][1] <= 2 * CONTEXT:
            hunks[-1].append(change)
        else:
            hunks.append([change])
    lines = [f"--- a/{file}\n", f"+++ b/{file}\n"] if hunks else []
    for hunk in hunks:
        lines += _hunk_lines(hunk, before, after)
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


def _slide_down(change: Change, limit: int, before: List[str], after: List[str]) -> Change:
    """Move a pure insertion or deletion as far down as it reads the same, as GNU and git diff do."""
    i1, i2, j1, j2 = change
    lines, start, stop = (after, j1, j2) if i1 == i2 else (before, i1, i2)
    if i1 != i2 and j1 != j2:
        return change
    shift = 0
    while i2 + shift < limit and lines[start + shift] == lines[stop + shift]:
        shift += 1
    return i1 + shift, i2 + shift, j1 + shift, j2 + shift


def _hunk_lines(hunk: List[Change], before: List[str], after: List[str]) -> List[str]:
    first, last = hunk[0], hunk[-1]
    start, stop = max(0, first[0] - CONTEXT), min(len(before), last[1] + CONTEXT)
    spans = f"-{_span(start, stop)} +{_span(first[2] - (first[0] - start), last[3] + (stop - last[1]))}"
    above = (line.rstrip()[:80] for line in reversed(before[:start]) if re.match(r"[A-Za-z_@]", line))
    lines = [f"@@ {spans} @@ {next(above, '')}".rstrip() + "\n"]
    for i1, i2, j1, j2 in hunk:
        lines += [" " + line for line in before[start:i1]]
        lines += ["-" + line for line in before[i1:i2]] + ["+" + line for line in after[j1:j2]]
        start = i2
    return lines + [" " + line for line in before[start:stop]]


def _span(start: int, stop: int) -> str:
    length = stop - start
    return f"{start + (length > 0)}" + ("" if length == 1 else f",{length}")


def _body_start(text: str) -> int:
    found = re.search(r"^(diff |Index: |--- (?:a/|\S*sglang/|/dev/null))", text, re.MULTILINE)
    return found.start() if found else len(text)


def fields(text: str) -> Dict[str, str]:
    """DEP-3: `Field: value`, continued by lines that begin with a space."""
    found: Dict[str, str] = {}
    name = None
    for line in header(text).splitlines():
        start = re.match(r"([A-Z][A-Za-z-]*):\s*(.*)", line)
        if start:
            name = start.group(1)
            found[name] = start.group(2)
        elif name and line.startswith(" "):
            found[name] += " " + line.strip()
    return found


def _added_lines(patch: Path) -> List[str]:
    text = patch.read_text(encoding="utf-8")
    lines = text[_body_start(text) :].splitlines()
    return [line[1:] for line in lines if line.startswith("+") and not line.startswith("+++ ")]


def _patch_problems(patch: Path, version: str) -> List[str]:
    try:
        from unidiff import PatchSet, UnidiffParseError
    except ImportError:
        raise Refused("unidiff is not installed, needed by lint: run `make setup`") from None
    text = patch.read_text(encoding="utf-8")
    problems = []
    if not re.fullmatch(r"\d\d-[a-z0-9]+(-[a-z0-9]+)*\.patch", patch.name):
        problems.append("name is not NN-kebab-name.patch")
    given = fields(text)
    problems += [f"header field {field} is missing or empty" for field in FIELDS if not given.get(field, "").strip()]
    try:
        conditions.parse(given.get(conditions.FIELD, ""))
    except ValueError as error:
        problems.append(f"{conditions.FIELD}: {error}")
    description = given.get("Description", "").strip()
    if description and (not description.endswith(".") or re.search(r"[.!?]\s+[A-Z]", description)):
        problems.append("Description is not one sentence: a patch has one concern")
    if version not in given.get("Applies-To", version):
        problems.append(f"Applies-To does not name {version}")
    try:
        files = PatchSet(text[_body_start(text) :])
    except UnidiffParseError as error:
        return problems + [f"does not parse ({error})"]
    if not files:
        problems.append("changes no file")
    if len(files) > MAX_FILES:
        problems.append(f"touches {len(files)} files, at most {MAX_FILES}")
    changed = sum(file.added + file.removed for file in files)
    if changed > MAX_CHANGED_LINES:
        problems.append(f"changes {changed} lines, at most {MAX_CHANGED_LINES}")
    for file in files:
        name, problem = file.path, None
        if file.is_added_file or file.is_removed_file or file.is_rename or file.is_binary_file:
            problem = "is added, removed, renamed or binary; a patch changes text of existing files"
        elif (file.source_file, file.target_file) != (f"a/{name}", f"b/{name}") or not name.startswith("sglang/"):
            problem = "is not named a/sglang/... and b/sglang/..."
        if problem:
            problems.append(f"{name} {problem}")
        problems += [f"{name}: {problem}" for problem in _line_problems(_added(file))]
    return problems


def _added(file: object) -> List[str]:
    return [line.value.rstrip("\n") for hunk in file for line in hunk if line.is_added]  # type: ignore[attr-defined]


def _line_problems(added: List[str]) -> List[str]:
    problems = [f"defines something: {line.strip()}" for line in added if DEFINITION.match(line)]
    problems += [f"adds a line over {MAX_LINE} characters: {line.strip()[:40]}..." for line in added
                 if len(line) > MAX_LINE]
    return problems + [f"adds white space at the end of: {line.strip()}" for line in added if line != line.rstrip()]
