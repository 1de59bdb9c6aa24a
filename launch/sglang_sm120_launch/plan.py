"""`sglang-sm120 plan`: which flags and variables SGLang should get for a model on a machine, each with its reason.

`make_plan` is a pure function. Reading the machine, the model and the config, and checking flags against the installed
SGLang, happens around it, in `request.py`; printing in `show.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from sglang_sm120.limits import CPU_SERVER, MAX_ROWS
from sglang_sm120.speculation import MAX_DRAFT_TOKENS

from . import contract, memory
from .cards import SM12X, Cards, choose
from .comms import SHM_MIB, comms
from .errors import LaunchError
from .fit import CONTEXT_STEP, Fit, Given, Room, Step, fit
from .machine import MIB, Machine
from .model import Model
from .settings import Setting, Value, env, flag, overridden

CUDA = (13, 0)
"""CUDA that the pinned PyTorch is built for (requirements.lock), and the first driver branch that serves it."""
DRIVER = 580
EMULATION_VARIABLES = {
    "SGLANG_OPT_FP8_WO_A_GEMM": "the contract asks for wo_a in bf16",
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "the step calls none of the shapes that would be compiled for minutes",
    "SGLANG_OPT_USE_TILELANG_MHC_PRE": "the step has its own mHC",
    "SGLANG_OPT_DEEPGEMM_HC_PRENORM": "the step has its own mHC",
}
"""0 each for a server with the step on a Hopper card (SGLANG_SM120_FORCE=1)."""
HOST_SHARE = 8192 * MIB
"""Allowance for the operating system where the GPU's memory is the host's."""
PROCESSES = 3072 * MIB
"""Allowance for SGLang's processes on a host without a GPU."""
DRAFT_TOKENS = 4
CPU_CHUNK = 4096


@dataclass(frozen=True)
class Request:
    """What the user wants beside the defaults.

    Attributes:
        config_flags, config_env: values of a config file, whose name is `config`.
        flags, env: values from the command line and the process's environment; they win over the config's.
        auto: flags that the config leaves to the plan; None for all.
        mtp: speculative decoding with the checkpoint's MTP layer.
        gpus: indices of the cards to use; None for the best set.
        apart: prefill and decode on hosts of their own.
        patched: whether the series is in the SGLang that will serve: the step is then on by itself.
        evidence: how the config was tried (see README.md).
    """

    config: str | None = None
    config_flags: Mapping[str, Value] = field(default_factory=dict)
    config_env: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, Value] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    auto: tuple[str, ...] | None = None
    mtp: bool = False
    gpus: tuple[int, ...] | None = None
    apart: bool = False
    patched: bool = True
    evidence: str = "unverified"

    def value(self, name: str) -> Value | None:
        """What the user gave for a flag."""
        return self.flags.get(name, self.config_flags.get(name))

    def variable(self, name: str) -> str | None:
        """What the user gave for a variable."""
        return self.env.get(name, self.config_env.get(name))


@dataclass(frozen=True)
class Plan:
    """Everything `serve` needs to know. `notes` are sentences about what the plan cannot repair."""

    model: str
    evidence: str
    settings: tuple[Setting, ...]
    fit: Fit
    notes: tuple[str, ...]

    def value(self, name: str) -> Value | None:
        """The value of a flag; None when the plan does not set it."""
        return next((entry.value for entry in self.settings if entry.kind == "flag" and entry.name == name), None)

    def arguments(self) -> list[str]:
        """SGLang's command-line arguments."""
        return [word for entry in self.settings if entry.kind == "flag" for word in entry.arguments()]

    def environment(self) -> dict[str, str]:
        """Variables to set for the server."""
        return {entry.name: str(entry.value) for entry in self.settings if entry.kind == "env"}

    def command(self) -> list[str]:
        """The command a user can type instead of `serve`."""
        variables = [f"{name}={value}" for name, value in self.environment().items()]
        return [*(["env", *variables] if variables else []), "python", "-m", "sglang.launch_server", *self.arguments()]


