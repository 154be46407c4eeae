"""What a masked trainer takes back from a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import get_last_checkpoint

from layerrl.checks import check_path, plain
from layerrl.delta import put_tensors, tensors_of_run
from layerrl.delta.description import Fingerprint
from layerrl.errors import DeltaError, LayerRLError
from layerrl.frozen import fingerprints
from layerrl.precision import unwrap_optimizer
from layerrl.reference import ReferenceModel
from layerrl.schema import Count, Misfit, fitted
from layerrl.shards import shape
from layerrl.stored import bytes_of, decoded, parsed, refuse_unusual, refused_as, tensors_in
from layerrl.trainer import agreement, launchers
from layerrl.trainer.adapters import active_in, check_checkpoint
from layerrl.trainer.arguments import with_argument
from layerrl.trainer.checkpoints import (
    FINGERPRINTS,
    REFERENCE,
    delta_in,
    last_complete,
    put_back,
    why_incomplete,
)
from layerrl.trainer.checksums import check_files
from layerrl.trainer.optimizer_state import check_optimizer_state, refused_state
from layerrl.trainer.schedule import LayerSchedule
from layerrl.trainer.whole_models import CheckpointError, trained_tensors
from layerrl.warning import warn


class CheckpointReader:
    """Loads a trainer's checkpoints, each whole or not at all."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.folder: Path | None = None
        """The checkpoint that a training resumes from; None: it begins."""
        self._has_optimizer = self._resumes = False
        self._put_back: list[tuple[Tensor, Tensor]] = []

    def resumed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `train`, the last whole checkpoint in place of `True`; sets `folder`."""
        trainer, name = self._trainer, "resume_from_checkpoint"
        given = args[0] if args else kwargs.get(name)
        found = plain(given)  # numpy's True and False
        # By its last name, as each node may have a folder of its own.
        shown = Path(found).name if isinstance(found, str | Path) else found
        schedules = [c for c in trainer.callback_handler.callbacks if isinstance(c, LayerSchedule)]
        both = {name: shown or None, "callbacks": schedules}
        agreement.refuse_disagreement(both, trainer.accelerator, "train()")
        if found is True:
            with agreement.raised_together("train()", trainer.accelerator):
                found = self._last_whole()
            agreement.refuse_disagreement({name: Path(found).name}, trainer.accelerator, "train()")
        self._has_optimizer = trainer.optimizer is not None
        begins = found is None or found is False
        self.folder = None if begins else check_path(name, found, DeltaError)
        if found is given:
            return args, kwargs
        return with_argument([name], args, kwargs, name, found)

    def _last_whole(self) -> str:
        output_dir = Path(self._trainer.args.output_dir)
        if self._trainer.args.should_save:
            for before in [*output_dir.glob("_checkpoint-*.replaced")]:
                put_back(before.with_name(before.stem.removeprefix("_")))
        self._trainer.accelerator.wait_for_everyone()  # all were given `True`
        last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
        if last is None:
            raise DeltaError(f"there is no checkpoint in {output_dir} to resume")
        if not (why := why_incomplete(Path(last))):
            return last
        earlier = last_complete(output_dir)
        if earlier is None:
            raise DeltaError(
                f"there is no whole checkpoint in {output_dir}: {last} was not written to its end, "
                f"or was deleted in part ({why})"
            )
        warn(
            f"{last} was not written to its end, or was deleted in part ({why}): going on from "
            f"{earlier}"
        )
        return str(earlier)

    def load(self, checkpoint: Any, *, resumes: bool) -> bool:
        """Load a checkpoint of this run, or nothing of it.

        Args:
            checkpoint: Its folder. Collective: call on every rank.
            resumes: Whether its optimizer's and trainer's states will be loaded, too.

        Returns:
            Whether it is loaded; otherwise the wrapped trainer has to.

        Raises:
            CheckpointError: If it holds a whole model that is not of this run.
            DeltaError: If it is damaged or incomplete, a file of it is not what was written, or its
                delta is not of this run.
            LayerRLError: Of another kind, where it is of another run.
        """
        run, folder = self._trainer.masked_run, Path(checkpoint)
        if not resumes and not folder.is_dir():  # the best one, of a run that has moved since
            return False
        try:
            values = self._checked(folder, resumes=resumes)
        except LayerRLError as error:
            if resumes:  # a damaged file may look like one of another run
                check_files(folder, because=error)
            raise
        if resumes:
            self._check_files(folder)
            self._resumes = True
        if values is None:
            return not resumes and self._found_adapters(folder)
        tensors, reference = values
        if resumes and not launchers.shards_model(self._trainer.accelerator):
            changed = [*run.layers.parameters.values()]
            changed += run.reference.tensors.values() if reference else []
            self._put_back = [(each, each.detach().to("cpu", copy=True)) for each in changed]
        put_tensors(self._trainer.model, run.layers.parameters, tensors)
        if reference:
            run.reference.load_tensors(reference)
        return True

    def _checked(
        self, folder: Path, *, resumes: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The trained tensors and the reference; None where the wrapped trainer has to load."""
        trainer, run = self._trainer, self._trainer.masked_run
        run.sync_everything()
        run.follow_shards()
        delta = delta_in(folder)
        launchers.refuse_checkpoint(folder, trainer.accelerator, has_delta=delta is not None)
        in_parts = launchers.shards_model(trainer.accelerator)
        quantised = getattr(trainer.model, "is_quantized", False)
        if delta is None and run.adapts and not launchers.uses_zero3(trainer.accelerator):
            check_checkpoint(trainer.model, folder, run.adapted)
            if resumes and not in_parts:
                self._check_state(folder, of_delta=True)
            return None
        if delta is None and (run.adapts or run.selection.full or in_parts or quantised):
            return None
        if run.adapts:
            raise CheckpointError(
                f"{folder} holds the delta of layers that trained themselves, and here adapters "
                "train: resume without peft_config, or load the delta into the base with load_delta"
            )
        assert run.base is not None  # "auto" has chosen before anything is loaded
        if delta is None:
            tensors, reference = trained_tensors(trainer.model, folder, run.selection), {}
        else:
            tensors = tensors_of_run(delta, run.selection, run.base, trainer.model)
            reference = _reference_in(folder, run.reference, getattr(trainer, "beta", 0.0))
        run.find_trained()
        if resumes:
            self._check_state(folder, of_delta=delta is not None)
        return tensors, reference

    def _found_adapters(self, folder: Path) -> bool:
        """Load the adapters that transformers resumes on, but does not find as the best ones."""
        trainer, run = self._trainer, self._trainer.masked_run
        if not run.adapts or launchers.shards_model(trainer.accelerator):
            return False
        active, place = active_in(trainer.model, folder)
        if place == folder:
            return False
        trainer.model.load_adapter(place, active, is_trainable=True)
        return True

    def load_reference(self) -> None:
        """Load what DeepSpeed does not: of the checkpoint that it will load itself."""
        if self.folder is None:
            return
        run, delta = self._trainer.masked_run, delta_in(self.folder)
        run.sync_everything()
        accelerator, beta = self._trainer.accelerator, getattr(self._trainer, "beta", 0.0)
        launchers.refuse_checkpoint(self.folder, accelerator, has_delta=delta is not None)
        reference = {}
        if delta is not None:
            tensors_of_run(delta, run.selection, run.base, self._trainer.model)
            reference = _reference_in(self.folder, run.reference, beta)
        self._check_files(self.folder)
        if reference:
            run.reference.load_tensors(reference)

    def _check_files(self, folder: Path) -> None:
        """Compare a checkpoint with its record: one process of each node reads all of it."""
        accelerator = self._trainer.accelerator
        with agreement.raised_together("the files of a checkpoint", accelerator):
            if accelerator.is_local_main_process:
                check_files(folder)

    @contextmanager
    def optimizer_state(self, checkpoint: str | None) -> Iterator[None]:
        """Inside, the states of optimizer and scheduler are loaded, by those that will step.

        Raises:
            DeltaError: If a state is of other ones.
            FrameworkError: If transformers does not let this version of torch read them.
            LayerRLError: As it is, if another one was raised inside.
        """
        if checkpoint is not None:
            self._check_optimizer_state(Path(checkpoint))
        with refused_state(self._trainer, checkpoint):
            yield
        self._put_back, self._resumes = [], False

    def undo(self) -> None:
        """After a training failed with weights loaded and no optimizer's state: put back what was.

        But for a whole model or adapters, which transformers has loaded.
        """
        with torch.no_grad():
            for tensor, before in self._put_back:
                tensor.copy_(before)
        if self._resumes and not self._has_optimizer:
            self._trainer.optimizer = None  # the next try makes another
        self._put_back, self._resumes = [], False

    def _check_optimizer_state(self, folder: Path) -> None:
        """Compare the optimizer's options, where transformers will load them."""
        file, accelerator = folder / OPTIMIZER_NAME, self._trainer.accelerator
        if launchers.shards_model(accelerator) or launchers.uses_deepspeed(accelerator):
            return
        if file.exists() and (folder / SCHEDULER_NAME).exists():
            optimizer = unwrap_optimizer(self._trainer.optimizer)
            by_others = not self._put_back  # transformers has loaded a whole model, or adapters
            check_optimizer_state(optimizer, file, _state(file), loaded=by_others)

    def _check_state(self, folder: Path, *, of_delta: bool) -> None:
        """What transformers would only find out after it has loaded the weights."""
        try:
            state = fitted(dict[str, Any], decoded(bytes_of(folder / TRAINER_STATE_NAME)))
            fitted(Count, state.get("global_step"), "global_step")
        except (OSError, Misfit) as error:
            raise DeltaError(
                f"{folder} is no checkpoint to resume from: its {TRAINER_STATE_NAME} is missing or "
                f"damaged ({error}). It was not written to its end, or is "
                f"{'a delta alone: call load_delta' if of_delta else 'a model alone: pass it'}, "
                "and start a new run."
            ) from error
        # Transformers loads the optimizer only if the scheduler is there as well.
        files = [folder / OPTIMIZER_NAME, folder / SCHEDULER_NAME]
        optimizer = _state(files[0])
        for file in (files[1], *folder.glob("rng_state*.pth")):
            _state(file)
        missing = [file.name for file in files if not file.exists()]
        if missing and not launchers.shards_model(self._trainer.accelerator):
            warn(
                f"{folder} has no {' and no '.join(missing)} (as with save_only_model=True): the "
                "optimizer and the learning rate schedule start anew from its weights. This is not "
                "the run that would have gone on."
            )
        if not of_delta and optimizer is not None:
            try:
                self._check_optimizer(folder, optimizer)
            except (AttributeError, KeyError, TypeError) as error:
                raise DeltaError(f"{files[0]} is damaged: {error!r:.200}") from error

    def _check_optimizer(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Whether a whole model's checkpoint has the optimizer of what trains here."""
        trainer, layers = self._trainer, self._trainer.masked_run.layers
        held = sum(len(group["params"]) for group in state.get("param_groups", ()))
        if not held or "layerwise" in str(trainer.args.optim):  # which has states of its own
            return
        moments = Counter(
            tuple(values["exp_avg"].shape)
            for values in state.get("state", {}).values()
            if isinstance(values, dict) and isinstance(values.get("exp_avg"), Tensor)
        )
        others = moments - Counter(tuple(shape(p)) for p in layers.parameters.values())
        if held != len(layers.parameters) or others:
            raise CheckpointError(
                f"{folder / OPTIMIZER_NAME} holds the state of {held} tensors"
                + (f", one of them of shape {[*next(iter(others))]}" if others else "")
                + f"; {trainer.selection} trains {len(layers.parameters)} others. It is of a run "
                "that trained something else. Nothing was loaded. Resume it with the selection "
                "that wrote it, or start a new run from its weights: pass the folder as the model."
            )


def _reference_in(
    folder: Path, reference: ReferenceModel | None, beta: object
) -> dict[str, Tensor]:
    """The values of a reference in a checkpoint, checked; none where there is no reference."""
    if reference is None:
        return {}
    file = folder / REFERENCE
    said = f"the checkpoint {folder} holds no readable reference, which beta={beta} needs"
    advice = "Was it written with beta=0, a ref_model or precomputed log-probabilities?"
    with refused_as(DeltaError, said, advice), tensors_in(file) as stored:
        found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        text = (stored.metadata() or {}).get(FINGERPRINTS, "null")
    with refused_as(DeltaError, f"{file} is damaged: the text of its fingerprints"):
        known = fitted(dict[str, Fingerprint] | None, parsed(text))
    expected = {
        name: (str(value.dtype), tuple(shape(reference.trained[name])))
        for name, value in reference.tensors.items()
    }
    given = {name: (str(value.dtype), tuple(value.shape)) for name, value in found.items()}
    if wrong := sorted(n for n in {*given, *expected} if given.get(n) != expected.get(n)):
        raise DeltaError(
            f"{file} is not this run's reference: {wrong[0]!r} is "
            f"{given.get(wrong[0], 'missing')}, expected "
            f"{expected.get(wrong[0], 'no such tensor')} ({len(wrong)} of {len(expected)} "
            "differ)"
        )
    if known is None:
        warn(
            f"{file} was written without fingerprints: only the names, shapes and dtypes in it "
            "could be checked"
        )
    elif wrong := sorted(n for n, value in fingerprints(found).items() if known.get(n) != value):
        raise DeltaError(
            f"{file} is damaged: the fingerprint of {wrong[0]!r} is another than was written "
            f"({len(wrong)} of {len(found)} differ)"
        )
    return found


def _state(file: Path) -> Any:
    """What transformers will load from a file; None where there is none."""
    if not file.exists():
        return None
    try:
        refuse_unusual(file)
        with safe_globals():
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, LookupError, RuntimeError, ValueError, UnpicklingError) as error:
        raise DeltaError(f"{file} is damaged: {error!s:.200}") from error
    if not isinstance(state, dict):
        raise DeltaError(f"{file} is damaged: it holds {state!r:.80}")
    return state
