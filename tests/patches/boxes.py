"""A checkout and a site to try patchset.py on, made up here and small enough for thousands of runs."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PATCHSET = CHECKOUT / "patches" / "patchset.py"
# The made-up release of the box, and the one that the checkout's own series is for.
VERSION = "9.9.9"
[SGLANG] = (path.parent.name for path in (CHECKOUT / "patches").glob("*/series"))

# a.py and b.py are touched by one patch, a.py by a second one of another group; c.py stays.
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
# What the second patch makes of a19.
LATE = "from sglang_sm120.hooks import answer\n\na19 = answer()\n"
SECOND = HEADER.format(text="Change a late line.", version=VERSION) + """--- a/sglang/a.py
+++ b/sglang/a.py
@@ -18,7 +18,9 @@
 a16 = 16
 a17 = 17
 a18 = 18
-a19 = 19
+from sglang_sm120.hooks import answer
+
+a19 = answer()
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
        if not {"lint", "port", "--site", "--python"} & set(arguments):
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

    @property
    def series(self) -> Path:
        return self.root / "patches" / VERSION

    @property
    def lock(self) -> Path:
        return self.series / "sglang.lock"

    def write_series(self, **patches: str) -> None:
        """Replace the series (keyword `group_01_name` -> text) and refresh the lock."""
        shutil.rmtree(self.series, ignore_errors=True)
        names = [name.replace("_", "/", 1).replace("_", "-") + ".patch" for name in patches]
        for name, text in zip(names, patches.values(), strict=True):
            (self.series / name).parent.mkdir(parents=True, exist_ok=True)
            (self.series / name).write_text(text)
        (self.series / "series").write_text("".join(f"{name}\n" for name in names))
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
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {VERSION}\n")
    with open(info / "RECORD", "w", newline="") as file:
        csv.writer(file).writerows(records)
    overlay = box.root / "overlay" / "sglang_sm120"
    overlay.mkdir(parents=True)
    (overlay / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (overlay / "hooks.py").write_text("def answer() -> int:\n    return 42\n")
    (overlay / "sglang.lock").symlink_to(Path("..") / ".." / "patches" / VERSION / "sglang.lock")
    shutil.copy(CHECKOUT / "overlay" / "sglang_sm120" / "startup.py", overlay)
    entry_point = 'a = "sglang_sm120.hooks:answer"'
    (box.root / "pyproject.toml").write_text(f'[project.entry-points."sglang.srt.plugins"]\n{entry_point}\n')
    box.write_series(core_01_first=FIRST, cpu_02_second=SECOND)
    return box


def install_wheel(python: str, folder: Path, scratch: Path) -> None:
    """Unpack the locked SGLang wheel for the interpreter `python` ("3.12") into `folder`, with pip or uv."""
    lock = CHECKOUT / "patches" / SGLANG / "requirements.lock"
    [entry] = re.findall(r"^sglang==.*\n(?:    --hash=.*\n)+", lock.read_text(), re.MULTILINE)
    scratch.write_text(entry)
    _install(folder, "--python-version", python, "--only-binary", ":all:", "--require-hashes", "--requirement", scratch)


# SGLang's plugin loader alone: the package is not executed, importing it takes long.
LOAD_PLUGINS = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
sys.modules["sglang"] = importlib.util.module_from_spec(importlib.util.find_spec("sglang"))
from sglang.srt.plugins import load_plugins
load_plugins()
print("server started")
"""


def _install(folder: Path, *arguments: str | Path) -> None:
    installers = {"uv": ["uv", "pip", "install"], "pip": ["pip", "install", "--no-compile"]}
    found = [command for tool, command in installers.items() if shutil.which(tool)]
    if importlib.util.find_spec("pip"):
        found.insert(0, [sys.executable, "-m", *installers["pip"]])
    assert found, "neither pip nor uv is there to install a wheel: install one of them"
    command = [*found[0], "--quiet", "--no-deps", "--target", str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def copy_checkout(root: Path) -> None:
    """What `make apply` and `make wheel` read."""
    for name in ("patches", "overlay", "launch"):
        shutil.copytree(CHECKOUT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "Makefile", "LICENSE"):
        shutil.copy(CHECKOUT / name, root)


def build_wheel(scratch: Path) -> Path:
    """Our wheel, built without the network from a copy of the checkout."""
    copy_checkout(scratch / "root")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(scratch)]
    done = subprocess.run([*command, str(scratch / "root")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [wheel] = scratch.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Environment:
    """A virtual environment with an SGLang of its own and everything else of the running one."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python3"

    @property
    def site(self) -> Path:
        [site] = self.folder.glob("lib/python3.*/site-packages")
        return site

    def install(self, wheel: Path) -> None:
        _install(self.site, "--no-index", wheel)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Its interpreter, unaware of the running one."""
        command = [str(self.python), *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=self.folder
        )

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def make_environment(folder: Path, installed: Path) -> Environment:
    """An environment with the released SGLang: hard links to the one in `installed`, its series taken back."""
    venv.create(folder, symlinks=True)
    environment = Environment(folder)
    for entry in installed.iterdir():
        ours = entry.name == "sglang" or entry.name.startswith(("sglang-", "sglang_sm120"))
        if ours:
            copy_tree(entry, environment.site / entry.name, with_byte_code=True)
        elif not (environment.site / entry.name).exists():
            (environment.site / entry.name).symlink_to(entry)
    Box(CHECKOUT, environment.site).done("unapply")
    return environment


def copy_tree(source: Path, target: Path, with_byte_code: bool = False) -> None:
    """Copy by hard links when the file system can: patchset must never write through one."""

    def link_or_copy(one: str, two: str) -> None:
        try:
            os.link(one, two)
        except OSError:
            shutil.copy2(one, two)

    ignore = None if with_byte_code else shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, target, copy_function=link_or_copy, ignore=ignore)