def make_plan(machine: Machine, model: Model, request: Request) -> Plan:
    """The plan for a model on a machine.

    Raises:
        LaunchError: the model does not fit or cannot run there; the sentence has the numbers.
    """
    if isinstance(nodes := request.value("nnodes"), int):
        machine = replace(machine, nodes=nodes)
    cpu = request.value("device") == "cpu" or not machine.gpus
    if cpu and request.value("device") not in (None, "cpu"):
        raise LaunchError(f"--device is {request.value('device')} and no NVIDIA GPU was found: leave the flag out.")
    _require_served(request)
    decided = _on_cpu(machine, model, request) if cpu else _on_cuda(machine, model, request)
    settings, found, notes = decided
    if request.auto is not None:
        drafts = (entry.name for entry in settings if request.mtp and entry.name.startswith("speculative-"))
        kept = {*request.auto, "model-path", *request.flags, *drafts}
        settings = [entry for entry in settings if entry.kind == "env" or entry.name in kept]
    source = f"as {request.config} says"
    settings = overridden(settings, "flag", dict(request.config_flags), source)
    settings = overridden(settings, "env", dict(request.config_env), source)
    settings = overridden(settings, "flag", dict(request.flags), "as given on the command line")
    settings = overridden(settings, "env", dict(request.env), "as set in the environment")
    return Plan(model.path, request.evidence, tuple(settings), found, tuple(notes))


_Decided = tuple[list[Setting], Fit, list[str]]


def _on_cuda(machine: Machine, model: Model, request: Request) -> _Decided:
    _require_driver(machine)
    cards = choose(machine, model, request.gpus, _number(request, "tp-size"))
    gpu, tp = cards.gpu, cards.tp
    sm12x, forced = gpu.sm in SM12X, request.variable("SGLANG_SM120_FORCE") == "1"
    emulated = forced and not sm12x
    prefill, absent = _prefill(request, emulated), [f"{gpu.name} is none of SM12x"]
    if sm12x or forced:
        absent = _without_step(request, machine, takes_prefill=prefill == "all", emulated=emulated)
    draft = _draft_tokens(model, request)
    lines = [(f"memory of {gpu.name}", cards.memory_mib * MIB), ("CUDA context and driver", -memory.CONTEXT)]
    if cards.used_mib:
        lines.append(("used by other processes", -cards.used_mib * MIB))
    if tp > 1:
        lines.append(("NCCL", -memory.NCCL))
    if gpu.unified:
        lines.append(("operating system (unified memory)", -HOST_SHARE))
    step: Step = "none" if absent else prefill
    room = Room(gpu.name, tuple(lines), sum(size for _, size in lines), tp, step, draft, sm12x=sm12x)
    preferred = 4096 if sm12x else 8192
    found = fit(model, room, _given(request), preferred)
    settings = [
        flag("model-path", model.path, "the model to serve"),
        *_rank_settings(machine, cards),
        *_memory_settings(model, room, found, preferred),
        *_graph_settings(found, room),
        *_step_settings(room, request),
        *(_mtp_settings(draft) if request.mtp else ()),
        *_served_settings(),
        *comms(machine, tp),
    ]
    notes = [*cards.notes, *_notes(machine, tp)]
    if absent:
        notes.append(f"SGLang's own forward serves every pass: {', '.join(absent)}.")
    return settings, found, notes


def _without_step(request: Request, machine: Machine, *, takes_prefill: bool, emulated: bool) -> list[str]:
    """Why SGLang's plugin contract would leave the step out; empty when it takes it.

    Raises:
        LaunchError: the step was asked for by SGLang's flag, which then refuses to start.
    """
    reasons = contract.reasons(request.value, request.variable, takes_prefill=takes_prefill, emulated=emulated)
    given = {feature for feature in contract.FEATURES if any(contract.asked(feature, request.value))}
    if request.apart and "PD_DISAGGREGATION" not in given:
        reasons.append("the step does not serve prefill and decode apart")
    if machine.nodes > 1 and "MULTI_NODE_TP" not in given:
        reasons.append("the step does not serve ranks on several nodes")
    if reasons and request.value("enable-nvidia-megakernel") is True:
        raise LaunchError(f"--enable-nvidia-megakernel was given, and {', '.join(reasons)}: leave one of them out.")
    return reasons


