"""Weights read by safetensors' own threads on a real card: the bytes of the files, and the card's memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import random_checkpoint
from sglang_sm120.checkpoint.config import ReferenceConfig, model_config
from sglang_sm120.step import loading
from sglang_sm120_reference.config_file import config_json


def test_the_bytes_of_the_files_are_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is copied when it is handed out, as SGLang's `load_weights` does, and may be overwritten after."""
    files = random_checkpoint.write(tmp_path / "model", config_json(ReferenceConfig()), 2)
    monkeypatch.setattr(loading, "PORTION", 1 << 20)
    pairs = loading.tensors(list(map(str, files)), lambda _: True, torch.device("cuda", torch.cuda.current_device()))
    found = {name: tensor.cpu() for name, tensor in pairs}
    held = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_memory_is_bounded_and_given_back(tmp_path: Path) -> None:
    """The cache is sized by what is free on the card after loading."""
    source = random_checkpoint.cut(model_config(), 7e9)
    files = random_checkpoint.write(tmp_path / "model", source, os.cpu_count() or 1)
    assert random_checkpoint.bytes_of(source) > 4 * loading.PORTION
    device = torch.device("cuda", torch.cuda.current_device())
    before = least = torch.cuda.mem_get_info()[0]
    for _ in loading.tensors(list(map(str, files)), lambda _: True, device):
        least = min(least, torch.cuda.mem_get_info()[0])
    del _
    torch.cuda.synchronize()
    assert before - least <= (loading.IN_FLIGHT + 1) * loading.PORTION
    assert before - torch.cuda.mem_get_info()[0] < loading.PORTION // 4
