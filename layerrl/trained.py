"""The tensors of a model that a selection trains."""

from __future__ import annotations

from torch import Tensor, nn

from layerrl.adapters import adapter_tensors
from layerrl.blocks import plain_name, unwrap
from layerrl.selection import LayerSelection
from layerrl.selection.parts import names_in_parts, rows_kept
from layerrl.selection.rows import NEW_TOKENS, names_rows
from layerrl.shards import is_sharded, shape


class TrainedLayers:
    """The tensors of a model that train, found once: by name, and by layer."""

    def __init__(self, model: nn.Module, selection: LayerSelection) -> None:
        self.selection = selection
        self.find(model)
        self.in_parts = any(map(is_sharded, self.parameters.values()))
        """Whether this process holds a part of each."""

    def find(self, model: nn.Module) -> None:
        """Find them again: loading with `assign=True`, for one, puts others in their places."""
        self.model = model
        self.parameters: dict[str, nn.Parameter] = self.selection.parameters(self.model)
        """Plain name to tensor, of all that train inside layers and outside."""
        chosen = {id(parameter) for parameter in self.parameters.values()}
        blocks = self.selection.blocks(self.model)
        self.by_layer: dict[int, list[nn.Parameter]] = {
            layer: [p for _, p in blocks.named_parameters(layer) if id(p) in chosen]
            for layer in self.selection.layers
        }
        """Those of each selected layer, in the order of the layers."""
        base = unwrap(self.model)
        self.frozen_rows = rows_kept(self.selection, base)
        """Plain name of each tensor that trains by rows, to runs of those that do not train."""
        outside = names_in_parts(self.selection, base, blocks, adapter_tensors(base))
        named = [(plain_name(n), p) for n, p in base.named_parameters(remove_duplicate=False)]
        self.by_part: dict[str, list[nn.Parameter]] = {
            f"layer_{layer}": tensors for layer, tensors in self.by_layer.items()
        }
        for part, names in outside.items():
            by_rows = names_rows(part)
            names = {*self.frozen_rows} if by_rows else names
            self.by_part[NEW_TOKENS if by_rows else part] = [p for n, p in named if n in names]
        """The same, and those of each part outside the layers, by the names they are logged by."""

    @property
    def num_training(self) -> int:
        """Elements that train now: those of layers whose turn it is not do not."""
        kept = {
            name: sum(run.stop - run.start for run in runs)
            for name, runs in self.frozen_rows.items()
        }
        return sum(
            shape(p).numel() - kept.get(name, 0) * shape(p)[1:].numel()
            for name, p in self.parameters.items()
            if p.requires_grad
        )

    def trained_rows(self, name: str, value: Tensor) -> Tensor:
        """The rows of a tensor, by its plain name, that train; mostly all."""
        return value[list(self.selection.token_rows)] if name in self.frozen_rows else value

    def follow(self, model: nn.Module) -> bool:
        """Switch to the sharded parameters, if a launcher has sharded them since the last time."""
        if self.in_parts:
            return False
        now = {plain_name(name): p for name, p in unwrap(model).named_parameters()}
        if not is_sharded(now[next(iter(self.parameters))]):
            return False
        self.find(model)
        self.in_parts = True
        return True
