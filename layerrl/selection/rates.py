"""How fast each tensor of a selection trains: `boost=`, read, shown and found in a model.

Of the keys that name a tensor the most specific gives its factor: a pair of layer and glob before a
glob or a part of `also`, those before a layer. Factors are never multiplied with each other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from layerrl.adapters import adapter_tensors
from layerrl.blocks import Blocks, plain_name, unwrap
from layerrl.checks import finite_number, whole_number
from layerrl.checks import shown as said
from layerrl.errors import SelectionError
from layerrl.selection.parsing import are_globs, matches, ranges
from layerrl.selection.parts import ABOVE, names_in_parts
from layerrl.selection.rows import NEW_TOKENS, by_rows, names_rows

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection

Boost = tuple[int | None, str, float]
"""Layer (None: every selected one), glob inside it or part of `also`, factor."""

_EMBEDDINGS = "embeddings"
_SMALLEST, _LARGEST = 2.0**-149, (2 - 2.0**-23) * 2.0**127  # of float32, above 0
_EXPECTED = (
    "boost maps layers, globs inside them, pairs of both or parts of also= to learning-rate "
    'factors, as {10: 2.0, "mlp.*": 0.5, (10, "self_attn.*"): 0.1}, or is "decay:D" with '
    "0 < D <= 1"
)


def read_boost(
    boost: Any,  # what a user wrote
    layers: tuple[int, ...],
    parts: tuple[str, ...],
    num_layers: int,
    described: str,
) -> tuple[tuple[float, ...], tuple[Boost, ...]]:
    """Read a boost: which factors it gives, not yet whether its globs match.

    Returns:
        A factor for each layer, none where nothing is boosted; and the boosts of globs and parts in
        the order of a selection's.

    Raises:
        SelectionError: If it is none of these, names a layer that does not train or one twice, or
            has a factor that is not positive and finite.
    """
    if isinstance(boost, str):
        boost = _decay(boost, layers, parts)
    if not isinstance(boost, Mapping):
        raise SelectionError(f"{_EXPECTED}; got {said(boost)}")
    factors: dict[tuple[int | None, str | None], float] = {}
    for key, factor in boost.items():
        layer, glob = _plain_key(key, layers, num_layers, described)
        shown = f"layer {layer}" if glob is None else repr(_key(layer, glob))
        if (layer, glob) in factors:
            raise SelectionError(f"boost of {shown} is given twice in {said(dict(boost))}")
        if not is_scale(factor):
            raise SelectionError(
                f"boost of {shown} is {said(factor)}, expected a positive finite factor on the "
                "learning rate, in float32. To keep it from training, leave it out of the "
                "selection."
            )
        factors[layer, glob] = float(factor)
    boosts = [(layer, glob, f) for (layer, glob), f in factors.items() if glob is not None]
    return tuple(factors.get((layer, None), 1.0) for layer in layers), tuple(
        sorted(boosts, key=_order)
    )


def _decay(word: str, layers: tuple[int, ...], parts: tuple[str, ...]) -> dict[Any, float]:
    """Layer-wise decay: D to the power of the distance, in layers, from the highest selected."""
    kind, _, text = word.partition(":")
    if kind != "decay":
        raise SelectionError(f"{_EXPECTED}; got {said(word)}")
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor <= 1:
        raise SelectionError(
            f"boost={said(word)}: expected a number above 0, at most 1, so that lower layers learn "
            "more slowly. Rates that grow downwards are given layer by layer, as {10: 2.0}."
        )
    if not layers:
        raise SelectionError(f"boost={word!r} is by layer, and no layer is selected")
    below = [-1] if _EMBEDDINGS in parts else []
    factors = {layer: factor ** (layers[-1] - layer) for layer in (*below, *layers)}
    if not all(factors.values()):
        raise SelectionError(
            f"boost={word!r} over {layers[-1] - min(factors)} layers is 0 in floating point: the "
            "lowest would not train. Give a D nearer 1, or select fewer layers."
        )
    return {_EMBEDDINGS if layer < 0 else layer: value for layer, value in factors.items()}


def _plain_key(
    key: Any, layers: tuple[int, ...], num_layers: int, described: str
) -> tuple[int | None, str | None]:
    if isinstance(key, str) and are_globs((key,)):
        return None, key
    is_pair = isinstance(key, tuple) and len(key) == 2
    number, glob = key if is_pair else (key, None)
    layer = whole_number(number)
    if layer is None or (is_pair and not are_globs((glob,))):
        raise SelectionError(f"boost of {said(key)}, which is no layer, glob or pair. {_EXPECTED}")
    if not -num_layers <= layer < num_layers:
        raise SelectionError(f"boost of layer {layer}, which does not exist: {described}")
    layer %= num_layers
    if layer not in layers:
        raise SelectionError(
            f"boost of layer {layer}, which does not train. Selected: {ranges(layers) or 'none'}."
        )
    return layer, glob


def is_scale(scale: object) -> bool:
    """Whether something can multiply a learning rate, which optimizers keep in float32."""
    number = finite_number(scale)
    return number is not None and _SMALLEST <= number <= _LARGEST


def check_boosts(boosts: Any, layers: tuple[int, ...]) -> None:
    """Refuse what is no tuple of boosts of these layers, ascending."""
    fits = isinstance(boosts, tuple) and all(
        isinstance(boost, tuple)
        and len(boost) == 3
        and (boost[0] is None or (type(boost[0]) is int and boost[0] in layers))
        and are_globs(boost[1:2])
        and is_scale(boost[2])
        for boost in boosts
    )
    keys = [_order(boost) for boost in boosts] if fits else []
    if not fits or keys != sorted({*keys}):
        raise SelectionError(
            "boosts of a selection are tuples (selected layer or None, glob, positive finite "
            f"factor), ascending, without duplicates; got {said(boosts)}"
        )


def _order(boost: Boost) -> tuple[int, str]:
    return (-1 if boost[0] is None else boost[0], boost[1])


def _key(layer: int | None, glob: str) -> str | tuple[int, str]:
    return glob if layer is None else (layer, glob)


def shown(selection: LayerSelection) -> dict[Any, float]:
    """A selection's boosts as the user could write them, factors to six digits."""
    scales = zip(selection.layers, selection.learning_rate_scale, strict=True)
    factors = {layer: scale for layer, scale in scales if scale != 1}
    factors |= {_key(layer, glob): factor for layer, glob, factor in selection.boosts}
    return {key: float(f"{factor:.6g}") for key, factor in factors.items()}


