"""Whose forward served a server's passes, from its metrics page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_sm120.limits import GRAPHS, PASSES

REPLAYS = "sglang:cuda_graph_passes"


def read(page: str) -> dict[str, float] | None:
    """Counts since the server started, of a metrics page; None where the step counts nothing in it.

    Keys: `step MODE` and `sglang MODE: REASON` are passes outside of CUDA graphs; `graphs step` and `graphs sglang` are
    decode graphs by whose forward they hold; `replays` of them.
    """
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == f"{PASSES}_total":
                why = f": {labels['why']}" if labels["why"] else ""
                key = f"{labels['by']} {labels['mode']}{why}"
            elif sample.name == f"{GRAPHS}_total":
                key = f"graphs {labels['by']}"
            elif sample.name == f"{REPLAYS}_total" and labels["mode"] == "decode_cuda_graph":
                key = "replays"
            else:
                continue
            found[key] = found.get(key, 0.0) + sample.value
    return found if any(key != "replays" for key in found) else None


def between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What was counted meanwhile; the graphs are those that exist."""
    return {
        key: value if key.startswith("graphs ") else value - before.get(key, 0.0)
        for key, value in after.items()
        if key.startswith("graphs ") or value > before.get(key, 0.0)
    }


def lines(counted: Mapping[str, Any] | None) -> list[str]:
    """For reading: passes by the step and by SGLang's forward, with its reasons."""
    if counted is None:
        return ["passes: not counted (/metrics shows none: the server wants --enable-metrics and the step)"]
    step, own = counted.get("graphs step", 0), counted.get("graphs sglang", 0)
    holders = {(True, False): "the step", (False, True): "SGLang's forward"}
    said = []
    if replays := counted.get("replays"):
        by = holders.get((step > 0, own > 0), f"the step in {step:g} graphs, SGLang's forward in {own:g}")
        said.append(f"passes in CUDA graphs: {replays:g} by {by}")
    for by, name in (("step", "the step"), ("sglang", "SGLang's forward")):
        outside = {key.removeprefix(f"{by} "): value for key, value in counted.items() if key.startswith(f"{by} ")}
        said += [f"passes outside of graphs: {value:g} by {name}, {what}" for what, value in sorted(outside.items())]
    return said or ["passes: none"]
