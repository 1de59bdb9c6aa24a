"""On PYTHONPATH of a server on a Hopper card: SGLang prefills with its own forward there, and the step decodes.

On SM12x both read the same experts. Here SGLang's Marlin re-lays them, so that a second copy is kept as they were
loaded, and the step reads that. A plugin of SGLang's, for one test.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch


def register() -> None:
    """Keep the copy when a layer is processed, and have the plugin take the server as it would on SM12x."""
    from sglang.srt.layers.quantization.mxfp4_marlin_moe import Mxfp4MarlinMoEMethod

    from sglang_sm120 import plugin
    from sglang_sm120.step import reasons, weights

    names = weights.EXPERTS
    process = Mxfp4MarlinMoEMethod.process_weights_after_loading

    def keep_and_process(method: Any, layer: torch.nn.Module) -> None:
        for name in names:
            kept = getattr(layer, name).data
            # Scales as the step finds them where SGLang has no kernel for the experts.
            setattr(layer, f"{name}_kept", kept.float() if name.endswith("scale_inv") else kept.clone())
        process(method, layer)

    Mxfp4MarlinMoEMethod.process_weights_after_loading = keep_and_process
    weights.EXPERTS = tuple(f"{name}_kept" for name in names)
    reasons.emulated = plugin.emulated = lambda: False
    plugin.drafts = lambda: True
    required = plugin.SPEC.requires
    arguments = {**required.server_args, "moe_runner_backend": frozenset({"marlin"})}
    plugin.SPEC = msgspec.structs.replace(
        plugin.SPEC, requires=msgspec.structs.replace(required, server_args=arguments)
    )
