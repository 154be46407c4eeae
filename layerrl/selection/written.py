"""A selection's fields as JSON, in the format's versions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from layerrl.checks import whole_number
from layerrl.errors import SelectionError

if TYPE_CHECKING:
    from collections.abc import Mapping

_VERSION = 2
_OF_VERSION_1 = ("num_layers", "layers", "learning_rate_scale", "modules", "full")

_LEFT_OUT = ((), "text")  # defaults of later fields


def as_json(values: Mapping[str, Any]) -> str:
    """One line of JSON for a selection's fields."""
    # Whatever format version 1 can say is said in it, for earlier versions of layerrl to read.
    used = {n: v for n, v in values.items() if n in _OF_VERSION_1 or v not in _LEFT_OUT}
    version = {} if {*used} == {*_OF_VERSION_1} else {"format_version": _VERSION}
    return json.dumps(used | version)


def fields_in(text: str, names: set[str]) -> dict[str, Any]:
    """The fields that `as_json` wrote.

    Args:
        text: The JSON.
        names: All fields of a selection.

    Returns:
        Name to value, lists as tuples.

    Raises:
        SelectionError: If the text is not JSON, of a newer version, or has other fields.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise SelectionError(f"not the JSON of a LayerSelection: {error}") from error
    version = data.pop("format_version", 1) if isinstance(data, dict) else 1
    if whole_number(version) is None or not 1 <= version <= _VERSION:
        raise SelectionError(
            f"the JSON of a LayerSelection has format version {version!r}; this layerrl reads "
            f"1 to {_VERSION}. A newer one may have written it."
        )
    if not isinstance(data, dict) or not {*_OF_VERSION_1} <= {*data} <= names:
        raise SelectionError(
            f"not the JSON of a LayerSelection: expected the fields {sorted(_OF_VERSION_1)}, "
            f"perhaps {sorted(names - {*_OF_VERSION_1})}, got "
            f"{sorted(data) if isinstance(data, dict) else data!r}"
        )
    return {
        name: tuple(tuple(v) if isinstance(v, list) else v for v in value)
        if isinstance(value, list)
        else value
        for name, value in data.items()
    }
