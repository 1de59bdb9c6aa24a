"""SGLang's own sampler with the package's draw in it: the same tokens from the same noise, and when SGLang draws."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from scipy.stats import chisquare
from sglang.srt import runtime_context
from sglang.srt.layers.sampler import Sampler

from sglang_sm120 import hooks, ops
from sglang_sm120.step import sample

CPU = torch.device("cpu")


class Drawn:
    """Counts the calls of `ops.sample_token`."""

    def __init__(self) -> None:
        self.calls = 0
        self._op = ops.sample_token

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self._op(*args)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drawn]:
    """A process whose step serves tensors on the CPU."""
    counter = Drawn()
    monkeypatch.setattr(sample, "_devices", set())
    sample.serve(CPU)
    monkeypatch.setattr(ops, "sample_token", counter)
    yield counter


def tokens(logits: torch.Tensor, seed: int, return_logprob: bool = False, **info: Any) -> torch.Tensor:
    """What SGLang's sampler gives for a batch without filters, but for `info`."""
    batch = {
        "is_all_greedy": False, "has_custom_logit_processor": False, "grammars": None, "sampling_seed": None,
        "need_top_p_sampling": False, "need_top_k_sampling": False, "need_min_p_sampling": False,
        "sampling_mask_batch_indices": None, "sampling_support_logprobs_capture_indices": None,
        "temperatures": torch.linspace(0.3, 1.7, len(logits)).view(-1, 1),
    }  # fmt: skip
    sampler = Sampler.__new__(Sampler)
    torch.nn.Module.__init__(sampler)
    sampler.rl_on_policy_target, sampler.enable_deterministic = None, False
    sampler.use_log_softmax_logprob = sampler.use_ascend_backend = False
    sampler.output_logprob_processor = MagicMock()
    output = MagicMock(next_token_logits=logits.clone())
    torch.manual_seed(seed)
    return sampler(output, SimpleNamespace(**(batch | info)), return_logprob, [], [], torch.zeros(len(logits)))


def test_the_same_tokens_from_the_same_noise(drawn: Drawn, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(seed)) * 3
    ours = tokens(logits, seed)
    assert drawn.calls == 1
    monkeypatch.setattr(sample, "_devices", set())
    theirs = tokens(logits, seed)
    assert drawn.calls == 1 and ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs) and len(ours.unique()) > 32


