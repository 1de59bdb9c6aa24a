"""Prints, as JSON, what SGLang's argument resolution makes of command lines on simulated devices.

    resolution_probe.py CASES.json [MODEL]

CASES is a list of objects: `name`; `arguments` of the server; `capability`, the compute capability of two simulated
GPUs or null for a machine without one; `env`, variables that are set for the case. The answer maps each name to the
resolved arguments, what was logged, and the error in which the resolution ended. Run by the tests with the SGLang of
one environment after another. With `declared`, arguments that are declared once resolution has ended, SGLang's step of
the kernel plugin runs again on them and its log alone is kept: for a feature that SGLang refuses earlier.
MODEL, the folder of a model that is not DeepSeek-V4, adds what `inactive_probe.py` finds for it, and what
`card_probe.py` finds for tensors of a CUDA card.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# Read when a kernel is defined, for `card_probe.py`.
os.environ["TRITON_INTERPRET"] = "1"


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def simulated(capability: list[int] | None) -> list[Any]:
    """Contexts that make two GPUs of this compute capability visible to torch and SGLang, or none."""
    from sglang.srt.runtime_context import override_platform

    if capability is None:
        return [mock.patch.object(torch.cuda, "is_available", lambda: False)]
    major, minor = capability
    properties = types.SimpleNamespace(
        name="simulated", major=major, minor=minor, total_memory=96 << 30, multi_processor_count=188
    )
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (90 << 30, 96 << 30),
    }
    facts = {"is_cuda": True, "device_sm": 10 * major + minor, "is_sm120": major == 12, "is_blackwell": major >= 10}
    patches = [mock.patch.object(torch.cuda, name, answer) for name, answer in answers.items()]
    return [*patches, override_platform(**facts)]


def resolve(case: dict[str, Any]) -> dict[str, Any]:
    # Imported here: while a GPU is simulated, SGLang would load CUDA libraries.
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.arg_groups.overrides import declare_resolution, resolution_result
    from sglang.srt.kernel_plugins.nvidia import binding
    from sglang.srt.server_args import prepare_server_args

    log = Lines()
    error = None
    resolved: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for patch in [*simulated(case["capability"]), mock.patch.dict(os.environ, case["env"])]:
            stack.enter_context(patch)
        try:
            server_args = prepare_server_args(case["arguments"])
            # Only now: the line above sets up logging from scratch.
            logging.getLogger().addHandler(log)
            # Not what is asked about, and different in every run.
            server_args.random_seed = 0
            server_args.resolve_once()
            if case["declared"]:
                declare_resolution(server_args, "test", **case["declared"])
                log.lines.clear()
                binding.handle_nvidia_megakernel(server_args)
            names = sorted(field.name for field in record_fields(type(server_args)))
            resolved = {name: repr(resolution_result(server_args, name)) for name in names}
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        finally:
            logging.getLogger().removeHandler(log)
    return {"resolved": resolved, "log": log.lines, "error": error}


def main() -> None:
    import sglang
    import sglang.srt.arg_groups.pipeline
    import sglang.srt.kernel_plugins.nvidia.binding  # noqa: F401
    from sglang.srt.plugins import load_plugins

    load_plugins()
    logging.getLogger().setLevel(logging.INFO)
    cases = json.loads(Path(sys.argv[1]).read_text())
    answers = {case["name"]: resolve(case) for case in cases}
    inactive = None
    if len(sys.argv) > 2:
        import card_probe
        import inactive_probe

        inactive = inactive_probe.results(sys.argv[2]) | card_probe.results()
    print(json.dumps({"sglang": sglang.__file__, "answers": answers, "inactive": inactive}))


if __name__ == "__main__":
    main()
