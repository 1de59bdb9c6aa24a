"""How long a decode step should take on cards that nobody has measured: by the bytes it reads and what an H200 showed.

    ms(b) = weights(b) / (SHARE * bandwidth) + rest(b) + sums * SUM_MS

`weights(b)` are a rank's bytes that b requests' tokens touch: all dense ones and the head, and of E experts a layer
those that b independent choices of k meet, E (1 - (1 - k/E)^b). `rest(b)` is what that leaves of a step measured on an
H200: latencies, launches, the cache. The sums over ranks, two a layer, are assumed. No step takes less time than one of
fewer requests. Not counted: reading long contexts, and whatever SM120 does otherwise than a Hopper card with its code.
"""

from __future__ import annotations

from itertools import accumulate

from .model import Kind, Model

BANDWIDTH = {
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 1792.0,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 1792.0,
    "NVIDIA GeForce RTX 5090": 1792.0, "NVIDIA GB10": 273.0, "NVIDIA H200": 4800.0,
}  # fmt: skip
"""GB/s as the maker says, by NVML's name; of the RTX PRO 6000 Server Edition sources disagree."""
SHARE = 0.912
"""With it cuBLAS reads the head on an H200: 1.059 GB in 241.8 us (results/2026-11-29-h200/decode-step.json)."""
SUM_MS = 0.010
"""One sum over ranks; assumed."""
FORMULA = f"weights(b) / ({SHARE} * bandwidth) + rest(b) + sums * {SUM_MS}"
"""`step_ms` in short."""
LAYERS = 43
REST_MS = {1: 2.42, 2: 2.58, 4: 2.08, 8: 0.96, 16: -0.21, 32: 0.50}
"""Of LAYERS layers, from results/2026-11-30-h200-three-runs/side-by-side.json (SM120 lowering, 128 experts, TP 1).
Negative where less was read, or faster, than the first term says."""
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


def step_ms(model: Model, card: str, tp: int) -> dict[int, float]:
    """Milliseconds a decode step of as many requests as `REST_MS` names; empty for a card of unknown bandwidth."""
    if card not in BANDWIDTH:
        return {}
    layers = model.config["num_hidden_layers"]
    sums = 2 * layers * SUM_MS if tp > 1 else 0.0
    found = (
        weights(model, rows, tp) / (SHARE * BANDWIDTH[card] * 1e6) + rest * layers / LAYERS + sums
        for rows, rest in REST_MS.items()
    )
    return dict(zip(REST_MS, accumulate(found, max), strict=True))


def sentence(model: Model, card: str, tp: int, requests: int, *, speculates: bool) -> str | None:
    """The prediction for up to so many requests in words; None for a card of unknown bandwidth."""
    found = step_ms(model, card, tp)
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
