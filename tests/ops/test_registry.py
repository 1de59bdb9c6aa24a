"""Dispatch: who is chosen, who may refuse, and what a bad setting says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from sglang_sm120 import ops as _ops  # noqa: F401  (so that an op's name in the environment can be checked)
from sglang_sm120 import registry
from sglang_sm120.registry import Arguments, Op, Own, ProviderError
from sglang_sm120.tolerance import EXACT


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_ops", dict(registry._ops))
    monkeypatch.delenv("SGLANG_SM120_PROVIDER", raising=False)
    monkeypatch.delenv("SGLANG_SM120_FORCE", raising=False)
    registry.reset()
    yield
    monkeypatch.undo()
    registry.reset()


def make(default_on: str = "", runs_on: str = "cpu sm80+", accepts=None, own: Own | None = None) -> Op:
    @Op
    def double(x: torch.Tensor, times: int = 2) -> str:
        return "torch"

    @double.provider("fake", runs_on=runs_on, default_on=default_on, accepts=accepts, own=own)
    def double_fake(a: Arguments) -> str:
        return "fake"

    return double


X = torch.zeros(1)


def test_the_reference_serves_unless_a_provider_is_the_default() -> None:
    assert make()(X) == "torch"


def test_a_default_provider_serves() -> None:
    assert make(default_on="cpu")(X) == "fake"


def test_force_makes_a_provider_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SM120_FORCE", "1")
    assert make()(X) == "fake"


def test_force_cannot_choose_what_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SM120_FORCE", "1")
    assert make(runs_on="sm120")(X) == "torch"


OWN = Own(lambda a: f"emulated {a.times}", EXACT, "doubles roughly (compiled, never run)")


def test_arithmetic_of_its_own_is_chosen_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    op = make(own=OWN)
    monkeypatch.setenv("SGLANG_SM120_FORCE", "1")
    assert op(X) == "torch"
    found = {row.provider: row.why for kind in ("cpu", "sm120") for row in registry.table(kind) if row.op == "double"}
    assert found["fake"] == "runs on sm120, off by default: doubles roughly (compiled, never run)"
    monkeypatch.setenv("SGLANG_SM120_PROVIDER", "double=fake")
    registry.reset()
    assert op(X) == "fake"
    with pytest.raises(ProviderError, match="provider fake of op double doubles roughly .*: leave default_on out"):
        monkeypatch.setattr(registry, "_ops", {})
        make(default_on="cpu", own=OWN)


def test_a_provider_is_meant_to_give_the_references_result_or_its_own() -> None:
    assert make(own=OWN).meant("fake", X, times=3) == "emulated 3"
    assert registry.ops()["double"].meant("torch", X) == "torch"


@pytest.mark.parametrize("value", ["torch", "double=torch", " double = torch ,", "fake,double=torch"])
def test_the_environment_switches_back_to_torch(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SGLANG_SM120_PROVIDER", value)
    assert make(default_on="cpu")(X) == "torch"


def test_the_environment_chooses_one_op_or_all_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    op = make()
    for value in ("double=fake", "fake", "torch,double=fake"):
        monkeypatch.setenv("SGLANG_SM120_PROVIDER", value)
        registry.reset()
        assert op(X) == "fake"
        y = registry.ops()["bf16_linear_fp32"](torch.zeros(0, 64).bfloat16(), torch.zeros(8, 64).bfloat16())
        assert y.shape == (0, 8)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("tritn", "asks for provider 'tritn', which any op lacks; use one of fake, mxfp8, sglang, torch"),
        ("double=triton", "asks for provider 'triton', which op double lacks"),
        ("doubel=torch", "names op 'doubel' and needs one of"),
        ("double=", "asks for provider '', which op double lacks"),
    ],
)
def test_a_bad_value_is_one_sentence(monkeypatch: pytest.MonkeyPatch, value: str, sentence: str) -> None:
    op = make()
    monkeypatch.setenv("SGLANG_SM120_PROVIDER", value)
    with pytest.raises(ProviderError, match=sentence) as caught:
        op(X)
    assert "\n" not in str(caught.value)


def test_a_provider_that_does_not_run_here_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    op = make(runs_on="sm120")
    monkeypatch.setenv("SGLANG_SM120_PROVIDER", "double=fake")
    with pytest.raises(ProviderError, match="runs on sm120 and not on cpu; name another of torch, fake"):
        op(X)


def test_a_bad_force_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SM120_FORCE", "yes")
    with pytest.raises(ProviderError, match="is 'yes' and needs 0 or 1"):
        make()(X)


def test_selection_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    op = make()
    assert op(X) == "torch"
    monkeypatch.setenv("SGLANG_SM120_FORCE", "1")
    assert op(X) == "torch"
    registry.reset()
    assert op(X) == "fake"


def test_a_default_provider_that_refuses_is_replaced_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    op = make(default_on="cpu", accepts=lambda a: None if a.times == 2 else "times must be 2")
    with caplog.at_level(logging.WARNING):
        assert op(X) == "fake"
        assert op(X, times=3) == op(X, 3) == "torch"
    assert len(caplog.records) == 1
    assert "provider fake refuses: times must be 2" in caplog.text


def test_a_provider_asked_for_that_refuses_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    op = make(accepts=lambda _: "x is too small")
    monkeypatch.setenv("SGLANG_SM120_PROVIDER", "fake")
    with pytest.raises(ProviderError, match="provider fake of op double refuses: x is too small"):
        op(X)


def test_a_call_by_name_chooses_the_provider_and_lets_it_refuse() -> None:
    op = make(accepts=lambda a: None if a.times == 2 else "times must be 2")
    assert (op.by("fake", X), op.by("torch", X, 3)) == ("fake", "torch")
    assert (op.refusal("fake", X), op.refusal("fake", X, times=3)) == (None, "times must be 2")
    with pytest.raises(ProviderError, match="provider fake of op double refuses: times must be 2"):
        op.by("fake", X, 3)


def test_arguments_are_the_references() -> None:
    @Op
    def scaled(x: int, y: int = 2, *, z: int = 3) -> int:
        return x + 10 * y + 100 * z

    assert vars(scaled.bind(1)) == {"x": 1, "y": 2, "z": 3}
    assert vars(scaled.bind(1, z=5, y=4)) == {"x": 1, "y": 4, "z": 5}
    assert scaled(1, 4, z=5) == 541
    wrong = [((), {}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"w": 1}), ((), {"y": 1, "w": 1})]
    for args, kwargs in wrong:
        with pytest.raises(TypeError):
            scaled.bind(*args, **kwargs)
    with pytest.raises(AttributeError, match="'w' is no argument of the op, which has y, z, x"):
        scaled.bind(1).w  # noqa: B018


def test_what_the_op_checks_no_provider_is_asked() -> None:
    op = make(default_on="cpu")
    op.checked(lambda a: None if a.times > 0 else f"times is {a.times} and needs to be positive.")
    for call in (op, partial(op.by, "torch"), partial(op.by, "fake")):
        with pytest.raises(ValueError, match="^double: times is 0 and needs to be positive.$"):
            call(X, 0)


def test_names_are_unique() -> None:
    op = make()
    with pytest.raises(ProviderError, match="already has a provider fake"):
        op.provider("fake", runs_on="cpu")(lambda _: None)
    with pytest.raises(ProviderError, match="op double is already registered"):
        make()


def test_an_unknown_device_kind_is_refused() -> None:
    with pytest.raises(ProviderError, match="device kind 'sm120x' is unknown; use cpu, sm120 or sm80"):
        make(runs_on="sm120x")


def test_device_kinds() -> None:
    op = make(runs_on="sm80+", default_on="sm120 sm121")
    chosen = {
        kind: row.provider
        for kind in ("cpu", "sm75", "sm80", "sm90", "sm120", "sm121")
        for row in registry.table(kind)
        if row.op == op.name and row.chosen
    }
    assert chosen == {
        "cpu": "torch",
        "sm75": "torch",
        "sm80": "torch",
        "sm90": "torch",
        "sm120": "fake",
        "sm121": "fake",
    }


def test_the_table_says_why() -> None:
    make(runs_on="sm80+", default_on="sm120")
    why = {kind: [row[1:] for row in registry.table(kind) if row.op == "double"] for kind in ("cpu", "sm90", "sm120")}
    assert why["cpu"] == [
        ("torch", True, "no other provider is the default on cpu"),
        ("fake", False, "does not run on cpu, needs sm80+"),
    ]
    assert why["sm90"][1] == ("fake", False, "runs on sm90, not chosen")
    assert why["sm120"] == [("torch", False, "runs on sm120, not chosen"), ("fake", True, "default on sm120")]
    assert {row.op for row in registry.table()} >= set(_ops.SPECS)
    assert all(row.chosen for row in registry.table("cpu") if row.provider == "torch" and row.op != "double")


def test_an_op_keeps_its_contract() -> None:
    assert _ops.mhc_pre.__name__ == "mhc_pre"
    assert "streams" in _ops.mhc_pre.__doc__
