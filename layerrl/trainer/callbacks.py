"""Callbacks of a masked trainer: frozen check, reference that follows, gradient norms, pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_utils import has_length
from trl.trainer.callbacks import BEMACallback, SyncRefModelCallback
from trl.trainer.utils import RepeatSampler

from layerrl.errors import SelectionError
from layerrl.reference import ReferenceModel
from layerrl.selection import LayerSelection
from layerrl.shards import parts, with_parameter
from layerrl.trainer.agreement import refuse_disagreement, same_on_ranks, share_control

if TYPE_CHECKING:
    from layerrl.trainer.checkpoints import Checkpoints


def refuse_callbacks(callbacks: Iterable[TrainerCallback], selection: LayerSelection) -> None:
    """Refuse callbacks of TRL that average trained parameters as if they were all."""
    for callback in callbacks:
        if isinstance(callback, BEMACallback) and not selection.full:
            raise SelectionError(
                f"{type(callback).__name__} was given for {selection}: it pairs the parameters "
                "that train with all of the model's, and would fail at its first update. Leave it "
                'out, or train with selection="full".'
            )


class FrozenCheck(TrainerCallback):
    """Checks before the first step, when a checkpoint has been loaded, and after the last one."""

    def __init__(self, check: Callable[[str], None]) -> None:
        self._check = check

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Transformers calls this after loading a checkpoint."""
        self._check("the beginning of train()")

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        """Transformers calls this after loading the best model."""
        self._check("the end of train()")


class OptimizerFit(TrainerCallback):
    """Fits the optimizer of a trainer whose own `create_scheduler` has made or replaced it."""

    def __init__(self, fit: Callable[[], None]) -> None:
        self._fit = fit

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Transformers calls this when the optimizer is the one that will step."""
        self._fit()


class EpochOrder(TrainerCallback):
    """Goes on, after a resume, with that epoch's order of the data.

    TRL's sampler draws an order whenever an epoch begins, and would begin with the first one's.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the orders of the epochs that are done."""
        sampler: Any = kwargs["train_dataloader"]
        while sampler is not None and not isinstance(sampler, RepeatSampler):
            inner = getattr(sampler, "batch_sampler", None)  # accelerate's shards lie around it
            sampler = getattr(sampler, "sampler", None) if inner is None else inner
        if sampler is not None:
            per_epoch = -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps)
            for _ in range(state.global_step // max(1, per_epoch)):  # as transformers counts them
                next(iter(sampler), None)


class SameControl(TrainerCallback):
    """Shares what a callback before it has set in the control of one rank.

    Not where a rank may be alone: in `on_log`, or where epochs end at other steps on other ranks.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._same_epochs = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to take another number of steps than the other processes."""
        steps = {"train_dataset": f"for {state.max_steps} steps"}
        refuse_disagreement(steps, self._accelerator, "the beginning of train()")
        loader = kwargs["train_dataloader"]
        num_batches = len(loader) if has_length(loader) else -1
        self._same_epochs = num_batches >= 0 and same_on_ranks(num_batches, self._accelerator)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Transformers logs, evaluates, saves or stops next."""
        share_control(control, self._accelerator)

    on_evaluate = on_save = on_step_end

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """As after a step."""
        if self._same_epochs:
            share_control(control, self._accelerator)


def same_control_last(callbacks: list[TrainerCallback]) -> None:
    """Move `SameControl` behind callbacks that were added after it."""
    callbacks.sort(key=lambda callback: isinstance(callback, SameControl))


class GradNorms(TrainerCallback):
    """Notes the gradients' norms, between clipping and the step."""

    def __init__(self, note: Callable[[], None]) -> None:
        self._note = note

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        """Transformers calls this when the gradients have been clipped."""
        self._note()


class DeltaOnTop(TrainerCallback):
    """Lets a checkpoint that is pushed have its delta at the top of the repository."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def on_push_begin(self, *args: object, **kwargs: object) -> None:
        """Transformers calls this when it has decided to push, before it uploads anything."""
        self._checkpoints.to_top()


class SyncReference(SyncRefModelCallback):
    """TRL's callback and its arithmetic, on the trained tensors alone."""

    def sync_target_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, target_model: ReferenceModel, alpha: float
    ) -> None:
        """Mix a share `alpha` of the policy into the `ReferenceModel`."""
        # TRL would gather what ZeRO-3 has in parts; both sides here are in the same parts.
        for value, tensor in zip(target_model.initial, target_model.trained.values(), strict=True):
            value = with_parameter(value, tensor).data
            value.mul_(1.0 - alpha).add_(parts(tensor).data, alpha=alpha)
