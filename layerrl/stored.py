"""Files that others may have written: JSON within limits, safetensors, and what refuses them."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from layerrl.checks import half_character, shown
from layerrl.errors import LayerRLError
from layerrl.schema import Misfit, fitted, is_not

MOST_BYTES = 1 << 29
"""Of a file that is read whole."""
_DEEPEST = 60
_MOST_DIGITS = 40


@contextmanager
def refused_as(error: type[LayerRLError], said: object, advice: str = "") -> Iterator[None]:
    """Inside, a fault of a file is raised as `error`: `said`, the cause, and `advice`."""
    try:
        yield
    except (OSError, SafetensorError, Misfit) as cause:
        text = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause
        raise error(f"{said}: {text}{f'. {advice}' if advice else ''}") from cause


def bytes_of(file: Path) -> bytes:
    """All of a file that is none of a device, a pipe or a folder, and not too large."""
    refuse_unusual(file, most=MOST_BYTES)
    return file.read_bytes()


def refuse_unusual(file: Path, *, most: float = math.inf) -> None:
    """Refuse a file that opening might wait for, or over `most` bytes; it may be missing."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return
    except ValueError as error:  # a NUL in its name
        raise Misfit(f": {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise Misfit(" is no regular file")
    if found.st_size > most:
        raise Misfit(f" has {found.st_size} bytes, expected at most {most}")


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text that layerrl wrote.

    Returns:
        Its value, free of what no other part has to expect: nesting without end, two values of one
        name, numbers of hundreds of digits, and text that has no UTF-8. NaN and infinity, which a
        model's config may hold, are left to the types.

    Raises:
        Misfit: If it is no such text.
    """
    value = decoded(text, object_pairs_hook=_object, parse_int=_integer)
    level = [each for each in [value] if isinstance(each, str | dict | list)]
    for _ in range(_DEEPEST):
        texts = [each for each in level if isinstance(each, str)]
        nested = [each for each in level if not isinstance(each, str)]
        keys = [key for each in nested if isinstance(each, dict) for key in each]
        _refuse_surrogates("".join([*texts, *keys]))
        level = [
            each
            for part in nested
            if {*map(type, part)} != {float}  # as are most, long, lists of a report
            for each in (part.values() if isinstance(part, dict) else part)
            if isinstance(each, str | dict | list)
        ]
        if not level:
            return value
    raise Misfit(f" is nested more than {_DEEPEST} deep")


def decoded(text: str | bytes, **hooks: Any) -> Any:
    """Parse untrusted JSON in UTF-8; `hooks` are keywords of `json.loads`."""
    if not isinstance(text, str | bytes | bytearray):
        raise Misfit(is_not("the text of JSON", text))
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), **hooks)
    except Misfit:
        raise
    except UnicodeDecodeError as error:
        raise Misfit(f" is no UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise Misfit(" is nested too deep") from error
    except ValueError as error:
        raise Misfit(f" is no JSON: {error}") from error


def version_of(
    value: Any, key: str, latest: int, error: type[LayerRLError], said: str, *, default: Any = None
) -> int:
    """The version of the format that a file has, from 1 up; `default` where it says none."""
    version = fitted(int, fitted(dict[str, Any], value).get(key, default), key)
    if version > latest:
        raise error(
            f"{said} has format version {version}; this layerrl reads up to {latest}. Upgrade "
            "layerrl."
        )
    if version < 1:
        raise Misfit(f" is {version}, expected 1{f' to {latest}' if latest > 1 else ''}", key)
    return version


@contextmanager
def tensors_in(file: Path) -> Iterator[Any]:
    """A safetensors file, open; a `Misfit` if it is no file."""
    refuse_unusual(file)
    with safe_open(file, framework="pt") as opened:
        yield opened


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Misfit(f" has two values of {shown(twice)}, expected one")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise Misfit(f" has a number of {len(digits)} digits, expected at most {_MOST_DIGITS}")
    return int(digits)


def _refuse_surrogates(text: str) -> None:
    if half := half_character(text):
        raise Misfit(f" has the text {half!r:.20}, half of a character")
