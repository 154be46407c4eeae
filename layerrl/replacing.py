"""Attributes of objects that are not ours, replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(holder: Any, /, **values: Any) -> Iterator[None]:
    """Give attributes of an object other values inside, and its own back, also after an exception.

    An attribute that the object has from its class alone is its class's again: a copy would hide
    what the class is given later. One that it does not have is an `AttributeError`: to set it would
    have no effect.
    """
    before = {name: getattr(holder, name) for name in values}
    own = {*values} & {*_attributes(holder)}
    done = []
    try:
        for name, value in values.items():
            setattr(holder, name, value)
            done.append(name)
        yield
    finally:
        for name in done:
            if name in own or name not in _attributes(holder):  # as a property's is not
                setattr(holder, name, before[name])
            else:
                delattr(holder, name)


def _attributes(holder: Any) -> dict[str, Any]:
    return getattr(holder, "__dict__", {})
