"""What a file says against the types that it should have, by pydantic."""

from __future__ import annotations

from typing import Any

from .errors import LaunchError


def typed(kind: Any, text: str | bytes, where: str) -> Any:
    """The value of a JSON text, nothing converted.

    Raises:
        LaunchError: it is none of that kind; the sentence names the place and what was found there.
    """
    # Not at the top: doctor runs on a bare Python too, which reads no such file.
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place, found = ".".join(map(str, first["loc"])), first["input"]
        problem = {
            "json_invalid": f"is not JSON ({first['msg']})",
            "missing": f"has no key {place!r}",
            "extra_forbidden": f"has the unknown key {place!r}",
            "unexpected_keyword_argument": f"has the unknown key {place!r}",
        }.get(first["type"], f"has {f'{place}={found!r}' if place else repr(found)} ({first['msg']})")
        raise LaunchError(f"{where} {problem}: correct it.") from None
