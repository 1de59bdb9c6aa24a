"""The plugin against SGLang's contract for it: what it takes, what it leaves, what it refuses and in which words."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from serving import PromptOf
from sglang.kernels.plugin_kernels.nvidia import spec
from sglang.srt import runtime_context
from sglang.srt.kernel_plugins.nvidia.binding import megakernel_disable_reasons
from sglang.srt.mem_cache import allocation_sizing
from sglang.srt.model_executor.cuda_graph_config import default_cuda_graph_config, with_phase
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models import deepseek_v4
from sglang.srt.server_args import ServerArgs
from standin import New, Server, Weights, stub_sglang

from sglang_sm120 import plugin, registry, warmup
from sglang_sm120.limits import MAX_DRAFT_TOKENS, MAX_ROWS
from sglang_sm120.plugin import Built, check_graphs, install_on_cpu
from sglang_sm120.step import draft_states, modules, reasons, sample, target
from sglang_sm120.step.passes import Passes
from sglang_sm120.step.prepare import prepare
from sglang_sm120.step.target import Target
from sglang_sm120_reference.config_file import load_config


@pytest.fixture
def model(checkpoint: Path) -> SimpleNamespace:
    loaded = Weights(checkpoint).target()
    loaded.forward = _not_called
    return loaded


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "_REGISTRY", {})
    plugin.register()


def _not_called(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("SGLang's forward was called")


def batch(mode: ForwardMode) -> SimpleNamespace:
    return SimpleNamespace(forward_mode=mode, spec_info=None)


def hf_config(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"architectures": [plugin.TARGET], "model_type": "deepseek_v4", **changed})


@pytest.mark.parametrize("isa", ["sm_120", "sm_121"])
def test_consumer_blackwell_finds_the_spec(registered: None, isa: str) -> None:
    assert spec.find_spec(architectures=[plugin.TARGET], isa=isa) == (plugin.SPEC, "")


@pytest.mark.parametrize("isa", ["sm_90", "sm_100", None])
def test_another_device_is_refused(registered: None, isa: str | None) -> None:
    found, why = spec.find_spec(architectures=[plugin.TARGET], isa=isa)
    assert found is None
    assert why == f"sglang_sm120.plugin:SPEC supports ['sm_120', 'sm_121'], not {isa}"


def refusals(model_type: str = "deepseek_v4", **settings: Any) -> list[str]:
    """What SGLang says of a server with these arguments on an SM120, where it takes this backend for MXFP4 experts."""
    settings = {"moe_runner_backend": "flashinfer_mxfp4", "cuda_graph_config": default_cuda_graph_config(), **settings}
    args = ServerArgs(model_path="model", **settings)
    _, reasons = megakernel_disable_reasons(cfg=args, hf_config=hf_config(model_type=model_type), isa="sm_120")
    return reasons


def test_servers_that_sglang_lets_us_serve(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_OPT_FP8_WO_A_GEMM", "0")  # SGLang's own choice on SM120
    drafts = {"speculative_algorithm": "EAGLE", "speculative_num_draft_tokens": MAX_DRAFT_TOKENS}
    assert refusals(tp_size=2, ep_size=2, enable_hierarchical_cache=True, **drafts) == []
    assert refusals(tp_size=8, fp8_gemm_runner_backend="triton") == []


def test_servers_that_sglang_refuses(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_OPT_FP8_WO_A_GEMM", "0")
    assert refusals("deepseek_v41") == ["config.model_type 'deepseek_v41' is not 'deepseek_v4'"]
    assert refusals(fp8_gemm_runner_backend="deep_gemm") == [
        "fp8_gemm_runner_backend 'deep_gemm' is not one of ['auto', 'cutlass', 'triton']"
    ]
    assert refusals(pp_size=2) == ["pipeline parallelism is in use and sglang-sm120 does not accept it"]
    fp4, drafts = refusals(
        enable_deepseek_v4_fp4_indexer=True,
        speculative_algorithm="EAGLE",
        speculative_num_draft_tokens=MAX_DRAFT_TOKENS + 1,
    )
    assert fp4.startswith("the indexer's keys are FP4 (--enable-deepseek-v4-fp4-indexer)")
    assert drafts.startswith("speculative_num_draft_tokens is 11")
    traced = with_phase(default_cuda_graph_config(), "prefill", backend="tc_piecewise")
    (prefill,) = refusals(cuda_graph_config=traced)
    assert prefill.startswith("prefill is traced by torch.compile")
    monkeypatch.setenv("SGLANG_OPT_USE_ONLINE_COMPRESS", "1")
    assert refusals() == ["SGLANG_OPT_USE_ONLINE_COMPRESS True is not False"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enforce_shared_experts_fusion", True),
        ("ep_num_redundant_experts", 2),
        ("expert_distribution_recorder_mode", "stat"),
        ("init_expert_location", "file.json"),
        ("moe_a2a_backend", "deepep"),
        ("moe_dense_tp_size", 1),
        ("moe_runner_backend", "marlin"),
        # Where the experts are not MXFP4, or are to be FP8.
        ("moe_runner_backend", "auto"),
    ],
)
def test_experts_that_are_served_otherwise_are_refused_before_they_load(
    registered: None, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    monkeypatch.setenv("SGLANG_OPT_FP8_WO_A_GEMM", "0")
    (why,) = refusals(**{name: value})
    assert why.startswith(f"{name} {value!r} is not one of ")


def test_a_shared_expert_that_is_added_after_the_sum_is_refused(
    registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_OPT_FP8_WO_A_GEMM", "0")
    monkeypatch.setenv("SGLANG_SHARED_EXPERT_TP1", "1")
    assert refusals() == ["SGLANG_SHARED_EXPERT_TP1 True is not False"]


why_left = functools.partial(reasons.why_left, reasons.TARGET_MODES)


@pytest.mark.parametrize("mode", ["decode", "target_verify"])
def test_rows_that_the_step_takes(mode: str) -> None:
    assert [why_left(mode, rows, {}) for rows in (1, 2, 255, 256)] == [None] * 4
    for rows in (0, 257, 300):
        assert why_left(mode, rows, {}) == f"a {mode} pass has no rows or more than the 256 that the step takes"
    assert why_left(mode, 1, {"input_embeds": None}) is None
    assert why_left(mode, 1, {"input_embeds": 0}) == "the pass brings embeddings instead of tokens"


@pytest.mark.parametrize(
    "mode",
    [one for one in ForwardMode if one not in (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY)],
    ids=lambda mode: mode.name,
)
def test_other_modes_are_left_to_sglang(mode: ForwardMode) -> None:
    name = plugin.mode_of(batch(mode))
    assert why_left(name, 1, {}) == f"the step takes decode and verification, not {name}"


@pytest.fixture
def prefill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets SGLANG_SM120_PREFILL, which is read once."""

    def choose(value: str) -> None:
        monkeypatch.setenv("SGLANG_SM120_PREFILL", value)
        reasons.takes_prefill.cache_clear()

    yield choose
    reasons.takes_prefill.cache_clear()


