"""One run of the compiler for all tests of the gate, with progress."""

from __future__ import annotations

import pytest
from gate import Compiled, Name, Run, all_steps, compile_all, jobs, other_steps, sample
from tqdm import tqdm

from sglang_sm120.checkpoint.config import RANKS
from sglang_sm120.compilation import Job


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-table", action="store_true", help="write docs/kernel-resources.md again; implies --all-shapes"
    )


@pytest.fixture(scope="session")
def renewing(request: pytest.FixtureRequest) -> bool:
    """Whether the table is to be written, not compared; the option exists where this folder was named."""
    return request.config.getoption("renew_table", default=False)


@pytest.fixture(scope="session")
def all_shapes(request: pytest.FixtureRequest, renewing: bool) -> bool:
    """Every shape of the real model; otherwise those of `sample`."""
    return renewing or request.config.getoption("all_shapes")


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest, all_shapes: bool) -> Run:
    groups = [jobs(all_steps, RANKS), jobs(other_steps, RANKS)] if all_shapes else [sample()]
    launched = (set[Name](), set[Name]())
    capture = request.config.pluginmanager.getplugin("capturemanager")
    total = sum(map(len, groups))
    with capture.global_and_fixture_disabled(), tqdm(total=total, unit="job", disable=not all_shapes) as bar:

        def done(job: Job, names: set[Name]) -> None:
            for group, mine in zip(groups, launched, strict=False):
                if job in group:
                    mine.update(names)
            bar.set_postfix_str(f"{job.op} TP {job.tp}: {len(names)} kernels")
            bar.update()

        with pytest.MonkeyPatch.context() as patch:
            # Importing FlashInfer names a CUDA 13 assembler there, and the table is of the one that Triton ships.
            patch.delenv("TRITON_PTXAS_BLACKWELL_PATH", raising=False)
            found = compile_all(sum(groups, []), done)
    return Run(found, *launched)


@pytest.fixture(scope="session")
def compiled(run: Run) -> Compiled:
    """Every kernel that the gate's steps need."""
    return {name: run.found[name] for name in sorted(run.steps)}


@pytest.fixture(scope="session")
def whole_run(run: Run, all_shapes: bool) -> Run:
    """The run at every shape of the real model, which one row says nothing about."""
    if not all_shapes:
        pytest.skip("needs every shape of the real model: make test-sm120")
    return run
