"""A CUDA card that is not there: its tensors have shapes and no memory, its kernels do nothing; the CPU's are real.

Enough of one for SGLang's own scheduler to load a model of any size with random weights, capture its graphs and serve,
so that what it would build and launch on such a card can be seen on any machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sysconfig
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GIB = 1 << 30
OWN = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional")
"""Namespaces of torch's own operators; those of others are kernels, which here do nothing."""
_fake = FakeTensorMode(allow_non_fake_inputs=True)
_python: dict[str, Callable[..., Any]] = {}


class Nothing:
    """A module, a handle, a stream: what is called of it does nothing and returns what `answers` has."""

    answers: dict[str, Callable[..., Any]] = {}
    _made = 0

    def __init__(self, name: object = "", *_: Any, **__: Any) -> None:
        Nothing._made += 1
        # SGLang looks for streams with different handles.
        self.__dict__.update(_name=name, cuda_stream=Nothing._made, stream_id=Nothing._made)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(f"{self._name}.{name}")

    def __call__(self, *args: Any, **arguments: Any) -> Any:
        return self.answers.get(self._name, lambda *_, **__: 0)(*args, **arguments)

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...


class _OneDevice(TorchFunctionMode):
    """`cuda` is `cuda:0`: what asks the driver for the current device would fail."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0].to("cuda:0")
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        args, kwargs = tree_map(lambda a: "cuda:0" if _bare(a) else a, (args, kwargs))
        if func in (torch.tensor, torch.as_tensor) and "cuda" in str(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _bare(value: Any) -> bool:
    return (isinstance(value, str) and value == "cuda") or (
        isinstance(value, torch.device) and value.type == "cuda" and value.index is None
    )


class _Card(TorchDispatchMode):
    """Operators on the card's tensors give shapes; where one is read, it holds ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, name = func._schema.name.split("::")
        if space not in OWN:
            if name in _python:
                return _python[name](*args, **kwargs)
            return args[0] if func._schema.returns and args else None
        leaves = tree_leaves((args, kwargs))
        here = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        to = kwargs.get("device")
        if not here and (to is None or torch.device(to).type != "cuda"):
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            return _ones(args[0]).flatten()[0].item()
        if name == "_to_copy" and to is not None and torch.device(to).type == "cpu":
            return _ones(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            return args[0].fill_(1)
        if name in ("equal", "is_nonzero"):
            return True
        args, kwargs = tree_map(
            lambda a: _fake.from_tensor(a) if isinstance(a, torch.Tensor) and not isinstance(a, FakeTensor) else a,
            (args, kwargs),
        )
        with _fake:
            if name == "nonzero":
                return torch.empty(3, args[0].dim(), dtype=torch.int64, device=args[0].device)
            return func(*args, **kwargs)


def _ones(like: Any) -> Any:
    return torch.ones(like.shape).to(like.dtype)


def library() -> None:
    """Load a `libcuda.so.1` that has every function which SGLang's compiled packages ask of it."""
    site = Path(sysconfig.get_paths()["purelib"])
    files = [str(file) for part in ("sgl_kernel", "deep_gemm") for file in (site / part).rglob("*.so")]
    found = subprocess.run(["nm", "-D", "--undefined-only", *files], capture_output=True, text=True, check=True).stdout
    words = {line.split()[-1].partition("@")[0] for line in found.splitlines() if line.startswith(" ")}
    names = sorted(word for word in words if word.startswith("cu") and word[2:3].isupper())
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "cuda.c", Path(folder) / "libcuda.so.1"
        source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names))
        subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", made, source], check=True)
        ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


def install(capability: tuple[int, int], sms: int = 188) -> None:
    """Before SGLang is imported: torch says that such cards are there, operators written in Python run as they are."""
    library()
    torch._C._ensureCUDADeviceGuardSet()
    properties = types.SimpleNamespace(
        name="card", major=capability[0], minor=capability[1], multi_processor_count=sms, total_memory=96 * GIB,
        shared_memory_per_block_optin=101376, shared_memory_per_multiprocessor=102400, warp_size=32, L2_cache_size=GIB,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536, is_integrated=0,
    )  # fmt: skip
    stream = Nothing()
    facts = {
        "is_available": True, "device_count": 8, "current_device": 0, "get_device_capability": capability,
        "get_device_properties": properties, "get_device_name": properties.name, "mem_get_info": (80 * GIB, 96 * GIB),
        "current_stream": stream, "default_stream": stream, "is_current_stream_capturing": False,
        "memory_allocated": GIB, "memory_reserved": GIB, "max_memory_allocated": GIB, "is_bf16_supported": True,
        "get_arch_list": [], "can_device_access_peer": False, "graph_pool_handle": (0, 0), "get_rng_state": None,
    }  # fmt: skip
    idle = ("set_device synchronize empty_cache set_stream manual_seed manual_seed_all init _lazy_init ipc_collect "
            "reset_peak_memory_stats").split()  # fmt: skip
    for name, value in (facts | dict.fromkeys(idle)).items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in ("Stream", "Event", "CUDAGraph", "graph", "StreamContext", "stream", "device"):
        setattr(torch.cuda, name, type(name, (Nothing,), {}))
    torch.cuda.default_generators = (torch.Generator(),)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # type: ignore[attr-defined]
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    FakeTensor.tolist = lambda self: _ones(self).tolist()  # type: ignore[method-assign]
    FakeTensor.data_ptr = lambda self: 1 << 12  # type: ignore[method-assign]
    implement = torch.library.Library.impl

    def remembered(self: Any, name: Any, function: Any, key: str = "", **options: Any) -> Any:
        if callable(function) and key in ("CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd", ""):
            _python[(name if isinstance(name, str) else name.name()).split("::")[-1]] = function
        return implement(self, name, function, key, **options)

    torch.library.Library.impl = remembered  # type: ignore[method-assign]
    begin, group = dist.init_process_group, dist.new_group
    dist.init_process_group = lambda *_, world_size=1, rank=0, **__: begin(
        "fake", store=FakeStore(), world_size=world_size, rank=rank
    )
    dist.new_group = lambda ranks=None, **_: group(ranks, backend="fake")
    dist.monitored_barrier = dist.broadcast_object_list = lambda *_, **__: None


@contextlib.contextmanager
def present() -> Iterator[None]:
    """Inside, tensors on `cuda` are the card's, and no Triton, TileLang or CuTe kernel is compiled or run."""
    import cutlass.cute
    import tilelang  # noqa: F401
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    nothing = Nothing("kernel")
    with (
        mock.patch.object(JITFunction, "run", lambda *_, **__: None),
        mock.patch.object(Autotuner, "run", lambda *_, **__: None),
        mock.patch("tilelang.jit.JITImpl.__call__", lambda *_, **__: nothing),
        mock.patch.object(cutlass.cute, "compile", lambda *_, **__: nothing),
        _OneDevice(),
        _Card(),
    ):
        yield
