"""The model and SGLang's parser, shared by the launcher's tests."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from sglang_sm120.checkpoint.config import FLASH, PRO, model_config
from sglang_sm120_launch.flags import Flags, imported
from sglang_sm120_launch.model import Model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="real servers that fail, the image's steps")


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether to run what takes minutes; the option exists where this folder was named."""
    return request.config.getoption("thorough", default=False)


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """Flash's published config.json."""
    return model_config()


@pytest.fixture(scope="session")
def flash() -> Model:
    """DeepSeek-V4-Flash, its tensors counted from its config."""
    return Model.load(FLASH)


@pytest.fixture(scope="session")
def pro() -> Model:
    """DeepSeek-V4-Pro, likewise."""
    return Model.load(PRO)


@pytest.fixture(scope="session")
def sglangs() -> argparse.ArgumentParser:
    """SGLang's own parser of its flags, whose import takes some ten seconds."""
    return imported()


@pytest.fixture(scope="session")
def flags() -> Flags:
    """The flags of the installed SGLang, from the launcher's table."""
    found = Flags.installed()
    assert found.release is not None, "sglang is not installed: make setup"
    return found


@pytest.fixture
def one_flags(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's parser is built once, and the series counts as applied."""
    monkeypatch.setattr(Flags, "installed", lambda: flags)
    monkeypatch.setattr("sglang_sm120_launch.request.is_patched", lambda: True)
