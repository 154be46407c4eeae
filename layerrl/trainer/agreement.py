"""Compare arguments and weights between processes, and raise an error of one in all.

A collective is called on every rank or on none: a rank that leaves early keeps the others waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather, gather_object
from torch import nn
from transformers import TrainerControl
from transformers.trainer_utils import has_length

from layerrl.digests import json_digest
from layerrl.errors import LauncherError, LayerRLError
from layerrl.scores.processes import give_first
from layerrl.trainer.launchers import uses_fsdp, uses_zero3
from layerrl.warning import warn

_Record = TypeVar("_Record")
_ANY_SIZE = "of any size"


def agree(accelerator: Accelerator, value: bool) -> bool:
    """Logical AND over ranks; a collective: call it on every rank."""
    if accelerator.num_processes == 1:
        return value
    values: Any = gather(torch.tensor([value], device=accelerator.device))
    return bool(values.all())


def same_on_ranks(number: int, accelerator: Accelerator) -> bool:
    """Whether a number is the same on every rank; a collective."""
    numbers: Any = gather(torch.tensor([number], device=accelerator.device))
    return bool((numbers == number).all())


def share_control(control: TrainerControl, accelerator: Accelerator) -> None:
    """Set on every rank each flag of the control that one rank has set: a logical OR. Collective.

    A rank that logs, evaluates, saves or stops alone would wait for the others.
    """
    if accelerator.num_processes == 1:
        return
    names = [field.name for field in fields(control)]
    flags = [[bool(getattr(control, name)) for name in names]]
    of_ranks: Any = gather(torch.tensor(flags, device=accelerator.device))
    for name, flag in zip(names, of_ranks.any(dim=0).tolist(), strict=True):
        setattr(control, name, flag)


def _of_all(value: _Record, at: str, accelerator: Accelerator) -> list[_Record]:
    """Each rank's value, if all have come to the same place: a collective."""
    try:
        found = gather_object([(at, value)])
    except RuntimeError as error:  # a process has ended, or did not come in time (ddp_timeout)
        raise LauncherError(
            f"process {accelerator.process_index} waited in {at}, where another did not come: it "
            "has ended, or is elsewhere. Call the trainer's methods in every process, also in "
            "those that write nothing."
        ) from error
    if len({place for place, _ in found}) > 1:
        raise LauncherError(
            "processes wait for each other in different places: "
            + ", ".join(f"process {rank} in {place}" for rank, (place, _) in enumerate(found))
            + ". Call the trainer's methods in every process, also in those that write nothing."
        )
    return [other for _, other in found]


@contextmanager
def raised_together(at: str, accelerator: Accelerator) -> Iterator[None]:
    """Raise on every rank what one finds inside: the others would wait in the next collective.

    A collective itself: enter on every rank. `at` is where this one looks, as a user knows it.
    Others get a plain error of its class.

    Raises:
        LayerRLError: If one found something.
    """
    error = None
    try:
        yield
    except LayerRLError as found_here:
        error = found_here
    found: list[tuple[type[LayerRLError], str] | None] = []
    if accelerator.num_processes > 1:
        found = _of_all(None if error is None else (type(error), str(error)), at, accelerator)
    if error is not None:
        raise error
    for rank, of_rank in enumerate(found):
        if of_rank is not None:
            kind, text = of_rank
            raise kind(f"process {rank} found: {text}")


def refuse_disagreement(
    given: Mapping[str, object], accelerator: Accelerator, at: str = "the making of the trainer"
) -> None:
    """Refuse processes that were given different arguments, by their `repr`. Collective.

    Raises:
        LauncherError: If one was given another.
    """
    if accelerator.num_processes == 1:
        return
    shown = {name: (repr(value), str(value)) for name, value in given.items()}
    found = _of_all(shown, at, accelerator)
    for name in given:
        if len({values[name] for values in found}) > 1:
            texts = [text for _, text in (values[name] for values in found)]
            raise LauncherError(
                f"{len(found)} processes were given different {name}=: "
                + ", ".join(f"process {rank} {text}" for rank, text in enumerate(texts))
                + f". Give the same {name}= to each, not one that depends on the rank, on chance "
                "or on a file that only some can read."
            )