def nameable_parts(also: tuple[str, ...], *, full: bool) -> tuple[str, ...]:
    """Names that a boost can give to what trains outside the layers."""
    if full:
        return (*sorted(ABOVE["text"]), _EMBEDDINGS)
    return tuple(NEW_TOKENS if names_rows(part) else part for part in also)


def learning_rate_factors(
    selection: LayerSelection, model: nn.Module, trained: Mapping[str, nn.Parameter]
) -> dict[int, float]:
    """Factor by identity of a parameter: of those in layers, and of boosted ones outside."""
    base, blocks = unwrap(model), selection.blocks(model)
    name_of = {id(parameter): name for name, parameter in trained.items()}
    adapted = adapter_tensors(base)
    inside: dict[int, list[tuple[str, int]]] = {}
    for layer in selection.layers:
        path = f"{blocks.path}.{layer}."
        tensors = [(n, id(p)) for n, p in blocks.named_parameters(layer) if id(p) in name_of]
        # An adapter's tensor is also known by what it adapts.
        weights = [(adapted.get(path + n, n).removeprefix(path), i) for n, i in tensors]
        inside[layer] = [*dict.fromkeys(weights + tensors)]
    scales = zip(selection.layers, selection.learning_rate_scale, strict=True)
    layers = [(layer, scale, [i for _, i in inside[layer]]) for layer, scale in scales]
    globs, pairs = [], []
    for layer, glob, factor in selection.boosts:
        within = selection.layers if layer is None else (layer,)
        tensors = [i for k in within for name, i in inside[k] if matches(name, glob)]
        if layer is None:
            tensors += _in_part(selection, glob, base, blocks, adapted)
        if not tensors:
            raise SelectionError(
                _explain_unmatched(selection, layer, glob, inside, {*name_of.values()})
            )
        (globs if layer is None else pairs).append((_key(layer, glob), factor, tensors))
    factors: dict[int, float] = {}
    for level in (pairs, globs, layers):
        factors |= _agreed(level, {i: name for i, name in name_of.items() if i not in factors})
    return factors


def _agreed(
    level: Iterable[tuple[Any, float, list[int]]], name_of: Mapping[int, str]
) -> dict[int, float]:
    """Factors of these tensors by keys of which none is more specific than another."""
    first: dict[int, tuple[Any, float]] = {}
    for key, factor, tensors in level:
        for i in filter(name_of.__contains__, tensors):
            other, given = first.setdefault(i, (key, factor))
            if given != factor:
                raise SelectionError(
                    f"boosts of {other!r} ({given}) and {key!r} ({factor}) disagree: both name "
                    f"{name_of[i]!r}, and neither is more specific. Give them the same factor, or "
                    "keys that do not overlap; a pair (layer, glob) overrides globs, a glob layers."
                )
    return {i: factor for i, (_, factor) in first.items()}


def _in_part(
    selection: LayerSelection,
    part: str,
    base: nn.Module,
    blocks: Blocks,
    adapted: Mapping[str, str],
) -> list[int]:
    if part not in nameable_parts(selection.also, full=selection.full):
        return []
    if part == NEW_TOKENS:
        names = {*by_rows(selection, base, names_in_parts(selection, base, blocks, adapted))}
    else:
        alone = replace(selection, full=False, boosts=(), also=(part,))
        names = names_in_parts(alone, base, blocks, adapted)[part]
    named = base.named_parameters(remove_duplicate=False)
    return [id(parameter) for name, parameter in named if plain_name(name) in names]


def _explain_unmatched(
    selection: LayerSelection,
    layer: int | None,
    glob: str,
    inside: Mapping[int, list[tuple[str, int]]],
    trained: Collection[str],
) -> str:
    if layer is None and glob in nameable_parts((), full=True):
        if not selection.also:
            return f"boost of {glob!r}, which does not train: also={glob!r} would train it"
        return (
            f"boost of {glob!r}, which is none of also={list(selection.also)}: boost a part by its "
            f"name there, or select also={glob!r}"
        )
    where = f"layer {layer}"
    if layer is None:
        where = (
            f"layers {ranges(selection.layers)}" if selection.layers else "layers: none is selected"
        )
    text = f"boost of {_key(layer, glob)!r} matches nothing that trains in {where}"
    if selection.also and layer is None:
        text += f", and is none of also={list(selection.also)}"
    if any(matches(name, glob) for name in trained):
        text += "; globs are compared with names inside a layer, not with whole names"
    example = selection.first if layer is None else layer
    names = ", ".join(dict.fromkeys(name for name, _ in inside.get(example, ())))
    return text + (f". What trains in layer {example} is {names}" if names else "")
