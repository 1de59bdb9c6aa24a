"""The one door: every name of this package that SGLang's patches import or its plugin loader calls.

SGLang imports this module first of all, in every process: at its top it imports neither torch nor SGLang, and what
another module defines is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import __version__ as _version

_DEFINED_IN = {
    "check": "startup",
    "register": "plugin",
    "install_on_cpu": "plugin",
    "settle_default": "step.default_on",
    "wanted_by_default": "step.default_on",
    "compress_decode_plan": "ops.compress_decode_plan",
    "compress_prefill_plan": "ops.compress_prefill_plan",
    "cpu_compression_metadata": "step.cpu",
    "cpu_defaults": "step.cpu",
    "clear_draft_states": "step.draft_states",
    "assign_draft_cache_locs": "step.cpu_speculation",
    "assign_extend_cache_locs": "step.cpu_speculation",
    "assign_req_to_token_pool": "step.cpu_speculation",
    "build_chain_tree": "step.cpu_speculation",
    "fill_bonus_tokens": "step.cpu_speculation",
    "gather_spec_extras": "step.cpu_speculation",
    "top_k_renorm_prob": "step.cpu_speculation",
    "top_p_renorm_prob": "step.cpu_speculation",
    "verify_chain_greedy": "step.cpu_speculation",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"{__name__} offers no {name}.")
    return getattr(import_module(f".{_DEFINED_IN[name]}", __package__), name)


def fp8_wo_a(o: Any, wo_a: Any) -> Any:
    """`step.prepare.fp8_wo_a`, imported when it is called: SGLang imports the patched module for every model."""
    from .step import prepare

    return prepare.fp8_wo_a(o, wo_a)


def require_overlay(version: str) -> None:
    """Stop a patched SGLang that has the overlay of another version: its patches and our functions belong together.

    Args:
        version: the overlay's version that the series was made with.

    Raises:
        SystemExit: with one sentence.
    """
    if version != _version:
        raise SystemExit(
            f"This SGLang carries the patches of sglang-sm120 {version}, but the package sglang_sm120 is {_version}: "
            "run `make apply` in the checkout of one of them."
        )


def sampled(logits: Any, info: Any) -> Any:
    """`step.sample.sampled`, imported when it is called: SGLang imports the patched module for every model."""
    from .step import sample

    return sample.sampled(logits, info)


def drawn_targets(logits: Any, info: Any) -> Any:
    """`step.sample.drawn_targets`, imported when it is called, as `sampled`."""
    from .step import sample

    return sample.drawn_targets(logits, info)


def sample_chain_target_only(*, retrive_index: Any, **arguments: Any) -> None:
    """`step.cpu_speculation.sample_chain_target_only`, called as SGLang calls `tree_speculative_sampling_target_only`.

    What a chain does not need is dropped: next nodes and siblings, draft probabilities, `deterministic`.
    """
    from .step import cpu_speculation

    for name in ("retrive_next_token", "retrive_next_sibling", "draft_probs", "deterministic"):
        del arguments[name]
    cpu_speculation.sample_chain_target_only(retrieve_index=retrive_index, **arguments)
