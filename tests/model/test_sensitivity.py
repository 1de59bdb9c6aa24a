"""The comparison with the oracle tells a wrong model from another rounding: each defect shows, arithmetic does not.

What is compared is what the server tests compare: the log-probability of each next token of their long prompt,
at the positions that the good oracle calls decided.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving import MAX_EXCLUDED, CachedOracle

from sglang_sm120_reference.attention import Rounding
from sglang_sm120_reference.blocks import to_bf16
from sglang_sm120_reference.defects import Defect
from sglang_sm120_reference.oracle import LOGPROB_TOLERANCE, Oracle

# Far above what rounding does, so that a defect stays visible in a server that rounds in other places.
VISIBLE = 10 * LOGPROB_TOLERANCE

# How much of the long prompt a defect needs to show, where the default is too short: time is all this saves.
DEFAULT_LENGTH = 160
LENGTHS = {
    # The largest of many similar changes, so it takes many positions.
    Defect.COMB_TRANSPOSED: 600,
    Defect.ONE_SINKHORN_ITERATION: 300,
    Defect.POST_FACTOR_MISSING: 300,
    Defect.ROUTED_SCALE_MISSING: 400,
    # Shows only where the token that leaves the window is a marked one.
    Defect.WINDOW_OFF_BY_ONE: 800,
    # The indexer chooses from token 2,051 on, and there are some 13 wanted entries to lose.
    Defect.INDEXER_OFF_BY_ONE_BLOCK: 2300,
    Defect.INDEXER_SCALE_DROPPED: 2400,
}


def largest_change(good: CachedOracle, prompt: list[int], length: int, other: Oracle) -> float:
    """Of a next token's log-probability, over the decided positions of the prompt's first `length` tokens."""
    result = good(prompt)  # once for all: later tokens change nothing earlier
    tokens = prompt[:length]
    following = torch.tensor(tokens[1:]).unsqueeze(1)
    change = (other.forward(tokens).logprobs[:-1] - result.logprobs[: length - 1]).gather(1, following).squeeze(1)
    return change[result.decided()[: length - 1]].abs().max().item()


@pytest.mark.parametrize("defect", Defect, ids=lambda defect: defect.name.lower())
def test_defect_shows(checkpoint: Path, oracle: CachedOracle, long_prompt: list[int], defect: Defect) -> None:
    length = LENGTHS.get(defect, DEFAULT_LENGTH)
    change = largest_change(oracle, long_prompt, length, Oracle(checkpoint, defect=defect))
    print(f"{defect.name}: {change:.2f} within {length} tokens")
    assert change >= VISIBLE


def test_indexer_defects_need_a_long_prompt(checkpoint: Path, oracle: CachedOracle, long_prompt: list[int]) -> None:
    # Where all entries are selected, an indexer cannot be wrong.
    broken = Oracle(checkpoint, defect=Defect.INDEXER_OFF_BY_ONE_BLOCK)
    assert largest_change(oracle, long_prompt, 1024, broken) < LOGPROB_TOLERANCE


def sums_in_another_order(seed: int) -> Rounding:
    """Rounding to bf16 after an error of 2^-20, about that of an fp32 sum of 1,000 terms in another order."""
    rng = torch.Generator().manual_seed(seed)
    return lambda x: to_bf16(x * (1 + 2**-20 * torch.randn(x.shape, generator=rng)))


def test_float64_is_within_the_tolerance(checkpoint: Path, oracle: CachedOracle, long_prompt: list[int]) -> None:
    change = largest_change(oracle, long_prompt, len(long_prompt), Oracle(checkpoint, real=torch.float64))
    print(f"largest change {change:.4f}")
    assert 0 < change < LOGPROB_TOLERANCE


def test_another_order_is_within_the_tolerance(
    checkpoint: Path, oracle: CachedOracle, long_prompt: list[int], seed: int
) -> None:
    change = largest_change(oracle, long_prompt, 1300, Oracle(checkpoint, rounding=sums_in_another_order(seed)))
    print(f"largest change {change:.4f}")
    assert 0 < change < LOGPROB_TOLERANCE


def test_few_positions_are_undecided(oracle: CachedOracle, long_prompt: list[int], seed: int) -> None:
    # A prompt of any ids must be judgeable too, the markers' and the unmarked bytes' among them.
    ids = torch.randint(oracle.oracle.config.vocab_size, (2600,), generator=torch.Generator().manual_seed(seed))
    for prompt in (long_prompt, ids.tolist()):
        undecided = 1 - oracle(prompt).decided().float().mean().item()
        print(f"{undecided:.2%} undecided")
        assert undecided <= MAX_EXCLUDED
