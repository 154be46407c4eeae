"""The mixin that puts a selection into a TRL trainer: which hook asks which collaborator."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from layerrl.delta.hub import hub_errors
from layerrl.errors import SelectionError
from layerrl.seams import check_class, check_made
from layerrl.selection.masked import TrainingMask
from layerrl.trainer import arguments, callbacks, launchers
from layerrl.trainer.call import TrainerCall
from layerrl.trainer.checkpoints import Checkpoints, refuse_readers
from layerrl.trainer.masked_run import MaskedRun
from layerrl.trainer.resuming import CheckpointReader

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn
    from torch.optim import Optimizer
    from transformers import Trainer as _Wrapped

    from layerrl.selection import LayerSelection
else:
    _Wrapped = object


class LayerMaskedMixin(_Wrapped):
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
            its first generation batches (64 prompts or more), which are then trained on. Until then
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
        ModelError: If the model's decoder layers cannot be found.
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
            super(),
            arguments.names(type(self), LayerMaskedMixin),
            args,
            kwargs,
            selection=selection,
            prefix_cache_bytes=prefix_cache_bytes,
            master_weights=master_weights,
            checkpoint_format=checkpoint_format,
        )
        with call.making():
            super().__init__(*call.args, **call.kwargs)
        check_made(self)
        if call.reference == "beta":
            self.beta = self.args.beta  # pyright: ignore[reportAttributeAccessIssue]
        self.checkpoint_format = call.checkpoint_format
        self._checkpoints, self._reader = Checkpoints(self), CheckpointReader(self)
        self._mask = TrainingMask()
        # The first, as callbacks of the user may write to the gradients.
        norms = callbacks.GradNorms(lambda: self.masked_run.note_gradients())
        self.callback_handler.callbacks.insert(0, norms)
        frozen = callbacks.FrozenCheck(lambda at: self.masked_run.check_frozen(at))
        for callback in (callbacks.EpochOrder(), frozen, callbacks.DeltaOnTop(self._checkpoints)):
            self.add_callback(callback)
        chosen = call.selection_for(self.model, self.processing_class)
        call.check_made(self, chosen)
        self._select(chosen)

    def _select(self, selection: LayerSelection) -> None:
        self.masked_run = MaskedRun(self, self._call, selection)
        self._mask.put_on(selection, self.model)

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
            path: Folder to make.

        Returns:
            The folder; None on every process but the main one, which writes it.

        Raises:
            DeltaError: If the folder exists or cannot be written.
            FrozenTensorError: If a frozen tensor changed. Nothing is written then.
            SelectionError: If `"auto"` has not chosen yet.
        """
        self.masked_run.check_frozen("save_delta()")
        writes = self.accelerator.is_main_process
        saved = self.masked_run.save_delta(path, writes=writes)
        self._checkpoints.describe(saved, beside="nothing")
        self.accelerator.wait_for_everyone()
        return saved if writes else None

    # What the wrapped trainer calls. Each takes and returns what its own method does.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the selected layers; a frozen tensor that changes is a `FrozenTensorError`."""
        args, kwargs = self._reader.resumed(args, kwargs)
        try:
            callbacks.refuse_callbacks(self.callback_handler.callbacks, self.selection)
            with self._mask.during_training():
                if self.model_init is None:
                    self.masked_run.check_adapters()
                    self._mask.put_on(self.selection, self.model)
                if not self._call.decided:
                    self._choose()
                if self.model_init is None:
                    self._before_sharding()
                return super().train(*args, **kwargs)
        except BaseException:
            self.masked_run.sync_everything()  # what failed may have been a sync
            raise
        finally:
            self._reader.folder = None
            self._checkpoints.warn_of_failed_pushes()
            self.masked_run.replay.clear()
            self._call.forget_batches()

    def _choose(self) -> None:
        selection = self._call.decide(self, self._reader.folder)
        self._mask.take_off()
        try:
            self._select(selection)
        except BaseException:
            self._select(self._call.undecide(self.model))
            raise

    def _before_sharding(self) -> None:
        self.masked_run.check_whole("train()")
        if launchers.uses_deepspeed(self.accelerator):  # it loads all but the reference itself
            self._reader.load_reference()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; before training, ZeRO-3 shards the model for it."""
        self.masked_run.check_whole("evaluate()")
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; before training, ZeRO-3 shards the model for it."""
        self.masked_run.check_whole("predict()")
        return super().predict(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model from the trainer's `model_init`, which it is masked on from now on."""
        model: Any = super().call_model_init(trial)
        if hasattr(self, "masked_run"):  # not the first one, which is masked when all else is made
            selection = self._call.selection_for(model, self.processing_class)
            self._mask.take_off()
            self.model = model
            if self.place_model_on_device:
                self._move_model_to_device(model, self.args.device)
            self._select(selection)
            self._before_sharding()
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The optimizer that the args name, over the trained tensors, each at its layer's rate."""
        self.masked_run.find_trained()
        make = partial(super().create_optimizer, *args, **kwargs)
        return self.masked_run.optimizer.made(self, make)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The scheduler: asked for when the model is sharded, and no checkpoint loaded yet."""
        self.masked_run.follow_shards()
        self.masked_run.find_trained()
        if not launchers.uses_deepspeed(self.accelerator):  # which wraps it in one of its own
            self.masked_run.optimizer.fit_another(self)
        return super().create_scheduler(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, whose backward ends at the first trained layer."""
        with self.masked_run.loss():
            return super().compute_loss(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """A batch, or one that the choice of the layers has generated."""
        auto = self._call.auto
        return self._answered(inputs) if auto is None else auto.batch(self, inputs, self._answered)

    def _answered(self, inputs: Any) -> dict[str, Any]:
        with self.masked_run.batch():
            return super()._generate_and_score_completions(inputs)  # pyright: ignore[reportAttributeAccessIssue]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Scores of completions, before the loss and in it; no generation comes through here."""
        with self.masked_run.scoring():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the layers' metrics beside those of a training step."""
        if "loss" in logs:
            logs.update(self.masked_run.metrics_of_step(logs.get("grad_norm")))
        super().log(logs, *args, **kwargs)

    def add_callback(self, callback: Any) -> None:
        """Add a callback that does not take a delta for a whole model."""
        refuse_readers([callback], getattr(self, "checkpoint_format", "full"))
        super().add_callback(callback)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, after checking that only the selection changed.

        A delta that lies in the folder is brought to the same state; a checkpoint holds a delta
        alone where `checkpoint_format` is `"delta"`.
        """
        sharded = launchers.shards_model(self.accelerator)
        # A model that each process has whole may be saved by one of them, a checkpoint never.
        together = sharded or (_internal_call and output_dir is not None)
        self.masked_run.check_frozen("save_model()" if together else "")
        self._checkpoints.save(output_dir, _internal_call, super().save_model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, and into it how to load a delta beside it."""
        super().create_model_card(*args, **kwargs)
        self._checkpoints.describe()

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository to push to; a hub that refuses is a `DeltaError`."""
        with hub_errors("push to", self.args.hub_model_id):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push the whole model, the delta and the card; a hub that refuses is a `DeltaError`."""
        with hub_errors("push to", self.args.hub_model_id):
            return super().push_to_hub(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial), folder)
        with self._checkpoints.all_or_nothing(folder), launchers.as_in_one_process(self):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._reader.load(resume_from_checkpoint, resumes=True):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._reader.load(self.state.best_model_checkpoint, resumes=False):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with launchers.as_in_one_process(self):
            super()._load_optimizer_and_scheduler(checkpoint)