def _require_served(request: Request) -> None:
    """Raise LaunchError for what SGLang itself refuses for this model."""
    for words in contract.asked("DETERMINISTIC_INFERENCE", request.value):
        raise LaunchError(f"{words} was given, and SGLang 0.5.23 refuses it for DeepSeek-V4: leave it out.")


def _prefill(request: Request, emulated: bool) -> Step:
    """Which passes the step takes where it serves.

    Raises:
        LaunchError: SGLANG_SM120_PREFILL has a value that ends the server.
    """
    value = request.variable("SGLANG_SM120_PREFILL") or ""
    if value not in ("", "sglang", "overlay"):
        raise LaunchError(f"SGLANG_SM120_PREFILL is {value!r} and needs sglang or overlay.")
    if value == "sglang" and emulated:
        raise LaunchError("SGLANG_SM120_PREFILL is sglang, whose prefill needs SM12x: leave out SGLANG_SM120_FORCE.")
    return "all" if value == "overlay" or emulated else "decode"


def _step_settings(room: Room, request: Request) -> Iterator[Setting]:
    if room.step == "none":
        return
    if not request.patched:
        yield flag("enable-nvidia-megakernel", True, "SGLang is not patched here, so the step is asked for by its flag")
    if room.step == "all":
        yield flag("disable-prefill-cuda-graph", True, "SGLang's prefill graphs hold its own layers, not the step")
    if not room.sm12x:
        yield flag("moe-runner-backend", "triton", "keeps the experts as loaded, for the step to take over")
        if room.draft_tokens:
            yield flag("speculative-moe-runner-backend", "marlin", "SGLang's kernel for the draft's experts here")
        yield from (env(name, "0", reason) for name, reason in EMULATION_VARIABLES.items())


