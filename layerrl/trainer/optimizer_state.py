"""Whether a trainer's optimizer can continue from the state in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from layerrl.errors import DeltaError, LayerRLError
from layerrl.optimizer import updates_in_backward
from layerrl.precision import unwrap_optimizer
from layerrl.replacing import replaced
from layerrl.trainer.training_hooks import TrainingHooks

_ADVICE = (
    "Resume with the optimizer that wrote it, or delete the file: the run then goes on from the "
    "checkpoint's weights with a new optimizer."
)


def check_optimizer_state(trainer: Any, file: Path, state: Mapping[str, Any]) -> None:
    """Refuse the state of another optimizer, of which torch would miss an option in its first step.

    Both sides have to have options that the other lacks: those that a newer version of an optimizer
    has added are given to it by its class.

    Args:
        trainer: Its optimizer is compared; where it has none yet, one is made and dropped.
        file: Where the state is from.
        state: What the optimizer would load.

    Raises:
        DeltaError: If it is of another optimizer, or its groups have other sizes.
    """
    groups = state.get("param_groups")
    if not isinstance(groups, Sequence) or not all(isinstance(g, dict) for g in groups):
        return  # of a form of its own, which the optimizer reads itself
    optimizer = _optimizer_of(trainer)
    if optimizer is None:
        return
    sizes, expected = (_sizes(groups_of) for groups_of in (groups, optimizer.param_groups))
    if sizes != expected and type(optimizer).state_dict is Optimizer.state_dict:
        raise DeltaError(
            f"{file} has parameter groups of {sizes} tensors, and this run's "
            f"{type(optimizer).__name__} of {expected}. Nothing was loaded. {_ADVICE}"
        )
    found = {name for group in _upgraded(optimizer, groups) for name in group}
    needed = {name for group in optimizer.param_groups for name in group}
    missing, others = sorted(needed - found), sorted(found - needed - {"initial_lr"})
    if missing and others:
        known, unknown = (", ".join(names[:3]) for names in (others, missing))
        raise DeltaError(
            f"{file} is of another optimizer than this run's {type(optimizer).__name__}: it has "
            f"the options {known}, and not {unknown}. Nothing was loaded. "
            f"{_ADVICE}"
        )


@contextmanager
def refused_state(trainer: Any, folder: str | None) -> Iterator[None]:
    """Inside, torch loads the state of a checkpoint; what does not fit gets a sentence.

    Raises:
        DeltaError: If the optimizer, or the scheduler, cannot load it.
        LayerRLError: As it is, if one was raised inside.
    """
    try:
        yield
    except LayerRLError:
        raise
    except (LookupError, ValueError) as error:
        name = type(unwrap_optimizer(trainer.optimizer)).__name__
        raise DeltaError(
            f"the state of the optimizer in {folder} is not one that this run's {name} and its "
            f"scheduler can load: {error!r:.200}. Resume with those that wrote it, or delete its "
            "optimizer.pt: the run then goes on from the checkpoint's weights with new ones."
        ) from error


def _sizes(groups: Sequence[Any]) -> list[int]:
    return [len(group.get("params", ())) for group in groups]


def _optimizer_of(trainer: Any) -> Any:
    """The trainer's optimizer, or one like it will make; None if that cannot be told yet."""
    # A caller's own may put another optimizer in the place of the one that was made before.
    if getattr(trainer.create_scheduler, "__func__", None) is not TrainingHooks.create_scheduler:
        return None
    if trainer.optimizer is not None:
        return unwrap_optimizer(trainer.optimizer)
    given = trainer.optimizer_cls_and_kwargs
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if given is None and updates_in_backward(optim):
        return None  # it hangs hooks on the parameters
    # Transformers takes entries out of the keywords when it makes an optimizer of them.
    given = None if given is None else (given[0], {**given[1]})
    with replaced(trainer, optimizer=None, optimizer_cls_and_kwargs=given):
        return unwrap_optimizer(trainer.create_optimizer())


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
