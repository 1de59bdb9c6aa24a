"""Which flags and variables SGLang should get for a model on a machine, each with its reason.

`make_plan` is a pure function. Reading the machine, the model and the config, and checking flags against the installed
SGLang, happens around it, in `request.py`; printing in `show.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from sglang_sm120.checkpoint.config import nvfp4_experts
from sglang_sm120.limits import CPU_SERVER, MAX_ROWS, SM12X, takes_prefill

from . import contract, memory, predict, values
from .cards import SIZES, choose, experts_by
from .comms import comms
from .errors import LaunchError
from .fit import Fit, Room, Step, Unfit, fit, gib
from .machine import MIB, Gpu, Machine
from .model import Model
from .sections import (
    CPU_CHUNK,
    NVFP4_NOTE,
    NVFP4_RUNNER,
    cpu_ranks,
    dspark_settings,
    graph_settings,
    loading_settings,
    memory_settings,
    mtp_settings,
    notes,
    nvfp4_settings,
    pool_settings,
    rank_settings,
    served_settings,
    step_settings,
)
from .settings import Setting, Value, command, env, flag, overridden
from .values import Request

CUDA = (13, 0)
"""CUDA that the pinned PyTorch is built for (requirements.lock), and the first driver branch that serves it."""
DRIVER = 580
HOST_SHARE = 8192 * MIB
"""Allowance for the operating system where the GPU's memory is the host's."""
PROCESSES = 3072 * MIB
"""Allowance for SGLang's processes on a host without a GPU."""
CARD = Gpu("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "12.0")
"""What is told about where the machine's own cards, or a CPU, hold too little: its memory as NVML says."""
LIMITS = (
    "context-length", "max-running-requests", "max-total-tokens", "chunked-prefill-size", "mem-fraction-static",
    "swa-full-tokens-ratio",
)  # fmt: skip
"""Flags with which a user may ask for what nothing holds, or for less than a server needs."""
PLACED = ("tp-size", "ep-size", "nnodes", "node-rank", "dist-init-addr", "device")
"""Flags that say where ranks run."""


@dataclass(frozen=True)
class Plan:
    """Everything `serve` needs to know.

    `notes` are sentences about what the plan cannot repair; `prediction` says how long a decode step should take, None
    where nothing is known of the card or SGLang's own forward decodes.
    """

    model: str
    evidence: str
    settings: tuple[Setting, ...]
    fit: Fit
    notes: tuple[str, ...]
    prediction: str | None

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
        """The command a user can type instead of `serve`, keys and passwords hidden."""
        return command("sglang.launch_server", self.settings)


def make_plan(machine: Machine, model: Model, request: Request) -> Plan:
    """The plan for a model on a machine.

    Raises:
        LaunchError: the model does not fit or cannot run there; the sentence has the numbers.
    """
    if nodes := values.number(request, "nnodes"):
        machine = replace(machine, nodes=nodes)
    request = values.checked(request, model)
    cpu = request.value("device") == "cpu" or not machine.gpus
    if cpu and request.value("device") not in (None, "cpu"):
        raise LaunchError(f"--device is {request.value('device')} and no NVIDIA GPU was found: leave the flag out.")
    _require_served(request)
    try:
        decided = _on_cpu(machine, model, request) if cpu else _on_cuda(machine, model, request)
    except Unfit as refusal:
        raise LaunchError(_instead(refusal, machine, model, request)) from None
    settings, found, sentences, predicted = decided
    everything = settings
    if request.auto is not None:
        drafts = (entry.name for entry in settings if entry.name.startswith("speculative-"))
        kept = {*request.auto, "model-path", *request.flags, *drafts}
        settings = [entry for entry in settings if entry.kind == "env" or entry.name in kept]
    source, mine = f"as {request.config} says", "as given on the command line"
    given = [flag(name, value, source) for name, value in request.config_flags.items()]
    given += [env(name, value, source) for name, value in request.config_env.items()]
    for name, value in request.keys.items():
        given.append(flag(name, value, f"as SGLANG_{name.replace('-', '_').upper()} says"))
    given += [flag(name, value, mine) for name, value in request.flags.items()]
    given += [env(name, value, "as set in the environment") for name, value in request.env.items()]
    prediction = predicted(overridden(everything, given)) if predicted else None
    return Plan(model.path, request.evidence, overridden(settings, given), found, tuple(sentences), prediction)


_Predicts = Callable[[Iterable[Setting]], str | None]
"""From all settings, the user's own among them, what a step should take."""
_Decided = tuple[list[Setting], Fit, list[str], _Predicts | None]


def _on_cuda(machine: Machine, model: Model, request: Request) -> _Decided:
    _require_driver(machine)
    cards = choose(machine, model, request.gpus, values.number(request, "tp-size"))
    gpu, tp = cards.gpu, cards.tp
    best = request.best(cards.names)
    request = replace(request, config_env={**best.variables, **request.config_env})
    sm12x, forced = gpu.sm in SM12X, request.variable("SGLANG_SM120_FORCE") == "1"
    emulated = forced and not sm12x
    with_nvfp4 = nvfp4_experts(model.config)
    nvfp4 = with_nvfp4 and (sm12x or forced)
    if with_nvfp4 and not nvfp4 and gpu.sm < 100:
        raise LaunchError(
            f"The model's experts are NVFP4, which SGLang 0.5.23 loads on Blackwell alone, and {gpu.name} has compute "
            f"capability {gpu.compute_capability}: use a checkpoint with MXFP4."
        )
    try:
        prefill = takes_prefill(request.variable("SGLANG_SM120_PREFILL") or ("overlay" if nvfp4 else None), emulated)
    except ValueError as refusal:
        raise LaunchError(str(refusal)) from None
    absent = [f"{gpu.name} is none of SM12x"]
    if sm12x or forced:
        absent = _without_step(request, machine, takes_prefill=prefill, emulated=emulated)
    draft = values.draft_tokens(request, model)
    if nvfp4:
        _require_step(request, sm12x, absent if prefill else ["SGLANG_SM120_PREFILL=sglang was given"], draft)
    lines = [(f"memory of {gpu.name}", cards.memory_mib * MIB), ("CUDA context and driver", -memory.CONTEXT)]
    if cards.used_mib:
        lines.append(("used by other processes", -cards.used_mib * MIB))
    if tp > 1:
        lines.append(("NCCL", -memory.NCCL))
    if gpu.unified:
        lines.append(("operating system (unified memory)", -HOST_SHARE))
    step: Step = "none" if absent else "all" if prefill else "decode"
    usable = sum(size for _, size in lines)
    room = Room(
        gpu.name, tuple(lines), usable, tp, step, draft, cards.ep, sm12x=sm12x, patched=request.patched
    )
    preferred = best.chunk or (4096 if sm12x else 8192)
    found = fit(model, room, values.given(request, model), preferred)
    settings = [
        flag("model-path", model.path, "the model to serve"),
        *rank_settings(machine, cards),
        *memory_settings(model, room, found, preferred, proved=best.chunk is not None),
        *graph_settings(found, room),
        *step_settings(room, request, best.variables),
        *(nvfp4_settings() if nvfp4 else loading_settings(room, request)),
        *(mtp_settings(draft) if request.mtp else ()),
        *(dspark_settings(model, draft - 1) if request.dspark else ()),
        *served_settings(),
        *comms(machine, tp),
    ]
    sentences = [*cards.notes, *notes(machine, tp), *([NVFP4_NOTE] if nvfp4 else ())]
    if absent:
        sentences.append(f"SGLang's own forward serves every pass: {', '.join(absent)}.")

    def predicted(chosen: Iterable[Setting]) -> str | None:
        by = predict.way(chosen, tp)
        return predict.sentence(model, gpu.name, tp, by, found.requests, speculates=draft > 0)

    return settings, found, sentences, None if absent else predicted


def _without_step(request: Request, machine: Machine, *, takes_prefill: bool, emulated: bool) -> list[str]:
    """Why SGLang's plugin contract would leave the step out; empty when it takes it.

    Raises:
        LaunchError: the step was asked for by SGLang's flag, which then refuses to start.
    """
    reasons = contract.reasons(request.value, request.variable, takes_prefill=takes_prefill, emulated=emulated)
    given = {feature for feature in contract.FEATURES if any(contract.asked(feature, request.value))}
    if machine.nodes > 1 and "MULTI_NODE_TP" not in given:
        reasons.append("the step does not serve ranks on several nodes")
    if reasons and request.value("enable-nvidia-megakernel") is True:
        raise LaunchError(f"--enable-nvidia-megakernel was given, and {', '.join(reasons)}: leave one of them out.")
    return reasons


def _require_step(request: Request, sm12x: bool, absent: list[str], draft: int) -> None:
    """Raise LaunchError where the step cannot serve a model with NVFP4 experts, which nothing else does on SM12x."""
    backend = request.value("moe-runner-backend")
    do = "leave it out, or use a checkpoint with MXFP4"
    if not sm12x:
        absent, do = ["SGLang loads them on Blackwell alone"], "use a checkpoint with MXFP4"
    elif draft:
        absent = ["SGLang 0.5.23 then puts the drafts' experts in a layout for SM100"]
        do = "leave speculation out"
    elif backend not in (None, NVFP4_RUNNER):
        absent, do = [f"--moe-runner-backend {backend} does not leave them as they are"], "leave it out"
    elif (values.number(request, "ep-size") or 1) > 1:
        absent = ["SGLang 0.5.23 multiplies all experts' input scales by the factors of a rank's own"]
        do = "leave EP out"
    elif (values.number(request, "max-running-requests") or 0) > MAX_ROWS:
        absent, do = [f"it takes {MAX_ROWS} requests at once"], "give a --max-running-requests up to that"
    if absent:
        found = ", ".join(absent)
        raise LaunchError(f"The model's experts are NVFP4, which the step alone serves here, and {found}: {do}.")


def _require_served(request: Request) -> None:
    """Raise LaunchError for what SGLang itself refuses for this model, or fails with."""
    for words in contract.asked("DETERMINISTIC_INFERENCE", request.value):
        raise LaunchError(f"{words} was given, and SGLang 0.5.23 refuses it for DeepSeek-V4: leave it out.")
    if request.value("weight-loader-disable-mmap") is True:
        raise LaunchError(
            "--weight-loader-disable-mmap was given, and without maps safetensors 0.9.0rc1 takes no block scales "
            "(F8_E8M0), which the model has: leave it out."
        )


def _on_cpu(machine: Machine, model: Model, request: Request) -> _Decided:
    if request.dspark:
        raise LaunchError("DSpark's drafts were asked for, and SGLang 0.5.23 has them on a GPU alone: leave them out.")
    if nvfp4_experts(model.config):
        raise LaunchError(
            "The model's experts are NVFP4, which SGLang 0.5.23 loads on Blackwell alone: use a checkpoint with MXFP4."
        )
    tp = values.number(request, "tp-size") or machine.nodes
    if tp not in SIZES or not experts_by(model, tp):
        most = max(size for size in SIZES if experts_by(model, size))
        raise LaunchError(
            f"TP {tp} was asked for, and the model's heads, groups and FP8 blocks allow powers of two up to {most}: "
            f"give one of them."
        )
    if tp % machine.nodes:
        raise LaunchError(f"TP {tp} was asked for over {machine.nodes} machines: give a multiple of {machine.nodes}.")
    draft = values.draft_tokens(request, model)
    given = values.given(request, model)
    given = replace(
        given,
        requests=given.requests or CPU_SERVER["max_running_requests"],
        window_ratio=given.window_ratio or CPU_SERVER["swa_full_tokens_ratio"],
        max_tokens=given.max_tokens or CPU_SERVER["max_total_tokens"],
        chunk=given.chunk or CPU_CHUNK,
    )
    local = tp // machine.nodes
    lines = (("memory of the host", machine.ram_mib * MIB), ("SGLang's processes", -PROCESSES))
    room = Room("the host", lines, sum(size for _, size in lines) // local, tp, "all", draft, device="cpu")
    found = fit(model, room, given, CPU_CHUNK)
    laptop = "a CPU is for demonstration: a laptop's worth of"
    settings = [
        flag("model-path", model.path, "the model to serve"),
        flag("device", "cpu", "no NVIDIA GPU was found; SGLang does not choose the CPU by itself"),
        *cpu_ranks(machine, tp),
        flag("max-total-tokens", found.pools.full, f"{laptop} cache; SGLang would take all free memory"),
        flag("swa-full-tokens-ratio", found.window_ratio, "so small a cache needs a larger share for the window"),
        *pool_settings(model, found, f"{laptop} requests"),
        flag("sleep-on-idle", True, "SGLang's scheduler would spin on a core while no request is there"),
        *(mtp_settings(draft) if request.mtp else ()),
        *served_settings(),
    ]
    unpatched = "SGLang is not patched here and does not serve this model on a CPU: run `make apply`."
    return settings, found, [] if request.patched else [unpatched], None


def _instead(refusal: Unfit, machine: Machine, model: Model, request: Request) -> str:
    """The refusal as one sentence that says which cards hold the model."""
    small = "give a small checkpoint, all that a CPU is for"
    if request.value("device") == "cpu":
        return f"{refusal}; {small}."
    if not machine.gpus:
        found = _holding(CARD, 0, machine, model, request)
        return (
            f"No NVIDIA GPU was found, so the plan is for the CPU (--machine FILE.json plans for another): {refusal}; "
            f"{small}{f', or use {found}' if found else ''}."
        )
    cards = choose(machine, model, request.gpus, values.number(request, "tp-size"))
    free = replace(machine, gpus=tuple(replace(gpu, used_mib=0) for gpu in machine.gpus))
    if cards.used_mib and _fits(free, model, request):
        return f"{refusal}; free what other processes hold, {gib(cards.used_mib * MIB)} GiB of a card."
    limits = [name for name in LIMITS if name in request.flags or name in request.config_flags]
    for names in (*([name] for name in limits), limits):
        if names and _fits(free, model, _without(request, names)):
            also = " and free what other processes hold" if cards.used_mib else ""
            return f"{refusal}; leave out --{' and --'.join(names)}{also}."
    gpu = replace(cards.gpu, used_mib=0)
    more = CARD if gpu.memory_mib < CARD.memory_mib else None
    for names in ([], limits):
        asked = _without(request, names)
        found = _holding(gpu, cards.tp, machine, model, asked)
        if found or (more and (found := _holding(more, 0, machine, model, asked))):
            return f"{refusal}; use {found}{', and leave out --' if names else ''}{' and --'.join(names)}."
        if not limits:
            break
    return f"{refusal}; use cards with more memory."


def _fits(machine: Machine, model: Model, request: Request) -> bool:
    try:
        _on_cuda(machine, model, request)
    except LaunchError:
        return False
    return True


def _without(request: Request, names: Iterable[str]) -> Request:
    """The request as if the user had not given these flags."""
    flags, config_flags = (
        {flag: value for flag, value in given.items() if flag not in names}
        for given in (request.flags, request.config_flags)
    )
    return replace(request, flags=flags, config_flags=config_flags)


def _holding(gpu: Gpu, above: int, machine: Machine, model: Model, request: Request) -> str | None:
    """How many of a card, more than `above`, hold what is asked for, and what they leave; None where 16 do not."""
    request = replace(_without(request, PLACED), gpus=None)
    driver, cuda = machine.driver or str(DRIVER), machine.cuda or ".".join(map(str, CUDA))
    host = replace(machine, driver=driver, cuda=cuda, link=machine.link or "root", p2p=bool(machine.p2p))
    fewer = ""
    for count in sorted({*SIZES, 2 * max(SIZES)}):
        local = 1 if gpu.unified else min(count, max(SIZES))
        host = replace(host, gpus=(gpu,) * local, nodes=count // local)
        if count <= above:
            continue
        try:
            found = _on_cuda(host, model, request)[1]
        except Unfit as refusal:
            fewer = f"; {count} would not, with {gib(refusal.taken)} GiB of weights and scratch each"
        except LaunchError:
            continue
        else:
            what = gpu.name if gpu is CARD else "such cards"
            where = f", {local} on each of {host.nodes} nodes" if host.nodes > 1 else ""
            # A machine of several nodes is a file's, which fixes their number.
            where += f" (`plan --nodes {host.nodes}`)" if host.nodes > 1 and machine.nodes == 1 else ""
            return (
                f"{count} {what}{where}: at TP {count} {gib(found.taken)} GiB of weights and scratch leave "
                f"{gib(found.left)} GiB of each, with a cache of {found.pools.full} tokens{fewer}"
            )
    return None


def _require_driver(machine: Machine) -> None:
    if machine.driver is None or machine.cuda is None:
        raise LaunchError(f"There are {len(machine.gpus)} GPUs and no NVIDIA driver: install {DRIVER} or newer.")
    major, minor = (int(part) for part in machine.cuda.split(".")[:2])
    if (major, minor) < CUDA:
        raise LaunchError(
            f"Driver {machine.driver} serves CUDA {machine.cuda} and the pinned PyTorch needs CUDA "
            f"{CUDA[0]}.{CUDA[1]}: install driver {DRIVER} or newer."
        )
