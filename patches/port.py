"""What another SGLang asks of the series: how its hunks apply, which names moved, which patches look needless."""

from __future__ import annotations

import ast
import builtins
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Set, Tuple

import authoring
import conditions
import distribution
from names import Import, bound, bound_anywhere, defined, imports, module_file, module_name, used
from series import Misuse, Refused, Series, gnu_patch

STATES = ("as is", "offset", "fuzz", "fails", "there")
"""Of a hunk. GNU patch moves it by lines (offset) or drops lines of its context (fuzz, which `apply` refuses); what
it would only put in so, or not at all, may be there already."""
# Those that came after Python 3.9 too.
BUILTINS = {*dir(builtins), "aiter", "anext", "BaseExceptionGroup", "ExceptionGroup"}
DROP_BY_HAND = re.compile(r"(?!never|the series is dropped)")


@dataclass
class Finding:
    """What a patch meets: the states of its hunks by file and line, and what else is to be said of it."""

    name: str
    hunks: Dict[Tuple[str, int], str] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    def files(self, *states: str) -> Dict[str, List[int]]:
        """The lines of the hunks in one of the states, by file."""
        files: Dict[str, List[int]] = {}
        for (file, line), state in self.hunks.items():
            if state in states:
                files.setdefault(file, []).append(line)
        return files

    def row(self, width: int) -> str:
        found = list(self.hunks.values())
        counts = [str(len(found)), *(str(found.count(state) or "") for state in STATES)]
        places = [f"{state} at {file}:{','.join(map(str, lines))}" for state in STATES[2:]
                  for file, lines in self.files(state).items()]
        cells = "".join(f"{count:>8}" for count in counts)
        return f"{self.name:{width}}{cells}  {'; '.join(self.notes + places)}".rstrip()

    @property
    def needs_work(self) -> bool:
        return bool(self.notes or self.files(*STATES[2:]))


