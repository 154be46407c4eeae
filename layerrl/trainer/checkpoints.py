"""What a masked trainer writes into a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from layerrl.delta.card import CARD, Beside, write_card
from layerrl.delta.description import read
from layerrl.delta.hub import hub_errors
from layerrl.errors import DeltaError, SelectionError
from layerrl.files import why_unwritten, written_whole
from layerrl.frozen import fingerprints
from layerrl.replacing import replaced
from layerrl.schema import Misfit, fitted
from layerrl.shards import shape, whole
from layerrl.stored import bytes_of, decoded
from layerrl.trainer import agreement, launchers
from layerrl.trainer.adapters import ADAPTED, note_base
from layerrl.trainer.auto import REPORT
from layerrl.trainer.checksums import CHECKSUMS, missing_files, update_checksums, write_checksums
from layerrl.trainer.run_summary import summary_of
from layerrl.warning import warn

REFERENCE = "reference.safetensors"
_DELTA = ("delta.safetensors", "delta.json")  # the description last: it vouches for the tensors
_OLD_DELTA = "delta"  # the sub-folder that had them once
FINGERPRINTS = "layerrl_fingerprints"
_READERS = {"MergeModelCallback"}  # TRL's; others upload the folder and load nothing
_CONTROL = TrainerControl.__name__
_WHOLE = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def delta_in(folder: Path) -> Path | None:
    """The folder of a checkpoint's delta; None of a whole model's."""
    if (folder / _OLD_DELTA).is_dir():
        return folder / _OLD_DELTA
    return folder if any((folder / name).exists() for name in _DELTA) else None


def refuse_readers(callbacks: Iterable[Any], checkpoint_format: str) -> None:
    """Refuse callbacks that take a checkpoint, which holds a delta, for a whole model."""
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if checkpoint_format == "delta" and _READERS & {base.__name__ for base in kind.__mro__}:
            raise SelectionError(
                f"{kind.__name__} takes the folder checkpoint-N for a whole model, and the "
                "checkpoints of a selection hold the delta of what trains. Pass "
                'checkpoint_format="full", or merge the models when training has ended: '
                "merge_delta(base, checkpoint, out) makes a whole one."
            )


class CheckpointWriteError(DeltaError, OSError):
    """A checkpoint that cannot be written: the disk is full, say."""


class Checkpoints:
    """A trainer's checkpoints, each written to its end or not at all.

    A checkpoint with a delta holds it where a reader looks, at the top of its folder, with a README
    that says how to load it; beside it the values of the reference, where there is one, and the
    report of `selection="auto"`. A whole model's is the wrapped trainer's own.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._written: Path | None = None
        self._beside: Beside = "older"

    # What is written

    @contextmanager
    def all_or_nothing(self, folder: Path) -> Iterator[None]:
        """Inside, a checkpoint is written; if that fails, the folder is what it was before."""
        trainer = self._trainer
        if trainer.args.should_save:
            put_back(folder)
            if folder.exists():
                folder.rename(_replaced(folder))
        trainer.accelerator.wait_for_everyone()  # before another process writes into it
        self._written = folder
        state, save_state, waited = trainer.state, trainer.state.save_to_json, False

        def save_last(path: str) -> None:
            nonlocal waited
            waited = True
            trainer.accelerator.wait_for_everyone()  # every process has written its files
            # Where a reader ignores it, and which each save makes anew.
            state.stateful_callbacks.setdefault(_CONTROL, {})[CHECKSUMS] = True
            save_state(path)
            write_checksums(folder)

        try:
            # Transformers pushes, and deletes older checkpoints, when it has saved the state.
            with replaced(state, save_to_json=save_last):
                yield
            if not waited:  # for the one that saves the state
                trainer.accelerator.wait_for_everyone()
            trainer.accelerator.wait_for_everyone()
            if trainer.args.should_save:
                update_checksums(folder)
        except BaseException as error:
            cause = error.__cause__ if isinstance(error, DeltaError) else error
            reason = why_unwritten(cause)
            if not trainer.args.should_save and reason:
                raise CheckpointWriteError(
                    f"process {trainer.accelerator.process_index} cannot write its files into "
                    f"{folder}: {reason}. A run resumes from the last whole checkpoint, if there "
                    "is one."
                ) from error
            if trainer.args.should_save and not is_complete(folder):
                _remove(folder)
                if _replaced(folder).exists():  # as a whole, whatever it held
                    _replaced(folder).rename(folder)
                if reason:
                    last = last_complete(folder.parent)
                    goes_on = f"a run resumes from {last}" if last else "there is no earlier one"
                    raise CheckpointWriteError(
                        f"cannot write {folder}: {reason}. Nothing of it is left; {goes_on}."
                    ) from error
            raise
        finally:
            self._written = None
            if trainer.args.should_save:
                put_back(folder)

    def save(
        self,
        output_dir: str | None,
        is_internal: bool,
        save_model: Callable[[str | None, bool], None],
    ) -> None:
        """Save a model, or the delta that a checkpoint holds in place of one; a collective.

        `is_internal`: transformers asks, for a checkpoint or to push.
        """
        # Pushing to the hub is an internal call too, but names no folder and wants a whole model.
        folder = Path(output_dir or self._trainer.args.output_dir)
        if self._trainer.args.should_save:  # what they vouch for will be written over
            (folder / CHECKSUMS).unlink(missing_ok=True)
        if not is_internal or output_dir is None:
            save_model(output_dir, is_internal)
            self._refresh(folder, pushes=is_internal)
            return
        self._clear(folder)
        if self._trainer.checkpoint_format == "delta":
            self._save_delta(folder)
        else:
            save_model(output_dir, is_internal)
            if self._trainer.args.should_save:
                note_base(folder, self._trainer.masked_run.adapted)
        auto = self._trainer.masked_run.auto
        if self._trainer.args.should_save and auto is not None:
            auto.save(folder)

    def _save_delta(self, folder: Path) -> None:
        trainer = self._trainer
        writes = trainer.args.should_save
        # An empty state dict writes everything that goes with a model; its weights go again.
        trainer._save(str(folder), state_dict={})
        if writes:
            (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        self._put_delta(folder)
        self.describe(folder, beside="nothing")
        reference = trainer.masked_run.reference
        if reference is None:
            return
        values = {
            name: whole(value).view(shape(reference.trained[name])).contiguous()
            for name, value in reference.tensors.items()
        }
        if writes:
            known = json.dumps(fingerprints(values))
            save_file(values, folder / REFERENCE, metadata={FINGERPRINTS: known})

    def _clear(self, folder: Path) -> None:
        """Remove what an earlier run left under a checkpoint's name, in whichever format."""
        if self._trainer.args.should_save:
            for stale in (REPORT, REFERENCE, CARD, ADAPTED, *_WHOLE, *_DELTA):
                (folder / stale).unlink(missing_ok=True)
            shutil.rmtree(folder / _OLD_DELTA, ignore_errors=True)

    def _refresh(self, folder: Path, *, pushes: bool) -> None:
        """After a whole model was written, leave no delta of another state beside it.

        A hub may have an older delta: what is pushed always has a new one.
        """
        trainer = self._trainer
        known = trainer.masked_run.base is not None
        pushes = pushes and trainer.checkpoint_format == "delta"
        there = (folder / _DELTA[-1]).exists()
        if launchers.shards_model(trainer.accelerator):  # else one process may save alone
            there = agreement.agree(trainer.accelerator, there)
        if known and (pushes or there):
            self._put_delta(folder, card=False)
            self.describe(folder, beside="same")
        elif trainer.args.should_save and not trainer.masked_run.adapts:  # whose files are no model
            for stale in _DELTA:
                (folder / stale).unlink(missing_ok=True)

    def _put_delta(self, folder: Path, *, card: bool = True) -> None:
        """A delta's files into a folder that exists, each at once or not at all."""
        writes, temporary = self._trainer.args.should_save, folder / "_delta"
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        self._trainer.masked_run.save_delta(temporary, writes=writes)
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

    def to_top(self) -> None:
        """Put the delta of the checkpoint that is pushed where the repository's readers look.

        Transformers copies files there that it knows to hold weights.
        """
        if self._written is None or self._trainer.checkpoint_format != "delta":
            return
        top = Path(self._trainer.args.output_dir)
        for name in _DELTA:
            with written_whole(top / name) as temporary:
                shutil.copyfile(self._written / name, temporary)
        self.describe(top, beside="older")

    def describe(self, folder: Path | None = None, *, beside: Beside | None = None) -> None:
        """Bring the README of a folder to what the folder holds.

        Args:
            folder: One with a delta, others are left alone; None: the args' own, which is pushed.
            beside: What whole model is in it; None: as it was when this was said last.
        """
        trainer = self._trainer
        top = Path(trainer.args.output_dir)
        folder = top if folder is None else folder
        if not trainer.is_world_process_zero() or not (folder / _DELTA[-1]).is_file():
            return
        if folder == top:
            self._beside = beside = beside or self._beside
        _, _, meta = read(folder / _DELTA[-1])
        hub_id = getattr(trainer, "hub_model_id", None) if folder == top else None
        write_card(folder, meta, beside=beside or "nothing", hub_id=hub_id, run=summary_of(trainer))

    def warn_of_failed_pushes(self) -> None:
        """Say which pushes failed: transformers waits for them, and does not ask."""
        pushes: Any = getattr(self._trainer, "push_in_progress", None)
        done = [job for job in getattr(pushes, "jobs", ()) if job.done() and not job.cancelled()]
        for job in done:
            pushes.jobs.remove(job)  # each is told once
            if (failure := job.exception()) is None:
                continue
            try:
                with hub_errors("push to", self._trainer.hub_model_id):
                    raise failure
            except Exception as error:  # it ends no training that went well
                warn(f"a checkpoint was not pushed: {error}")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f"_{folder.name}.replaced")


