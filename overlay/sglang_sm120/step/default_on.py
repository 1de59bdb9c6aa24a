"""The step without its flag: which servers take it by default, and what is logged where the contract refuses it."""

from __future__ import annotations

import logging
import os
from typing import Any

logger = logging.getLogger(__name__)

ARCHITECTURE = "DeepseekV4ForCausalLM"


def wanted_by_default(server_args: Any) -> bool:
    """Whether SGLang shall try the kernel plugin although `--enable-nvidia-megakernel` was not given.

    True for DeepSeek-V4 on SM12x (on any CUDA device with SGLANG_SM120_FORCE=1) unless SGLANG_SM120=0. Everywhere
    else the answer is False and nothing is logged.

    Args:
        server_args: SGLang's `ServerArgs` while its resolution runs.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
    from sglang.srt.kernel_plugins.nvidia.binding import device_isa

    if os.environ.get("SGLANG_SM120") == "0" or not str(resolving_view(server_args).device).startswith("cuda"):
        return False
    if ARCHITECTURE not in (model_config_of(server_args).hf_config.architectures or ()):
        return False
    isa = device_isa()
    return isa is not None and (isa.startswith("sm_12") or os.environ.get("SGLANG_SM120_FORCE") == "1")


def settle_default(server_args: Any, reasons: list[str]) -> bool:
    """Turn the plugin on where SGLang found nothing against it, else log why its own forward serves.

    Args:
        server_args: SGLang's `ServerArgs` while its resolution runs.
        reasons: why the plugin cannot serve this configuration, in SGLang's words.

    Returns:
        Whether the plugin is on.
    """
    if reasons:
        logger.warning("sglang-sm120 is off, SGLang's own forward serves DeepSeek-V4: %s", "; ".join(reasons))
        return False
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "sglang_sm120", enable_nvidia_megakernel=True)
    return True