def report(root: Path, wheel: Optional[str]) -> bool:
    """Print how the series of the checkout `root` meets a SGLang wheel; whether everything applies and nothing moved.

    Raises:
        Misuse: `wheel` is not the path of a SGLang wheel.
    """
    series = Series.load(root / "patches")
    with tempfile.TemporaryDirectory() as scratch:
        released, patched = Path(scratch, "released"), Path(scratch, "patched")
        version = unpack(wheel, released)
        for file in series.files():
            if (released / file).is_file():
                (patched / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(released / file, patched / file)
        tool, release = gnu_patch(), Release(released)
        found = [_meet(tool, series.name(patch), patch, release, patched) for patch in series.patches]
        torn = {file for one in found for file in one.files("fails", "there")}
        asked = _asked_of_us(root, release)
        lost = _lost(release, asked) + _lost_to_patches(release, patched, series.files(), torn, asked)
    width = max(len(one.name) for one in found) + 2
    print(f"SGLang {version} against the series for {series.version}")
    print(f"{'patch':{width}}" + "".join(f"{title:>8}" for title in ("hunks", *STATES)))
    for one in found:
        print(one.row(width))
    print(f"{len(asked)} names that our source and our patches take from SGLang, {len(lost)} moved or gone")
    for line in lost:
        print(line)
    for file in release.unread:
        print(f"not read, because Python {sys.version_info[0]}.{sys.version_info[1]} does not know its syntax: {file}")
    by_hand = [series.name(patch) for patch in series.patches if _is_judged_by_hand(patch)]
    if by_hand:
        print(f"without a Drop-Check, read their Drop-When: {', '.join(by_hand)}")
    working = sum(one.needs_work for one in found)
    counts = ((working, "patches"), (len(lost), "names"), (len(release.unread), "files that were not read"))
    work = ", ".join(f"{count} {what}" for count, what in counts if count)
    print(f"needs work: {work}" if work else "everything applies")
    return not work


def unpack(wheel: Optional[str], folder: Path) -> str:
    """Put the Python sources of a SGLang wheel into `folder`; its version.

    Raises:
        Misuse: it is none.
    """
    if not wheel:
        raise Misuse("no wheel was named, needed the path of another SGLang's: give it (make port WHEEL=FILE)")
    if not os.path.isfile(wheel):
        if re.fullmatch(r"\d+(\.\w+)+", wheel):
            raise Misuse(
                f"{wheel} is a version, needed the path of a wheel: run `python3 -m pip download --no-deps "
                f"--only-binary :all: sglang=={wheel}` and give the file that it writes"
            )
        raise Misuse(f"{wheel} is not a file, needed a SGLang wheel: give the path of one")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            versions = re.findall(r"^sglang-([^/\n]+)\.dist-info/METADATA$", "\n".join(names), re.MULTILINE)
            if len(versions) != 1 or "sglang/__init__.py" not in names:
                raise Misuse(f"{wheel} holds no package sglang with its METADATA, needed a SGLang wheel: give one")
            archive.extractall(folder, [name for name in names if re.fullmatch(r"sglang/.*\.py", name)])
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise Misuse(f"{wheel} is no whole zip archive, needed a SGLang wheel: download it again") from None
    return versions[0]


def _meet(tool: str, name: str, patch: Path, release: Release, patched: Path) -> Finding:
    """Apply a patch to the files in `patched`, as far as it goes, and compare it with the released ones."""
    found = Finding(name)
    text = patch.read_text(encoding="utf-8")
    present = []
    for file, diff in authoring.file_diffs(text):
        hunks = re.split(r"^(?=@@ )", diff, flags=re.MULTILINE)[1:]
        lines = [int(number) for number in re.findall(r"^@@ -(\d+)", diff, re.MULTILINE)]
        path = release.folder / file
        if not path.is_file():
            module = module_name(Path(), Path(file))
            found.notes.append(f"{file} is gone{_now_in(release.home(module, None))}")
            found.hunks.update({(file, line): "fails" for line in lines})
            present.append(False)
            continue
        there = [_is_there(hunk, path.read_text(encoding="utf-8")) for hunk in hunks]
        present += there
        for line, state, is_there in zip(lines, _applied(tool, name, diff, len(hunks), patched), there):
            found.hunks[file, line] = "there" if state in ("fuzz", "fails") and is_there else state
    if all(present):
        found.notes.append("looks needless, its lines are there")
    fields = authoring.fields(text)
    judged = {one.place: one.holds(release.folder) for one in conditions.parse(fields.get(conditions.FIELD, ""))}
    found.notes += [f"Drop-Check names {place}, which is gone" for place, holds in judged.items() if holds is None]
    if judged and all(judged.values()):
        found.notes.append(f"looks needless by its Drop-Check ({fields['Drop-When']})")
    return found


def _applied(tool: str, name: str, diff: str, hunks: int, folder: Path) -> List[str]:
    """The state of each hunk of a patch's part for one file, after GNU patch has done in `folder` what it can."""
    command = [tool, "-p1", "-F2", "--force", "--no-backup-if-mismatch", "--reject-file=-"]
    done = subprocess.run(
        command, cwd=folder, input=diff.encode("utf-8"), capture_output=True, env={**os.environ, "LC_ALL": "C"}
    )
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode > 1:
        raise Refused(f"{name} is not understood by GNU patch ({' '.join(said.split())[:300]}): run `make lint`")
    states = ["as is"] * hunks
    for number, line in re.findall(r"^Hunk #(\d+) (.+)$", said, re.MULTILINE):
        kinds = [kind for kind, word in (("fails", "FAILED"), ("fuzz", "with fuzz"), ("offset", "offset"))
                 if word in line]
        states[int(number) - 1] = (kinds or ["as is"])[0]
    return states


def _is_there(hunk: str, text: str) -> bool:
    """Whether a text has the lines that a hunk adds, or lacks those of one that only removes; indentation aside."""
    have = "\n" + "".join(f"{line.strip()}\n" for line in text.split("\n") if line.strip())
    runs: Dict[str, List[str]] = {"+": [], "-": []}
    before = ""
    for line in hunk.split("\n")[1:]:
        sign, content = line[:1], line[1:].strip()
        if sign in runs and content:
            if sign == before:
                runs[sign][-1] += f"{content}\n"
            else:
                runs[sign].append(f"\n{content}\n")
        if content:
            before = sign
    if runs["+"]:
        return all(run in have for run in runs["+"])
    return not any(run in have for run in runs["-"])


class Release:
    """The Python sources of a SGLang in a folder, by the names of modules; what cannot be read is in `unread`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unread: List[str] = []

    def tree(self, file: Path) -> Optional[ast.Module]:
        """A source, parsed; None when this Python does not know its syntax."""
        try:
            return ast.parse(file.read_bytes())
        except SyntaxError:
            name = "/".join(file.parts[-4:])
            if name not in self.unread:
                self.unread.append(name)
            return None

    def has(self, module: str, name: Optional[str]) -> bool:
        """Whether `from module import name` finds something; a module with `__getattr__` may have any name."""
        inner = module if name is None else f"{module}.{name}"
        if module_file(self.folder, inner) or self.folder.joinpath(*inner.split(".")).is_dir():
            return True
        file = module_file(self.folder, module)
        tree = self.tree(file) if file else None
        if tree is None or name is None:
            return file is not None
        names = bound(tree.body)
        return bool(names & {name, "__getattr__"}) or any(
            self.has(star, name) for star, what in imports(tree, "sglang") if what == "*"
        )

    def home(self, module: str, name: Optional[str]) -> List[str]:
        """The modules that define a name, or that are called like it, or like a module when no name is given."""
        wanted = name or module.split(".")[-1]
        word = re.compile(rb"\b" + wanted.encode() + rb"\b")
        called, homes = [], []
        for file in sorted(self.folder.rglob("*.py")):
            found = module_name(self.folder, file)
            if found.split(".")[-1] == wanted:
                called.append(found)
            elif name and word.search(file.read_bytes()):
                tree = self.tree(file)
                homes += [found] if tree is not None and name in defined(tree.body) else []
        return called + homes


def _asked_of_us(root: Path, release: Release) -> Dict[Import, Set[str]]:
    """What the packages of the checkout import of SGLang, and in which files."""
    asked: Dict[Import, Set[str]] = {}
    for package, folder in distribution.PACKAGES.items():
        for file in sorted((root / folder / package).rglob("*.py")):
            tree = release.tree(file)
            for one in imports(tree, "sglang") if tree else ():
                asked.setdefault(one, set()).add(file.relative_to(root).as_posix())
    return asked


def _lost(release: Release, asked: Dict[Import, Set[str]]) -> List[str]:
    return [_moved(release, module, name, files) for (module, name), files in sorted(asked.items(), key=str)
            if not release.has(module, name)]


def _lost_to_patches(
    release: Release, patched: Path, files: List[str], torn: Set[str], asked: Dict[Import, Set[str]]
) -> List[str]:
    """What nothing provides of what the patches import of SGLang (added to `asked`) or use in the patched files.

    Uses are not looked for in the files that are `torn`, which lack a hunk.
    """
    lost: List[str] = []
    for file in files:
        paths = (release.folder / file, patched / file)
        before, after = (release.tree(path) if path.is_file() else None for path in paths)
        if before is None or after is None:
            continue
        where = {f"the patched {file}"}
        new = {one: where for one in imports(after, "sglang") - imports(before, "sglang")}
        asked.update(new)
        lost += _lost(release, new)
        if file not in torn:
            unbound = used(after) - used(before) - bound_anywhere(after) - BUILTINS
            lost += [_moved(release, module_name(Path(), Path(file)), name, where) for name in sorted(unbound)]
    return lost


def _moved(release: Release, module: str, name: Optional[str], files: Set[str]) -> str:
    symbol = f"{module}.{name}" if name else module
    return f"{symbol} is gone{_now_in(release.home(module, name))} (asked for by {', '.join(sorted(files))})"


def _now_in(homes: List[str]) -> str:
    return f", now in {', '.join(homes[:3])}{' and others' * (len(homes) > 3)}" if homes else ""


def _is_judged_by_hand(patch: Path) -> bool:
    fields = authoring.fields(patch.read_text(encoding="utf-8"))
    return conditions.FIELD not in fields and bool(DROP_BY_HAND.match(fields.get("Drop-When", "")))
