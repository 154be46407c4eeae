"""A seam: a name of another package that layerrl needs, and what is the matter with it here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


class Seam(NamedTuple):
    """A name of another package that layerrl overrides, calls, reads or sets."""

    of: str
    """Where it lives: a class or a module; `torch.nn.Module()` for an instance's attribute."""
    name: str
    """The name; of a trainer's attribute, the path to it."""
    takes: tuple[str, ...] | None
    """The parameters that it is called with, or overridden with, in their order; `...` for any, as
    the last for any more, as the first for any before. None: it is no function."""
    use: str
    """What it is needed to do."""
    by: str | None
    """The class that needs it, and all that are derived from it; None: whoever imports it."""
    when: Callable[[Any], bool] | None = None
    """Of an attribute: whether this trainer has it; None: every one."""
    attribute: bool = False
    """Whether it is there when the trainer has been made, and not before."""

    def __str__(self) -> str:
        takes = "" if self.takes is None else f"({', '.join(self.takes)})"
        return f"{self.of}.{self.name}{takes}"

    def problem(self, place: Any) -> str:
        """What differs from the table at `place` (None: nothing is there); empty if all fits."""
        if place is None:
            return f"there is no {self.of}"
        if not has(place, self.name):
            return f"{short_name(self.of)} has no {self.name}"
        if self.takes is None or self.takes == ("...",):
            return ""
        names, takes_any = _parameters(place, self.name)
        expected = [name for name in self.takes if name != "..."]
        if self.takes[:1] == ("...",):
            fits = takes_any or {*expected} <= {*names}
        elif takes_any:  # what it does not name itself
            shorter = min(len(names), len(expected))
            fits = names[:shorter] == expected[:shorter]
        else:
            fits = expected == (names[: len(expected)] if self.takes[-1:] == ("...",) else names)
        if fits:
            return ""
        name = f"{short_name(self.of)}.{self.name}"
        return f"{name} takes ({', '.join(names)}), expected ({', '.join(self.takes)})"


def object_at(path: str) -> Any:
    """The module or class of that path, or an instance; None where there is none."""
    names = path.removesuffix("()").split(".")
    for length in range(len(names), 0, -1):
        module = ".".join(names[:length])
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # it is there, and imports what is not
            continue
        for name in names[length:]:
            found = getattr(found, name, None)
        return found() if path.endswith("()") and callable(found) else found
    return None


def has(place: Any, path: str) -> bool:
    """Whether there is an attribute of that path."""
    for name in path.split("."):
        if not hasattr(place, name):
            return False
        place = getattr(place, name)
    return True


def short_name(path: str) -> str:
    """A class without its module; a module whole."""
    last = path.removesuffix("()").rpartition(".")[2]
    return last if last[:1].isupper() else path


def _parameters(place: Any, path: str) -> tuple[list[str], bool]:
    """The names of a function's parameters, and whether it takes any others by name."""
    holder, found = None, place
    for name in path.split("."):
        holder, found = found, inspect.getattr_static(found, name)
    function = inspect.unwrap(getattr(found, "__func__", found))
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # a descriptor or a callable that does not say
        return [], True
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return [], True  # a wrapper that hands on what it is given
    if isinstance(holder, type) and not isinstance(found, staticmethod):
        parameters = parameters[1:]
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)
