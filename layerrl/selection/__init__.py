"""Which layers train, and how fast: a small frozen value that everything else derives from."""

from layerrl.selection.layer_selection import LayerSelection
from layerrl.selection.select import select_layers

__all__ = ["LayerSelection", "select_layers"]
