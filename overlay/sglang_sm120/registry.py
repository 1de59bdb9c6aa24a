"""Dispatch: an op is its torch reference, and providers are other ways to compute it.

    @Op
    def mhc_post(f, x, post, comb): ...                                    # torch: the contract
    @mhc_post.checked
    def _check(a): ...                                                     # why no provider takes a call, or None
    @mhc_post.provider("triton", runs_on="sm80+", default_on="sm120 sm121")
    def _triton(a): ...                                                    # a.f, a.x, …

Which provider serves an op is decided once per device kind, in this order:
`SGLANG_SM120_PROVIDER` ("torch", or "mhc_post=torch,sparse_mla=triton"), then the provider whose `default_on`
names the device, then, with `SGLANG_SM120_FORCE=1`, the first provider that runs on the device, then torch. A provider
with arithmetic of its `Own` serves only where the variable names it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from .tolerance import Tolerance

P = ParamSpec("P")
R = TypeVar("R")
TORCH = "torch"
logger = logging.getLogger(__name__)
_ops: dict[str, Op] = {}


class ProviderError(ValueError):
    """A provider that does not exist, does not run here, or refuses its arguments."""


class Arguments(SimpleNamespace):
    """A call's arguments by the names of the op's reference, which says what they are, with its defaults; checked."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name!r} is no argument of the op, which has {', '.join(vars(self))}.")


Check = Callable[[Arguments], str | None]
"""None, or a sentence that says why not."""


class Own(NamedTuple):
    """Arithmetic of a provider that is not the reference's.

    emulated: the same in torch, which the provider is held against, within `tolerance`. differs: how the reference's
    is another, and what is known of it, in a few words.
    """

    emulated: Callable[[Arguments], Any]
    tolerance: Tolerance
    differs: str


class Provider(NamedTuple):
    """One implementation of an op. `accepts` says why this one does not take a call."""

    name: str
    function: Callable[[Arguments], Any]
    runs_on: str
    default_on: str
    accepts: Check
    own: Own | None = None


class Choice(NamedTuple):
    """The provider that serves an op on a device; `asked` when the user named it."""

    provider: Provider
    why: str
    asked: bool


class Row(NamedTuple):
    """One line of `table()`."""

    op: str
    provider: str
    chosen: bool
    why: str


