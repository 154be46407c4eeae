"""What a masked trainer writes into a checkpoint, and what it takes back from one."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from layerrl.delta import put_tensors, tensors_of_run
from layerrl.delta.card import CARD, write_card
from layerrl.errors import DeltaError, SelectionError
from layerrl.frozen import fingerprints
from layerrl.reference import ReferenceModel
from layerrl.shards import shape, whole
from layerrl.trainer import launchers
from layerrl.trainer.auto import REPORT
from layerrl.trainer.whole_models import CheckpointError, trained_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from layerrl.delta.card import Beside

_REFERENCE = "reference.safetensors"
_DELTA = ("delta.safetensors", "delta.json")  # the description last: it vouches for the tensors
_OLD_DELTA = "delta"  # the sub-folder that had them once
_FINGERPRINTS = "layerrl_fingerprints"
_READERS = {"MergeModelCallback"}  # TRL's; others upload the folder and load nothing
_WHOLE = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def delta_in(folder: Path) -> Path | None:
    """The folder of a checkpoint's delta; None of a whole model's."""
    if (folder / _OLD_DELTA).is_dir():
        return folder / _OLD_DELTA
    return folder if any((folder / name).exists() for name in _DELTA) else None


def refuse_readers(callbacks: Iterable[Any], checkpoint_format: str) -> None:
    """Callbacks that take a checkpoint's folder for a whole model.

    Args:
        callbacks: What the trainer is given.
        checkpoint_format: What its checkpoints will hold.

    Raises:
        SelectionError: If one would be given a delta.
    """
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if checkpoint_format == "delta" and _READERS & {base.__name__ for base in kind.__mro__}:
            raise SelectionError(
                f"{kind.__name__} takes the folder checkpoint-N for a whole model, and the "
                "checkpoints of a selection hold the delta of what trains. Pass "
                'checkpoint_format="full", or merge the models when training has ended: '
                "merge_delta(base, checkpoint, out) makes a whole one."
            )


class Checkpoints:
    """A trainer's checkpoints: all or nothing, on disk and when they are loaded.

    A checkpoint with a delta holds it where a reader looks, at the top of its folder, with a README
    that says how to load it; beside it the values of the reference, where there is one, and the
    report of `selection="auto"`. A whole model's is the wrapped trainer's own.

    Args:
        trainer: The masked trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._pushing: Path | None = None
        self._beside: Beside = "older"

    # What is written

    @contextmanager
    def all_or_nothing(self, folder: Path) -> Iterator[None]:
        """Inside, a checkpoint is written; if that fails, the folder is what it was before.

        Args:
            folder: The checkpoint's.

        Yields:
            Nothing.
        """
        trainer, replaced = self._trainer, folder.with_name(f"_{folder.name}.replaced")
        if trainer.args.should_save:
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
        trainer.accelerator.wait_for_everyone()  # before another process writes into it
        try:
            yield
        except BaseException:
            if trainer.args.should_save and not _is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                if _is_complete(replaced):
                    replaced.rename(folder)
            raise
        finally:
            if trainer.args.should_save:
                shutil.rmtree(replaced, ignore_errors=True)

    def save(self, folder: Path) -> None:
        """Write what a checkpoint holds in place of a whole model's weights.

        Args:
            folder: The checkpoint's. Every process has to call this.
        """
        trainer = self._trainer
        writes = trainer.args.should_save
        # An empty state dict writes everything that goes with a model; its weights go again.
        trainer._save(str(folder), state_dict={})
        if writes:
            (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        self._put_delta(folder)
        if not self._has_reference():
            return
        reference = {
            name: whole(value).view(shape(trainer.ref_model.trained[name])).contiguous()
            for name, value in trainer.ref_model.tensors.items()
        }
        if writes:
            known = json.dumps(fingerprints(reference))
            save_file(reference, folder / _REFERENCE, metadata={_FINGERPRINTS: known})

    def save_report(self, folder: Path) -> None:
        """Write what `selection="auto"` has chosen by.

        Args:
            folder: The checkpoint's.
        """
        if self._trainer.args.should_save and self._trainer._auto is not None:
            self._trainer._auto.save(folder)

    def clear(self, folder: Path) -> None:
        """Remove what an earlier run left under a checkpoint's name, in whichever format.

        Args:
            folder: The checkpoint's.
        """
        if self._trainer.args.should_save:
            for stale in (REPORT, _REFERENCE, CARD, *_WHOLE, *_DELTA):
                (folder / stale).unlink(missing_ok=True)
            shutil.rmtree(folder / _OLD_DELTA, ignore_errors=True)

    def refresh(self, folder: Path, *, pushes: bool) -> None:
        """After a whole model was written, leave no delta of another state beside it.

        Args:
            folder: Where the model is. Every process has to call this if the model is sharded.
            pushes: Whether it will be pushed: a hub may have an older delta, so there is a new one.
        """
        trainer = self._trainer
        known = trainer.checkpoint_format == "delta" and trainer._base is not None
        there = (folder / _DELTA[-1]).exists()
        if launchers.shards_model(trainer.accelerator):  # else one process may save alone
            there = launchers.agree(trainer.accelerator, there)
        if known and (pushes or there):
            self._put_delta(folder, card=False)
            self.describe(folder, beside="same")
        elif trainer.args.should_save:
            for stale in _DELTA:
                (folder / stale).unlink(missing_ok=True)

    def _put_delta(self, folder: Path, *, card: bool = True) -> None:
        """A delta's files into a folder that exists, each at once or not at all."""
        writes, temporary = self._trainer.args.should_save, folder / "_delta"
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        self._trainer._save_delta(temporary, writes=writes)
        if not writes:
            return
        try:
            for file in sorted(temporary.iterdir()):
                if file.name == CARD and not card:
                    continue
                if (folder / file.name).is_dir():
                    shutil.rmtree(folder / file.name)
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    # What is pushed

    @contextmanager
    def pushing(self, folder: Path) -> Iterator[None]:
        """Inside, transformers pushes a checkpoint, if it pushes at all.

        Args:
            folder: The checkpoint's.

        Yields:
            Nothing.
        """
        self._pushing = folder
        try:
            yield
        finally:
            self._pushing = None

    def to_top(self) -> None:
        """Put the delta of the checkpoint that is pushed where the repository's readers look.

        Transformers copies files there that it knows to hold weights.
        """
        if self._pushing is None or self._trainer.checkpoint_format != "delta":
            return
        top = Path(self._trainer.args.output_dir)
        for name in _DELTA:
            temporary = top / f"_{name}"
            shutil.copyfile(self._pushing / name, temporary)
            temporary.replace(top / name)
        self.describe(top, beside="older")

    def describe(self, folder: Path, *, beside: Beside | None = None) -> None:
        """Bring the README of a folder to what the folder holds.

        Args:
            folder: One with a delta; others are left alone.
            beside: What whole model is in it; None: as it was when this was said last.
        """
        trainer = self._trainer
        if not trainer.is_world_process_zero() or not (folder / _DELTA[-1]).is_file():
            return
        self._beside = beside or self._beside
        meta = json.loads((folder / _DELTA[-1]).read_text(encoding="utf-8"))
        hub_id = getattr(trainer, "hub_model_id", None)
        write_card(folder, meta, beside=self._beside, hub_id=hub_id)

    # What is loaded

    def resumed(self, given: str | bool | None) -> str | bool | None:
        """The checkpoint that `True` stands for: the last one that was written to its end.

        Args:
            given: As `train` takes it.

        Returns:
            Its folder; anything else as it was given.

        Raises:
            DeltaError: If none was written to its end.
        """
        output_dir = Path(self._trainer.args.output_dir)
        if given is not True or not output_dir.is_dir():
            return given
        last = get_last_checkpoint(str(output_dir))
        if last is None or _is_complete(Path(last)):
            return last or given
        complete = [path for path in output_dir.glob("checkpoint-*") if _is_complete(path)]
        steps = {int(path.name.rpartition("-")[2]): path for path in complete if _numbered(path)}
        if not steps:
            raise DeltaError(
                f"there is no whole checkpoint in {output_dir}: {last} was not written to its end"
            )
        warnings.warn(
            f"{last} was not written to its end (it has no readable {TRAINER_STATE_NAME}): going "
            f"on from {steps[max(steps)]}",
            stacklevel=4,
        )
        return str(steps[max(steps)])

    def load(self, folder: Path, *, resumes: bool) -> bool:
        """Load a checkpoint of this run, or nothing of it.

        Args:
            folder: The checkpoint's. Every process has to call this.
            resumes: Whether its optimizer's and trainer's states will be loaded, too.

        Returns:
            Whether it is loaded; otherwise the wrapped trainer has to.

        Raises:
            CheckpointError: If it holds a whole model that is not of this run.
            DeltaError: If it is damaged or incomplete, or its delta is not of this run.
        """
        trainer = self._trainer
        launchers.refuse_checkpoint(folder, trainer.accelerator, has_delta=bool(delta_in(folder)))
        in_parts = launchers.shards_model(trainer.accelerator)
        quantised = getattr(trainer.model, "is_quantized", False)
        delta = delta_in(folder)
        if delta is None and (trainer.selection.full or in_parts or quantised):
            return False
        assert trainer._base is not None  # "auto" has chosen before anything is loaded
        if delta is None:
            tensors = trained_tensors(trainer.model, folder, trainer.selection)
        else:
            tensors = tensors_of_run(delta, trainer.selection, trainer._base)
        reference = {} if delta is None else self.reference(folder)
        if resumes:
            self._check_state(folder, of_delta=delta is not None)
        put_tensors(trainer.model, trainer.selection.parameters(trainer.model), tensors)
        if reference:
            trainer.ref_model.load_tensors(reference)
        return True

    def load_reference(self, folder: Path) -> None:
        """Load what DeepSpeed does not: of a checkpoint that it will load itself.

        Args:
            folder: The checkpoint's.

        Raises:
            DeltaError: If the launcher cannot load it, its delta is not of this run, or its
                reference is missing or damaged.
        """
        trainer, delta = self._trainer, delta_in(folder)
        launchers.refuse_checkpoint(folder, trainer.accelerator, has_delta=delta is not None)
        if delta is None:
            return
        tensors_of_run(delta, trainer.selection, trainer._base)
        if reference := self.reference(folder):
            trainer.ref_model.load_tensors(reference)

    def reference(self, folder: Path) -> dict[str, Tensor]:
        """The reference's values in a checkpoint, checked.

        Args:
            folder: The checkpoint's.

        Returns:
            Name to value; empty where there is no reference to load them into.

        Raises:
            DeltaError: If the file is missing or damaged, or of another reference.
        """
        trainer, file = self._trainer, folder / _REFERENCE
        if not self._has_reference():
            return {}
        try:
            with safe_open(file, framework="pt") as stored:
                found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                known = json.loads((stored.metadata() or {}).get(_FINGERPRINTS, "null"))
        except (OSError, SafetensorError, ValueError) as error:
            raise DeltaError(
                f"the checkpoint {folder} holds no readable reference, which beta="
                f"{trainer.beta} needs ({error}). Was it written with beta=0, a ref_model or "
                "precomputed log-probabilities?"
            ) from error
        expected = {
            name: (str(value.dtype), tuple(shape(trainer.ref_model.trained[name])))
            for name, value in trainer.ref_model.tensors.items()
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
            warnings.warn(
                f"{file} was written without fingerprints: only the names, shapes and dtypes in it "
                "could be checked",
                stacklevel=4,
            )
        elif not isinstance(known, dict):
            raise DeltaError(f"{file} is damaged: its fingerprints are {known!r:.80}")
        elif wrong := sorted(
            n for n, value in fingerprints(found).items() if known.get(n) != value
        ):
            raise DeltaError(
                f"{file} is damaged: the fingerprint of {wrong[0]!r} is another than was written "
                f"({len(wrong)} of {len(found)} differ)"
            )
        return found

    def _has_reference(self) -> bool:
        return isinstance(getattr(self._trainer, "ref_model", None), ReferenceModel)

    def _check_state(self, folder: Path, *, of_delta: bool) -> None:
        """What transformers would only find out after it has loaded the weights."""
        try:
            state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
                raise ValueError(f"expected the trainer's state, got {state!r:.80}")
        except (OSError, ValueError, RecursionError) as error:
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
            warnings.warn(
                f"{folder} has no {' and no '.join(missing)} (as with save_only_model=True): the "
                "optimizer and the learning rate schedule start anew from its weights. This is not "
                "the run that would have gone on.",
                stacklevel=4,
            )
        if not of_delta and optimizer is not None:
            try:
                self._check_optimizer(folder, optimizer)
            except (AttributeError, KeyError, TypeError) as error:
                raise DeltaError(f"{files[0]} is damaged: {error!r:.200}") from error

    def _check_optimizer(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Whether a whole model's checkpoint has the optimizer of what trains here."""
        trainer = self._trainer
        held = sum(len(group["params"]) for group in state.get("param_groups", ()))
        if not held or "layerwise" in str(trainer.args.optim):  # which has states of its own
            return
        moments = Counter(
            tuple(values["exp_avg"].shape)
            for values in state.get("state", {}).values()
            if isinstance(values, dict) and isinstance(values.get("exp_avg"), Tensor)
        )
        others = moments - Counter(tuple(shape(p)) for p in trainer._trained.values())
        if held != len(trainer._trained) or others:
            raise CheckpointError(
                f"{folder / OPTIMIZER_NAME} holds the state of {held} tensors"
                + (f", one of them of shape {[*next(iter(others))]}" if others else "")
                + f"; {trainer.selection} trains {len(trainer._trained)} others. It is of a run "
                "that trained something else. Nothing was loaded. Resume it with the selection "
                "that wrote it, or start a new run from its weights: pass the folder as the model."
            )


def _state(file: Path) -> Any:
    """What transformers will load from a file; None where there is none."""
    if not file.exists():
        return None
    try:
        with safe_globals():
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, LookupError, RuntimeError, ValueError, UnpicklingError) as error:
        raise DeltaError(f"{file} is damaged: {error!s:.200}") from error
    if not isinstance(state, dict):
        raise DeltaError(f"{file} is damaged: it holds {state!r:.80}")
    return state


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint has what transformers writes last."""
    try:
        return bool(json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _numbered(folder: Path) -> bool:
    return folder.name.removeprefix("checkpoint-").isdecimal()
