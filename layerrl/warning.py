"""Warnings that point at the user's line."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

_BETWEEN = {
    *("layerrl", "trl", "transformers", "accelerate", "torch", "peft", "datasets"),
    *("contextlib", "functools", "importlib", "runpy"),
}
"""Packages and modules whose lines are not the user's."""


def warn(message: str) -> None:
    """Warn as `warnings.warn` does, of the innermost line outside layerrl and what it builds on.

    How many frames lie between depends on who calls whom, and on TRL, so that no `stacklevel` fits.
    Where no line is the user's, the outermost is shown.
    """
    frame: Any = inspect.currentframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