class Op(Generic[P, R]):
    """A function with a contract: calling it runs the provider chosen for the device of its arguments.

    The wrapped torch function defines names, shapes, dtypes and results; it runs on any device.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self._signature = inspect.signature(reference)
        parameters = self._signature.parameters.values()
        self._positional = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self._names = frozenset(p.name for p in parameters)
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._check: Check = _nothing
        self.providers = {TORCH: Provider(TORCH, self._by_reference, "cpu sm0+", "", _nothing)}
        if self.name in _ops:
            raise ProviderError(f"op {self.name} is already registered; give the second one another name.")
        _ops[self.name] = self

    def checked(self, check: Check) -> Check:
        """Register what every provider's calls must fulfil, the reference's too; else they raise ValueError."""
        self._check = check
        return check

    def provider(
        self, name: str, *, runs_on: str, default_on: str = "", accepts: Check | None = None, own: Own | None = None
    ) -> Callable[[Callable[[Arguments], Any]], Callable[[Arguments], Any]]:
        """Register another implementation, which is given the arguments by name.

        runs_on and default_on list device kinds, separated by spaces: `cpu`, `sm120`, or `sm80+` for that
        CUDA capability and above. With arithmetic of its own it is nowhere the default.
        """

        def register(function: Callable[[Arguments], Any]) -> Callable[[Arguments], Any]:
            if name in self.providers:
                raise ProviderError(f"op {self.name} already has a provider {name}; give this one another name.")
            for kinds in (runs_on, default_on):
                _matches(kinds, "cpu")
            if own and default_on:
                raise ProviderError(f"provider {name} of op {self.name} {own.differs}: leave default_on out.")
            self.providers[name] = Provider(name, function, runs_on, default_on, accepts or _nothing, own)
            reset()
            return function

        return register

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> Arguments:
        """A call's arguments.

        Raises:
            TypeError: they are not the reference's.
            ValueError: the op's check says why no provider takes them.
        """
        # Eager passes come here a thousand times each: inspect's own `bind` takes several times as long.
        found = Arguments(**{**self._defaults, **dict(zip(self._positional, args, strict=False)), **kwargs})
        twice = args and not kwargs.keys().isdisjoint(self._positional[: len(args)])
        if twice or len(args) > len(self._positional) or vars(found).keys() != self._names:
            self._signature.bind(*args, **kwargs)  # says what is missing or too many
        if why := self._check(found):
            raise ValueError(f"{self.name}: {why}")
        return found

    def by(self, name: str, *args: P.args, **kwargs: P.kwargs) -> R:
        """The call by the provider `name`, wherever the arguments are.

        Raises:
            ProviderError: it refuses them.
        """
        found, provider = self.bind(*args, **kwargs), self.providers[name]
        if why := provider.accepts(found):
            raise ProviderError(f"provider {name} of op {self.name} refuses: {why}")
        return provider.function(found)

    def meant(self, name: str, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the provider `name` is to give: the reference's result, or that of its own arithmetic in torch."""
        found, own = self.bind(*args, **kwargs), self.providers[name].own
        return own.emulated(found) if own else self._by_reference(found)

    def refusal(self, name: str, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """Why the provider `name` does not take this call, or None."""
        return self.providers[name].accepts(self.bind(*args, **kwargs))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        found = self.bind(*args, **kwargs)
        choice = _choose(self.name, _kind_of(found))
        provider = choice.provider
        if why := provider.accepts(found):
            if choice.asked:
                raise ProviderError(f"provider {provider.name} of op {self.name} refuses: {why}")
            _log_refusal(self.name, provider.name, why)
            provider = self.providers[TORCH]
        return provider.function(found)

    def _by_reference(self, a: Arguments) -> R:
        return self.reference(**vars(a))  # type: ignore[call-arg]


def ops() -> dict[str, Op]:
    """Every registered op by name."""
    return dict(_ops)


def reset() -> None:
    """Forget past selections, so that the next call reads the environment again."""
    for cached in (_choose, _asked, forced, _log_refusal):
        cached.cache_clear()


def table(kind: str | None = None) -> list[Row]:
    """Op x provider x why, for device kind `kind` (default: CUDA device 0 if there is one, else the CPU)."""
    if kind is None:
        kind = device_kind(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    rows = []
    for op in sorted(_ops.values(), key=lambda op: op.name):
        choice = _choose(op.name, kind)
        for provider in op.providers.values():
            if provider is choice.provider:
                why = choice.why
            elif why_not := refusal(provider, kind):
                why = why_not
            else:
                off = f"off by default: {provider.own.differs}" if provider.own else "not chosen"
                why = f"runs on {kind}, {off}"
            rows.append(Row(op.name, provider.name, provider is choice.provider, why))
    return rows


def refusal(provider: Provider, kind: str) -> str | None:
    """Why a provider does not run on a device kind, or None."""
    return None if _matches(provider.runs_on, kind) else f"does not run on {kind}, needs {provider.runs_on}"


@functools.cache
def device_kind(device: torch.device) -> str:
    """`cpu`, or `sm` and the compute capability: `sm90`, `sm120`."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _nothing(_: Arguments) -> str | None:
    return None


def _kind_of(a: Arguments) -> str:
    for value in vars(a).values():
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return device_kind(value.device)
    return "cpu"


@functools.cache
def _choose(name: str, kind: str) -> Choice:
    op = _ops[name]
    asked = _asked().get(name) or _asked().get("")
    if asked is not None and (asked in op.providers or name in _asked()):
        provider = op.providers[asked]
        if refusal(provider, kind):
            raise ProviderError(
                f"SGLANG_SM120_PROVIDER asks for {asked} in op {name}, which runs on {provider.runs_on} "
                f"and not on {kind}; name another of {', '.join(op.providers)}."
            )
        return Choice(provider, "SGLANG_SM120_PROVIDER", True)
    others = [p for p in op.providers.values() if not (p.name == TORCH or p.own or refusal(p, kind))]
    for provider in others:
        if _matches(provider.default_on, kind):
            return Choice(provider, f"default on {kind}", False)
    if others and forced():
        return Choice(others[0], "SGLANG_SM120_FORCE", False)
    return Choice(op.providers[TORCH], f"no other provider is the default on {kind}", False)


@functools.cache
def _asked() -> dict[str, str]:
    """SGLANG_SM120_PROVIDER as {op: provider}; key "" is the provider asked for in every op that has it."""
    asked: dict[str, str] = {}
    for item in os.environ.get("SGLANG_SM120_PROVIDER", "").split(","):
        name, _, provider = (part.strip() for part in item.rpartition("="))
        if not name and not provider:
            continue
        if name and name not in _ops:
            raise ProviderError(f"SGLANG_SM120_PROVIDER names op {name!r} and needs one of {', '.join(sorted(_ops))}.")
        known = _ops[name].providers if name else {p for op in _ops.values() for p in op.providers}
        if provider not in known:
            where = f"op {name}" if name else "any op"
            raise ProviderError(
                f"SGLANG_SM120_PROVIDER asks for provider {provider!r}, which {where} lacks; "
                f"use one of {', '.join(sorted(known))}."
            )
        asked[name] = provider
    return asked


@functools.cache
def forced() -> bool:
    """Whether SGLANG_SM120_FORCE=1 makes every provider that runs on a device its default.

    Raises:
        ProviderError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("SGLANG_SM120_FORCE", "0")
    if value not in ("", "0", "1"):
        raise ProviderError(f"SGLANG_SM120_FORCE is {value!r} and needs 0 or 1.")
    return value == "1"


@functools.cache
def _log_refusal(op: str, provider: str, refusal: str) -> None:
    logger.warning("op %s runs its torch reference, because provider %s refuses: %s", op, provider, refusal)


def _matches(kinds: str, kind: str) -> bool:
    """Whether `kind` is named by `kinds`, a list such as "cpu sm80+"."""
    found = False
    for entry in kinds.split():
        match = re.fullmatch(r"cpu|sm(\d+)(\+?)", entry)
        if match is None:
            raise ProviderError(f"device kind {entry!r} is unknown; use cpu, sm120 or sm80+.")
        floor, plus = match.groups()
        found |= entry == kind or (plus == "+" and kind.startswith("sm") and int(kind[2:]) >= int(floor))
    return found