def test_prefill_is_taken_on_request(prefill: Callable[[str], None]) -> None:
    prefill("sglang")
    assert why_left("extend", 1, {}) == "the step takes decode and verification, not extend"
    prefill("overlay")
    assert why_left("extend", MAX_ROWS + 1, {}) is None
    assert why_left("extend", 1, {"input_embeds": 0}) == "the pass brings embeddings instead of tokens"
    assert why_left("mixed", 1, {}) == "the step takes decode and verification, not mixed"
    prefill("yes")
    with pytest.raises(ValueError, match="^SGLANG_SM120_PREFILL is 'yes': set it to sglang or overlay.$"):
        why_left("extend", 1, {})


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hopper card with SGLANG_SM120_FORCE=1."""
    cached = (reasons.emulated, reasons.takes_prefill)
    monkeypatch.setenv("SGLANG_SM120_FORCE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    registry.reset()
    for one in cached:
        one.cache_clear()
    yield
    monkeypatch.undo()
    registry.reset()
    for one in cached:
        one.cache_clear()


def test_a_forced_card_has_every_pass_served_by_the_step(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons.emulated() and why_left("extend", MAX_ROWS + 1, {}) is None
    left = SimpleNamespace(passes=Passes(), _modes=reasons.TARGET_MODES, _alone=reasons.why_alone(hf_config()))
    for mode, rows in ((ForwardMode.MIXED, 1), (ForwardMode.DECODE, MAX_ROWS + 1)):
        with pytest.raises(RuntimeError, match="^With SGLANG_SM120_FORCE=1 SGLang's forward cannot serve "):
            Built.plan(left, torch.zeros(rows, dtype=torch.int64), batch(mode))
    assert not left.passes.taken and not left.passes.left
    reasons.takes_prefill.cache_clear()
    monkeypatch.setenv("SGLANG_SM120_PREFILL", "sglang")
    with pytest.raises(ValueError, match="^SGLANG_SM120_PREFILL is sglang, .*: leave out SGLANG_SM120_FORCE.$"):
        reasons.takes_prefill()


def test_forcing_an_sm12x_changes_no_pass(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert not reasons.emulated() and not reasons.takes_prefill()


@pytest.mark.parametrize("isa", ["sm_90", "sm_80"])
def test_force_adds_hopper_alone(hopper: None, isa: str) -> None:
    """In a process of its own: the spec is made when the plugin is imported."""
    line = (
        "import torch; from sglang.kernels.plugin_kernels.nvidia import spec; "
        "torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda *_: 'card'; "
        "torch.cuda.get_device_capability = lambda *_: (9, 0); "
        "from sglang_sm120 import plugin; plugin.register(); "
        f"found, why = spec.find_spec(architectures=[plugin.TARGET], isa={isa!r}); "
        "print(why or sorted(map(str, found.requires.server_args['moe_runner_backend'])))"
    )
    said = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = {
        "sm_90": "['triton']",
        "sm_80": "sglang_sm120.plugin:SPEC supports ['sm_120', 'sm_121', 'sm_90'], not sm_80",
    }
    assert said[-1] == expected[isa]


def test_a_built_step_plans_and_counts(
    model: SimpleNamespace, checkpoint: Path, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_sglang(monkeypatch)
    built = Built(Target(model), (1, 2, 4), reasons.TARGET_MODES)
    assert built.widths == (1, 2, 4) and built.draft_sampler is None
    assert built.summary() == "decode and verification up to 4 rows"

    def step(view: Any, ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        found = built.plan(ids, batch(ForwardMode.TARGET_VERIFY), pp_proxy_tensors=None)
        assert found == spec.Step("target_verify", len(ids))
        return built.forward(msgspec.structs.replace(found, view=view), _not_called, ids, positions, forward_batch)

    tokens, ratios = prompt_of(6, 1), load_config(checkpoint).compress_ratios
    server = Server(step, ratios, 1, 256, torch.Generator().manual_seed(1), rings=(16, 256))
    assert server.extend(New(1, 0, tokens[:4])).logits.shape[0] == 4
    server.extend(New(1, 4, tokens[4:5]))
    for mode in (ForwardMode.EXTEND, ForwardMode.EXTEND, ForwardMode.MIXED):
        assert built.plan(torch.tensor(tokens), batch(mode)) is None
    assert built.plan(torch.zeros(257, dtype=torch.int64), batch(ForwardMode.DECODE)) is None
    assert built.passes.taken == Counter(target_verify=2)
    assert sorted(built.passes.left.values()) == [1, 1, 2]


def test_what_is_compiled_and_reserved_when_the_step_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that SGLang's graphs may ask for: its page tables are wider than the longest request."""
    given: dict[str, Any] = {}
    group = SimpleNamespace(barrier=None, local_rank=1)
    parallel = SimpleNamespace(tp_size=4, tp_rank=0, moe_ep_size=2, tp_group=group)
    bags = {
        "get_parallel": parallel,
        "get_model": SimpleNamespace(context_length=98_304),
        "get_schedule": SimpleNamespace(chunked_prefill_size=2048),
        "get_exec": SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=None)),
        "get_spec": SimpleNamespace(speculative_algorithm=None),
    }
    for name, bag in bags.items():
        monkeypatch.setattr(runtime_context, name, lambda bag=bag: bag)
    monkeypatch.setattr(allocation_sizing, "get_req_to_token_extra_context_len", lambda: 264)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(target, "Target", str)
    monkeypatch.setattr(plugin, "Built", lambda *arguments, counts, alone: (*arguments, counts, alone))
    monkeypatch.setattr(warmup, "warm_up", lambda config, **sizes: given.update(sizes, config=config))
    config = SimpleNamespace(to_dict=dict, max_position_embeddings=1 << 20, vocab_size=6)
    late: list[tuple[bool, int]] = []
    monkeypatch.setattr(modules, "late_ones", lambda *asked: late.append(asked) or nullcontext())

    for asked in (sample, draft_states):
        monkeypatch.setattr(asked, "_devices", set())
    context = SimpleNamespace(widths=(1, 2), tokens_per_request=1)
    assert plugin.build("model", config, context) == ("model", (1, 2), reasons.TARGET_MODES, True, None)
    assert sample._devices == draft_states._devices == {torch.device("cuda", 3)}
    assert given == {
        "config": {}, "tp": 4, "ep": 2, "prefill_rows": MAX_ROWS, "graph_rows": MAX_ROWS, "context": 98_304 + 264,
        "lent_rows": 2048,  # the series is applied here
        "speculates": False,
        "device": torch.device("cuda", 3), "barrier": None, "compiles": False,
    }  # fmt: skip
    bags["get_model"].context_length = None
    monkeypatch.setattr(plugin, "takes_prefill", lambda: True)
    for algorithm in ("DSPARK", "EAGLE"):
        bags["get_spec"].speculative_algorithm = algorithm
        plugin.build("model", config, SimpleNamespace(widths=(1, 2), tokens_per_request=2))
        assert given["speculates"] == (algorithm == "EAGLE")
    assert (given["context"], given["prefill_rows"], given["lent_rows"]) == ((1 << 20) + 264, 2048, 0)
    assert late == [(False, 6), (False, 6), (True, 6)]


