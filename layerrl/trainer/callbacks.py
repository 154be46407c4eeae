"""What happens at certain moments of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback
from trl.trainer.callbacks import SyncRefModelCallback

if TYPE_CHECKING:
    from collections.abc import Callable


class TrainingEvents(TrainerCallback):
    """Calls back when a checkpoint is loaded and the first step comes next, and after the last."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Transformers calls this after loading a checkpoint and enabling checkpointing."""
        self._begin()

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        """Transformers calls this after loading the best model."""
        self._end()


class SyncReference(SyncRefModelCallback):
    """TRL's callback and its arithmetic, on the trained tensors alone."""

    def sync_target_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, target_model: Any, alpha: float
    ) -> None:
        """Mix the policy's trained tensors into a `ReferenceModel`.

        Args:
            model: The policy; not used, `target_model` knows its trained tensors.
            target_model: The `ReferenceModel`, changed.
            alpha: Share of the policy.
        """
        trained = nn.ParameterList(target_model.trained.values())
        SyncRefModelCallback.sync_target_model(trained, target_model.initial, alpha)
