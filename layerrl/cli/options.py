"""Options that several commands have: what trains."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from layerrl.errors import LayerRLError, SelectionError

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection

_LAYERS = "such as 10, 3,-1, middle:5, last:2, 40%%:60%%, all, full, or a selection's JSON"


def add_layers(parser: ArgumentParser, also: str = "") -> None:
    """Add the options that name layers and parts of them."""
    parser.add_argument("--layers", help=_LAYERS + also)
    parser.add_argument(
        "--modules", nargs="+", metavar="GLOB", help="parts of each layer: 'self_attn.*'"
    )


def add_selection(parser: ArgumentParser, also: str = "") -> None:
    """Add the options that `select_layers` has as arguments."""
    add_layers(parser, also)
    parser.add_argument(
        "--also", nargs="+", metavar="PART", help="parts outside the layers: head, embeddings, ..."
    )
    parser.add_argument(
        "--boost", nargs="+", metavar="KEY=FACTOR", help="learning-rate factors: 10=2 'mlp.*=0.5'"
    )
    parser.add_argument("--stack", help="whose layers: text (default) or vision")


def selection_of(config: Any, given: Namespace) -> LayerSelection:
    """The selection that the options, or the keys of a YAML file, name for a model's config."""
    from layerrl.selection import select_layers
    from layerrl.selection.select import layers_in

    layers = given.layers
    return select_layers(
        config,
        layers_in(layers) if isinstance(layers, str) else layers,
        modules=given.modules,
        also=given.also,
        boost=_boosts(given.boost),
        stack=given.stack,
    )


def _boosts(given: Any) -> Any:
    """Boosts of the command line or a YAML file, in the form that `select_layers` takes."""
    if isinstance(given, dict):
        pairs = [*given.items()]
    elif isinstance(given, str | list):
        words = [given] if isinstance(given, str) else [*map(str, given)]
        if len(words) == 1 and "=" not in words[0]:
            return words[0]  # decay:0.9
        pairs = [word.rpartition("=")[::2] for word in words]
    else:
        return given
    factors: dict[Any, float] = {}
    for key, factor in pairs:
        name = int(key) if re.fullmatch(r"\s*-?\d+", str(key)) else key
        try:
            value = None if isinstance(factor, bool) else float(factor)
        except (TypeError, ValueError):
            value = None
        if value is None or key == "":
            raise SelectionError(
                f"--boost {f'{key}={factor}'!r}: expected KEY=FACTOR, as in 10=2 or "
                "'mlp.*=0.5', or decay:0.9 alone"
            )
        if name in factors:
            raise SelectionError(f"--boost has {key!r} twice: give each layer or glob one factor")
        factors[name] = value
    return factors


def config_of(model: str, **options: Any) -> Any:
    """The config of a model: its folder, file or hub id; a `LayerRLError` if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, **options)
    except Exception as error:  # whatever the hub client and remote code raise
        raise LayerRLError(
            f"no model {model!r}: it is no folder here with a config.json, and no model that the "
            f"hub or its cache gives. {first_line(error)}"
        ) from error


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """Inside, what another package says of what it was given is a `LayerRLError`."""
    try:
        yield
    except LayerRLError:
        raise
    except (AttributeError, ImportError, OSError, ValueError) as error:
        raise LayerRLError(f"{type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