def dataset_sizes(trainer: Any) -> dict[str, str]:
    """Describe the number of rows of a generating trainer's data, for `refuse_disagreement`.

    A prompt's completions lie on several ranks, which draw the same rows only from as many.

    Returns:
        By the trainer's argument; without a number where the user's own data loader may ignore the
        data.
    """
    datasets = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    shared = hasattr(trainer, "num_generations") and not trainer.accelerator.dispatch_batches
    return {
        name: _num_rows(dataset) if shared and not _has_own_loader(trainer, name) else _ANY_SIZE
        for name, dataset in datasets.items()
    }


def _has_own_loader(trainer: Any, name: str) -> bool:
    """Whether a class of the user's makes the data loader of a dataset."""
    loader = getattr(type(trainer), f"get_{name.replace('dataset', 'dataloader')}")
    return loader.__module__.partition(".")[0] not in ("trl", "transformers")


def _num_rows(dataset: Any) -> str:
    if isinstance(dataset, Mapping):
        return ", ".join(f"{name} {_num_rows(rows)}" for name, rows in dataset.items())
    return f"of {len(dataset)} rows" if has_length(dataset) else _ANY_SIZE


def share_weights(model: nn.Module, marks: Mapping[str, str], accelerator: Accelerator) -> bool:
    """Give every process the first one's weights where they differ, and warn of it. Collective.

    As DDP does, but when training starts: what a trainer keeps of the model would be of another by
    then. FSDP2 would put together a model of parts of all.

    Args:
        model: Not sharded yet.
        marks: The fingerprints of its tensors, by name.
        accelerator: The trainer's.

    Returns:
        Whether weights were written.

    Raises:
        LauncherError: If processes have models of other shapes or dtypes.
    """
    state: Any = accelerator.state
    in_one = uses_fsdp(accelerator) and state.fsdp_plugin.cpu_ram_efficient_loading
    if accelerator.num_processes == 1 or uses_zero3(accelerator) or in_one:
        return False
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    forms = {n: (str(t.dtype), tuple(t.shape), t.is_meta) for n, t in tensors.items()}
    at = "the making of the trainer"
    found = _of_all((json_digest(repr(forms)), json_digest(dict(marks))), at, accelerator)
    # Also of buffers that are not saved: DDP sends all of them as one, one after the other.
    if odd := [rank for rank, (form, _) in enumerate(found) if form != found[0][0]]:
        raise LauncherError(
            f"process {odd[0]} was given another model than process 0: the names, shapes, dtypes "
            "or devices of its parameters or buffers differ. Give the same model to each."
        )
    odd = [rank for rank, (_, digest) in enumerate(found) if digest != found[0][1]]
    if not odd:
        return False
    of_ranks = _of_all(dict(marks), at, accelerator)
    names = sorted(name for name in of_ranks[0] if of_ranks[odd[0]].get(name) != of_ranks[0][name])
    warn(
        f"process {odd[0]} was given other weights than process 0 (in {len(names)} of "
        f"{len(marks)} tensors: {', '.join(names[:3])}): all take those of process 0, as under "
        "DDP. Load or make the model from the same seed in each."
    )
    with torch.no_grad():
        for tensor in tensors.values():
            if not tensor.is_meta:
                give_first(tensor, accelerator.device)
    return True


def warn_of_divergence(marks: Mapping[str, str], at: str, accelerator: Accelerator) -> None:
    """Warn if trained tensors, which every process has whole, are not the same in each.

    Collective. Not an error: different devices may round differently.
    """
    found = _of_all(dict(marks), at, accelerator)
    for rank, of_rank in enumerate(found):
        if names := sorted(name for name in found[0] if of_rank.get(name) != found[0][name]):
            warn(
                f"processes 0 and {rank} no longer train the same model: {len(names)} of "
                f"{len(found[0])} trained tensors differ, as {names[0]!r}. What is saved is that "
                "of process 0. Something writes to them, or skips their gradients, in one process "
                "alone: a callback, or another setting or seed there."
            )
            return


def of_main_process(record: _Record, accelerator: Accelerator) -> _Record:
    """The main process's record of the base: the others may have loaded no weights yet."""
    if accelerator.num_processes == 1:
        return record
    [shared] = broadcast_object_list([record])
    return shared
