"""Layers, as people name them, made a selection of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from layerrl.blocks import (
    find_blocks,
    layers_described,
    meta_model,
    unwrap,
)
from layerrl.selection.layer_selection import LayerSelection
from layerrl.selection.parsing import (
    counted,
    globs,
    resolve,
    scales,
)
from layerrl.selection.tensors import described


def select_layers(
    model: Any,  # a model or a config
    layers: int | Iterable[int] | slice | str | LayerSelection,
    *,
    modules: str | Iterable[str] | None = None,
    boost: Mapping[int, float] | None = None,
) -> LayerSelection:
    """Choose which decoder layers train, and how fast.

    Mid-K of arXiv:2607.01232 is `"middle:K"`: of L layers, ⌊L/2 - K/2⌋ to ⌊L/2 + K/2⌋ - 1.
    Its Boost is `"full"` with `boost=`.

    Args:
        model: A transformers model (any device, `meta` included) or config. Not changed; no weight
            is read. With `modules` and a config, its names come from a model on `meta`.
        layers: A layer or several, negative ones counted from the end; a `range` or `slice`;
            `"all"` (every block), `"full"` (every parameter: embeddings, final norm and head too),
            `"middle"`, `"middle:K"`, `"first:K"`, `"last:K"`; `"LO%:HI%"`, the layers k with
            LO <= 100 k / L < HI, so that neighbouring ranges never share a layer; or a selection.
        modules: Globs of tensors or modules inside the block: `"self_attn.*"`,
            `"mlp.down_proj.weight"`. Everything else in the block stays frozen.
        boost: Learning-rate factor of some of the chosen layers, `{10: 2.0}`.

    Returns:
        The selection. Except for `"full"`, nothing outside the blocks is in it.

    Raises:
        SelectionError: If a layer does not exist, is given twice or is no integer; if nothing is
            selected; if a glob matches nothing; if a boost is not a positive finite number or
            belongs to a layer that does not train. Nothing is clipped or skipped.
        ModelError: If the model's layers cannot be found.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=28)
        >>> select_layers(config, "middle:5").layers
        (11, 12, 13, 14, 15)
        >>> print(select_layers(config, [-1, 10], boost={10: 2.0}))
        layers 10, 27 of 28, learning rate scaled by {10: 2.0}
    """
    if isinstance(model, nn.Module):
        base = unwrap(model)
        blocks = find_blocks(base)
        num_layers, text = len(blocks.modules), described(base, blocks)
    else:
        num_layers = layers_described(model)
        text = f"{type(model).__name__} has {counted(num_layers)}"
    if isinstance(layers, LayerSelection):
        layers.check_num_layers(num_layers, text)
        chosen, full = layers.layers, layers.full
        modules = layers.modules if modules is None else modules
        boost = (
            dict(zip(chosen, layers.learning_rate_scale, strict=True)) if boost is None else boost
        )
    else:
        chosen = resolve(layers, num_layers, text)
        full = isinstance(layers, str) and layers == "full"
    selection = LayerSelection(
        num_layers=num_layers,
        layers=chosen,
        learning_rate_scale=scales(boost, chosen, num_layers, text),
        modules=globs(modules, full=full),
        full=full,
    )
    if isinstance(model, nn.Module):
        selection.parameters(model)
    elif modules is not None:
        selection.parameters(meta_model(model))
    return selection
