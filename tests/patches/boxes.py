"""A checkout and a site to try patchset.py on, made up here and small enough for thousands of runs."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PATCHSET = CHECKOUT / "patches" / "patchset.py"
VERSION = "9.9.9"

# a.py and b.py are touched by one patch, a.py by a second one; c.py stays.
FILES = {
    "sglang/__init__.py": "",
    "sglang/a.py": "".join(f"a{line} = {line}\n" for line in range(30)),
    "sglang/sub/b.py": "one = 1\ntwo = 2\nthree = 3\n",
    "sglang/sub/c.py": "untouched = True\n",
}
HEADER = """Description: {text}
Origin: this project
Forwarded: not-needed
Applies-To: SGLang {version}
Drop-When: never

"""
FIRST = HEADER.format(text="Change the first lines.", version=VERSION) + """--- a/sglang/a.py
+++ b/sglang/a.py
@@ -1,4 +1,5 @@
 a0 = 0
-a1 = 1
+a1 = 11
+a1b = 12
 a2 = 2
 a3 = 3
--- a/sglang/sub/b.py
+++ b/sglang/sub/b.py
@@ -1,3 +1,3 @@
 one = 1
-two = 2
+two = 22
 three = 3
"""
SECOND = HEADER.format(text="Change a late line.", version=VERSION) + """--- a/sglang/a.py
+++ b/sglang/a.py
@@ -18,7 +18,7 @@
 a16 = 16
 a17 = 17
 a18 = 18
-a19 = 19
+a19 = 99
 a20 = 20
 a21 = 21
 a22 = 22
"""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every path below `folder`: equal means untouched."""
    paths = sorted(folder.rglob("*"))
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@dataclass(frozen=True)
class Box:
    """A checkout and a site."""

    root: Path
    site: Path

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """patchset.py on the site, isolated from every installed package, as on a machine with Python alone."""
        command = [sys.executable, "-I", "-S", str(PATCHSET), *arguments, "--root", str(self.root)]
        if "lint" not in arguments and "--site" not in arguments and "--python" not in arguments:
            command += ["--site", str(self.site)]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    def done(self, *arguments: str) -> str:
        """Run and require success; the standard output."""
        result = self.run(*arguments)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        return result.stdout

    def refused(self, *arguments: str, code: int = 1, env: dict[str, str] | None = None) -> str:
        """Run and require a refusal in one line that leaves the site as it was; that line."""
        before = stamps(self.site) if self.site.is_dir() else {}
        result = self.run(*arguments, env=env)
        assert result.returncode == code, result.stdout + result.stderr
        assert result.stderr.startswith("patchset: ") and result.stderr.count("\n") == 1, result.stderr
        assert (stamps(self.site) if self.site.is_dir() else {}) == before
        return result.stderr

    def write_series(self, **patches: str) -> None:
        """Replace the series (keyword `p01_name` -> text) and refresh the lock."""
        folder = self.root / "patches" / VERSION
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        names = [name.removeprefix("p").replace("_", "-") + ".patch" for name in patches]
        for name, text in zip(names, patches.values(), strict=True):
            (folder / name).write_text(text)
        (folder / "series").write_text("".join(f"{name}\n" for name in names))
        self.done("refresh")


def make_box(folder: Path) -> Box:
    """The tiny checkout and site."""
    box = Box(folder / "root", folder / "site dir")
    records = [[f"sglang-{VERSION}.dist-info/RECORD", "", ""]]
    for name, text in FILES.items():
        path = box.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        records.append([name, f"sha256={digest}", str(len(text))])
    info = box.site / f"sglang-{VERSION}.dist-info"
    info.mkdir()
    with open(info / "RECORD", "w", newline="") as file:
        csv.writer(file).writerows(records)
    overlay = box.root / "overlay" / "sglang_sm120"
    overlay.mkdir(parents=True)
    (overlay / "__init__.py").write_text('__version__ = "0.1.0"\n')
    shutil.copy(CHECKOUT / "overlay" / "sglang_sm120" / "startup.py", overlay)
    (box.root / "pyproject.toml").write_text('[project.entry-points."sglang.srt.plugins"]\na = "b:c"\n')
    box.write_series(p01_first=FIRST, p02_second=SECOND)
    return box


def copy_tree(source: Path, target: Path) -> None:
    """Copy by hard links when the file system can: patchset must never write through one."""

    def link_or_copy(one: str, two: str) -> None:
        try:
            os.link(one, two)
        except OSError:
            shutil.copy2(one, two)

    shutil.copytree(source, target, copy_function=link_or_copy, ignore=shutil.ignore_patterns("__pycache__"))
