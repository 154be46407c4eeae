"""The hooks of a trainer's saving, pushing and resuming: which asks which collaborator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from layerrl.delta.hub import hub_errors
from layerrl.trainer import launchers
from layerrl.trainer.callbacks import same_control_last
from layerrl.trainer.checkpoints import refuse_readers

if TYPE_CHECKING:
    from transformers import Trainer as _Wrapped

    from layerrl.trainer.checkpoints import Checkpoints
    from layerrl.trainer.masked_run import MaskedRun
    from layerrl.trainer.resuming import CheckpointReader
else:
    _Wrapped = object


class SavingHooks(_Wrapped):
    """Overrides of methods that save. Each takes and returns what the trainer's own does."""

    masked_run: MaskedRun
    checkpoint_format: str
    _checkpoints: Checkpoints
    _reader: CheckpointReader

    def add_callback(self, callback: Any) -> None:
        """Add a callback that does not take a delta for a whole model."""
        refuse_readers([callback], getattr(self, "checkpoint_format", "full"))
        super().add_callback(callback)
        same_control_last(self.callback_handler.callbacks)

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
        self.masked_run.fit_optimizer()  # before it is loaded: float32 values are a part of it
        with launchers.as_in_one_process(self), self._reader.optimizer_state(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
