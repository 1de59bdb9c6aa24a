"""Weights read by safetensors' own threads: which a rank asks for, how many at a time, and what SGLang reads itself.

Its reader needs a CUDA device: here a stand-in reads the same plans from the same files.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
from sglang.srt import runtime_context
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_loader import loader as sglang_loader
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_sm120 import plugin
from sglang_sm120.checkpoint.layout import stored
from sglang_sm120.step import loading
from sglang_sm120_reference.config_file import load_config

CUDA = torch.device("cuda", 1)


class Handle:
    """In `safe_open`'s place: reads a plan at once, and knows how many of its plans are open and were read."""

    opened: int
    most: int
    plans: list[dict[str, None]]

    def __init__(self, file: str, framework: str, backend: str) -> None:
        assert (framework, backend) == ("pt", "pread")
        self._file = safetensors.safe_open(file, "pt")
        self.offset_keys, self.get_tensor_meta = self._file.offset_keys, self._file.get_tensor_meta

    def prefetch(self, plan: dict[str, None], device: str, threads: int) -> Any:
        assert device == "cuda:1" and threads > 1 and plan
        Handle.plans.append(plan)
        Handle.opened += 1
        Handle.most = max(Handle.most, Handle.opened)
        pairs = [(name, self._file.get_tensor(name)) for name in reversed(plan)]

        def close() -> None:
            Handle.opened -= 1

        return type("Loader", (), {"__iter__": lambda _: iter(pairs), "close": lambda _: close()})()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Handle.opened, Handle.most, Handle.plans = 0, 0, []
    monkeypatch.setattr(loading, "safe_open", Handle)
    yield
    assert Handle.opened == 0


def files(checkpoint: Path) -> list[str]:
    return sorted(map(str, checkpoint.glob("*.safetensors")))


