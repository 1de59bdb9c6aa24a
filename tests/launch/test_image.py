"""The container recipe, without a container engine: its text, its entry point, and its steps in a clean root.

The clean root is a new minimal Debian (debootstrap) in which every RUN and COPY of launch/Dockerfile is carried out,
the user, the environment, the entry point and the health check included. Two things differ from the real build: the
base (no CUDA; Debian's packages and Python instead of Ubuntu's), and requirements.lock, cut down to SGLang itself and
what the launcher imports, because the whole lock is 10 GB.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
DOCKERFILE = CHECKOUT / "launch/Dockerfile"
LOCK = "patches/0.5.23/requirements.lock"
KEPT = (
    "sglang", "nvidia-ml-py", "packaging", "pyyaml", "httpx", "httpcore", "h11", "anyio", "idna", "sniffio", "certifi",
    "typing-extensions",
)  # fmt: skip
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NETWORK = re.compile(
    r"(https?_proxy|no_proxy|PIP_(INDEX_URL|EXTRA_INDEX_URL|TRUSTED_HOST|DEFAULT_TIMEOUT))", re.IGNORECASE
)


class Step(NamedTuple):
    """One instruction of the Dockerfile, continuation lines joined."""

    name: str
    text: str

    def words(self) -> list[str]:
        """The JSON list that ends the instruction (`CMD [...]`, `ENTRYPOINT [...]`, `SHELL [...]`)."""
        found: list[str] = json.loads(self.text[self.text.index("[") :])
        return found


def steps() -> list[Step]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(*line.split(None, 1)) for line in text.splitlines() if line.strip()]


def only(name: str) -> Step:
    (step,) = [step for step in steps() if step.name == name]
    return step


def test_the_base_is_pinned_and_fits_the_lock():
    base = only("FROM").text
    match = re.fullmatch(r"[\w./-]+:(\d+\.\d+)\.\d+-devel-[\w.]+@sha256:[0-9a-f]{64}", base)
    assert match is not None, base
    lock = (CHECKOUT / LOCK).read_text()
    runtime = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)\.", lock, re.MULTILINE)
    assert runtime is not None and runtime.group(1) == match.group(1)


def test_it_runs_as_a_user_and_checks_itself():
    names = [step.name for step in steps()]
    user = only("USER").text
    assert re.fullmatch(r"[1-9]\d*", user), "Kubernetes tells root from others by a number"
    (step,) = [step for step in steps()[names.index("USER") :] if step.name == "RUN"]
    assert "sglang-sm120 prebuild" in step.text and names.index("ENV") < names.index("RUN", names.index("USER"))
    assert only("EXPOSE").text == "30000"
    assert only("HEALTHCHECK").words()[-1] == "sglang_sm120_launch.progress"
    assert "SGLANG_SM120_URL_FILE=/home/sglang/" in " ".join(step.text for step in steps() if step.name == "ENV")
    (entry,) = only("ENTRYPOINT").words()
    assert os.access(CHECKOUT / Path(entry).relative_to("/opt/sglang-sm120"), os.X_OK)


def test_the_documented_options_are_there():
    page = (CHECKOUT / "docs/container.md").read_text()
    for word in ("--shm-size=16g", "--ipc=host", "--gpus all", "30000", "make image", "--ulimit"):
        assert word in page
    for word in ("-e SGLANG_API_KEY", "--host 0.0.0.0", "127.0.0.1:30000", "--stop-timeout"):
        assert word in page


def test_the_builder_gets_what_is_copied():
    """.dockerignore leaves out everything but the sources of COPY, so no environment of 10 GB is sent."""
    lines = [line for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {source for step in steps() if step.name == "COPY" for source in step.text.split()[:-1]}
    assert lines[0] == "*" and sent == {source.split("/")[0] for source in copied}
    assert all((CHECKOUT / name).exists() for name in sent)
    left_out = [line for line in lines[1:] if not line.startswith("!")]
    assert all(line.startswith("**/") for line in left_out), "or a source would be cut"


def fake(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("given", "looked_at"),
    [
        ([], ""),
        (["--model", "a b", "--mtp"], ""),
        (["--model", "x", "--", "--tp", "4"], ""),
        (["--model", "x", "--", "--host", "0.0.0.0", "--tp", "4", "--port", "8000"], " --host 0.0.0.0 --port 8000"),
        (["--", "--port=7", "--host=::"], " --port=7 --host=::"),
    ],
)
def test_the_entry_point(given: list[str], looked_at: str, tmp_path: Path):
    """It adds no flag: the server listens where the user says, else on the loopback, and doctor looks there."""
    served, doctor = " ".join(["serve --watch", *given]), f"doctor{looked_at}"
    fake(tmp_path / "bin", "sglang-sm120", f'echo "$@" >> {tmp_path}/trace; exit $(cat {tmp_path}/code)')
    environment = {"PATH": f"{tmp_path}/bin:{PATH}"}
    for code, expected in ((0, [doctor, served]), (1, [])):
        (tmp_path / "trace").write_text("")
        (tmp_path / "code").write_text(str(code))
        done = subprocess.run([CHECKOUT / "launch/entrypoint", *given], env=environment, timeout=30)
        trace = (tmp_path / "trace").read_text().splitlines()
        assert done.returncode == code
        assert trace == (expected or [doctor]), "a failed check must start no server"


@pytest.mark.parametrize("builder", ["docker", "podman", "buildah", None])
def test_make_image(builder: str | None, tmp_path: Path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "make", "sed"):
        (tools / tool).symlink_to(shutil.which(tool) or pytest.fail(f"{tool} is not on PATH"))
    if builder:
        fake(tools, builder, 'echo "$@"')
    done = subprocess.run(["make", "image"], cwd=CHECKOUT, env={"PATH": str(tools)}, capture_output=True, text=True)
    if builder is None:
        assert done.returncode == 2 and "none of docker, podman and buildah" in done.stderr
    else:
        assert re.fullmatch(r"build --file launch/Dockerfile --tag sglang-sm120:\d+\.\d+\.\d+ \.\n", done.stdout), done


@pytest.mark.parametrize("beside", [None, "podman"])
def test_make_image_without_dockers_daemon(beside: str | None, tmp_path: Path):
    """One sentence and a status; another builder that is there is taken."""
    for tool in ("bash", "make", "sed"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or pytest.fail(f"{tool} is not on PATH"))
    fake(tmp_path, "docker", "echo Cannot connect to the Docker daemon >&2; exit 1")
    if beside:
        fake(tmp_path, beside, 'echo "$@"')
    done = subprocess.run(["make", "image"], cwd=CHECKOUT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    if beside:
        assert done.returncode == 0 and done.stdout.startswith("build --file launch/Dockerfile"), done
    else:
        first, makes = done.stderr.splitlines()
        assert done.returncode == 2 and done.stdout == "" and makes.startswith("make: ***")
        assert first.startswith("make image: docker's daemon does not answer") and "start it" in first


class Root:
    """A root file system in which the Dockerfile's steps are carried out one after the other."""

    def __init__(self, folder: Path, context: Path) -> None:
        self.folder, self.context = folder, context
        self.shell = ["/bin/sh", "-c"]
        self.workdir = "/"
        self.user = "0"
        self.environment = {"PATH": PATH}
        # How this machine reaches the package registries is no part of the recipe.
        self.network = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
        authorities = Path(os.environ.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt"))
        if authorities.is_file():
            shutil.copy(authorities, folder / "authorities.crt")
            self.network["PIP_CERT"] = "/authorities.crt"

    def run(self, *command: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command in the root: its own mounts and process numbers, the network of the host."""
        variables = [f"{name}={value}" for name, value in (self.environment | self.network).items()]
        inside = ["env", "-i", "-C", self.workdir, *variables, *command]
        mounts = 'mount -t proc proc "$0/proc"; mount --rbind /dev "$0/dev"; exec chroot --userspec="$1" "$0" "${@:2}"'
        outside = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-euc", mounts, str(self.folder)]
        return subprocess.run(
            [*outside, user or self.user, *inside],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=600,
        )

    def copy(self, *sources: str, target: str) -> None:
        """COPY: files into a directory, the contents of a directory into another."""
        place = self.folder / Path(self.workdir, target).relative_to("/")
        if target.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
        for source in sources:
            path = self.context / source
            if path.is_dir():
                shutil.copytree(path, place, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                assert target.endswith("/") or len(sources) == 1
                shutil.copy(path, place)

    def carry_out(self, step: Step) -> None:
        if step.name == "SHELL":
            self.shell = step.words()
        elif step.name == "WORKDIR":
            self.workdir = step.text
            (self.folder / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif step.name == "USER":
            self.user = step.text
        elif step.name == "ARG":
            # Nothing is built with nvcc, which is not there.
            self.environment[step.text.partition("=")[0]] = ""
        elif step.name == "ENV":
            self.environment |= dict(re.findall(r"(\w+)=(\S+)", step.text))
        elif step.name == "COPY":
            *sources, target = step.text.split()
            self.copy(*sources, target=target)
        elif step.name == "RUN":
            done = self.run(*self.shell, step.text)
            assert done.returncode == 0, f"RUN {step.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        else:
            assert step.name in ("FROM", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"), f"{step.name} is not carried out here"


def locked(names: tuple[str, ...]) -> str:
    """The lock with these packages alone."""
    text = (CHECKOUT / LOCK).read_text()
    entries = {entry.split("==")[0]: entry for entry in re.findall(r"^[^\s#].*\n(?: .*\n)*", text, re.MULTILINE)}
    return "".join(entries[name] for name in names)


@pytest.fixture(scope="module")
def clean_root(thorough: bool) -> Iterator[Path]:
    """A minimal system of the host's own Debian release; nothing of the host is changed."""
    if not thorough:
        pytest.skip("fetches a Debian system: make test-launch")
    if os.geteuid() != 0 or not shutil.which("apt-get") or not shutil.which("unshare"):
        pytest.fail("a clean root needs root, apt-get and unshare: run it as root on Debian or Ubuntu")
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    memory = "/dev/shm" if shutil.disk_usage("/dev/shm").free > 3 << 30 else None
    with tempfile.TemporaryDirectory(prefix="sglang-sm120-root-", dir=memory) as name:
        scratch = Path(name)
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (scratch / folder).mkdir(parents=True)
        apt = ["apt-get", "-q", "-o", f"Dir::State={scratch}/state", "-o", f"Dir::Cache={scratch}/cache"]
        apt += ["-o", "APT::Sandbox::User=root"]
        for command in ([*apt, "update"], [*apt, "download", "debootstrap"]):
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                pytest.fail(f"Debian's packages cannot be reached: {done.stderr.strip()[-200:]}")
        (package,) = scratch.glob("debootstrap_*.deb")
        subprocess.run(["dpkg", "-x", package, scratch / "tool"], check=True)
        mirror = subprocess.run(
            [*apt, "indextargets", "--format", "$(SITE)"], capture_output=True, text=True, check=True
        )
        tool = scratch / "tool/usr"
        root = scratch / "root"
        done = subprocess.run(
            ["bash", tool / "sbin/debootstrap", "--variant=minbase", release["VERSION_CODENAME"].strip('"'), root,
             mirror.stdout.split()[0]],
            env={"PATH": PATH, "DEBOOTSTRAP_DIR": str(tool / "share/debootstrap")},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        yield root


class Answer(http.server.BaseHTTPRequestHandler):
    """A server that is asked for its health: `status` to every path."""

    status = 200

    def do_GET(self) -> None:  # noqa: N802  named by http.server
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def answering(status: int) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Now", (Answer,), {"status": status})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_every_step_in_a_clean_root(clean_root: Path, tmp_path: Path):
    context = tmp_path / "context"
    context.mkdir()
    for name in {source for step in steps() if step.name == "COPY" for source in step.text.split()[:-1]}:
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif name != LOCK:
            shutil.copy(CHECKOUT / name, context / name)
    (context / LOCK).write_text(locked(KEPT))
    root = Root(clean_root, context)
    for step in steps():
        root.carry_out(step)

    # The entry point, as the image's user: its checks find the patched SGLang, miss the GPU and start no server.
    done = root.run(*only("ENTRYPOINT").words(), "--model", "nowhere")
    found = {
        line.split()[1]: line.split()[0] for line in done.stdout.splitlines() if line[:4].strip() in ("ok", "fail")
    }
    assert done.returncode == 1 and done.stderr == "", done
    wanted = ("glibc", "python", "patches", "overlay", "disk", "host-compiler")
    assert {found[name] for name in wanted} == {"ok"}, done.stdout
    assert found["gpu"] == found["pins"] == "fail"
    assert any((clean_root / "home/sglang/.cache/pycache").rglob("*.pyc")), "byte code has to be kept somewhere"

    command = only("HEALTHCHECK").words()
    for status, code in ((200, 0), (503, 1)):
        with answering(status) as url:
            assert root.run(*command, url).returncode == code
