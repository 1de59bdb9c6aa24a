"""Every name that a patch of the series imports; nothing else of this package is imported by one.

SGLang imports this module first of all, in every process: at its top it imports neither torch nor SGLang, and what
another module defines is imported when a patch asks for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import __version__ as _version
from .default_on import settle_default, wanted_by_default

_DEFINED_IN = {
    "compress_decode_plan": "ops",
    "compress_prefill_plan": "ops",
    "cpu_compression_metadata": "cpu",
    "cpu_defaults": "cpu",
    "install_on_cpu": "plugin",
    "assign_draft_cache_locs": "cpu_speculation",
    "assign_extend_cache_locs": "cpu_speculation",
    "assign_req_to_token_pool": "cpu_speculation",
    "build_chain_tree": "cpu_speculation",
    "clear_unaccepted_c128_draft_states": "cpu_speculation",
    "fill_bonus_tokens": "cpu_speculation",
    "gather_spec_extras": "cpu_speculation",
    "top_k_renorm_prob": "cpu_speculation",
    "top_p_renorm_prob": "cpu_speculation",
    "verify_chain_greedy": "cpu_speculation",
}

__all__ = [
    "fp8_wo_a", "require_overlay", "sample_chain_target_only", "settle_default", "wanted_by_default", *_DEFINED_IN,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"{__name__} offers no {name} to patches.")
    return getattr(import_module(f".{_DEFINED_IN[name]}", __package__), name)


def fp8_wo_a(o: Any, wo_a: Any) -> Any:
    """`prepare.fp8_wo_a`, imported when it is called: SGLang imports the patched module for every model."""
    from . import prepare

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


def sample_chain_target_only(*, retrive_index: Any, **arguments: Any) -> None:
    """`cpu_speculation.sample_chain_target_only`, called as SGLang calls `tree_speculative_sampling_target_only`.

    What a chain does not need is dropped: next nodes and siblings, draft probabilities, `deterministic`.
    """
    from . import cpu_speculation

    for name in ("retrive_next_token", "retrive_next_sibling", "draft_probs", "deterministic"):
        del arguments[name]
    cpu_speculation.sample_chain_target_only(retrieve_index=retrive_index, **arguments)
