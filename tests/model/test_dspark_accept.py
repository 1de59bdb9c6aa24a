"""`speed/60` lets DSpark's verification graph accept and commit for DeepSeek-V4 too, as what else follows it does."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.speculative.dspark_components import dspark_worker_v2
from sglang.srt.speculative.dspark_components.dspark_verify import DsparkVerifyEpilogue, TargetVerifyExecutor
from sglang.srt.speculative.spec_tp_sync import SpecTpSync

BLOCK, VOCABULARY, HIDDEN, REQUESTS, PADDED = 5, 40, 8, 3, 4


class Injector:
    """What is committed: SGLang's own injector takes it from here on either way."""

    swa_ring_size = None

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def ids_for(self, plan: torch.Tensor) -> torch.Tensor:
        return plan

    def inject_target_hidden(self, **given: Any) -> None:
        self.given = given


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_graphs_accept_is_the_eager_one(share: float, seed: int) -> None:
    """For a batch padded to its graph's size; the padded request commits nothing."""
    rng = torch.Generator().manual_seed(seed)
    rows = BLOCK + 1
    logits = torch.randn(PADDED * rows, VOCABULARY, generator=rng)
    best = logits.argmax(-1).view(PADDED, rows)
    ids = torch.randint(VOCABULARY, (PADDED, rows), generator=rng)
    # A draft is right where it is what the row before it says.
    right = torch.rand(PADDED, BLOCK, generator=rng) < share
    ids[:, 1:] = torch.where(right, best[:, :-1], ids[:, 1:])
    hidden = torch.randn(PADDED * rows, HIDDEN, generator=rng)
    lengths = torch.randint(1, 300, (PADDED,), generator=rng)
    slots = torch.randint(999, (PADDED * rows,), generator=rng)
    positions = (lengths[:, None] + torch.arange(rows)).flatten()
    sync = SpecTpSync(SimpleNamespace(world_size=1))

    eager = Injector()
    executor = TargetVerifyExecutor.__new__(TargetVerifyExecutor)
    vars(executor).update(
        gamma=BLOCK, verify_num_draft_tokens=rows, kv_injector=eager, _tp_sync=sync, _simulated_correct_len=None,
        _fused_argmax=False, _block_verification=False, _rejection_noise=None, verify_epilogue=None,
    )  # fmt: skip
    mine, real = ids[:REQUESTS], slice(0, REQUESTS * rows)
    told = executor.accept_and_finalize(
        folded_accept=False, bs=REQUESTS, verify_ids_2d=mine, target_logits=logits[real],
        draft_block=SimpleNamespace(greedy_mask=None), sampling_info=None, draft_input=None, layout=None,
        prefix_lens=lengths[:REQUESTS], draft_tokens=mine[:, 1:],
    )  # fmt: skip
    window = SimpleNamespace(
        verify_cache_loc_2d=slots[real].view(REQUESTS, rows), positions_2d=positions[real].view(REQUESTS, rows),
        kv_loc_plan=slots[real],
    )  # fmt: skip
    executor.commit_hidden(
        batch=None, layout=None, hidden_strided=None, verify_window=window, commit_lens=told.commit_lens,
        logits_output=SimpleNamespace(hidden_states=hidden[real]), bs=REQUESTS, run_compact=False,
    )  # fmt: skip

    graph = Injector()
    pool = SimpleNamespace(set_swa_key_buffer_radix_fused_norm_rope=None)
    context = SimpleNamespace(kv_injector=graph, resolve_pool=lambda: pool, resolve_engram_hasher=None)
    epilogue = DsparkVerifyEpilogue(
        max_bs=2 * PADDED, verify_num_draft_tokens=rows, device="cpu", tp_sync=sync, commit_ctx=context
    )
    epilogue.begin_static_step(REQUESTS, True)
    batch = SimpleNamespace(
        batch_size=PADDED, input_ids=ids.flatten(), seq_lens=lengths, req_pool_indices=torch.arange(PADDED),
        out_cache_loc=slots, positions=positions,
    )  # fmt: skip
    epilogue._static_epilogue(SimpleNamespace(next_token_logits=logits, hidden_states=hidden), batch)
    folded = epilogue.read_accept(REQUESTS)
    for name in ("correct_len", "bonus", "commit_lens", "new_seq_lens", "out_tokens"):
        assert torch.equal(getattr(folded, name).long(), getattr(told, name).long()), name
    same = ids[:REQUESTS, 1:] == best[:REQUESTS, :-1]
    assert told.commit_lens.tolist() == (1 + same.int().cumprod(1).sum(1)).tolist()
    committed = graph.given["commit_lens"].tolist()
    assert committed == [*told.commit_lens.tolist(), 0]
    for name, part in eager.given.items():
        if isinstance(part, torch.Tensor) and name != "commit_lens":
            assert torch.equal(graph.given[name][: len(part)], part), name


def test_the_graph_accepts_for_this_model() -> None:
    """The condition asks for no model: V4's drafter is DeepSeek-V4's, with experts, as V4.1's is."""
    source = inspect.getsource(dspark_worker_v2.DSparkWorkerV2.__init__)
    condition = source.partition("static_epilogue_supported = (")[2].partition("\n        )")[0]
    assert "mode_value" in condition and "dsv41" not in condition