def put_back(folder: Path) -> None:
    """End the replacement of a checkpoint, which a killed process may have begun.

    If what is there is not complete, it is what it was before.
    """
    before = _replaced(folder)
    if is_complete(before) and not is_complete(folder):
        _remove(folder)
        before.rename(folder)
    _remove(before)


def _remove(folder: Path) -> None:
    """Delete a folder; of a link to one, as to another disk, the link."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def last_complete(output_dir: Path) -> Path | None:
    """The checkpoint of the latest step among those that were written to their end."""
    numbers = {
        int(number): path
        for path in output_dir.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdecimal() and is_complete(path)
    }
    return numbers[max(numbers)] if numbers else None


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has all that was written into it."""
    return not why_incomplete(folder)


def why_incomplete(folder: Path) -> str:
    """The files that a checkpoint lacks, in a clause; empty where it is complete."""
    try:
        state = fitted(dict[str, Any], decoded(bytes_of(folder / TRAINER_STATE_NAME)))
    except (OSError, Misfit):
        state = {}
    if not state:
        return f"it has no readable {TRAINER_STATE_NAME}"
    missing = missing_files(folder)
    noted: Any = state
    for key in ("stateful_callbacks", _CONTROL, CHECKSUMS):
        noted = noted.get(key) if isinstance(noted, dict) else None
    if noted and not (folder / CHECKSUMS).exists():  # else another trainer wrote it
        missing.append(CHECKSUMS)
    if not missing:
        return ""
    return f"it lacks {', '.join(missing[:3])}; to resume from it all the same, name its folder"
