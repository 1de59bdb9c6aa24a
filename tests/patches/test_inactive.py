"""Where the overlay is not active, touched functions do what the released SGLang does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from boxes import Box

import sglang_sm120

PROBE = Path(__file__).with_name("inactive_probe.py")


def probe(site: Path) -> subprocess.Popen[str]:
    """What the SGLang in `site` returns for models that are not DeepSeek-V4."""
    # Bytecode is not written: `site` may share its files with another one.
    env = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, str(PROBE)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def results(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    found: dict[str, object] = json.loads(out.splitlines()[-1])
    return found


def test_another_model_gets_upstreams_results(real: Box, pristine: Path):
    real.done("apply")
    with probe(pristine) as released, probe(real.site) as patched:
        expected, found = results(released), results(patched)
    assert Path(str(expected.pop("sglang"))).is_relative_to(pristine)
    assert Path(str(found.pop("sglang"))).is_relative_to(real.site)
    assert found == expected
    # The probe reached the functions: a digest of what they returned, not an error both have in common.
    assert len(str(found["moe"])) == 64
    assert found["deepgemm"] == {"80": False, "90": True, "100": True, "103": True}


@pytest.mark.parametrize(
    ("device", "capability", "force", "expected"),
    [
        ("cuda", (12, 0), None, True),
        ("cuda:1", (12, 1), None, True),
        ("cuda", (9, 0), None, False),
        ("cuda", (10, 0), None, False),
        ("cuda", (9, 0), "0", False),
        ("cuda", (9, 0), "1", True),
        ("cuda", None, None, False),
        ("cpu", None, None, True),
        ("xpu", None, "1", False),
        ("npu", None, None, False),
    ],
)
def test_devices_it_serves(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int] | None,
    force: str | None,
    expected: bool,
):
    monkeypatch.delenv("SGLANG_SM120_FORCE", raising=False)
    if force is not None:
        monkeypatch.setenv("SGLANG_SM120_FORCE", force)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(sglang_sm120, "_active", False)
    assert not sglang_sm120.active(), "active before a DeepSeek-V4 model was built"
    assert sglang_sm120.activate(device) is expected
    assert sglang_sm120.active() is expected


def test_prepare_leaves_other_devices_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.delenv("SGLANG_SM120_FORCE", raising=False)
    before = dict(os.environ)
    assert not sglang_sm120.prepare("cuda", 2)
    assert sglang_sm120.server_defaults("cuda") == {}
    assert dict(os.environ) == before
