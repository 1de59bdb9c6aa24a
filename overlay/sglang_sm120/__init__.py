"""Runs DeepSeek-V4 under SGLang where upstream has no path: consumer Blackwell (SM12x) and, for tests, CPU.

The patches call this module at three points: `prepare` where SGLang applies its DeepSeek-V4 defaults (parent
process, before the schedulers start), `activate` when the model class is built (every worker), and `active` at
each redirected call site. All of them are reached from DeepSeek-V4 code only, so another model never activates
the overlay, whatever the device.

Environment variables (all of them):

| variable | values | meaning |
|---|---|---|
| `SGLANG_SM120_PROVIDER` | `torch`, or `op=provider,…` | provider for all ops, or for single ops |
| `SGLANG_SM120_FORCE` | `1` | activate on any CUDA device, non-torch providers first (tests) |
| `SGLANG_SM120_PDL` | `0` | no programmatic dependent launches |
"""

from __future__ import annotations

import logging
import os

__version__ = "0.1.0"

logger = logging.getLogger(__name__)

_active = False
_prepared = False

# SGLang's own switches that would otherwise pick a kernel SM12x and CPU do not have. They are read at import in
# the scheduler processes, so they must be in the environment before those start.
_SWITCHES = {
    "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
    "SGLANG_OPT_DEEPGEMM_HC_PRENORM": "0",
    "SGLANG_FP8_PAGED_MQA_LOGITS_TORCH": "1",
    "SGLANG_OPT_USE_TOPK_V2": "0",
    "SGLANG_OPT_FP8_WO_A_GEMM": "1",
    # The compressor plan made on the host keeps no draft tokens.
    "SGLANG_PREP_IN_CUDA_GRAPH": "1",
}


# A laptop's worth of cache (SGLang sizes the pool by all free memory otherwise), and a core that is free while no
# request is there.
_CPU_SERVER_DEFAULTS = {
    "max_total_tokens": 32768,
    "max_running_requests": 8,
    "swa_full_tokens_ratio": 0.4,
    "disable_cuda_graph": True,
    "sleep_on_idle": True,
}


def server_defaults(device: str) -> dict[str, object]:
    """SGLang server arguments to use where the user gave none."""
    return dict(_CPU_SERVER_DEFAULTS) if device.startswith("cpu") else {}


def no_cuda_driver() -> bool:
    """Whether this is a CUDA build of torch on a machine without libcuda, where `import sgl_kernel` fails."""
    import ctypes

    import torch

    if torch.version.cuda is None:
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def supports(device: str) -> bool:
    """Whether the overlay serves DeepSeek-V4 on `device` (`"cuda"`, `"cuda:0"`, `"cpu"`): SM12x, CPU or forced."""
    kind = device.split(":")[0]
    if kind == "cpu":
        return True
    if kind != "cuda":
        return False
    if os.environ.get("SGLANG_SM120_FORCE") == "1":
        return True
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 12


def prepare(device: str, tp_size: int) -> bool:
    """Set the process environment that the schedulers inherit; return `supports(device)`.

    Args:
        device: SGLang's `--device` (`"cuda"` or `"cpu"`).
        tp_size: tensor-parallel ranks; on CPU the usable cores are divided among them.
    """
    global _prepared
    if not supports(device):
        return False
    _prepared = True
    switches = dict(_SWITCHES)
    if device.startswith("cpu"):
        # SGLang's own Triton kernels (metadata, allocator) run in Triton's interpreter.
        switches["TRITON_INTERPRET"] = "1"
    for name, value in switches.items():
        found = os.environ.get(name)
        if found is not None and found != value:
            logger.warning("%s=%s is replaced by %s: DeepSeek-V4 runs through sglang_sm120 here.", name, found, value)
        os.environ[name] = value
    if device.startswith("cpu"):
        cores = _cores_of_ranks(tp_size)
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, cpus)) for cpus in cores))
        # More threads than cores make OpenMP's barriers spin against each other.
        os.environ.setdefault("OMP_NUM_THREADS", str(min(map(len, cores))))
    return True


def _cores_of_ranks(tp_size: int) -> list[list[int]]:
    """CPU ids for each rank, equally many; ranks share cores when there are fewer cores than ranks."""
    cpus = sorted(os.sched_getaffinity(0))
    share = max(1, len(cpus) // tp_size)
    return [[cpus[(rank * share + i) % len(cpus)] for i in range(share)] for rank in range(tp_size)]


def warmup_sampling() -> dict[str, float]:
    """Sampling parameters of the request that SGLang sends itself before it says ready; none for its own, greedy.

    A request that samples makes it build its sampling kernels (70 s with nvcc), which otherwise the first user's does.
    """
    return {"temperature": 0.7, "top_p": 0.9} if _prepared else {}


def activate(device: str) -> bool:
    """Called once per worker by the DeepSeek-V4 model class before it builds a layer."""
    global _active
    _active = supports(device)
    return _active


def ready() -> None:
    """Called once per worker when it begins to serve: a compilation from here on is logged and counted."""
    if _active:
        from . import kernels

        kernels.freeze()


def active() -> bool:
    """Whether redirected call sites use the overlay in this process; False until `activate`."""
    return _active


def launches_dependently() -> bool:
    """Whether the overlay is active and its kernels may start while the one before still runs."""
    if not _active:
        return False
    from . import kernels

    return kernels.dependent()
