"""Checks of arguments that many functions take."""

from __future__ import annotations

import operator
from typing import Any


def whole_number(value: Any, *, least: int | None = None) -> int | None:
    """A number of things, or of a thing, as Python's own int.

    Args:
        value: What was given: an int, or one of numpy or torch.
        least: The smallest that makes sense.

    Returns:
        The number; None if it is too small, no whole number, or True or False.
    """
    try:
        plain = value.tolist() if hasattr(value, "tolist") else value
        number = operator.index(plain)
    except (TypeError, NotImplementedError):  # torch's of a tensor without values
        return None
    if isinstance(plain, bool):
        return None
    return None if least is not None and number < least else number
