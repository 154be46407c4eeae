"""Checks of arguments that many functions take.

`whole_number` and `finite_number` return None for what is none, where the caller has more to say.
`check_...` return the value of the argument `name` as Python's own, or raise `error` with a
sentence: the argument, what was given, what is expected.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, overload

T = TypeVar("T")


def whole_number(value: Any, *, least: int | None = None) -> int | None:
    """A number of things as Python's own int; None if below `least`, no int, or over 64 bits."""
    own = plain(value)
    try:
        number = operator.index(own)
    except Exception:  # code of the value's own
        return None
    if isinstance(own, bool) or number.bit_length() > 64:
        return None
    return None if least is not None and number < least else number


def finite_number(
    value: Any, *, least: float | None = None, most: float | None = None
) -> float | None:
    """A quantity as Python's own float; None if it is no finite number from `least` to `most`."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except Exception:  # too large, or code of the value's own
        return None
    if not math.isfinite(number) or (least is not None and number < least):
        return None
    return None if most is not None and number > most else number


def is_finite(reward: Any) -> bool:
    """Whether a reward, of any type that knows numbers, is one, and finite."""
    try:
        return math.isfinite(reward)
    except (TypeError, ValueError, OverflowError):
        return False


def shown(value: object, *, most: int = 80) -> str:
    """The beginning of a value's `repr`, or its type where that fails (an int of 5000 digits)."""
    try:
        text = repr(value)
    except Exception:  # code of the value's own
        return f"a value of type {type(value).__name__}"
    text = " ".join(text.split()) if "\n" in text else text  # as of a model
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_count(
    name: str, value: object, error: type[Exception], *, least: int | None = 1, of: str = ""
) -> int:
    """A number of things: `of` says which, `least` the smallest that makes sense (None: any)."""
    number = whole_number(value, least=least)
    if number is None:
        above = "" if least is None else f" from {least} up"
        raise error(f"{name} is {shown(value)}, expected {of}an int{above}")
    return number


def check_number(
    name: str,
    value: object,
    error: type[Exception],
    *,
    least: float | None = None,
    most: float | None = None,
) -> float:
    """A finite quantity, from `least` to `most` where they are given."""
    number = finite_number(value, least=least, most=most)
    if number is None:
        above = "" if least is None else f" from {least} {'up' if most is None else f'to {most}'}"
        raise error(f"{name} is {shown(value)}, expected a finite number{above}")
    return number


@overload
def check_switch(name: str, value: object, error: type[Exception]) -> bool: ...
@overload
def check_switch(
    name: str, value: object, error: type[Exception], *, or_none: bool
) -> bool | None: ...
def check_switch(
    name: str, value: object, error: type[Exception], *, or_none: bool = False
) -> bool | None:
    """True or False, or None where `or_none`. A text such as "no" would count as True."""
    own = plain(value)
    if own is None and or_none:
        return None
    if not isinstance(own, bool):
        expected = "True, False or None" if or_none else "True or False"
        raise error(f"{name} is {shown(value)}, expected {expected}")
    return own


def check_choice(name: str, value: object, choices: Iterable[str], error: type[Exception]) -> str:
    """One of a few words."""
    words = [*choices]
    if not isinstance(value, str) or value not in words:
        quoted = [f'"{word}"' for word in words]
        expected = " or ".join(quoted) if len(words) < 3 else f"one of {', '.join(quoted)}"
        raise error(f"{name} is {shown(value)}, expected {expected}")
    return value


def half_character(text: str) -> str:
    """The first half of a character in a text, which no file and no tokenizer takes; or empty."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start : error.end]
    return ""


def check_text(name: str, value: object, error: type[Exception]) -> str:
    """A text, of whole characters."""
    if not isinstance(value, str):
        raise error(f"{name} is {shown(value)}, expected text")
    if half := half_character(value):
        raise error(
            f"{name} is {shown(value)}, expected text of whole characters: {half!r:.20} is half of "
            "one, which no file can hold"
        )
    return value


def check_path(name: str, value: object, error: type[Exception]) -> Path:
    """A path, there or not, that a file system could have: not empty, no NUL, no half character."""
    given: object = value
    if isinstance(value, os.PathLike):
        with suppress(Exception):  # code of the value's own
            given = os.fspath(value)
    if not isinstance(given, str):
        raise error(f"{name} is {shown(value)}, expected a path")
    try:
        possible = bool(given.strip()) and b"\0" not in os.fsencode(given)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise error(
            f"{name} is {shown(given)}, expected a path: it is empty, or has a NUL or half of a "
            "character"
        )
    return Path(given)


def check_kind(
    name: str,
    value: object,
    kinds: type[T] | tuple[type[T], ...],
    expected: str,
    error: type[Exception],
) -> T:
    """An instance of a class, or of one of several; `expected` says it in words."""
    if not isinstance(value, kinds):
        raise error(f"{name} is {shown(value)}, expected {expected}")
    return value


def listed(value: object) -> tuple[Any, ...]:
    """One thing or several as a tuple: what cannot be walked through, text and mappings are one."""
    if is_unordered(value):
        return tuple(sorted(value, key=_place))
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | os.PathLike):
        with suppress(TypeError):  # arrays without dimensions say that they can be
            return tuple(value)
    return (value,)


def is_unordered(value: object) -> TypeGuard[Set[Any]]:
    """Whether a value is a set, whose order differs between processes."""
    return isinstance(value, set | frozenset)


def _place(value: Any) -> tuple[Any, ...]:
    """The sort key of a set's element: its type, then its value or its text."""
    if is_unordered(value):  # which compare by inclusion
        return "", tuple(map(_place, listed(value)))
    return str(type(value)), value if isinstance(value, int | float | str) else shown(value)


def plain(value: Any) -> Any:
    """Python's own number or list for that of numpy or torch; anything else as it is."""
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except Exception:  # torch's of a tensor without values, or code of the value's own
        return value
