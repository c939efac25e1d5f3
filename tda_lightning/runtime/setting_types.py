"""Settings of another type than they are declared with are refused at once, in words."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "null (None)",
}


def require_types(settings: Any) -> None:
    """Check the fields of a dataclass of settings against their annotations.

    Raises:
        TypeError: names the first field of another type.

    Example:
        >>> from tda_lightning.estimators import Source
        >>> Source(num_segments="three")
        Traceback (most recent call last):
        TypeError: Source: num_segments must be a whole number, got 'three'.
    """
    kind = type(settings)
    for name, hint in _hints(kind).items():  # type: ignore[arg-type]
        require_type(f"{kind.__name__}: {name}", getattr(settings, name), hint)


def require_type(name: str, value: object, hint: Any, example: str = "") -> None:
    """Refuse a value of another type than ``hint``; of other hints than plain ones nothing is
    known.

    Args:
        example: a value that would do, in words.
    """
    if not _fits(value, hint):
        such_as = f", such as {example}" if example else ""
        raise TypeError(f"{name} must be {_in_words(hint)}{such_as}, got {value!r}.")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind)}


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin is Sequence:
        plain = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return plain and all(_fits(item, get_args(hint)[0]) for item in value)  # type: ignore[attr-defined]
    if hint is Mapping:
        return isinstance(value, Mapping)
    if hint in (int, float):
        if isinstance(value, float) and hint is int:
            return value.is_integer()  # 1e9 bytes
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return not isinstance(hint, type) or hint not in _WORDS or isinstance(value, hint)


def _in_words(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, get_args(hint))))
    if origin is Sequence:
        return f"a list ({_in_words(get_args(hint)[0])} each)"
    if hint is Mapping:
        return "settings by name"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