@pytest.mark.parametrize(
    ("sizes", "tokens", "said"),
    [
        ([1, 128, 256], 1, []),
        ([1, 64], 4, []),
        ([8, 264, 320], 1, ["264, 320 requests of 1 token"]),
        ([64, 65], 4, ["65 requests of 4 tokens"]),
        (None, 1, []),
    ],
)
def test_graphs_that_the_step_leaves_are_named(
    caplog: pytest.LogCaptureFixture, sizes: list[int] | None, tokens: int, said: list[str]
) -> None:
    graphs = SimpleNamespace(decode=SimpleNamespace(bs=sizes))
    with caplog.at_level(logging.INFO, logger="sglang_sm120.plugin"):
        check_graphs(graphs, tokens, None)
        check_graphs(None, tokens, None)
    assert [record.message for record in caplog.records] == [
        f"sglang_sm120: CUDA graphs of {what} are SGLang's forward's, the step takes 256 rows." for what in said
    ]
    if said:
        needed = f"^With NVFP4 experts nothing but .*: give --cuda-graph-max-bs-decode {256 // tokens}.$"
        with pytest.raises(ValueError, match=needed):
            check_graphs(graphs, tokens, "With NVFP4 experts")


def test_the_first_pass_of_a_kind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    passes = Passes()
    with caplog.at_level(logging.INFO, logger="sglang_sm120.step.passes"):
        for rows in (3, 2):
            passes.take("decode", rows)
            passes.leave("decode", "it has no rows")
    assert [record.message for record in caplog.records] == [
        "sglang_sm120: the step takes its first decode pass (3 rows).",
        "sglang_sm120: SGLang's forward serves a pass, because it has no rows.",
    ]


