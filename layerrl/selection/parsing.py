"""What a user may write for layers, modules and also, made plain or refused with a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

from layerrl.checks import half_character, listed, plain, shown, whole_number
from layerrl.errors import SelectionError
from layerrl.selection.towers import STACKS

_WORDS = (
    '"all" (every block), "full" (every parameter), "middle", "middle:K", "first:K", "last:K", '
    '"LO%:HI%"'
)
PARTS = ("head", "final_norm", "embeddings", "projector", "new_tokens")
"""Parts outside the layers that have names; `parts.py` says where each one's tensors are."""


def resolve(
    layers: Any, num_layers: int, described: str, *, or_none: bool = False
) -> tuple[int, ...]:
    """Layers given in any form, as ascending numbers; `described` says what the model has."""
    if layers is None:
        layers = ()
    if isinstance(layers, str):
        return tuple(_resolve_word(layers, num_layers, described))
    if isinstance(layers, slice):
        layers = range(num_layers)[_checked(layers, num_layers, described)]
    layers = plain(layers)
    several = isinstance(layers, Iterable) and not isinstance(layers, Mapping | bytes)
    given = [integer(layer) for layer in (layers if several else [layers])]
    if not given and or_none:
        return ()
    if not given:
        raise SelectionError(
            f"no layers given: expected at least one, or also= without layers; {described}"
        )
    missing = [layer for layer in given if not -num_layers <= layer < num_layers]
    if missing:
        which, do = ("layers", "do") if len(missing) > 1 else ("layer", "does")
        shown = missing if len(missing) > 1 else missing[0]
        raise SelectionError(f"{which} {shown} {do} not exist: {described}")
    chosen = sorted(layer % num_layers for layer in given)
    twice = sorted({layer for layer in chosen if chosen.count(layer) > 1})
    if twice:
        raise SelectionError(
            f"layers {twice} are given more than once in {given} (negative ones count from the "
            "end). Give each layer once."
        )
    return tuple(chosen)


def _resolve_word(word: str, num_layers: int, described: str) -> range:
    if word in ("all", "full"):
        return range(num_layers)
    if match := re.fullmatch(r"(middle|first|last)(?::(-?\d{1,18}))?", word):
        kind, count = match[1], match[2]
        if count is not None or kind == "middle":
            k = int(count or 1)
            if not 1 <= k <= num_layers:
                raise SelectionError(
                    f"{word!r} asks for {k} layers, expected 1 to {num_layers}: {described}"
                )
            start = {"first": 0, "last": num_layers - k, "middle": (num_layers - k) // 2}[kind]
            return range(start, start + k)
    if match := re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)%:(\d{1,18}(?:\.\d{1,18})?)%", word):
        low, high = (Fraction(percent) / 100 for percent in match.groups())
        chosen = range(math.ceil(low * num_layers), math.ceil(high * num_layers))
        if not 0 <= low < high <= 1:
            raise SelectionError(f"{word!r} is no range of depth: expected 0 <= LO < HI <= 100")
        if not chosen:
            raise SelectionError(
                f"{word!r} holds no layer: {described}, {100 / num_layers:.3g} % of depth each"
            )
        return chosen
    if word.partition(":")[0] == "auto":
        raise SelectionError(
            f"{word!r} is chosen by a trainer from its first answers, not here: pass it as the "
            "trainer's selection, or take contribution_probe(...).top(1)"
        )
    raise SelectionError(
        f"{shown(word)} does not name layers. Expected integers, a range or slice, or one of "
        f"{_WORDS}."
    )


def _checked(given: slice, num_layers: int, described: str) -> slice:
    """A slice of integers that clips nothing."""
    for bound in (given.start, given.stop):
        if bound is not None and not -num_layers <= integer(bound) <= num_layers:
            raise SelectionError(f"{given} reaches outside the model: {described}")
    if given.step is not None and integer(given.step) == 0:
        raise SelectionError(f"{given} has a step of 0, expected another integer")
    return given


def integer(layer: object) -> int:
    """A layer's number as Python's own."""
    number = whole_number(layer)
    if number is not None:
        return number
    own = plain(layer)
    raise SelectionError(
        f"{shown(own)} is no layer: expected an integer, got {type(own).__name__}. "
        f"Otherwise use a range or slice, or one of {_WORDS}."
    )


def globs(modules: str | Iterable[str] | None, *, full: bool) -> tuple[str, ...] | None:
    """One glob or several, as a tuple without repetitions."""
    if modules is None:
        return None
    if full:
        raise SelectionError(
            '"full" trains every parameter: use "all" to give modules inside blocks'
        )
    given = listed(modules)
    if not are_globs(given):
        raise SelectionError(
            f"modules are globs inside the block, such as 'self_attn.*'; got {shown(modules)}"
        )
    return tuple(dict.fromkeys(given))


def parts(also: str | Iterable[str] | None, *, full: bool) -> tuple[str, ...]:
    """Parts outside the layers, one or several, as a tuple without repetitions."""
    given = () if also is None else listed(also)
    if not given:
        return ()
    if full:
        raise SelectionError('"full" trains every parameter, also those outside the layers')
    if not are_globs(given):
        raise SelectionError(
            f"also names parts outside the layers: {', '.join(map(repr, PARTS))} "
            f"or globs of full names, such as 'model.norm.*'; got {shown(also)}"
        )
    return tuple(dict.fromkeys(given))


def matches(name: str, glob: str) -> bool:
    """A glob names a tensor, or a module and so everything in it."""
    return fnmatchcase(name, glob) or fnmatchcase(name, glob + ".*")


def are_globs(globs: object) -> bool:
    """Whether something is a tuple of globs, at least one."""
    given = globs if isinstance(globs, tuple) else ()
    return bool(given) and all(
        isinstance(glob, str) and glob and not half_character(glob) for glob in given
    )


def counted(num_layers: int, stack: str) -> str:
    """How many layers there are of a stack, and their numbers."""
    return f"{num_layers} {STACKS[stack]} layers (0 to {num_layers - 1})"


def ranges(layers: tuple[int, ...]) -> str:
    """`(3, 4, 5, 9)` as `"3-5, 9"`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
