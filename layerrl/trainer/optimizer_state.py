"""Whether a trainer's optimizer can continue from the state in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from layerrl.errors import DeltaError, FrameworkError, LayerRLError
from layerrl.optimizer import updates_in_backward
from layerrl.precision import unwrap_optimizer

_ADVICE = (
    "Resume with the optimizer that wrote it, or delete the file: the run then goes on from the "
    "checkpoint's weights with a new optimizer."
)


def check_optimizer_state(
    optimizer: Any, file: Path, state: Mapping[str, Any], *, loaded: bool = False
) -> None:
    """Refuse the state of another optimizer, of which torch would miss an option in its first step.

    Both sides have to have options that the other lacks: those that a newer version of an optimizer
    has added are given to it by its class.

    Args:
        optimizer: The one that will load it, not in accelerate's wrapper.
        file: Where the state is from.
        state: What the optimizer would load.
        loaded: Whether the model keeps the checkpoint's weights when this has raised.

    Raises:
        DeltaError: If it is of another optimizer, or its groups have other sizes.
    """
    what = "The model has the checkpoint's weights now." if loaded else "Nothing was loaded."
    groups = state.get("param_groups")
    if not isinstance(groups, Sequence) or not all(isinstance(g, dict) for g in groups):
        return  # of a form of its own, which the optimizer reads itself
    if updates_in_backward(optimizer):
        return  # its groups stand for others
    sizes, expected = (_sizes(groups_of) for groups_of in (groups, optimizer.param_groups))
    if sizes != expected and type(optimizer).state_dict is Optimizer.state_dict:
        raise DeltaError(
            f"{file} has parameter groups of {sizes} tensors, and this run's "
            f"{type(optimizer).__name__} of {expected}. {what} {_ADVICE}"
        )
    found = {name for group in _upgraded(optimizer, groups) for name in group}
    needed = {name for group in optimizer.param_groups for name in group}
    schedulers = {"initial_lr"}
    missing, others = (sorted(names - schedulers) for names in (needed - found, found - needed))
    if missing and others:
        known, unknown = (", ".join(names[:3]) for names in (others, missing))
        raise DeltaError(
            f"{file} is of another optimizer than this run's {type(optimizer).__name__}: it has "
            f"the options {known}, and not {unknown}. {what} {_ADVICE}"
        )


@contextmanager
def refused_state(trainer: Any, folder: str | None) -> Iterator[None]:
    """Inside, torch loads the state of a checkpoint; what does not fit gets a sentence.

    Raises:
        DeltaError: If the optimizer, or the scheduler, cannot load it.
        FrameworkError: If transformers does not let this version of torch read it.
        LayerRLError: As it is, if one was raised inside.
    """
    try:
        yield
    except LayerRLError:
        raise
    except (LookupError, ValueError) as error:
        if "torch.load" in str(error):  # transformers' check of torch's version
            raise FrameworkError(
                f"transformers does not read the optimizer's state in {folder} with torch "
                f"{torch.__version__}: {error!s:.300} The file is not at fault: resume with a "
                "torch that it asks for."
            ) from error
        name = type(unwrap_optimizer(trainer.optimizer)).__name__
        raise DeltaError(
            f"the state of the optimizer in {folder} is not one that this run's {name} and its "
            f"scheduler can load: {error!r:.200}. Resume with those that wrote it, or delete its "
            "optimizer.pt: the run then goes on from the checkpoint's weights with new ones."
        ) from error


def _sizes(groups: Sequence[Any]) -> list[int]:
    return [len(group.get("params", ())) for group in groups]


def _upgraded(optimizer: Any, groups: Sequence[Any]) -> list[dict[str, Any]]:
    """The groups of a checkpoint, with what the class of the optimizer adds to older ones."""
    kind = type(optimizer)
    loaded = object.__new__(kind)  # as in unpickling one
    values = {"defaults": {**optimizer.defaults}, "state": {}}
    try:
        loaded.__setstate__({**values, "param_groups": [{**group} for group in groups]})
        return loaded.param_groups
    except Exception:  # a class that cannot be unpickled like this: its options are as they are
        return [*groups]
