"""The draft of a server: which passes the step takes of it, where it can, and its head in FP8."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from sglang.kernels.plugin_kernels.nvidia import spec
from sglang.srt import runtime_context
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe import utils as moe_utils
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_sm120 import plugin
from sglang_sm120.formats import fp8_block
from sglang_sm120.step import draft, reasons
from sglang_sm120.step.draft import Vocabulary


@pytest.mark.parametrize("mode", ForwardMode, ids=lambda mode: mode.name)
def test_modes_of_a_draft(mode: ForwardMode) -> None:
    name = plugin.mode_of(SimpleNamespace(forward_mode=mode))
    taken = mode in (ForwardMode.DECODE, ForwardMode.DRAFT_EXTEND_V2)
    said = f"the step takes decode and what a draft keeps of a verification, not {name}"
    assert reasons.why_left(reasons.DRAFT_MODES, name, 256, {}) == (None if taken else said)
    said = None if mode is ForwardMode.TARGET_VERIFY else f"the step takes blocks of drafts, not {name}"
    assert reasons.why_left(reasons.DSPARK_MODES, name, 256, {}) == said


@pytest.mark.parametrize(
    ("build", "name", "taken"),
    [
        (plugin.build_draft, "Draft", {ForwardMode.DECODE, ForwardMode.DRAFT_EXTEND_V2}),
        (plugin.build_dspark, "Stages", {ForwardMode.TARGET_VERIFY}),
    ],
)
def test_what_is_built_for_a_draft(
    monkeypatch: pytest.MonkeyPatch, build: Callable[..., plugin.Built], name: str, taken: set[ForwardMode]
) -> None:
    """Its own forward of its own passes; what it leaves is an error where SGLang cannot serve the experts."""
    monkeypatch.setattr(draft, name, lambda model: lambda *given: (model, *given))
    monkeypatch.setattr(plugin, "unusable", lambda view: [])
    nvfp4 = {"quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16}
    ids, context = torch.zeros(2, dtype=torch.int64), SimpleNamespace(widths=(1, 2))
    built = build("model", SimpleNamespace(quantization_config=None), context)
    alone = build("model", SimpleNamespace(quantization_config=nvfp4), context)
    assert built.widths == (1, 2) and built.draft_sampler is None
    assert built.forward(SimpleNamespace(view=3), Mock(), ids, 4, 5) == ("model", 3, ids, 4, 5)
    for mode in ForwardMode:
        batch = SimpleNamespace(forward_mode=mode)
        if mode in taken:
            assert built.plan(ids, batch) == alone.plan(ids, batch) == spec.Step(plugin.mode_of(batch), 2)
            continue
        assert built.plan(ids, batch) is None
        with pytest.raises(RuntimeError, match="^With NVFP4 experts SGLang's forward cannot serve a pass here: "):
            alone.plan(ids, batch)


def test_a_rounded_head_follows_the_targets(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """SGLang's own logits processor multiplies by it, also when another head is put there later."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 256, generator=rng).bfloat16()
    processor, vocabulary = SimpleNamespace(use_fp32_lm_head=False), Vocabulary()
    kept = []
    for rows in (300, 2048 + 130):  # a partial block; more than one part
        head = SimpleNamespace(weight=torch.nn.Parameter(torch.randn(rows, 256, generator=rng).bfloat16()))
        for _ in range(2):
            found = LogitsProcessor._compute_lm_head(processor, x, vocabulary.of(head))
        rounded = fp8_block.dequantise(*fp8_block.quantise(head.weight.detach().float()))
        assert torch.equal(found, (x.float() @ rounded.T).bfloat16())
        kept.append(vocabulary.weight)
        assert vocabulary.of(head).weight is kept[-1] and vocabulary.weight.dtype == torch.float8_e4m3fn
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="met the draft's head first in a CUDA graph, needed a pass before it"):
        vocabulary.of(SimpleNamespace(weight=SimpleNamespace(is_cuda=True)))


@pytest.mark.parametrize(
    ("emulated", "experts", "drafts"),
    [
        (False, "flashinfer_mxfp4", True),
        (False, "marlin", False),
        (False, "triton", False),
        (True, "triton", True),
        (True, "marlin", False),
    ],
)
def test_the_step_drafts_where_it_can_read_the_experts(
    monkeypatch: pytest.MonkeyPatch, emulated: bool, experts: str, drafts: bool
) -> None:
    monkeypatch.setattr(spec, "_REGISTRY", {})
    backend = MoeRunnerBackend(experts)
    monkeypatch.setattr(moe_utils, "get_speculative_moe_runner_backend", lambda: backend)
    monkeypatch.setattr(plugin, "emulated", lambda: emulated)
    graph = SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=None))
    monkeypatch.setattr(runtime_context, "get_exec", lambda: graph)
    monkeypatch.setattr(runtime_context, "get_parallel", Mock(side_effect=LookupError("what comes next")))
    with pytest.raises(LookupError, match="what comes next"):
        plugin.build(None, None, SimpleNamespace(tokens_per_request=1))
    assert spec.spec_registered([plugin.DRAFT]) == drafts
    # SGLang builds DSpark's stages with the target's experts' runner, whatever the draft's is.
    assert spec.spec_registered([plugin.DSPARK])
    assert plugin.DSPARK_SPEC.build is plugin.build_dspark and plugin.DSPARK_SPEC.max_rows == plugin.SPEC.max_rows
