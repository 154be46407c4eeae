"""The hooks of a trainer's steps, from `train` to `log`: which asks which collaborator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from layerrl.errors import SelectionError, TrainerError
from layerrl.selection.masked import check_gradients_on
from layerrl.swapping import cast_undone
from layerrl.trainer import callbacks, launchers
from layerrl.trainer.masked_run import MaskedRun
from layerrl.trainer.texts import refused_texts

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import Trainer as _Wrapped

    from layerrl.selection import LayerSelection
    from layerrl.selection.masked import TrainingMask
    from layerrl.trainer.call import TrainerCall
    from layerrl.trainer.checkpoints import Checkpoints
    from layerrl.trainer.resuming import CheckpointReader
else:
    _Wrapped = object

# Of torch's error in a backward; that of autograd.grad, of other tensors, begins otherwise.
_WITHOUT_GRADIENT = "element 0 of tensors does not require grad"


class TrainingHooks(_Wrapped):
    """What the wrapped trainer calls to train. Each takes and returns what its own method does."""

    masked_run: MaskedRun
    _call: TrainerCall
    _mask: TrainingMask
    _checkpoints: Checkpoints
    _reader: CheckpointReader

    def _select(self, selection: LayerSelection) -> None:
        self.masked_run = MaskedRun(self, self._call, selection)
        self._mask.put_on(selection, self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the selected layers; a frozen tensor that changes is a `FrozenTensorError`."""
        with self._mask.during_training():
            args, kwargs = self._reader.resumed(args, kwargs)
            try:
                self._prepare()
                return super().train(*args, **kwargs)
            except BaseException:
                self._reader.undo()
                self.masked_run.sync_everything()  # what failed may have been a sync
                raise
            finally:
                self._reader.folder = None
                self._checkpoints.warn_of_failed_pushes()
                self.masked_run.replay.clear()
                self._call.forget_batches()

    def _prepare(self) -> None:
        """Check, mask, choose layers and shard, before the wrapped trainer begins."""
        callbacks.refuse_callbacks(self.callback_handler.callbacks, self.masked_run.selection)
        check_gradients_on("train()", TrainerError)
        if self.model_init is None:
            self.masked_run.check_adapters()
            self._mask.put_on(self.masked_run.selection, self.model)
        if not self._call.decided:
            self._choose()
        if self.model_init is None:
            self._before_sharding()
            launchers.forget_evaluation(self)

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
        with self._cast_undone():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; before training, ZeRO-3 shards the model for it."""
        self.masked_run.check_whole("predict()")
        with self._cast_undone():
            return super().predict(*args, **kwargs)

    def _cast_undone(self) -> AbstractContextManager[None]:
        """Outside of a training, transformers casts the model for `bf16_full_eval`, for good."""
        cast = self.args.bf16_full_eval or self.args.fp16_full_eval
        whole = not self.masked_run.layers.in_parts
        return cast_undone(self.model) if cast and whole and not self.is_in_train else nullcontext()

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
        self.masked_run.fit_optimizer()
        return super().create_scheduler(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step's forward and backward; a loss without gradient is a `SelectionError`."""
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if _WITHOUT_GRADIENT not in str(error):
                raise
            self.masked_run.refuse_frozen()
            raise SelectionError(
                f"the loss depends on no tensor that trains, of {self.masked_run.selection}: "
                "something on its way has no gradient, such as a forward or a compute_loss that "
                "detaches its result or runs inside torch.no_grad()"
            ) from error

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, whose backward ends at the first trained layer."""
        with self.masked_run.loss():
            return super().compute_loss(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """A batch, or one that the choice of the layers has generated."""
        auto = self._call.auto
        return self._answered(inputs) if auto is None else auto.batch(self, inputs, self._answered)

    def _answered(self, inputs: Any) -> dict[str, Any]:
        with refused_texts(inputs), self.masked_run.batch():
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
