"""The mixin that puts a selection into a TRL trainer: what it takes, makes, and is asked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from layerrl.errors import SelectionError
from layerrl.seams import check_class, check_made
from layerrl.selection import LayerSelection
from layerrl.selection.masked import TrainingMask
from layerrl.trainer import agreement, arguments, callbacks
from layerrl.trainer.call import TrainerCall
from layerrl.trainer.checkpoints import Checkpoints
from layerrl.trainer.resuming import CheckpointReader
from layerrl.trainer.saving_hooks import SavingHooks
from layerrl.trainer.training_hooks import TrainingHooks

if TYPE_CHECKING:
    from layerrl.trainer.masked_run import MaskedRun


class LayerMaskedMixin(TrainingHooks, SavingHooks):
    """Put in front of a TRL trainer, trains only the layers of a selection and pays only for them.

    `class MyTrainer(LayerMaskedMixin, GRPOTrainer)` takes a few keywords more than the trainer it
    wraps. Everything outside the selection is frozen when the trainer has been made, compared with
    its fingerprint at train start, at every save and at train end, and never reaches the optimizer.
    When `train` returns or fails, or making the trainer fails, every `requires_grad` flag is what
    it was before the trainer was made; the next `train` masks anew.

    The backward ends at the first trained layer, and only layers from there up are checkpointed.
    The reference (`beta > 0`; DPO, KTO without a `ref_model`) is the model that was passed, kept as
    the trained tensors' initial values. What enters the first trained layer is recorded in the
    first pass over a batch and replayed in the others. After a first time, vLLM is sent only what
    was trained. None of this changes a result; with `selection="full"` there is nothing to save,
    and the trainer is the plain one, with a copy of the model that was passed for its reference.

    With a `peft_config`, or of a PEFT model, adapters train in the selected layers, and only there;
    the reference and the checkpoints are then TRL's and PEFT's own.

    What does change a result, for the better: trained tensors in bfloat16 or float16 are updated in
    float32, where small steps are not rounded away.

    Logged with the trainer's own metrics: `layerrl/trained_parameters`, the number of elements that
    train now; `layerrl/grad_norm/layer_<k>`, the layer's share of `grad_norm`, before clipping;
    `layerrl/relative_update/layer_<k>`, the norm of the layer's change since the trainer was made
    over its norm then (not for `"full"`, which would need a second copy of the model); both also of
    each part of `also`, by its name.

    Args:
        *args: The trainer's own arguments.
        selection: What trains: a `LayerSelection` or anything `select_layers` takes, resolved
            against the trainer's model. `"auto"` or `"auto:K"` in a trainer that generates: the K
            layers that `contribution_probe`'s `"gradient"` scores highest when training starts, on
            its first generation batches (64 prompts or more), which are then trained on. With
            `"auto:step"` or `"auto:K:step"` they are scored by `"step"`. Until then
            `selection` is all layers. Checkpoints hold the report, and resume on it.
        prefix_cache_bytes: Most memory that recorded hidden states may take, on the device: those
            of an evaluation beside a batch to train on included; a larger batch is not recorded. 0:
            never record.
        master_weights: Update half-precision trained tensors in float32. The optimizer keeps those
            values, and its checkpoint holds them. Not for `"full"`, which is the plain trainer.
        checkpoint_format: `"delta"`: checkpoints hold the trained tensors, their optimizer state
            and the trainer's state, and resume on the same base; `"full"`: whole models, as the
            trainer's own, for tools that take checkpoints for models. `save_model()` and
            `push_to_hub()` write a whole model either way.
        **kwargs: The trainer's own arguments.

    Raises:
        SelectionError: If the selection does not fit the model, or with a
            `peft_config` that trains something else; if tokens were added whose embedding rows it
            does not train; if a callback takes checkpoints for models that hold a delta.
        TrainerError: If the class behind the mixin is no trainer, or is one that cannot be masked.
        ModelError: If the model's decoder layers cannot be found, or torch can train none of it, as
            it was made inside `torch.inference_mode()`.
        LauncherError: Under a launcher that cannot train chosen layers, or in processes that do not
            choose the same.
        FrameworkError: If the versions of TRL, transformers, accelerate or torch are too old, or
            lack what the mixin needs of the trainer's class.
    """

    beta: float
    masked_run: MaskedRun
    """What the trainer keeps while its selection trains."""

    if not TYPE_CHECKING:

        def __init_subclass__(cls, **kwargs: object) -> None:
            """Show the wrapped trainer's arguments, and `selection`, in `help` and editors."""
            super().__init_subclass__(**kwargs)
            arguments.refuse_other_classes(cls, LayerMaskedMixin)
            own = cls.__init__ is not LayerMaskedMixin.__init__
            cls.__signature__ = None if own else arguments.signature(cls, LayerMaskedMixin)

    def __init__(
        self,
        *args: Any,
        selection: LayerSelection | int | Iterable[int] | slice | str,
        prefix_cache_bytes: int = 2 * 2**30,
        master_weights: bool = True,
        checkpoint_format: Literal["delta", "full"] = "delta",
        **kwargs: Any,
    ) -> None:
        check_class(type(self))
        self._call = call = TrainerCall(
            type(self),
            LayerMaskedMixin,
            args,
            kwargs,
            selection=selection,
            prefix_cache_bytes=prefix_cache_bytes,
            master_weights=master_weights,
            checkpoint_format=checkpoint_format,
        )
        with call.making(self):
            super().__init__(*call.args, **call.kwargs)
        check_made(self)
        self.checkpoint_format = call.checkpoint_format
        self._checkpoints, self._reader = Checkpoints(self), CheckpointReader(self)
        self._mask = TrainingMask()
        # The first, as callbacks of the user may write to the gradients.
        norms = callbacks.GradNorms(lambda: self.masked_run.note_gradients())
        self.callback_handler.callbacks.insert(0, norms)
        frozen = callbacks.FrozenCheck(lambda at: self.masked_run.check_frozen(at))
        fit = callbacks.OptimizerFit(lambda: self.masked_run.fit_optimizer())
        on_top = callbacks.DeltaOnTop(self._checkpoints)
        control = callbacks.SameControl(self.accelerator)  # the last: `add_callback` keeps it there
        for callback in (callbacks.EpochOrder(), fit, frozen, on_top, control):
            self.add_callback(callback)
        chosen = call.selection_for(self.model, self.processing_class)
        call.check_made(self, chosen)
        self._select(chosen)

    @property
    def selection(self) -> LayerSelection:
        """What trains, resolved against the model.

        Raises:
            SelectionError: On an attempt to set it. The optimizer, the reference and the
                fingerprints of what is frozen belong to this selection.
        """
        return self.masked_run.selection

    @selection.setter
    def selection(self, selection: object) -> None:
        """Refuse it: a trainer has one selection."""
        raise SelectionError(
            f"selection={selection!r} was set on a trainer that was made for {self.selection}: its "
            "optimizer, reference and frozen tensors are those of that selection. Make another "
            "trainer, with selection=... and this one's model, which goes on from where it is."
        )

    def check_frozen(self) -> None:
        """Compare every frozen tensor and buffer with what it was when the trainer was made.

        One process may call this alone. In checkpoints, and where training begins and ends, all
        raise what one of them finds.

        Raises:
            FrozenTensorError: If one changed.
        """
        self.masked_run.check_frozen()

    def save_delta(self, path: str | os.PathLike[str]) -> Path | None:
        """Save only what was trained, as a delta on the model the trainer was made with.

        Args:
            path: Folder to make. Collective: call on every rank.

        Returns:
            The folder; None on every rank but rank 0, which writes it.

        Raises:
            DeltaError: If the folder exists or cannot be written.
            FrozenTensorError: If a frozen tensor changed. Nothing is written then.
            SelectionError: If `"auto"` has not chosen yet.
        """
        self.masked_run.check_frozen("save_delta()")
        writes = self.accelerator.is_main_process
        with agreement.raised_together("the writing of save_delta()", self.accelerator):
            saved = self.masked_run.save_delta(path, writes=writes)
            self._checkpoints.describe(saved, beside="nothing")
        return saved if writes else None
