"""Checks of arguments that many functions take."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any


def whole_number(value: Any, *, least: int | None = None) -> int | None:
    """A number of things, or of a thing, as Python's own int.

    Args:
        value: What was given: an int, or one of numpy or torch.
        least: The smallest that makes sense.

    Returns:
        The number; None if it is too small, of more than 64 bits, no whole number, or True or
        False.
    """
    try:
        plain = value.tolist() if hasattr(value, "tolist") else value
        number = operator.index(plain)
    except (TypeError, NotImplementedError):  # torch's of a tensor without values
        return None
    if isinstance(plain, bool) or number.bit_length() > 64:
        return None
    return None if least is not None and number < least else number


def finite_number(value: Any, *, least: float | None = None) -> float | None:
    """A quantity, as Python's own float.

    Args:
        value: What was given: an int or float, or one of numpy.
        least: The smallest that makes sense.

    Returns:
        The number; None if it is too small, infinite, NaN, no number, or True or False.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and (least is None or number >= least) else None


def shown(value: object, *, most: int = 80) -> str:
    """A value in a message, whatever it is.

    Args:
        value: Any.
        most: Characters to show.

    Returns:
        The beginning of its `repr`, or its type where that fails, as of an int of 5000 digits.
    """
    try:
        text = repr(value)
    except Exception:  # code of the value's own
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."
