"""The prediction of a decode step: what it is made from, and what it says."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_sm120.checkpoint.config import FLASH
from sglang_sm120_launch import predict
from sglang_sm120_launch.comms import comms
from sglang_sm120_launch.machine import Machine
from sglang_sm120_launch.model import Model, _from_config

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MEASURED = ROOT / "results/2026-11-30-h200-three-runs/side-by-side.json"
PREFILL = ROOT / "results/2026-12-01-h200-prefill/side-by-side.json"
TWO_CARDS = ROOT / "results/2026-11-30-h200-tp2/decode.json"
PROFILE = ROOT / "results/2026-11-30-h200-eagle/profile-sglang-draft.json"
SHEET = ROOT / "docs/launcher.md"
BAR = (-0.13, 0.15)
"""By so much two H200 were below and above the formula."""
NAMES = {
    "RTX PRO 6000": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    "RTX 5090": "NVIDIA GeForce RTX 5090",
    "GB10": "NVIDIA GB10",
}
MACHINES: tuple[tuple[int, str, predict.Way, tuple[float, float], tuple[float, float]], ...] = (
    (2, "RTX PRO 6000", "SGLang", (368, 417), (50, 50)),
    (4, "RTX PRO 6000", "FlashInfer", (368, 417), (50, 50)),
    (8, "RTX 5090", "NCCL", (179, 240), (3.6, 28)),
    (2, "GB10", "RoCE", (92, 92), (12, 20)),
)
"""Cards, how they sum, and what others report, least and most: TFLOPS of bf16 products, GB/s of large sums."""


def half(flash: Model, experts: int) -> Model:
    """The model that was measured."""
    config = {**flash.config, "n_routed_experts": experts}
    return replace(flash, config=config, tensors=_from_config(config))


def test_the_rest_is_what_the_measurement_leaves(flash: Model):
    measured = json.loads(MEASURED.read_text())
    served = half(flash, measured["experts"])
    rests = {
        "sm120": {rows: rest + predict.LAUNCHES_MS[rows] for rows, rest in predict.REST_MS.items()},
        "sglang": predict.SGLANGS_REST_MS,
    }
    for side, rest in rests.items():
        for rows, told in rest.items():
            ms = statistics.median(measured["figures"][side][f"decode {rows} 1024"])
            read = predict.weights(served, rows, 1) / (predict.SHARE * predict.BANDWIDTH["NVIDIA H200"] * 1e6)
            assert told == pytest.approx(ms - read, abs=0.006)


def test_launches_are_what_no_kernel_takes():
    """Of a step that was streamed, beside its kernels under the profiler."""
    profile = json.loads(PROFILE.read_text())
    for step, traced in zip(profile["steps"], profile["profiles"], strict=True):
        if not step["eagle"]:
            busy = sum(replay["busy_us"] for replay in traced["replays"]) + traced["between_kernels_us"]
            assert predict.LAUNCHES_MS[step["batch"]] == pytest.approx(step["ms"] - busy / 1000, abs=0.006)
            assert f"{traced['replays'][0]['launches']:,}" in SHEET.read_text()
    one = profile["profiles"][0]["replays"][0]
    assert f"{one['kernels_us'] / 1000:.2f} ms of them run in {one['busy_us'] / 1000:.2f} ms" in SHEET.read_text()
    assert predict.LAYERS == profile["layers"]


def off(flash: Model, side: str) -> list[float]:
    """By how much two H200 with all experts, by which no part of the formula was chosen, differ from it."""
    measured = json.loads(TWO_CARDS.read_text())
    assert (measured["experts"], measured["asked"]["tp"]) == (256, 2) and flash.config["n_routed_experts"] == 256
    predicted = {rows: step(flash, measured["gpu"], 2, rows, "SGLang", side) for rows in predict.TOLD}
    return [
        statistics.median(measured["figures"][side][f"decode {rows} 1024"]) / predicted[rows] - 1
        for rows in predict.TOLD
    ]


def test_how_far_two_cards_were_off(flash: Model):
    step_off, sglang_off = off(flash, "sm120"), off(flash, "sglang")
    assert max(map(abs, step_off)) == pytest.approx(predict.OFF, abs=0.005)
    told = "by {:+d} %, {:+d} % and {:+d} % from the step's lines, by {:+d} %, {:+d} % and {:+d} % from SGLang's own"
    assert told.format(*(round(share * 100) for share in (*step_off, *sglang_off))) in SHEET.read_text()
    assert min(step_off) >= BAR[0] - 0.005 and max(step_off) <= BAR[1] + 0.005 and BAR[1] >= max(sglang_off)


def step(flash: Model, card: str, tp: int, rows: int, by: predict.Way, side: str) -> float:
    """Milliseconds by the step's line, or by SGLang's own, whose launches are in its rest."""
    found = predict.terms(flash, card, tp, rows, by)
    if side == "sglang":
        found |= {"launches": 0.0, "rest": predict.SGLANGS_REST_MS[rows]}
    return sum(found.values())


def steps(flash: Model) -> Iterator[str]:
    """The sheet's lines on a decode step."""
    for tp, card, by, _, _ in MACHINES:
        side = "sglang" if by == "RoCE" else "sm120"
        for rows in predict.TOLD:
            found = predict.terms(flash, NAMES[card], tp, rows, by)
            launches, rest = f"{found['launches']:.2f}", found["rest"]
            if side == "sglang":
                launches, rest = "in the rest", predict.SGLANGS_REST_MS[rows]
            ms = step(flash, NAMES[card], tp, rows, by, side)
            assert side == "sglang" or ms == pytest.approx(predict.step_ms(flash, NAMES[card], tp, by)[rows])
            low, high = (ms * (1 + share) for share in BAR)
            yield (
                f"| {tp} × {card} | {rows} | {predict.weights(flash, rows, tp) / 1e9:.1f} | {found['weights']:.2f} | "
                f"{launches} | {rest:.2f} | {found['sums']:.2f} | **{ms:.1f}** ({low:.1f} to {high:.1f}) | "
                f"{rows * 1000 / ms:,.0f} | *unverified* |"
            )