def test_passes_in_the_servers_metrics(tmp_path: Path) -> None:
    """In a process of its own, as a scheduler of a server with --enable-metrics."""
    line = (
        "import torch; from sglang_sm120.step import passes; "
        "from sglang.srt.model_executor.runner_utils import capture_mode; "
        "one, other = passes.Passes(True), passes.Passes(False); "
        "[p.take('decode', 1) for p in (one, one, other)]; one.leave('extend', 'it is long'); "
        "capture_mode.is_capture_mode = True; one.take('decode', 1); "
        "torch.cuda.is_available = torch.cuda.is_current_stream_capturing = lambda: True; one.take('decode', 1); "
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess; "
        "registry = CollectorRegistry(); multiprocess.MultiProcessCollector(registry); "
        "print(generate_latest(registry).decode())"
    )
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True, env=env).stdout
    assert sorted(text for text in said.splitlines() if text.startswith("sglang_sm120")) == [
        'sglang_sm120:graphs_total{by="step",mode="decode"} 1.0',
        'sglang_sm120:passes_total{by="sglang",mode="extend",why="it is long"} 1.0',
        'sglang_sm120:passes_total{by="step",mode="decode",why=""} 2.0',
    ]


@pytest.mark.parametrize("backend", [None, "flashinfer_trtllm"])
def test_experts_of_another_backend_are_refused(model: SimpleNamespace, backend: str | None) -> None:
    layer = model.model.layers[1]
    one = SimpleNamespace(model=SimpleNamespace(layers=[layer]))
    kept, experts = prepare(one)[0].experts.weights, layer.mlp.experts
    assert experts.w13_weight_scale_inv.data_ptr() == kept.s13.data_ptr(), "a CPU layer's experts are kept twice"
    if backend is not None:
        experts._dsv4_mxfp4_backend = backend
    (why,) = reasons.model_reasons(model, None)
    assert why == (
        "the step cannot read a layer's weights: the experts of layer 1 are in the layout of "
        f"{backend or 'no FlashInfer backend'}: leave "
        "--moe-runner-backend at auto (on a card that is no SM12x give triton)."
    )
    experts._dsv4_mxfp4_backend = "flashinfer_cutlass_sm120"
    again = prepare(one)[0].experts.weights
    assert [tensor.data_ptr() for tensor in again] == [tensor.data_ptr() for tensor in kept]


