"""A selection's fields: whether they make sense together, and as JSON in the format's versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerrl.checks import check_choice, check_count, check_kind, shown
from layerrl.errors import SelectionError
from layerrl.schema import fitted
from layerrl.selection.parsing import are_globs, integer
from layerrl.selection.rates import check_boosts, is_scale
from layerrl.selection.rows import with_named_rows
from layerrl.selection.towers import STACKS
from layerrl.stored import version_of

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection

_VERSION = 2
_OF_VERSION_1 = ("num_layers", "layers", "learning_rate_scale", "modules", "full")

_LEFT_OUT = ((), "text")  # defaults of later fields


def checked(selection: LayerSelection) -> dict[str, Any]:
    """Refuse fields that make no sense, alone or together.

    Returns:
        Fields by name, as they are kept: numbers as Python's own, which JSON can hold, `also` with
        rows named in one way, `learning_rate_scale` 1.0 for each layer where it was left out.

    Raises:
        SelectionError: If they make none.
    """
    if not isinstance(selection.layers, tuple):
        raise SelectionError(f"layers of a selection is a tuple, got {shown(selection.layers)}")
    if selection.modules is not None and not are_globs(selection.modules):
        raise SelectionError(f"modules is None or a tuple of globs, got {shown(selection.modules)}")
    check_kind("full", selection.full, bool, "True or False", SelectionError)
    if not isinstance(selection.also, tuple) or (selection.also and not are_globs(selection.also)):
        raise SelectionError(f"also is a tuple of parts and globs, got {shown(selection.also)}")
    check_choice("stack", selection.stack, STACKS, SelectionError)
    also = with_named_rows(selection.also)
    num_layers = check_count("num_layers", selection.num_layers, SelectionError)
    last = num_layers - 1
    given = [integer(layer) for layer in selection.layers]
    if not given and selection.also:
        if selection.modules is not None:
            raise SelectionError(
                f"modules={selection.modules!r} are parts of layers: none is given"
            )
    elif not given or given != sorted({*given}) or given[0] < 0 or given[-1] > last:
        raise SelectionError(
            f"layers={shown(selection.layers)}: expected at least one, ascending, without "
            f"duplicates, from 0 to {last}"
        )
    factors: Any = selection.learning_rate_scale
    if isinstance(factors, tuple):
        factors = factors or (1.0,) * len(given)
    fits = isinstance(factors, tuple) and len(factors) == len(given)
    if not fits or not all(map(is_scale, factors)):
        raise SelectionError(
            f"learning_rate_scale needs one positive finite factor for each of {len(given)} "
            f"layers, got {shown(factors)}"
        )
    check_boosts(selection.boosts, tuple(given))
    beside = selection.modules is not None or selection.also or selection.stack != "text"
    if selection.full and (len(given) != num_layers or beside):
        raise SelectionError(
            '"full" trains every parameter: it takes no layers, modules, also, stack'
        )
    return {
        "num_layers": num_layers,
        "layers": tuple(given),
        "learning_rate_scale": tuple(map(float, factors)),
        "also": also,
        "boosts": tuple((layer, glob, float(factor)) for layer, glob, factor in selection.boosts),
    }


def as_json(values: Mapping[str, Any]) -> str:
    """One line of JSON for a selection's fields."""
    # Whatever format version 1 can say is said in it, for earlier versions of layerrl to read.
    used = {n: v for n, v in values.items() if n in _OF_VERSION_1 or v not in _LEFT_OUT}
    version = {} if {*used} == {*_OF_VERSION_1} else {"format_version": _VERSION}
    return json.dumps(used | version)


def selection_in(kind: type[LayerSelection], data: Any) -> LayerSelection:
    """The selection that `as_json` wrote; a `SelectionError` or `Misfit` if the data is none."""
    of = "the JSON of a LayerSelection"
    version_of(data, "format_version", _VERSION, SelectionError, of, default=1)
    values = {name: value for name, value in data.items() if name != "format_version"}
    return fitted(kind, values, required=_OF_VERSION_1)
