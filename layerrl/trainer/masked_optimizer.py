"""The optimizer of a masked trainer: made, its float32 masters, replaced where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from layerrl.errors import SelectionError
from layerrl.optimizer import (
    check_optimizer,
    check_steps,
    keep_only,
    refuse_updates_in_backward,
    scale_learning_rates,
    updates_in_backward,
)
from layerrl.precision import HALF, step_in_float32, unwrap_optimizer
from layerrl.rows import keep_rows
from layerrl.trained import TrainedLayers


class MaskedOptimizer:
    """The optimizer of a masked trainer: made over the trained tensors alone, and seen to be."""

    def __init__(self, layers: TrainedLayers, *, master_weights: bool) -> None:
        self._layers, self._master_weights = layers, master_weights
        self._own: Any = None  # the optimizer that has the layers' rates
        self._fitted: Any = None

    def made(self, trainer: Any, make: Callable[[], Optimizer]) -> Optimizer:
        """Let a trainer make its optimizer, and fit it; refuse one that cannot be fitted."""
        new = trainer.optimizer is None
        optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
        if new and trainer.optimizer_cls_and_kwargs is None and updates_in_backward(optim):
            self._refuse_updates_in_backward(f'optim="{optim}"')  # before it hangs up its hooks
        with self._layers.selection.masked(trainer.model):  # also before or after a training
            optimizer = make()
        try:
            self._fit(optimizer, new=new)
        except SelectionError:
            if new:
                trainer.optimizer = None  # or the next attempt would take it for a good one
            raise
        return optimizer

    def _refuse_updates_in_backward(self, name: str) -> None:
        layers = self._layers
        refuse_updates_in_backward(name, layers.selection, master_weights=self._keeps_masters())

    def _keeps_masters(self) -> bool:
        half = any(p.dtype in HALF for p in self._layers.parameters.values())
        return self._master_weights and half

    def _fit(self, optimizer: Any, *, new: bool) -> None:
        layers, self._fitted = self._layers, unwrap_optimizer(optimizer)
        optimizer = self._fitted
        if new and not layers.selection.full:
            keep_only(optimizer, layers.parameters.values())
        if updates_in_backward(optimizer):
            self._refuse_updates_in_backward(type(optimizer).__name__)
            return
        own = new or optimizer is self._own
        if not own and layers.selection.is_boosted:
            raise SelectionError(
                f"{layers.selection}: the scales cannot be put into {type(optimizer).__name__}, "
                "which was passed in ready-made. Let the trainer build an ordinary optimizer from "
                "its args, or select without boost."
            )
        if new:
            scale_learning_rates(optimizer, layers)
        check_optimizer(optimizer, layers)
        keep_rows(optimizer, layers)  # inside of the next, on the masters
        if self._keeps_masters():
            step_in_float32(optimizer)
        check_steps(optimizer, lambda: layers.parameters)
        self._own = optimizer if own else None

    def fit_another(self, trainer: Any) -> None:
        """Fit an optimizer that was made in another way than through `create_optimizer`."""
        optimizer = unwrap_optimizer(trainer.optimizer)
        if optimizer is not None and optimizer is not self._fitted:
            self._fit(optimizer, new=False)