@pytest.mark.parametrize("is_patched", [True, False])
def test_sglangs_prefill_takes_the_steps_wo_a(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, seed: int, is_patched: bool
) -> None:
    """Where the series is applied there is one, in FP8, and SGLang's function multiplies by that."""
    if not is_patched:
        monkeypatch.delattr(deepseek_v4, "fp8_wo_a")
    attention = model.model.layers[1].self_attn
    attention.use_fused_wo_a = True
    before = attention.wo_a.weight.clone()
    (layer,) = prepare(SimpleNamespace(model=SimpleNamespace(layers=[model.model.layers[1]])))
    held, ours = attention.wo_a.weight, layer.attention.wo_a
    assert (held.data_ptr() == ours.weight.data_ptr()) == is_patched and attention.use_fused_wo_a != is_patched
    wo_a = held.view(attention.n_local_groups, -1, held.shape[1])
    o = torch.randn(5, len(wo_a), held.shape[1], generator=torch.Generator().manual_seed(seed)).bfloat16()
    found = deepseek_v4._apply_wo_a_bf16_matmul(o, wo_a, is_decode=False, is_prefill=True)
    expected = torch.einsum("tgk,gnk->tgn", o.float(), before.float().view(wo_a.shape))
    # One rounding to bf16, of the sum or of a product's terms.
    assert (found.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_an_attribute_that_a_layer_lacks_is_named(model: SimpleNamespace) -> None:
    assert reasons.model_reasons(model, None) == []
    del model.model.layers[2].self_attn.compressor.ape
    (why,) = reasons.model_reasons(model, None)
    assert why.startswith("the step cannot read a layer's weights: ") and "'ape'" in why


def test_another_architecture_is_left_alone_on_a_cpu(model: SimpleNamespace) -> None:
    for architectures in (["LlamaForCausalLM"], [], None):
        install_on_cpu(model, hf_config(architectures=architectures))
        assert model.forward is _not_called


@pytest.mark.parametrize("architecture", [plugin.TARGET, plugin.DRAFT])
def test_another_model_type_is_refused_on_a_cpu(model: SimpleNamespace, architecture: str) -> None:
    model.num_fused_shared_experts = 1
    expected = (
        "sglang_sm120 cannot serve this model on a CPU: the shared expert is fused with the routed ones: leave out "
        "--enforce-shared-experts-fusion; the model type is deepseek_v41 and the step serves deepseek_v4."
    )
    with pytest.raises(ValueError) as refused:
        install_on_cpu(model, hf_config(architectures=[architecture], model_type="deepseek_v41"))
    assert str(refused.value) == expected
    assert model.forward is _not_called


def test_embeddings_are_refused_on_a_cpu(model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(tp_rank=0))
    for asked in (sample, draft_states):
        monkeypatch.setattr(asked, "_devices", set())
    install_on_cpu(model, hf_config())
    assert model.forward is not _not_called and sample._devices == draft_states._devices == {torch.device("cpu")}
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="^A request brings embeddings, .*: send text or token ids\\.$"):
        model.forward(ids, ids, batch(ForwardMode.EXTEND), input_embeds=ids)