def test_every_tensor_is_read_once(
    reader: None, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In bounded portions, of which two are read or taken at a time; one tensor may be longer than a portion."""
    monkeypatch.setattr(loading, "PORTION", 100_000)
    with caplog.at_level("INFO"):
        pairs = list(loading.tensors(files(checkpoint), lambda _: True, CUDA))
    found = dict(pairs)
    assert len(found) == len(pairs) and found.keys() == stored(load_config(checkpoint)).keys()
    for file in files(checkpoint):
        with safetensors.safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                assert torch.equal(found[name].view(torch.uint8), opened.get_tensor(name).view(torch.uint8))
    sizes = [sum(found[name].nbytes for name in plan) for plan in Handle.plans]
    shared = [size for size, plan in zip(sizes, Handle.plans, strict=True) if len(plan) > 1]
    assert len(shared) > 50 and max(shared) <= 100_000
    assert Handle.most == loading.IN_FLIGHT == 2
    assert f"{sum(sizes) / 1e9:.2f} GB of weights read in " in caplog.text


def test_files_of_other_names_are_refused(reader: None, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="by its published name: unset SGLANG_SM120_LOADER"):
        next(loading.tensors(files(checkpoint), lambda _: False, CUDA))


def test_a_consumer_that_fails_leaves_nothing_open(reader: None, checkpoint: Path) -> None:
    pairs = loading.tensors(files(checkpoint), lambda _: True, CUDA)
    next(pairs)
    assert Handle.opened
    pairs.close()


def rank(monkeypatch: pytest.MonkeyPatch, held: int | None = None, **moe: Any) -> torch.nn.Module:
    """A model on a rank that holds the experts from `held` on, 8 of 16; all for None."""
    settled = {"enable_eplb": False, "ep_num_redundant_experts": 0, "init_expert_location": "trivial", **moe}
    monkeypatch.setattr(runtime_context, "get_exec", lambda: SimpleNamespace(moe=SimpleNamespace(**settled)))
    model = torch.nn.Module()
    if held is not None:
        experts = FusedMoE.__new__(FusedMoE)
        torch.nn.Module.__init__(experts)
        vars(experts).update(
            _expert_storage_rank=held // 8, _num_local_routed=8, _num_global_routed=16, _has_fused_shared=False
        )
        model.experts = experts
    return model


def test_a_rank_reads_what_its_model_takes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(stored(load_config(checkpoint)))
    draft = {name for name in names if name.startswith("mtp.")}

    def taken(drafts: bool = False, **about: Any) -> set[str]:
        return set(filter(loading.taken_by(rank(monkeypatch, **about), drafts), names))

    assert taken() == names - draft and taken(drafts=True) == draft
    halves = [taken(held=0), taken(held=8)]
    assert halves[0] | halves[1] == names - draft
    assert "layers.1.ffn.experts.7.w1.weight" in halves[0] - halves[1]
    assert "layers.1.ffn.experts.8.w2.scale" in halves[1] - halves[0]
    scale = "layers.1.ffn.experts.8.w2.input_scale"
    assert loading.taken_by(rank(monkeypatch, held=0), False)(scale), "SGLang takes the largest of all experts'"
    shared = {name for name in names - draft if ".experts." not in name}
    assert halves[0] & halves[1] == shared and any("shared_experts" in name for name in shared)
    for moves in ({"enable_eplb": True}, {"ep_num_redundant_experts": 2}, {"init_expert_location": "x.json"}):
        assert taken(held=0, **moves) == names - draft


def asked(kind: str, device: str, load_format: str = "auto", draft: int | None = None, safe: bool = True) -> Any:
    """What the hook gives for a loader and a model; "SGLang's" where it leaves it to the original."""
    parameter = SimpleNamespace(device=torch.device(device))
    model = type(kind, (), {"parameters": lambda _: iter([parameter])})()
    config = SimpleNamespace(load_format=sglang_loader.LoadFormat(load_format), draft_model_idx=draft)
    loader = SimpleNamespace(load_config=config, _prepare_weights=lambda *_: ("", ["a"], safe))
    return loading.weights(lambda *_: "SGLang's", loader, SimpleNamespace(model_path="m", revision=None), model)


@pytest.mark.parametrize("kind", (loading.TARGET, loading.DRAFT))
def test_what_is_read_otherwise(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other models, devices, formats and files are SGLang's."""
    monkeypatch.setattr(loading, "taken_by", lambda _, drafts: drafts)
    monkeypatch.setattr(loading, "tensors", lambda *arguments: arguments)
    for load_format in ("auto", "safetensors"):
        assert asked(kind, "cuda:1", load_format) == (["a"], kind == loading.DRAFT, CUDA)
    others = [asked("LlamaForCausalLM", "cuda:1"), asked(kind, "cpu"), asked(kind, "cuda:1", "layered")]
    others += [asked(kind, "cuda:1", draft=0), asked(kind, "cuda:1", safe=False)]
    assert others == ["SGLang's"] * 5


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook's place is one of SGLang's, called as it is there."""
    monkeypatch.setattr(HookRegistry, "_hooks", hooks := {})
    monkeypatch.setattr(HookRegistry, "register", lambda place, hook, kind: hooks.update({place: (hook, kind)}))
    monkeypatch.delenv(loading.SWITCH, raising=False)
    plugin.register()
    assert not hooks
    monkeypatch.setenv(loading.SWITCH, "1")
    plugin.register()
    ((place, hook),) = hooks.items()
    assert hook == (loading.weights, HookType.AROUND)
    assert place == f"{sglang_loader.__name__}.DefaultModelLoader._get_all_weights"
    parameters = [*inspect.signature(sglang_loader.DefaultModelLoader._get_all_weights).parameters]
    assert parameters == ["self", "model_config", "model"]
    monkeypatch.setenv(loading.SWITCH, "yes")
    with pytest.raises(ValueError, match="SGLANG_SM120_LOADER is 'yes' and needs 0 or 1"):
        plugin.register()