def prefills() -> Iterator[str]:
    """Its lines on prefill, from the slowest products and sums to the quickest."""
    for tp, card, _, rates, links in MACHINES:
        computed = [8192 / (7918 * tp * rate / 383) for rate in rates]
        sums = [2 * 43 * 2 * (tp - 1) / tp * 67.1e6 / (link * 1e9) for link in links]
        tokens = [8192 / sum(both) for both in zip(computed, sums, strict=True)]
        texts = [" to ".join(dict.fromkeys(f"{value:{form}}" for value in values)) for values, form in (
            (rates, "g"), (links, "g"), (computed, ".2f"), (sums, ".2f"), ([round(one, -2) for one in tokens], ",.0f")
        )]  # fmt: skip
        yield f"| {tp} × {card} | {' | '.join(texts[:4])} | **{texts[4]}** | *unverified* |"


def test_the_sheet_is_the_formulas(flash: Model):
    """The tables of docs/launcher.md, line by line, and no other line on so many cards."""
    measured = json.loads(PREFILL.read_text())["figures"]["sm120"]
    assert statistics.median(measured["prefill 8192"]) == pytest.approx(7918, abs=0.5)
    found = [line for line in SHEET.read_text().splitlines() if re.match(r"\| \d × ", line)]
    assert found == [*steps(flash), *prefills()]


