"""Which flags and variables leave the step out: what SGLang's plugin contract refuses, and what the step itself does.

All of it is found in the arguments, so that a plan needs no SGLang; a test holds the features against SGLang's own
probes and the step's spec. What only the loaded weights show ends the server instead, and no plan can see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from sglang_sm120.limits import ENVIRONMENT, prefill_graphs, server_args

from .settings import Get, Value

FEATURES: Mapping[str, Mapping[str, Value | None]] = {
    "CONTEXT_PARALLEL": {"attn-cp-size": 1, "dcp-size": 1, "enable-prefill-cp": False},
    "CPU_OFFLOAD": {"cpu-offload-gb": 0, "offload-group-size": 0},
    "DETERMINISTIC_INFERENCE": {"enable-deterministic-inference": False, "rl-on-policy-target": None},
    "DP_ATTENTION": {"enable-dp-attention": False, "attn-dp-size": 1},
    "EPLB": {"enable-eplb": False},
    "HISPARSE": {"enable-hisparse": False},
    "LORA": {"enable-lora": False, "lora-paths": ()},
    "MEMORY_RELEASE": {"enable-memory-saver": False, "enable-weights-cpu-backup": False},
    "MULTI_NODE_TP": {"nnodes": 1},
    "PARTITIONED_GPU": {},
    "PIPELINE_PARALLEL": {"pp-size": 1},
    "RETURN_INDEXER_TOPK": {"enable-return-indexer-topk": False},
    "RETURN_ROUTED_EXPERTS": {"enable-return-routed-experts": False},
    "TORCH_COMPILE": {"enable-torch-compile": False},
    "TWO_BATCH_OVERLAP": {"enable-two-batch-overlap": False, "enable-single-batch-overlap": False},
}
"""Features of SGLang's contract, by name, that the step does not accept, and the flags that ask for each: one does with
a number above the one here, or with anything else than the word here. A GPU that is partitioned is seen by no flag."""
WO_A = "SGLANG_OPT_FP8_WO_A_GEMM"
"""A variable that leaves the step out where it is on, and that SGLang turns off by itself on SM12x."""
SWITCHES = tuple(name for name, needed in ENVIRONMENT.items() if needed is False and name != WO_A)
"""The others that do."""
STATES = "SGLANG_DSV4_COMPRESS_STATE_DTYPE"
PLUGINS = "SGLANG_PLUGINS"
PLUGIN = "nvidia_megakernel"
VARIABLES = (*SWITCHES, WO_A, STATES, PLUGINS)
ON = ("1", "true", "yes", "y")
"""What SGLang reads as on, in any case."""
SHORTEST_WATCHDOG = 10
"""Seconds; with a shorter one SGLang's waits have too little time."""


def asked(feature: str, flags: Get) -> Iterator[str]:
    """The flags, with their values, that ask for a feature."""
    for name, off in FEATURES[feature].items():
        value = flags(name)
        if value is not None and _beyond(value, off):
            yield _written(name, value)


def served(takes_prefill: bool, emulated: bool) -> dict[str, tuple[Value, ...]]:
    """Other flags that leave the step out with any value but these; the arguments are those of `reasons`."""
    named = {"fp8_gemm_runner_backend": "fp8-gemm-backend"}
    found: dict[str, tuple[Value, ...]] = {
        "cuda-graph-backend-decode": ("full", "disabled"),
        "cuda-graph-backend-prefill": prefill_graphs(takes_prefill),
        "enable-amd-monokernel": (False,),
        "enable-deepseek-v4-fp4-indexer": (False,),
    }
    for field, values in server_args(emulated).items():
        # None is a flag that was not given.
        found[named.get(field, field.replace("_", "-"))] = tuple(value for value in values if value is not None)
    if takes_prefill:
        found["disable-prefill-cuda-graph"] = (True,)
    if not emulated:
        # SGLang's choice is the right one.
        found["moe-runner-backend"] += ("auto",)
    return found


def reasons(
    flags: Get, variables: Callable[[str], str | None], *, takes_prefill: bool = False, emulated: bool = False
) -> list[str]:
    """Why the step would be left out, a clause for each reason; empty where it serves.

    Args:
        variables: what the user gave for a variable, None where nothing.
        takes_prefill: the step is asked to take prefill too.
        emulated: SGLANG_SM120_FORCE=1 has the step serve on a card that is no SM12x.
    """
    found = ["SGLANG_SM120=0 is set"] if variables("SGLANG_SM120") == "0" else []
    found += [_refused(words) for feature in FEATURES for words in asked(feature, flags)]
    switches = (*SWITCHES, WO_A) if emulated else SWITCHES
    found += [
        _refused(_written(name, value))
        for name, values in served(takes_prefill, emulated).items()
        if (value := flags(name)) is not None and value not in values
    ]
    watchdog = flags("watchdog-timeout")
    if isinstance(watchdog, int | float) and 0 < watchdog < SHORTEST_WATCHDOG:
        found.append(f"--watchdog-timeout {watchdog:g} leaves SGLang's waits too little time")
    found += [_refused(f"{name}={value}") for name in switches if (value := variables(name) or "").lower() in ON]
    if (dtype := variables(STATES)) not in (None, ENVIRONMENT[STATES]):
        found.append(_refused(f"{STATES}={dtype}"))
    if (plugins := variables(PLUGINS)) and PLUGIN not in (one.strip() for one in plugins.split(",")):
        found.append(f"{PLUGINS}={plugins} does not list {PLUGIN}")
    return found


def _beyond(value: Value, off: Value | None) -> bool:
    if isinstance(off, int) and isinstance(value, int | float):
        return value > off
    return value != off


def _refused(words: str) -> str:
    return f"the step does not serve {words}"


def _written(name: str, value: Value) -> str:
    """A flag as it would be typed."""
    if value is True:
        return f"--{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
