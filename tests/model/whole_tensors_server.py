"""The server that reads its weights as `SGLANG_SM120_LOADER=1` does, on a CPU: the children import this file too.

The reader needs a CUDA device. Here each portion is read at once, and handed out in another order than the file's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import safetensors

from sglang_sm120.step import loading


class Portions:
    """In `safe_open`'s place."""

    def __init__(self, file: str, framework: str, backend: str) -> None:
        self._file = safetensors.safe_open(file, framework)
        self.offset_keys, self.get_tensor_meta = self._file.offset_keys, self._file.get_tensor_meta

    def prefetch(self, plan: dict[str, None], device: str, threads: int) -> Any:
        pairs = [(name, self._file.get_tensor(name)) for name in reversed(plan)]
        return type("Read", (), {"__iter__": lambda _: iter(pairs), "close": lambda _: pairs.clear()})()


os.environ[loading.SWITCH] = "1"
loading.safe_open = Portions
loading.DEVICE = "cpu"

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    launch_server(prepare_server_args(sys.argv[1:]))
