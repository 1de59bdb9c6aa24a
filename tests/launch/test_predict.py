"""The prediction of a decode step: what it is made from, and what it says."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_sm120_launch import predict
from sglang_sm120_launch.model import Model, _from_config

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "results/2026-11-30-h200-three-runs/side-by-side.json"
TWO_CARDS = ROOT / "results/2026-11-30-h200-tp2/decode.json"
SHEET = ROOT / "docs/launcher.md"


def test_the_rest_is_what_the_measurement_leaves(flash: Model):
    measured = json.loads(MEASURED.read_text())
    config = {**flash.config, "n_routed_experts": measured["experts"]}
    served = replace(flash, config=config, tensors=_from_config(config))
    for rows, rest in predict.REST_MS.items():
        ms = statistics.median(measured["figures"]["sm120"][f"decode {rows} 1024"])
        read = predict.weights(served, rows, 1) / (predict.SHARE * predict.BANDWIDTH["NVIDIA H200"] * 1e6)
        assert rest == pytest.approx(ms - read, abs=0.006)


def test_how_far_two_cards_were_off(flash: Model):
    """Two ranks with all experts, by which no part of the formula was chosen."""
    measured = json.loads(TWO_CARDS.read_text())
    assert (measured["experts"], measured["asked"]["tp"]) == (256, 2) and flash.config["n_routed_experts"] == 256
    predicted = predict.step_ms(flash, measured["gpu"], 2)
    off = [
        statistics.median(measured["figures"]["sm120"][f"decode {rows} 1024"]) / predicted[rows] - 1
        for rows in predict.TOLD
    ]
    assert max(map(abs, off)) == pytest.approx(predict.OFF, abs=0.005)


def sheet(columns: int) -> list[list[str]]:
    """Rows of the one table of docs/launcher.md that is of cards and has so many columns."""
    rows = [line for line in SHEET.read_text().splitlines() if re.match(r"\| \d × ", line)]
    found = [cells for row in rows if len(cells := [cell.strip() for cell in row.strip("|").split("|")]) == columns]
    assert len(found) >= 2
    return found


def test_the_prefill_of_the_sheet_is_its_formulas():
    measured = json.loads(MEASURED.read_text())["figures"]["sm120"]
    assert statistics.median(measured["prefill 8192"]) == pytest.approx(7544, abs=0.5)
    for what, rates, tokens in sheet(3):
        cards = int(what[0])
        for rate, told in zip(rates.split(" to "), tokens.split(" to "), strict=True):
            computed = 8192 / (7544 * cards * int(rate) / 383)
            sums = 2 * 43 * 2 * (cards - 1) / cards * 67.1e6 / 50e9
            assert int(told.replace(",", "")) == pytest.approx(8192 / (computed + sums), abs=50)


def test_the_sheet_is_the_formulas(flash: Model):
    """The table of docs/launcher.md, row by row."""
    for what, read, ms, tokens in sheet(4):
        tp, card = int(what[0]), "NVIDIA " + what[4:]
        predicted = predict.step_ms(flash, card, tp)
        assert read == ", ".join(f"{predict.weights(flash, b, tp) / 1e9:.1f}" for b in predict.TOLD)
        assert ms == ", ".join(f"{predicted[b]:.1f}" for b in predict.TOLD)
        assert tokens == ", ".join(f"{b * 1000 / predicted[b]:,.0f}" for b in predict.TOLD)


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
    assert 5.0 < two[1] < 5.0 * 2.7 / 2 + 2 * 43 * predict.SUM_MS
    told = predict.sentence(flash, card, 2, 8, speculates=True)
    assert told is not None and f"{two[1]:.1f} ms for 1 ({1000 / two[1]:.0f} tokens/s)" in told
    assert "without speculation" in told and "for 8 (" in told and "for 32" not in told
    assert "speculation" not in str(predict.sentence(flash, card, 2, 64, speculates=False))
    # Another card by a name that begins alike.
    for other in ("NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA RTX PRO 6000 Blackwell Server Edition"):
        assert predict.sentence(flash, other, 2, 8, speculates=False) is None
