"""How long a decode step should take on cards that nobody has measured: by the bytes it reads and what an H200 showed.

    ms(b) = weights(b) / (SHARE * bandwidth) + launches(b) + rest(b) + sums * sum(b)

`weights(b)` are a rank's bytes that b requests' tokens touch: all dense ones and the head, and of E experts a layer
those that b independent choices of k meet, E (1 - (1 - k/E)^b). `launches(b)` is the time between an H200's kernels,
`rest(b)` what else those two leave of a step measured there: latencies, the cache. The sums over ranks, two a layer,
take what others say of them. No step takes less time than one of fewer requests. Not counted: reading long contexts,
and whatever SM120 does otherwise than a Hopper card with its code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Literal

from .comms import PCIE_IPC
from .model import Kind, Model
from .settings import Setting

BANDWIDTH = {
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 1792.0,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 1792.0,
    "NVIDIA GeForce RTX 5090": 1792.0, "NVIDIA GB10": 273.0, "NVIDIA H200": 4800.0,
}  # fmt: skip
"""GB/s as the maker says, by NVML's name; of the RTX PRO 6000 Server Edition sources disagree."""
SHARE = 0.912
"""With it cuBLAS reads the head on an H200: 1.059 GB in 241.8 us (results/2026-11-29-h200/decode-step.json)."""
Way = Literal["SGLang", "FlashInfer", "NCCL", "RoCE"]
"""How ranks sum: SGLang's all-reduce of two ranks, FlashInfer's over PCIe, NCCL's of eight cards, or of two GB10."""
SUMS_US: Mapping[Way, Mapping[float, float]] = {
    "SGLang": {0: 10.0, 1: 10.0},
    "FlashInfer": {12: 5.3, 96: 15.3, 384: 34.6},
    "NCCL": {12: 205.1, 96: 584.9, 384: 1169.3},
    "RoCE": {8: 35.2, 32: 39.6, 64: 67.9},
}
"""KiB that a rank sums -> us. SGLang's is assumed; the next two are of eight SM120 cards by SGLang 0.5.23's
pcie_ipc_ar.py, the last by github.com/NVIDIA/dgx-spark-playbooks/pull/103. Straight lines between; the last goes on."""
FORMULA = f"weights(b) / ({SHARE} * bandwidth) + launches(b) + rest(b) + sums * sum(b)"
"""`step_ms` in short."""
LAYERS = 43
LAUNCHES_MS = {1: 0.04, 2: 0.04, 4: 0.04, 8: 0.02, 16: 0.02, 32: 0.08}
"""Of LAYERS layers: an H200's step less the time in which a kernel ran, for 1, 8 and 32 requests (1,131, 1,238 and
1,514 launches, results/2026-11-30-h200-eagle/profile-sglang-draft.json); for the others as for fewer."""
REST_MS = {1: 2.38, 2: 2.54, 4: 2.04, 8: 0.94, 16: -0.23, 32: 0.42}
"""Of LAYERS layers, from results/2026-11-30-h200-three-runs/side-by-side.json (SM120 lowering, 128 experts, TP 1).
Negative where less was read, or faster, than the first term says."""
SGLANGS_REST_MS = {1: 5.75, 8: 3.34, 32: 1.75}
"""The same of SGLang's own forward there, native, its launches included."""
TOLD = (1, 8, 32)
OFF = 0.15
"""By so much two H200 with all experts at most differed from this formula, which is not made from their figures
(results/2026-11-30-h200-tp2/decode.json). Of another card nobody knows."""


def weights(model: Model, rows: int, tp: int) -> float:
    """Bytes that one rank reads in a step of so many requests."""
    experts = model.config["n_routed_experts"]
    met = 1 - (1 - model.config["num_experts_per_tok"] / experts) ** rows

    def read(kind: Kind, size: int) -> float:
        if kind.owner == "mtp":
            return 0.0
        # Of the embedding, as large as the head, a step reads a row for each token.
        share = 0.5 if kind.owner == "shared" else met if kind.expert else 1.0
        return size * share / (tp if kind.sharded else 1)

    return sum(read(kind, size) for kind, size in model.bytes_of.items())


def way(settings: Iterable[Setting], tp: int) -> Way | None:
    """How ranks on one host sum with these settings; None where nobody has said what that takes."""
    chosen = {entry.name: entry.value for entry in settings}
    if tp == 1 or chosen.get("disable-custom-all-reduce") is False:
        return "SGLang"
    return "FlashInfer" if chosen.get(PCIE_IPC) == "1" else "NCCL" if tp == 8 else None


def sum_ms(model: Model, rows: int, by: Way) -> float:
    """Milliseconds of one sum over ranks of so many rows in bf16."""
    points = [*SUMS_US[by].items()]
    size = max(rows * model.config["hidden_size"] * 2 / 1024, points[0][0])
    (low, first), (high, second) = next((two for two in pairwise(points) if size <= two[1][0]), points[-2:])
    return (first + (size - low) * (second - first) / (high - low)) / 1000


def terms(model: Model, card: str, tp: int, rows: int, by: Way = "SGLang") -> dict[str, float]:
    """Milliseconds of each term of a step of as many requests as `REST_MS` names, for a card that `BANDWIDTH` has."""
    layers = model.config["num_hidden_layers"]
    return {
        "weights": weights(model, rows, tp) / (SHARE * BANDWIDTH[card] * 1e6),
        "launches": LAUNCHES_MS[rows] * layers / LAYERS,
        "rest": REST_MS[rows] * layers / LAYERS,
        "sums": 2 * layers * sum_ms(model, rows, by) if tp > 1 else 0.0,
    }


def step_ms(model: Model, card: str, tp: int, by: Way = "SGLang") -> dict[int, float]:
    """Milliseconds a decode step of as many requests as `REST_MS` names; empty for a card of unknown bandwidth."""
    if card not in BANDWIDTH:
        return {}
    found = (sum(terms(model, card, tp, rows, by).values()) for rows in REST_MS)
    return dict(zip(REST_MS, accumulate(found, max), strict=True))


def sentence(model: Model, card: str, tp: int, by: Way | None, requests: int, *, speculates: bool) -> str | None:
    """The prediction for up to so many requests in words; None for a card of unknown bandwidth, or unknown sums."""
    found = step_ms(model, card, tp, by) if by else {}
    if not found:
        return None
    told = ", ".join(
        f"{found[rows]:.1f} ms for {rows} ({rows * 1000 / found[rows]:.0f} tokens/s)"
        for rows in TOLD
        if rows <= requests
    )
    plain = " without speculation" if speculates else ""
    return (
        f"Predicted, not measured: a decode step{plain} takes {told} requests of little context, by the bytes it reads "
        f"and what an H200 showed; two H200 were up to {OFF:.0%} off (docs/launcher.md, Prediction)."
    )
