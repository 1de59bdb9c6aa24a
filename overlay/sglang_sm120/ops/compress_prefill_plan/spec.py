"""What the tools know of `compress_prefill_plan`."""

from __future__ import annotations

from ...spec import Spec

SPEC = Spec(prefill="SGLang's CUDA kernel")
