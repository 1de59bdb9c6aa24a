"""One small checkpoint and one server per configuration, shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from serving import CachedOracle, PromptOf

from local_server import PLAIN, LocalServer
from sglang_sm120_reference.oracle import Oracle
from sglang_sm120_reference.prompts import prompt
from sglang_sm120_reference.write import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "DeepSeek-V4-small"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> CachedOracle:
    return CachedOracle(Oracle(checkpoint))


@pytest.fixture(scope="session")
def prompt_of(checkpoint: Path) -> PromptOf:
    """`prompt_of(tokens, seed)`: random ids on which every part of the checkpoint shows."""
    return partial(prompt, checkpoint)


@pytest.fixture(scope="session")
def long_prompt(prompt_of: PromptOf) -> list[int]:
    """2,600 tokens: the indexer chooses 512 of 650 entries, and 20 c128 entries are in sight."""
    return prompt_of(2600, 1)


@pytest.fixture(scope="session")
def short_prompt(prompt_of: PromptOf) -> list[int]:
    """200 tokens: every compressed entry is selected."""
    return prompt_of(200, 2)


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """The server of a module's `SERVER_ARGS`, `SERVER_ENV` and `SERVER_LAUNCHER`."""
    module = request.module
    with LocalServer(
        checkpoint,
        "--device",
        "cpu",
        *module.SERVER_ARGS,
        log=tmp_path_factory.mktemp("server") / "server.log",
        launcher=getattr(module, "SERVER_LAUNCHER", ("-m", "sglang.launch_server")),
        env=getattr(module, "SERVER_ENV", {}),
    ) as running:
        yield running
    running.require_step(PLAIN)
