"""Modules that SGLang and FlashInfer build with nvcc while a server runs: each build is logged, each request listed.

Both call what `watch` wraps by name, so whoever asks is seen, whether its module is built or found in the cache.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

LIST = "SGLANG_SM120_MODULES"
"""Variable that names a file to which every module asked for is appended, for `sglang-sm120 prebuild --modules`."""
_watching = False
_generators: dict[str, dict[str, Any]] = {}


def watch() -> None:
    """From now on log every module that this process builds and, where `LIST` is set, list every one it asks for."""
    global _watching
    if _watching or not torch.cuda.is_available():
        return
    _watching = True
    try:
        _log_builds()
        if os.environ.get(LIST):
            _list_requests()
    except (ImportError, AttributeError) as error:
        # What it would say is not worth a server.
        logger.warning("sglang_sm120 does not see which modules are built with nvcc: %s.", error)


@contextmanager
def late_ones(eagle: bool, vocabulary: int) -> Iterator[None]:
    """While the context lasts, build or load what SGLang asks for at the first request that needs it.

    That is a request with top-k or top-p, with DSpark every sampled one, with EAGLE every one: it would wait for nvcc.
    """
    late: dict[str, tuple[Any, ...]] = {"top-k and top-p": ("flashinfer.sampling", "get_sampling_module")}
    if eagle:
        ops, width = "sglang.kernels.ops.speculative", math.gcd(4, vocabulary)
        late["verification"] = (f"{ops}.tree", "_jit_tree_module")
        late["verification with top-k and top-p"] = (f"{ops}.sampling", "_jit_sampling_module", width, True)
    with ThreadPoolExecutor() as pool:
        made = {what: pool.submit(_make, *whence) for what, whence in late.items()}
        yield
    for what, future in made.items():
        if error := future.exception():
            # As without this: who needs it gets SGLang's own error.
            logger.warning("sglang_sm120 could not build SGLang's module for %s ahead of a request: %s", what, error)


def _make(module: str, name: str, *arguments: object) -> object:
    return getattr(import_module(module), name)(*arguments)


def _log_builds() -> None:
    from sglang.kernels.jit.utils.compile import ninja

    # After SGLang, which sets where FlashInfer keeps its modules.
    core: Any = import_module("flashinfer.jit.core")
    build, make = ninja.build, core.JitSpecNvcc.build

    @wraps(build)
    def built_by_sglang(*, spec: Any, **arguments: Any) -> Any:
        began = time.monotonic()
        library = build(spec=spec, **arguments)
        _built(spec.module_name, began)
        return library

    @wraps(make)
    def built_by_flashinfer(spec: Any, *args: Any, **arguments: Any) -> None:
        # It asks ninja every time, which builds nothing where all is as it was.
        began, before = time.monotonic(), _written(spec.jit_library_path)
        make(spec, *args, **arguments)
        if _written(spec.jit_library_path) != before:
            _built(spec.name, began)

    ninja.build, core.JitSpecNvcc.build = built_by_sglang, built_by_flashinfer


def _list_requests() -> None:
    from sglang.kernels.jit.utils.compile import cache, loader

    core: Any = import_module("flashinfer.jit.core")
    names = inspect.signature(loader.load_jit).parameters
    key = cache.compute_build_key

    @wraps(key)
    def asked_of_sglang(spec: Any, *, build_file: str) -> Any:
        # The caller is `load_jit`, whose arguments are texts and lists of texts: they are all that a rebuild needs.
        given = {name: value for name, value in sys._getframe(1).f_locals.items() if name in names}
        changed = {name: value for name, value in given.items() if name != "args" and value != names[name].default}
        _listed({"name": spec.module_name, "args": [str(arg) for arg in given["args"]], **changed})
        return key(spec, build_file=build_file)

    cache.compute_build_key = asked_of_sglang
    register, load = core.jit_spec_registry.register, core.JitSpec.build_and_load

    @wraps(register)
    def registered(spec: Any) -> None:
        _generators[spec.name] = _generator()
        register(spec)

    @wraps(load)
    def asked_of_flashinfer(spec: Any) -> Any:
        # CuTe-DSL's kernels have no generator: they are compiled without nvcc.
        if spec.name in _generators:
            _listed({"name": spec.name, **_generators[spec.name]})
        return load(spec)

    core.jit_spec_registry.register, core.JitSpec.build_and_load = registered, asked_of_flashinfer


def _generator() -> dict[str, Any]:
    """Which function of FlashInfer's the specification comes from that is being registered, and its arguments."""
    # `gen_jit_spec` registers; what called it, and what that was called by, are named alike.
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_back.f_code.co_name.startswith("gen_"):
        frame = frame.f_back
    code = frame.f_code
    given = {name: frame.f_locals[name] for name in code.co_varnames[: code.co_argcount]}
    return {"generator": f"{frame.f_globals['__name__']}:{code.co_name}", "arguments": given}


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def _listed(entry: dict[str, Any]) -> None:
    # One write of one line: other processes append to the same file.
    with open(os.environ[LIST], "a", encoding="utf-8") as out:
        out.write(json.dumps(entry, default=str) + "\n")


def _built(name: str, began: float) -> None:
    logger.warning("A module was built with nvcc while the server ran: %s, %.0f s.", name, time.monotonic() - began)
