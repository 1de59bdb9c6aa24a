"""The settings of a plan by what they are about, each with its reason, and the notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sglang_sm120.checkpoint.config import DSPARK_FOLDER
from sglang_sm120.limits import DSPARK, MAX_ROWS

from . import memory
from .cards import Cards
from .comms import SHM_MIB
from .fit import CONTEXT_STEP, Fit, Room
from .machine import Machine
from .model import Model, bundles_dspark
from .settings import Setting, env, flag
from .values import Request

CPU_CHUNK = 4096
EMULATION_VARIABLES = {
    "SGLANG_OPT_FP8_WO_A_GEMM": "the contract asks for wo_a in bf16",
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "the step calls none of the shapes that would be compiled for minutes",
    "SGLANG_OPT_USE_TILELANG_MHC_PRE": "the step has its own mHC",
    "SGLANG_OPT_DEEPGEMM_HC_PRENORM": "the step has its own mHC",
}
"""0 each for a server with the step on a Hopper card (SGLANG_SM120_FORCE=1)."""


def rank_settings(machine: Machine, cards: Cards) -> Iterator[Setting]:
    yield flag("tp-size", cards.tp, cards.why_tp)
    if cards.ep > 1:
        yield flag("ep-size", cards.ep, "parts of every expert would be no whole FP8 blocks: each rank has whole ones")
        yield env("SGLANG_SHARED_EXPERT_TP1", "1", "the shared expert is whole on each rank too, for the same reason")
    yield from _nodes(machine)
    if cards.visible is not None:
        yield env("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "so that CUDA counts the cards as nvidia-smi and this plan do")
        yield env("CUDA_VISIBLE_DEVICES", ",".join(map(str, cards.visible)), cards.why_visible)


def cpu_ranks(machine: Machine, tp: int) -> Iterator[Setting]:
    yield flag("tp-size", tp, "one process on each machine uses all cores" if tp > 1 else "one process uses all cores")
    yield from _nodes(machine)


def _nodes(machine: Machine) -> Iterator[Setting]:
    if machine.nodes > 1:
        yield flag("nnodes", machine.nodes, "hosts that serve one model together; each gets its --node-rank")


def memory_settings(
    model: Model, room: Room, found: Fit, preferred: int, *, proved: bool
) -> Iterator[Setting]:
    """`proved`: whether `preferred` is the chunk that `prove` found on such a card."""
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
    yield from pool_settings(model, found, _why_requests(found), preferred, proved=proved)


def pool_settings(
    model: Model, found: Fit, requests: str, preferred: int = CPU_CHUNK, *, proved: bool = False
) -> Iterator[Setting]:
    longest = model.config["max_position_embeddings"]
    if found.context == longest:
        context = "all the model has; the cache holds one such request"
    else:
        context = f"the cache holds {found.pools.full} tokens, and one request must fit (steps of {CONTEXT_STEP})"
    yield flag("context-length", found.context, context)
    if found.chunk == preferred and proved:
        chunk = "the shortest that is nearly as fast as the best, by the table of this card, which `prove` wrote"
    elif found.chunk == preferred:
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


def graph_settings(found: Fit, room: Room) -> Iterator[Setting]:
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


def mtp_settings(draft_tokens: int) -> Iterator[Setting]:
    yield flag("speculative-algorithm", "EAGLE", "--mtp: how SGLang runs DeepSeek-V4's MTP layer")
    yield flag("speculative-num-steps", draft_tokens - 1, "one draft token for each step, and the verified one")
    yield flag("speculative-eagle-topk", 1, "SGLang supports no wider tree for DeepSeek-V4")
    yield flag("speculative-num-draft-tokens", draft_tokens, "the MTP layer is trained for one; later ones pay less")


def dspark_settings(model: Model, block: int) -> Iterator[Setting]:
    assert model.dspark is not None, "`values.checked` refuses it"
    place = "the checkpoint's own files" if bundles_dspark(model.config) else f"its folder {DSPARK_FOLDER}/"
    trained = model.dspark.block_size
    size = "as it was trained" if block == trained else f"as given, and it was trained for {trained}"
    reason = f"--dspark: SGLang finds the drafter in {place}; blocks of {block}, {size}"
    yield flag("speculative-algorithm", DSPARK, reason)


def served_settings() -> Iterator[Setting]:
    yield flag("reasoning-parser", "deepseek-v4", "thinking is returned apart from the answer")
    yield flag("tool-call-parser", "deepseekv4", "the model's own tool-call format")
    yield flag("grammar-backend", "xgrammar", "SGLang's default for structured output")
    yield flag("enable-metrics", True, "token counters tell a wedged server from a healthy one; /health does not")
    yield flag("uvicorn-access-log-exclude-prefixes", ("/metrics", "/health"), "the watchdog looks there all the time")


def notes(machine: Machine, tp: int) -> Iterator[str]:
    if tp > 1 and machine.shm_mib < SHM_MIB:
        yield f"/dev/shm has {machine.shm_mib} MiB, NCCL wants more: start the container with --shm-size=16g."
    if tp > 1 and machine.iommu == "translated" and machine.link != "nvlink":
        yield "The IOMMU translates peer writes: boot with iommu=pt, or turn it off, for direct transfers."
    if machine.nodes > 1 and not machine.rdma:
        yield "No RDMA device is up: the nodes talk over sockets, which is slow."


BEST = "the fastest prefill on this card by its tuned table, which `prove` wrote"
OWN = f"{BEST}; decode and verification of 65 rows or more have its FP8 activations too"


def step_settings(room: Room, request: Request, best: Mapping[str, str]) -> Iterator[Setting]:
    if room.step == "none":
        return
    for name, value in best.items():
        yield env(name, value, OWN if name == "SGLANG_SM120_PROVIDER" else BEST)
    if not request.patched:
        yield flag("enable-nvidia-megakernel", True, "SGLang is not patched here, so the step is asked for by its flag")
    if room.step == "all":
        yield flag("disable-prefill-cuda-graph", True, "SGLang's prefill graphs hold its own layers, not the step")
    if not room.sm12x:
        yield flag("moe-runner-backend", "triton", "keeps the experts as loaded, for the step to take over")
        yield flag("enforce-disable-flashinfer-allreduce-fusion", True, "SGLang fuses no all-reduce on SM12x either")
        yield from (env(name, "0", reason) for name, reason in EMULATION_VARIABLES.items())


LOADER = "SGLANG_SM120_LOADER"
OTHER_LOADERS = (
    "load-format", "model-loader-extra-config", "weight-loader-prefetch-checkpoints",
    "weight-loader-drop-cache-after-load",
)  # fmt: skip
"""Flags of who wants the weights read in a way of SGLang's."""


def loading_settings(room: Room, request: Request) -> Iterator[Setting]:
    if room.step != "none" and not any(map(request.value, OTHER_LOADERS)):
        yield env(LOADER, "1", "weights are read ahead of the card: 13 s for 20 GB on an H200's host, SGLang's way 18")


NVFP4_RUNNER = "flashinfer_mxfp4"
"""SGLang's runner that leaves the weights of NVFP4 experts as they lie in a checkpoint."""
NVFP4_NOTE = "The input scales of the NVFP4 experts are ignored: the step has activations in bf16."


def nvfp4_settings() -> Iterator[Setting]:
    yield flag("moe-runner-backend", NVFP4_RUNNER, "leaves NVFP4 experts as loaded, for the step to take over")
    yield flag("disable-flashinfer-autotune", True, "its pass, SGLang's own, has more rows than the step takes")
    yield env("SGLANG_SM120_PREFILL", "overlay", "SGLang has no forward for NVFP4 experts on SM12x")
