"""Layer-selective training in TRL's trainers: the only module that imports trl."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import GRPOTrainer

from layerrl.blocks import is_peft
from layerrl.delta import DeltaBase, save_delta
from layerrl.errors import SelectionError
from layerrl.masking import (
    check_frozen,
    check_optimizer,
    fingerprints,
    frozen_tensors,
    norm,
    parameters_by_layer,
    scale_learning_rates,
)
from layerrl.selection import select_layers

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from pathlib import Path

    from torch.optim import Optimizer

    from layerrl.selection import LayerSelection


def _with_selection(cls: type) -> inspect.Signature:
    """The signature of the class behind the mixin, with `selection`."""
    after = cls.__mro__[cls.__mro__.index(LayerMaskedMixin) + 1]
    parameters = list(inspect.signature(after).parameters.values())
    selection = inspect.Parameter("selection", inspect.Parameter.KEYWORD_ONLY)
    keep = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*keep, selection, *rest])


class LayerMaskedMixin:
    """Put in front of a TRL trainer, trains only the layers of a selection.

    `class MyTrainer(LayerMaskedMixin, GRPOTrainer)` takes one keyword more than the trainer it
    wraps. Everything outside the selection is frozen when the trainer has been made, compared with
    its fingerprint at train start, at every save and at train end, and never reaches the optimizer.
    If making the trainer or training fails, every `requires_grad` flag is what it was before.

    Logged with the trainer's own metrics: `layerrl/trained_parameters`, the number of elements that
    train; `layerrl/grad_norm/layer_<k>`, the layer's share of `grad_norm`, before clipping;
    `layerrl/relative_update/layer_<k>`, the norm of the layer's change since `train()` was first
    called over its norm then (not for `"full"`, which would need a second copy of the model).

    Args:
        *args: The trainer's own arguments.
        selection: What trains: a `LayerSelection` or anything `select_layers` takes, resolved
            against the trainer's model.
        **kwargs: The trainer's own arguments.

    Raises:
        SelectionError: If the selection does not fit the model, or comes with a `peft_config` or a
            PEFT model, which also choose what trains.
        ModelError: If the model's decoder layers cannot be found.
    """

    selection: LayerSelection
    """What trains, resolved against the model."""

    if TYPE_CHECKING:
        model: Any
        optimizer: Any
        accelerator: Any
    else:

        def __init_subclass__(cls, **kwargs: object) -> None:
            """Show the wrapped trainer's arguments, and `selection`, in `help` and editors."""
            super().__init_subclass__(**kwargs)
            own = "__init__" in vars(cls)
            cls.__signature__ = None if own else _with_selection(cls)

    def __init__(
        self,
        *args: Any,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        **kwargs: Any,
    ) -> None:
        given = _bound(super().__init__, args, kwargs)
        model = given.get("model")
        if given.get("peft_config") is not None or (
            isinstance(model, nn.Module) and is_peft(model)
        ):
            what = "peft_config" if given.get("peft_config") is not None else "a PEFT model"
            raise SelectionError(
                f"selection={selection!r} was given together with {what}: two ways of choosing "
                "what trains. Leave out one of them (PEFT's own layers_to_transform restricts an "
                "adapter to layers)."
            )
        if isinstance(model, nn.Module):
            selection = select_layers(model, selection)
        super().__init__(*args, **kwargs)
        self.selection = select_layers(self.model, selection)
        self._by_layer = parameters_by_layer(self.model, self.selection)
        self._trained = self.selection.parameters(self.model)
        self._base = DeltaBase.of(self.model, self.selection)
        self._frozen = fingerprints(frozen_tensors(self.model, self.selection))
        self._initial: dict[int, list[Tensor]] = {}
        self._grad_norms: dict[int, Tensor] = {}
        self._optimizer_is_own = False
        self._mask = ExitStack()
        self._mask_model()
        self.add_callback(_FrozenCheck(self))  # pyright: ignore[reportAttributeAccessIssue]

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Train the selected layers; the wrapped trainer's arguments and result.

        Args:
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.

        Returns:
            What the wrapped trainer returns.

        Raises:
            FrozenTensorError: If a frozen tensor changed, at train start, at a save or at the end.
        """
        self._mask_model()
        if not self._initial and not self.selection.full:
            self._initial = {
                layer: [parameter.detach().clone() for parameter in parameters]
                for layer, parameters in self._by_layer.items()
            }
        try:
            return super().train(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except BaseException:
            self._mask.close()
            raise

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the whole model, after checking that only the selection changed.

        Args:
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.

        Raises:
            FrozenTensorError: If a frozen tensor changed. Nothing is written then.
        """
        self.check_frozen()
        super().save_model(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def save_delta(self, path: str | os.PathLike[str]) -> Path | None:
        """Save only what was trained, as a delta on the model the trainer was made with.

        Args:
            path: Folder to make.

        Returns:
            The folder; None on every process but the main one, which writes it.

        Raises:
            DeltaError: If the folder exists or cannot be written.
            FrozenTensorError: If a frozen tensor changed. Nothing is written then.
        """
        self.check_frozen()
        saved = None
        if self.accelerator.is_main_process:
            saved = save_delta(self.model, path, selection=self.selection, base=self._base)
        self.accelerator.wait_for_everyone()
        return saved

    def check_frozen(self) -> None:
        """Compare every frozen tensor and buffer with what it was when the trainer was made.

        Raises:
            FrozenTensorError: If one changed.
        """
        check_frozen(self.model, self.selection, self._frozen)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The optimizer that the args name, over the trained tensors, each at its layer's rate.

        Args:
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.

        Returns:
            The optimizer.

        Raises:
            SelectionError: If an optimizer passed to the trainer holds other tensors than the
                selection, or has one learning rate where the selection scales some.
        """
        new = self.optimizer is None
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        layer_wise = isinstance(optimizer, LayerWiseDummyOptimizer)
        self._optimizer_is_own |= new and not layer_wise
        if not self._optimizer_is_own and set(self.selection.learning_rate_scale) != {1.0}:
            why = "updates layer by layer" if layer_wise else "was passed in ready-made"
            raise SelectionError(
                f"{self.selection}: the scales cannot be put into {type(optimizer).__name__}, "
                f"which {why}. Let the trainer build an ordinary optimizer from its args, or "
                "select without boost."
            )
        if new and not layer_wise:
            scale_learning_rates(optimizer, self.model, self.selection)
        if not layer_wise:
            check_optimizer(optimizer, self.model, self.selection)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the layers' metrics beside those of a training step.

        Args:
            logs: Metrics. Those of a training step (they have a `loss`) are extended.
            *args: The trainer's own arguments.
            **kwargs: The trainer's own arguments.
        """
        if "loss" in logs:
            logs.update(self._layer_metrics())
        super().log(logs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _mask_model(self) -> None:
        self._mask.close()
        self._mask.enter_context(self.selection.masked(self.model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:  # noqa: ANN401
        """Transformers calls this between clipping and the step: note each layer's share."""
        total = super()._get_grad_norm(model, grad_norm=grad_norm)  # pyright: ignore[reportAttributeAccessIssue]
        clipped = norm(p.grad for p in self._trained.values() if p.grad is not None)
        factor = torch.where(clipped > 0, total / clipped, 0.0)
        self._grad_norms = {
            layer: factor * norm(p.grad for p in parameters if p.grad is not None)
            for layer, parameters in self._by_layer.items()
        }
        return total

    def _layer_metrics(self) -> dict[str, float]:
        metrics = {
            "layerrl/trained_parameters": float(sum(p.numel() for p in self._trained.values()))
        }
        for layer, value in self._grad_norms.items():
            metrics[f"layerrl/grad_norm/layer_{layer}"] = value.item()
        for layer, initial in self._initial.items():
            moved = norm(p - start for p, start in zip(self._by_layer[layer], initial, strict=True))
            metrics[f"layerrl/relative_update/layer_{layer}"] = (moved / norm(initial)).item()
        return metrics


class LayerMaskedGRPOTrainer(LayerMaskedMixin, GRPOTrainer):
    """TRL's `GRPOTrainer`, training only the layers of a selection.

    Takes what `GRPOTrainer` takes and the keyword `selection`; see `LayerMaskedMixin`.

    Example:
        ```python
        trainer = LayerMaskedGRPOTrainer(
            model, reward, args=GRPOConfig(...), train_dataset=data, selection=10
        )
        trainer.train()
        trainer.save_delta("out/layer-10")
        ```
    """


class _FrozenCheck(TrainerCallback):
    """Checks when a checkpoint has been loaded, before the first step, and after the last."""

    def __init__(self, trainer: LayerMaskedMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self._trainer.check_frozen()

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self._trainer.check_frozen()


def _bound(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments by name; what does not fit is left for the call itself to complain about."""
    names = list(inspect.signature(function).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
