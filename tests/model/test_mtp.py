"""The MTP layer in SGLang: every tensor is loaded, and verification and drafts agree with the oracle.

SGLang's EAGLE worker needs CUDA; the models, the attention metadata and the compressor's state are the same here.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import CachedOracle, PromptOf

from sglang_sm120.checkpoint.config import ReferenceConfig
from sglang_sm120.checkpoint.layout import stored
from sglang_sm120.speculation import MAX_DRAFT_TOKENS, require_kept
from sglang_sm120_reference.oracle import LOGPROB_TOLERANCE

Rows = dict[str, torch.Tensor]

PROBE = Path(__file__).with_name("mtp_probe.py")
# The largest tier of `--speculative-adaptive`.
DRAFTS = 8
# A c128 entry is completed from accepted drafts, tokens 121 to 127 and 250 to 255, that came in several verifications
# and were followed by rejected ones; the second request also enters a new window page, at 256.
LENGTHS = (119, 250)
ACCEPTED = ((2, 1), (1, 2), (3, 4), (4, 1))


END = 7
# Accepted tokens, the limit; what is returned and why.
ENDINGS = (
    ([5, END, 9], 3, [5, END], "stop"),
    ([5, END, 9], 2, [5, END], "stop"),
    ([5, 6, END, 9], 2, [5, 6], "length"),
    ([5, 6, 9, 8], 3, [5, 6, 9], "length"),
    ([5, 6], 3, [5, 6], None),
)


def script(prompt_of: PromptOf) -> dict[str, Any]:
    """What `mtp_probe.py` is to do: two prompts, then verifications in which the first few drafts are accepted."""
    prompts = [prompt_of(length, i) for i, length in enumerate(LENGTHS)]
    accepted_tokens = [prompt_of(sum(counts) + 1, 10 + i) for i, counts in enumerate(zip(*ACCEPTED, strict=True))]
    steps, at = [], [0] * len(LENGTHS)
    for n, counts in enumerate(ACCEPTED):
        drafts, bonus = [], []
        for r, count in enumerate(counts):
            right = accepted_tokens[r][at[r] : at[r] + count]
            drafts.append(right + prompt_of(DRAFTS - count, 100 * n + r + 20))
            at[r] += count
            bonus.append(accepted_tokens[r][at[r]])
        steps.append({"drafts": drafts, "accepted": list(counts), "bonus": bonus})
    endings = [{"accepted": accepted, "limit": limit, "end": END} for accepted, limit, _, _ in ENDINGS]
    following = [tokens[0] for tokens in accepted_tokens]
    return {"prompts": prompts, "following": following, "steps": steps, "endings": endings}


@pytest.fixture(scope="module")
def plan(prompt_of: PromptOf) -> dict[str, Any]:
    return script(prompt_of)


@pytest.fixture(scope="module")
def served(plan: dict[str, Any], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What SGLang's models returned."""
    folder = tmp_path_factory.mktemp("mtp")
    (folder / "script.json").write_text(json.dumps(plan))
    command = [sys.executable, str(PROBE), str(checkpoint), str(folder / "script.json"), str(folder / "out.pt")]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(folder / "out.pt")
    return found


def test_every_tensor_is_loaded(served: dict[str, Any], checkpoint: Path) -> None:
    # SGLang warns of a name it has no parameter for, and of a parameter that no tensor filled.
    assert served["warnings"] == []
    shared = ("model.embed_tokens.weight", "lm_head.weight")
    kept = {name: size for name, size in served["sizes"].items() if name not in shared and "attn_mqa" not in name}
    shapes = stored(ReferenceConfig.load(checkpoint))
    written = [math.prod(shape) for name, (shape, _) in shapes.items() if name.startswith("mtp.")]
    assert sum(kept.values()) == sum(written) > 0


def _sequences(plan: dict[str, Any]) -> list[list[int]]:
    """Each prompt with the drafts that were accepted."""
    sequences = [list(prompt) for prompt in plan["prompts"]]
    for step in plan["steps"]:
        for sequence, drafts, accepted in zip(sequences, step["drafts"], step["accepted"], strict=True):
            sequence += drafts[:accepted]
    return sequences


def _accepted_rows(plan: dict[str, Any], results: list[Rows], key: str, request: int) -> torch.Tensor:
    """What verification returned for the accepted drafts of one request, in order."""
    parts = []
    for step, result in zip(plan["steps"], results[1:], strict=True):
        parts.append(result[key][request * DRAFTS : request * DRAFTS + step["accepted"][request]])
    return torch.cat(parts)


def _prompt_rows(plan: dict[str, Any], results: list[Rows], key: str, request: int) -> torch.Tensor:
    return results[0][key].split([len(prompt) for prompt in plan["prompts"]])[request]


@pytest.mark.parametrize("request_number", range(len(LENGTHS)))
def test_verification_is_the_oracles(
    served: dict[str, Any], plan: dict[str, Any], oracle: CachedOracle, request_number: int
) -> None:
    sequence = _sequences(plan)[request_number]
    result = oracle(sequence)
    logits = _accepted_rows(plan, served["results"], "logits", request_number)
    error = (logits.float().log_softmax(-1) - result.logprobs[-len(logits) :]).abs().amax(-1)
    decided = result.decided()[-len(logits) :]
    print(f"largest error {error[decided].max():.4f}, {int(decided.sum())} of {len(logits)} rows decided")
    # Rounding alone may choose another expert in one row.
    assert decided.sum() >= len(logits) - 1
    assert error[decided].max() <= LOGPROB_TOLERANCE


@pytest.mark.parametrize("request_number", range(len(LENGTHS)))
def test_drafts_are_the_oracles(
    served: dict[str, Any], plan: dict[str, Any], oracle: CachedOracle, request_number: int
) -> None:
    sequence, results = _sequences(plan)[request_number], served["results"]
    rows = [
        torch.cat([part(plan, results, key, request_number) for part in (_prompt_rows, _accepted_rows)])
        for key in ("hidden", "draft")
    ]
    # The oracle's MTP layer reads the hidden streams that SGLang's read: the target's error is judged above.
    hidden, drafts = rows[0].float().unflatten(-1, (4, -1)), rows[1]
    expected = oracle.oracle.mtp_logits(hidden, sequence[1:] + [plan["steps"][-1]["bonus"][request_number]])
    error = (drafts.log_softmax(-1) - expected.float().log_softmax(-1)).abs().amax(-1)
    print(f"largest error {error.max():.4f} of {len(error)} rows")
    assert error.max() <= LOGPROB_TOLERANCE


def test_more_drafts_than_can_be_taken_back_are_refused() -> None:
    require_kept(None)
    require_kept(MAX_DRAFT_TOKENS)
    with pytest.raises(ValueError, match="is 11, .* take back 10 tokens: use --speculative-num-steps 9 or fewer"):
        require_kept(MAX_DRAFT_TOKENS + 1)


def test_an_end_token_ends_the_answer_where_the_limit_is_reached(served: dict[str, Any]) -> None:
    assert served["ended"] == [(tokens, reason) for _, _, tokens, reason in ENDINGS]


def test_metadata_is_made_before_streams_part(served: dict[str, Any]) -> None:
    assert served["order"] == ["metadata", "streams"]
