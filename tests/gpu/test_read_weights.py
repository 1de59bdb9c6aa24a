"""Weights read by safetensors' own threads on a real card: the bytes of the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import random_checkpoint
from sglang_sm120.checkpoint.config import ReferenceConfig
from sglang_sm120.step import loading
from sglang_sm120_reference.config_file import config_json


def test_the_bytes_of_the_files_are_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is copied when it is handed out, as SGLang's `load_weights` does, and may be overwritten after."""
    files = random_checkpoint.write(tmp_path / "model", config_json(ReferenceConfig()), 2)
    monkeypatch.setattr(loading, "PORTION", 1 << 20)
    before = torch.cuda.mem_get_info()[0]
    pairs = loading.tensors(list(map(str, files)), lambda _: True, torch.device("cuda", torch.cuda.current_device()))
    found = {name: tensor.cpu() for name, tensor in pairs}
    held = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    torch.cuda.synchronize()
    # The cache is sized by what is free: what the reader took has to be given back.
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20
