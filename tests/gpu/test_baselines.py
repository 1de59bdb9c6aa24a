"""The benchmark's baselines call what the installed SGLang, DeepGEMM and FlashMLA define, with arguments these take."""

from __future__ import annotations

import ast
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from foreign import bind, calls, definition, functions, imported

import baselines
from calls import ROWS_COMPARED, checker
from sglang_sm120 import ops
from sglang_sm120.spec import Call, Inputs

pytestmark = pytest.mark.needs_no_gpu
MODULES = [import_module(f"baselines.{module.name}") for module in iter_modules(baselines.__path__)]
FUNCTIONS = {name: function for module in MODULES for name, function in functions(module).items()}
FOREIGN_USERS = [name for name, function in FUNCTIONS.items() if imported(function)]


def test_the_functions_are_found() -> None:
    assert {module.__name__.rpartition(".")[2] for module in MODULES} <= set(ops.SPECS)
    assert sum(len(functions(module)) for module in MODULES) == len(FUNCTIONS), "two functions of one name"
    assert {"marlin", "tilelang", "torch"} <= set(baselines.names())
    called = {dotted for name in FOREIGN_USERS for dotted, _ in calls(FUNCTIONS[name])}
    assert len(FOREIGN_USERS) >= 15 and len(called) >= 18
    assert {"deep_gemm.fp8_gemm_nt", "sglang.kernels.ops.layernorm.mhc.mhc_fused_post_pre"} <= called


def test_the_first_rows_of_a_draw_are_judged_alone(seed: int) -> None:
    """Also where requests, which have a temperature each, are fewer than rows."""
    drawn = list(ops.SPECS["sample_token"].calls(Inputs(torch.device("cpu"), seed), {"vocab_size": 40}, 1, 256, 0))
    assert {len(arguments["temperature"]) for _, arguments in drawn} == {256, 64}
    for label, arguments in drawn:
        tokens = ops.sample_token.reference(**arguments)
        judge = checker(Call("sample_token", label, arguments))
        assert judge(tokens) is None
        tokens[ROWS_COMPARED:] += 1
        assert judge(tokens) is None
        tokens[ROWS_COMPARED - 1] = (tokens[ROWS_COMPARED - 1] + 1) % 40
        assert judge(tokens) == "a token scores lower than another"


@pytest.mark.parametrize("name", FOREIGN_USERS)
def test_what_a_baseline_calls_exists_and_takes_its_arguments(name: str) -> None:
    function = FUNCTIONS[name]
    for dotted in imported(function).values():
        if "." in dotted:
            definition(dotted)
    for dotted, call in calls(function):
        bind(dotted, call)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("fused_hc_head(x, fn, scale, base, 1e-6)", "missing a required argument: 'hc_eps'"),
        ("fused_hc_head(x, fn, scale, base, 1e-6, 1e-6, splits=2)", "unexpected keyword argument 'splits'"),
    ],
)
def test_a_call_that_does_not_fit_is_found(call: str, problem: str) -> None:
    parsed = ast.parse(call, mode="eval").body
    assert isinstance(parsed, ast.Call)
    with pytest.raises(TypeError, match=problem):
        bind("sglang.kernels.ops.layernorm.mhc_head.fused_hc_head", parsed)


def test_a_name_that_is_gone_is_found() -> None:
    with pytest.raises(AssertionError, match="defines no hc_gone"):
        definition("sglang.kernels.ops.layernorm.mhc.hc_gone")
