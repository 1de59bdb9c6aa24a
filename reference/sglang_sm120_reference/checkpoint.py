"""Reading a published checkpoint: every weight dequantised exactly, by its published name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sglang_sm120.formats import fp8_block, mxfp4, nvfp4

from .config_file import load_config
from .defects import Defect


class Checkpoint:
    """A checkpoint directory. Weights are read on first use and kept on `device`, 4 or 8 bytes per value."""

    def __init__(self, directory: str | Path, real: torch.dtype, defect: Defect | None, device: str = "cpu") -> None:
        self.directory, self._device = Path(directory), device
        self.config = load_config(directory)
        index = json.loads((self.directory / "model.safetensors.index.json").read_text())
        self._files: dict[str, str] = index["weight_map"]
        self._real, self._defect = real, defect
        self._values: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def raw(self, name: str) -> Tensor:
        """The tensor as stored. Raises KeyError when the checkpoint does not hold it."""
        if name not in self._files:
            raise KeyError(f"{self.directory} holds no tensor {name}: write or download the checkpoint again")
        with safe_open(self.directory / self._files[name], "pt", device=self._device) as file:
            return file.get_tensor(name)

    def weight(self, name: str) -> Tensor:
        """The weight's values in the oracle's arithmetic dtype, dequantised with its scales if it has some."""
        if name not in self._values:
            self._values[name] = self._dequantise(name).to(self._real)
        return self._values[name]

    def _dequantise(self, name: str) -> Tensor:
        stored = self.raw(name)
        if stored.dtype == torch.float8_e4m3fn:
            return fp8_block.dequantise(stored, self._scale(name))
        if stored.dtype == torch.uint8:
            # Input scales are for activations in FP4, and the oracle's are not rounded.
            return nvfp4.dequantise(stored, self.raw(f"{name}_scale"), self.raw(f"{name}_scale_2"))
        if stored.dtype == torch.int8:
            if self._defect is Defect.NIBBLES_SWAPPED:
                stored = mxfp4.pack(mxfp4.unpack(stored).unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
            values = mxfp4.dequantise(stored, self._scale(name))
            return values * 2 if self._defect is Defect.SCALE_EXPONENT_OFF_BY_ONE else values
        return stored

    def _scale(self, name: str) -> Tensor:
        return self.raw(name.removesuffix(".weight") + ".scale")
