"""Which tensors require gradients, for a while."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import nn

from layerrl.blocks import plain_name

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection


class Masked(AbstractContextManager[dict[str, nn.Parameter]]):
    """A class and no generator: one that is dropped while suspended would restore the flags."""

    def __init__(self, selection: LayerSelection, model: nn.Module) -> None:
        self._selection, self._model = selection, model

    def __enter__(self) -> dict[str, nn.Parameter]:
        trained = self._selection.parameters(self._model)
        chosen = {id(parameter) for parameter in trained.values()}
        self._required: dict[str, bool] = {}
        for name, parameter in self._model.named_parameters():
            self._required[plain_name(name)] = parameter.requires_grad
            parameter.requires_grad_(id(parameter) in chosen)
        return trained

    def __exit__(self, *exception: object) -> None:
        # By name: FSDP2 replaces parameters, and frees the old ones if nobody holds them.
        for name, parameter in self._model.named_parameters():
            required = self._required.get(plain_name(name), parameter.requires_grad)
            parameter.requires_grad_(required)
