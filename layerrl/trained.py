"""The trained parameters of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerrl.blocks import find_blocks

if TYPE_CHECKING:
    from torch import nn

    from layerrl.selection import LayerSelection


def parameters_by_layer(
    model: nn.Module, selection: LayerSelection
) -> dict[int, list[nn.Parameter]]:
    """The trained tensors of each selected layer, in the order of the layers."""
    chosen = {id(parameter) for parameter in selection.parameters(model).values()}
    blocks = find_blocks(model)
    return {
        layer: [p for _, p in blocks.named_parameters(layer) if id(p) in chosen]
        for layer in selection.layers
    }
