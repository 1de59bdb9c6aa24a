"""What the step reads of SGLang's pools and metadata: by classes at start, by instances before the first pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.layers.attention.deepseek_v4_backend import DSV4AttnMetadata
from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

from sglang_sm120.plugin import Checked
from sglang_sm120.step import reasons


def test_this_sglang_has_what_the_step_reads() -> None:
    assert reasons.missing() == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [(DeepSeekV4TokenToKVPool, "get_swa_key_buffer_radix"), (DSV4AttnMetadata, "c4_sparse_page_indices")],
)
def test_a_renamed_attribute_is_named(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(owner, name, raising=False)
    fields = getattr(owner, "__dataclass_fields__", {})
    monkeypatch.setattr(
        owner, "__dataclass_fields__", {key: fields[key] for key in fields if key != name}, raising=False
    )
    (why,) = reasons.missing()
    assert why.startswith(f"SGLang's {owner.__name__} has no {name}, which the step reads: install the release ")


def view(bytes_per_token: int = 584, window: Any = None, lacks: str = "") -> SimpleNamespace:
    """A pass's view, of pools and metadata with everything that the step reads but one name."""
    pool, core, metadata = (
        SimpleNamespace(**dict.fromkeys(set(names) - {lacks}))
        for names in (reasons.POOL, reasons.CORE, reasons.METADATA)
    )
    if hasattr(metadata, "core_attn_metadata"):
        metadata.core_attn_metadata = core
    kept = SimpleNamespace(pool=pool, request_window=window, get_swa_key_bytes_per_token=lambda: bytes_per_token)
    return SimpleNamespace(kv_pool=kept, metadata=metadata)


def test_pools_that_are_refused() -> None:
    assert reasons.unusable(view()) == []
    for other in (view(512), view(window=0)):
        (why,) = reasons.unusable(other)
        assert why.startswith("its keys have 5") and "and the step reads pages of V4's 584" in why


@pytest.mark.parametrize("name", [*reasons.POOL, *reasons.METADATA, *reasons.CORE])
def test_an_attribute_that_an_instance_lacks_is_named(name: str) -> None:
    found = reasons.unusable(view(lacks=name))
    assert f"SGLang's SimpleNamespace has no {name}, which the step reads" in found


def test_pools_are_looked_at_before_the_first_pass() -> None:
    step = Checked(lambda view, *args: args)
    with pytest.raises(
        RuntimeError, match="^sglang_sm120 cannot serve this pool: its keys have 512 bytes a token, .* alone\\.$"
    ):
        step(view(512), 1)
    assert step(view(), 1, 2) == (1, 2)
    assert step(None, 3) == (3,)