ASKED: dict[str, dict[str, Any]] = {
    "probabilities": {"return_logprob": True},
    "top-p": {"need_top_p_sampling": True},
    "top-k": {"need_top_k_sampling": True},
    "min-p": {"need_min_p_sampling": True},
    "seeds": {"sampling_seed": torch.tensor([1, 2, 3])},
    "the tokens that could be drawn": {"sampling_mask_batch_indices": torch.tensor([0])},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_sglang_draws_when_asked_for(asked: dict[str, Any], drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torch.tensor([7, 8, 9])
    monkeypatch.setattr(Sampler, "_sample_from_probs", lambda *_: (theirs, MagicMock()))
    monkeypatch.setattr(Sampler, "_build_sampling_mask_output", lambda *_: None)
    assert tokens(torch.randn(3, 40), 0, **asked) is theirs
    assert drawn.calls == 0
    assert tokens(torch.randn(3, 40), 0) is not theirs and drawn.calls == 1


def test_sglang_draws_where_gumbel_is_turned_off(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_OPT_USE_GUMBEL_SAMPLE", "0")
    sample._devices.clear()
    sample.serve(CPU)
    assert len(tokens(torch.randn(3, 40), 0)) == 3 and drawn.calls == 0


@pytest.mark.parametrize(
    ("asked", "module"),
    [
        ("sampled(torch.zeros(1, 4), None) is None", "sample"),
        ("drawn_targets(torch.zeros(1, 4), None) is None", "sample"),
        ("clear_draft_states(None, torch.zeros(1), None, None, 4) is False", "draft_states"),
    ],
    ids=lambda text: text.partition("(")[0],
)
def test_where_no_step_was_built_nothing_is_imported(asked: str, module: str) -> None:
    """SGLang asks for every model, or of this one's pool; the ops need Triton."""
    code = (
        f"import sys, torch\nfrom sglang_sm120 import hooks\nassert hooks.{asked}\n"
        "print(sorted(name for name in sys.modules if name.startswith('sglang_sm120')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = ["sglang_sm120", "sglang_sm120.hooks", "sglang_sm120.step", f"sglang_sm120.step.{module}"]
    assert done.stdout.strip() == str(loaded)


def test_tokens_come_as_often_as_the_softmax_says(drawn: Drawn, seed: int) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)).expand(40_000, 12)
    found = tokens(logits, seed, temperatures=torch.full((40_000, 1), 0.8))
    expected = (logits[0].double() / 0.8).softmax(-1) * 40_000
    # One seed in 10,000 would fail by chance.
    assert chisquare(torch.bincount(found.long(), minlength=12).double(), expected).pvalue > 1e-4


@pytest.fixture
def chain(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The settings of a chain of drafts as a server has them by default, on one rank."""
    found = SimpleNamespace(
        speculative_accept_threshold_single=1.0, speculative_accept_threshold_acc=1.0, speculative_eagle_topk=1,
        speculative_use_rejection_sampling=False,
    )  # fmt: skip
    parallel = SimpleNamespace(tp_group=SimpleNamespace(broadcast=lambda tokens, src: tokens))
    monkeypatch.setattr(runtime_context, "get_spec", lambda: found)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    return found


def batch(temperatures: torch.Tensor, **info: Any) -> SimpleNamespace:
    filters = {"need_top_p_sampling": False, "need_top_k_sampling": False}
    others = {"is_all_greedy": False, "sampling_seed": None, "sampling_mask_batch_indices": None}
    return SimpleNamespace(**filters | others | {"temperatures": temperatures} | info)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"speculative_accept_threshold_single": 0.9}, {}),
        ({"speculative_accept_threshold_acc": 0.9}, {}),
        ({"speculative_eagle_topk": 2}, {}),
        ({"speculative_use_rejection_sampling": True}, {}),
        ({}, {"need_top_p_sampling": True}),
        ({}, {"need_top_k_sampling": True}),
        ({}, {"sampling_seed": torch.tensor([1])}),
        ({}, {"sampling_mask_batch_indices": torch.tensor([0])}),
    ],
)
def test_sglang_verifies_when_asked_for(
    settings: dict[str, Any], asked: dict[str, Any], chain: SimpleNamespace, drawn: Drawn
) -> None:
    logits = torch.randn(4, 40)
    assert hooks.drawn_targets(logits, batch(torch.ones(1, 1))) is not None and drawn.calls == 1
    vars(chain).update(settings)
    assert hooks.drawn_targets(logits, batch(torch.ones(1, 1), **asked)) is None and drawn.calls == 1


def test_a_greedy_batch_is_sglangs(chain: SimpleNamespace, drawn: Drawn) -> None:
    assert hooks.drawn_targets(torch.randn(8, 40), batch(torch.ones(2, 1), is_all_greedy=True)) is None
    assert drawn.calls == 0


def test_every_rank_verifies_with_the_first_ones_tokens(
    chain: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SimpleNamespace(broadcast=lambda tokens, src: torch.full_like(tokens, 7 + src))
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(tp_group=group))
    assert hooks.drawn_targets(torch.randn(4, 40), batch(torch.ones(2, 1))).tolist() == [7] * 4


def test_verified_tokens_follow_the_target(chain: SimpleNamespace, seed: int) -> None:
    """Of three nodes with two drafts: each sequence that the drafts allow as often as the target's product says."""
    requests, words, temperatures = 40_000, 3, (0.6, 1.7)
    logits = torch.randn(3, words, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    info = batch(torch.tensor(temperatures).repeat(requests // 2).view(-1, 1))
    targets = hooks.drawn_targets(logits.repeat(requests, 1), info).view(requests, 3)
    assert targets.dtype == torch.int64
    drafts = (1, 2)
    predicts = torch.zeros(requests * 3, dtype=torch.int32)
    accepted_at = torch.full((requests, 3), -1, dtype=torch.int32)
    candidates = torch.tensor([[0, *drafts]]).repeat(requests, 1)
    kept = torch.zeros(requests, dtype=torch.int32)
    nodes = torch.arange(requests * 3).view(requests, 3)
    hooks.verify_chain_greedy(predicts, accepted_at, kept, candidates, nodes, targets)
    for which, temperature in enumerate(temperatures):
        p = (logits.double() / temperature).softmax(-1)
        found, expected = [], []
        for accepted, chance in enumerate((1.0, p[0, drafts[0]], p[0, drafts[0]] * p[1, drafts[1]])):
            mine = (kept == accepted) & (torch.arange(requests) % 2 == which)
            last = predicts.view(requests, 3)[mine, accepted]
            for token in range(words):
                if accepted == 2 or token != drafts[accepted]:
                    found.append(int((last == token).sum()))
                    expected.append(float(chance * p[accepted, token]) * requests / 2)
        assert sum(found) == requests / 2
        # One seed in 10,000 would fail by chance.
        assert chisquare(found, expected).pvalue > 1e-4