def _on_cpu(machine: Machine, model: Model, request: Request) -> _Decided:
    tp = _number(request, "tp-size") or 1
    draft = _draft_tokens(model, request)
    given = _given(request)
    given = replace(
        given,
        requests=given.requests or CPU_SERVER["max_running_requests"],
        window_ratio=given.window_ratio or CPU_SERVER["swa_full_tokens_ratio"],
        max_tokens=given.max_tokens or CPU_SERVER["max_total_tokens"],
        chunk=given.chunk or CPU_CHUNK,
    )
    lines = (("memory of the host", machine.ram_mib * MIB), ("SGLang's processes", -PROCESSES))
    room = Room("the host", lines, sum(size for _, size in lines) // tp, tp, "all", draft, device="cpu")
    found = fit(model, room, given, CPU_CHUNK)
    laptop = "a CPU is for demonstration: a laptop's worth of"
    settings = [
        flag("model-path", model.path, "the model to serve"),
        flag("device", "cpu", "no NVIDIA GPU was found; SGLang does not choose the CPU by itself"),
        flag("tp-size", tp, "one process uses all cores"),
        flag("max-total-tokens", found.pools.full, f"{laptop} cache; SGLang would take all free memory"),
        flag("swa-full-tokens-ratio", found.window_ratio, "so small a cache needs a larger share for the window"),
        *_pool_settings(model, found, f"{laptop} requests"),
        flag("sleep-on-idle", True, "SGLang's scheduler would spin on a core while no request is there"),
        *(_mtp_settings(draft) if request.mtp else ()),
        *_served_settings(),
    ]
    unpatched = "SGLang is not patched here and does not serve this model on a CPU: run `make apply`."
    return settings, found, [] if request.patched else [unpatched]


def _draft_tokens(model: Model, request: Request) -> int:
    """Tokens that a request verifies per step; 0 without speculation."""
    if not request.mtp:
        return 0
    if any(key.startswith("dspark_") for key in model.config):
        raise LaunchError(
            f"--mtp was given and {model.path} has DSpark's stages in place of the MTP layer: leave it out, and give "
            f"SGLang's --speculative-algorithm DSPARK after `--`."
        )
    if not model.config.get("num_nextn_predict_layers"):
        raise LaunchError(f"--mtp was given and {model.path} has no MTP layer: leave it out.")
    draft = _number(request, "speculative-num-draft-tokens") or DRAFT_TOKENS
    if draft > MAX_DRAFT_TOKENS:
        raise LaunchError(
            f"--speculative-num-draft-tokens is {draft}, and the compressor can take back {MAX_DRAFT_TOKENS} tokens: "
            f"give {MAX_DRAFT_TOKENS} or fewer."
        )
    return draft


def _number(request: Request, name: str) -> int | None:
    value = request.value(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise LaunchError(f"--{name} is {value!r}, needed a whole number.")
    return value


def _fraction(request: Request, name: str) -> float | None:
    value = request.value(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise LaunchError(f"--{name} is {value!r}, needed a number between 0 and 1.")
    return float(value)


def _given(request: Request) -> Given:
    graphs = request.value("cuda-graph-bs-decode")
    if isinstance(graphs, int) and not isinstance(graphs, bool):
        graphs = (graphs,)
    off = request.value("disable-cuda-graph") is True or request.value("disable-decode-cuda-graph") is True
    if off or request.value("cuda-graph-backend-decode") == "disabled":
        graphs = ()
    sizes = tuple(size for size in graphs if isinstance(size, int)) if isinstance(graphs, tuple) else None
    if sizes != graphs:
        raise LaunchError(f"--cuda-graph-bs-decode is {graphs!r}, needed whole numbers.")
    return Given(
        chunk=_number(request, "chunked-prefill-size"),
        requests=_number(request, "max-running-requests"),
        context=_number(request, "context-length"),
        window_ratio=_fraction(request, "swa-full-tokens-ratio"),
        static=_fraction(request, "mem-fraction-static"),
        graphs=sizes,
        max_graph=_number(request, "cuda-graph-max-bs-decode"),
        max_tokens=_number(request, "max-total-tokens"),
    )


def _require_driver(machine: Machine) -> None:
    if machine.driver is None or machine.cuda is None:
        raise LaunchError(f"There are {len(machine.gpus)} GPUs and no NVIDIA driver: install {DRIVER} or newer.")
    major, minor = (int(part) for part in machine.cuda.split(".")[:2])
    if (major, minor) < CUDA:
        raise LaunchError(
            f"Driver {machine.driver} serves CUDA {machine.cuda} and the pinned PyTorch needs CUDA "
            f"{CUDA[0]}.{CUDA[1]}: install driver {DRIVER} or newer."
        )


def _rank_settings(machine: Machine, cards: Cards) -> Iterator[Setting]:
    yield flag("tp-size", cards.tp, cards.why_tp)
    if machine.nodes > 1:
        yield flag("nnodes", machine.nodes, "hosts that serve one model together; each gets its --node-rank")
    if cards.visible is not None:
        yield env("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "so that CUDA counts the cards as nvidia-smi and this plan do")
        yield env("CUDA_VISIBLE_DEVICES", ",".join(map(str, cards.visible)), cards.why_visible)


def _memory_settings(model: Model, room: Room, found: Fit, preferred: int) -> Iterator[Setting]:
    loaded = sum(room.loaded(model).values())
    yield flag(
        "mem-fraction-static",
        found.static,
        f"{loaded / 2**30:.1f} GiB of weights and scratch, and the cache; what is left holds graphs and activations",
    )
    ratio = "SGLang's own for DeepSeek-V4" if found.window_ratio == memory.WINDOW_RATIO else "more than SGLang's 0.1"
    yield flag(
        "swa-full-tokens-ratio",
        found.window_ratio,
        f"{ratio}: the window pool holds {found.pools.swa} tokens, {found.window_needed} are needed",
    )
    yield from _pool_settings(model, found, _why_requests(found), preferred)


def _pool_settings(model: Model, found: Fit, requests: str, preferred: int = CPU_CHUNK) -> Iterator[Setting]:
    longest = model.config["max_position_embeddings"]
    if found.context == longest:
        context = "all the model has; the cache holds one such request"
    else:
        context = f"the cache holds {found.pools.full} tokens, and one request must fit (steps of {CONTEXT_STEP})"
    yield flag("context-length", found.context, context)
    if found.chunk == preferred:
        chunk = "running requests wait for a chunk: large enough for the kernels, short enough to wait for"
    else:
        chunk = f"{preferred} would not fit into the window pool beside two pages for each request"
    yield flag("chunked-prefill-size", found.chunk, chunk)
    yield flag("max-running-requests", found.requests, requests)


def _why_requests(found: Fit) -> str:
    return (
        f"a chunk and two pages for each fit into the window pool, else SGLang shrinks chunks and requests wait; "
        f"each has {found.concurrency()[found.requests]} tokens when all run"
    )


def _graph_settings(found: Fit, room: Room) -> Iterator[Setting]:
    if not found.graphs:
        return
    reason = "they count requests: every size up to 8, then steps up to the running requests"
    if room.draft_tokens:
        reason += "; SGLang multiplies by the draft tokens"
    if found.trimmed:
        reason = f"{min(found.trimmed)} and more are left out: graphs may take a tenth of what the weights leave"
    yield flag("cuda-graph-bs-decode", found.graphs, reason)
    largest = "the largest size captured; larger batches run without a graph"
    covered = MAX_ROWS // max(1, room.draft_tokens)
    if room.step != "none" and max(found.graphs) > covered:
        largest += f", and more than {covered} requests without the step"
    yield flag("cuda-graph-max-bs-decode", max(found.graphs), largest)


def _mtp_settings(draft_tokens: int) -> Iterator[Setting]:
    yield flag("speculative-algorithm", "EAGLE", "--mtp: how SGLang runs DeepSeek-V4's MTP layer")
    yield flag("speculative-num-steps", draft_tokens - 1, "one draft token for each step, and the verified one")
    yield flag("speculative-eagle-topk", 1, "SGLang supports no wider tree for DeepSeek-V4")
    yield flag("speculative-num-draft-tokens", draft_tokens, "the MTP layer is trained for one; later ones pay less")


def _served_settings() -> Iterator[Setting]:
    yield flag("reasoning-parser", "deepseek-v4", "thinking is returned apart from the answer")
    yield flag("tool-call-parser", "deepseekv4", "the model's own tool-call format")
    yield flag("grammar-backend", "xgrammar", "SGLang's default for structured output")
    yield flag("enable-metrics", True, "token counters tell a wedged server from a healthy one; /health does not")
    yield flag("uvicorn-access-log-exclude-prefixes", ("/metrics", "/health"), "the watchdog looks there all the time")


def _notes(machine: Machine, tp: int) -> Iterator[str]:
    if tp > 1 and machine.shm_mib < SHM_MIB:
        yield f"/dev/shm has {machine.shm_mib} MiB, NCCL wants more: start the container with --shm-size=16g."
    if tp > 1 and machine.iommu == "translated" and machine.link != "nvlink":
        yield "The IOMMU translates peer writes: boot with iommu=pt, or turn it off, for direct transfers."
    if machine.nodes > 1 and not machine.rdma:
        yield "No RDMA device is up: the nodes talk over sockets, which is slow."


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `plan`."""
    from . import request, topology

    request.configure(parser)
    topology.configure(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print a plan; 0."""
    from . import request, show, topology

    wanted = request.read(arguments)
    if arguments.topology:
        nodes = [node.checked(wanted) for node in topology.nodes(arguments.topology, arguments.hosts, wanted)]
        print(show.topology_json(nodes) if arguments.json else show.topology_text(nodes))
        return 0
    plan = wanted.check(make_plan(wanted.machine, wanted.model, wanted.request))
    print(show.as_json(plan) if arguments.json else show.as_text(plan))
    return 0