def test_what_a_sum_takes(flash: Model):
    """As in SGLang's source at the sizes it names, a straight line between, and no less than its smallest."""
    hidden = replace(flash, config={**flash.config, "hidden_size": 6144})
    assert [predict.sum_ms(hidden, rows, "NCCL") for rows in (1, 8, 32)] == pytest.approx([0.2051, 0.5849, 1.1693])
    assert predict.sum_ms(flash, 1, "NCCL") == pytest.approx(0.2051)
    assert predict.sum_ms(flash, 8, "RoCE") == pytest.approx(0.0679)
    assert predict.sum_ms(flash, 16, "RoCE") == pytest.approx(0.0679 + 64 * (0.0679 - 0.0396) / 32)
    assert {predict.sum_ms(flash, rows, "SGLang") for rows in (1, 32)} == {0.01}


def test_how_ranks_sum():
    """By what the plan chooses; nobody has said what NCCL takes for two or four cards without peer access."""
    ways = {
        "1x-rtx-pro-6000": "SGLang", "2x-rtx-pro-6000": "SGLang", "2x-rtx-pro-6000-no-p2p": None, "2x-h200": "SGLang",
        "4x-rtx-pro-6000": "FlashInfer", "8x-rtx-5090": "NCCL",
    }  # fmt: skip
    for name, by in ways.items():
        host = Machine.from_json(HERE / "machines" / f"{name}.json")
        assert predict.way(comms(host, len(host.gpus)), len(host.gpus)) == by, name
    plan = json.loads((HERE / "golden/2x-rtx-pro-6000-no-p2p.json").read_text())
    assert plan["prediction"] is None
    told = json.loads((HERE / "golden/8x-rtx-5090.json").read_text())["prediction"]
    ms = predict.step_ms(Model.load(FLASH), "NVIDIA GeForce RTX 5090", 8, "NCCL")[1]
    assert f"takes {ms:.1f} ms for 1 " in told


def test_bytes_of_a_step(flash: Model):
    """One token meets 6 of 256 experts, very many all; two ranks halve what is sharded, and no MTP layer is read."""
    one, all_experts = (predict.weights(flash, rows, 1) for rows in (1, 10**6))
    experts = sum(size for kind, size in flash.bytes_of.items() if kind.expert and kind.owner == "layers")
    assert all_experts - one == pytest.approx(experts * (1 - 6 / 256))
    stored = sum(flash.bytes_of.values())
    assert all_experts < stored - sum(size for kind, size in flash.bytes_of.items() if kind.owner == "mtp")
    assert one / 2 < predict.weights(flash, 1, 2) < 0.6 * one


def test_more_requests_take_no_less(flash: Model):
    """A model of few experts, whose bytes hardly grow with the requests."""
    config = {**flash.config, "n_routed_experts": 8}
    few = predict.step_ms(replace(flash, config=config, tensors=_from_config(config)), "NVIDIA H200", 1)
    assert [*few.values()] == sorted(few.values()) and few.keys() == predict.REST_MS.keys()


def test_what_is_told(flash: Model):
    card = "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"
    two = predict.step_ms(flash, card, 2)
    # Two cards of 1 / 2.7 of the bandwidth: longer than the H200's step, less than 2.7 / 2 times it and the sums.
    assert 5.0 < two[1] < 5.0 * 2.7 / 2 + 2 * 43 * 0.010
    told = predict.sentence(flash, card, 2, "SGLang", 8, speculates=True)
    assert told is not None and f"{two[1]:.1f} ms for 1 ({1000 / two[1]:.0f} tokens/s)" in told
    assert "without speculation" in told and "for 8 (" in told and "for 32" not in told
    assert "speculation" not in str(predict.sentence(flash, card, 2, "SGLang", 64, speculates=False))
    # Another card by a name that begins alike.
    for other in ("NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA RTX PRO 6000 Blackwell Server Edition"):
        assert predict.sentence(flash, other, 2, "SGLang", 8, speculates=False) is None


def write() -> None:
    """Print the sheet's lines, for docs/launcher.md."""
    print(*steps(Model.load(FLASH)), "", *prefills(), sep="\n")


if __name__ == "__main__":
    write()
