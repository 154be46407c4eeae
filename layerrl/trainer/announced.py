"""TRL's asynchronous trainers, which tell vLLM while they are made what they will send."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from layerrl.blocks import plain_name, unwrap, with_fused_siblings
from layerrl.errors import TrainerError
from layerrl.selection import LayerSelection
from layerrl.trainer import agreement, arguments
from layerrl.trainer.sync import Part, PartialSync


def announces(cls: type) -> bool:
    """Whether a trainer (TRL's asynchronous ones) tells vLLM while it is made what it will send."""
    if hasattr(cls, "_streaming_iter"):
        return True
    for base in cls.__mro__:
        if base.__module__.startswith("trl.") and base.__name__.startswith("Async"):
            raise TrainerError(_unknown(base.__name__, "without its method _streaming_iter"))
    return False


def _unknown(name: str, how: str) -> str:
    return (
        f"{name} of TRL {version('trl')} sends weights to vLLM {how}, and a selection has to "
        "decide which. The way of TRL 1.9 to 1.16 is known here: install one of these, train with "
        'selection="full", or use a trainer that generates between its steps (GRPO, RLOO).'
    )


class EarlyMask(TrainerCallback, AbstractContextManager[None]):
    """The mask that a trainer is made under which announces what requires gradients.

    A callback, for transformers calls it when the model is loaded and TRL has announced nothing
    yet; and a context around the making, which gives the flags back.

    Args:
        choice: The selection, as the trainer was given it.
        own_transfer: Whether the trainer was given what sends its weights.
    """

    def __init__(self, choice: Any, *, own_transfer: bool) -> None:
        self._choice, self.own_transfer = choice, own_transfer
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self.everything: frozenset[str] = frozenset()
        """Plain names of what would have been announced without it."""

    def on_init_end(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        """Require gradients of what will be sent."""
        parameters = {plain_name(name): p for name, p in unwrap(model).named_parameters()}
        trained = arguments.chosen_early(model, self._choice).parameters(model)
        sent = frozenset(with_fused_siblings(parameters, trained))
        self._flags = [(p, p.requires_grad) for p in parameters.values()]
        self.everything = frozenset(n for n, p in parameters.items() if p.requires_grad) | sent
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in sent)

    def __exit__(self, *exception: object) -> None:
        """Give the flags back."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._flags = []  # FSDP2 frees parameters that nobody holds


class AnnouncedSync(PartialSync):
    """Takes over what a trainer of TRL sends to vLLM, and what it announces before each time.

    TRL's own transfer is sent everything first, as a server may have been trained before. One that
    was passed to the trainer, and does not hold an announcement like TRL's, is sent what trains,
    and vLLM's module of it, every time. The trainer is one that `announces`, made under the mask;
    its `_streaming_iter` is this object's from now on.
    """

    def __init__(self, trainer: Any, selection: LayerSelection, mask: EarlyMask) -> None:
        super().__init__(unwrap(trainer.model), selection)
        trainer.remove_callback(mask)
        self._trainer, self._everything = trainer, mask.everything
        if not hasattr(trainer, "weight_transfer") or not mask.everything:
            raise self._unknown("by other means than its weight_transfer")
        by_flag, held = self._sends_by_flag(), self._announcement()
        made_here = trainer.weight_transfer is not None and not mask.own_transfer
        fits = not made_here or self._was_announced(by_flag, held)
        if not agreement.agree(trainer.accelerator, fits):
            raise self._unknown("after announcing others")
        widens = held is not None or not trainer.accelerator.is_main_process
        self._widens = agreement.agree(trainer.accelerator, widens)
        trainer._streaming_iter = self.stream

    def _unknown(self, how: str) -> TrainerError:
        return TrainerError(_unknown(type(self._trainer).__name__, how))

    def _was_announced(self, by_flag: bool, held: str | None) -> bool:
        """Whether TRL has told vLLM of what it sends."""
        if held is None:
            return by_flag  # of what trains, as the mask was on
        model = unwrap(self._trainer.model)
        every = frozenset(name for name, _ in model.named_parameters())
        announced = getattr(self._trainer.weight_transfer, held)
        expected = _described(Part(model, self._names if by_flag else every))
        return announced | expected == announced

    def _sends_by_flag(self) -> bool:
        """Whether TRL sends what requires gradients, or all parameters as it did before 1.13."""
        probe = nn.Module()
        probe.trained = nn.Parameter(torch.zeros(1))
        probe.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        try:
            names = [name for name, _ in self._started(probe)]
        except Exception as error:
            raise self._unknown("from another place") from error
        if names not in (["trained"], ["trained", "frozen"]):
            raise self._unknown("from another place")
        return names == ["trained"]

    def _announcement(self) -> str | None:
        """The attribute of TRL's transfer that holds what it tells vLLM."""
        attributes: dict[str, Any] = getattr(self._trainer.weight_transfer, "__dict__", {})
        for name, value in attributes.items():
            if isinstance(value, dict) and {*_described(nn.Module())} <= {*value}:
                return name
        return None

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Announce what the engine does not have yet, and give it by name; a collective."""
        trainer, model = self._trainer, unwrap(self._trainer.model)
        frozen = self._frozen(model)
        narrow = not self._widens or self._has_frozen(frozen)
        part = _Trained(model, self._names if narrow else self._everything)
        self._sent = None
        transfer, held = trainer.weight_transfer, self._announcement()
        if held is not None:
            setattr(transfer, held, getattr(transfer, held) | _described(part))
        elif transfer is not None:
            behind = f"the engine behind {type(transfer).__name__} has to hold the others"
            self._say(behind, "the trained ones alone")
        return self._checked(self._started(part), part, frozen)

    def _started(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What TRL sends of a model. It asks for the parameters once, before the first one."""
        trainer, own = self._trainer, self._trainer.model
        sent = type(trainer)._streaming_iter(trainer)
        trainer.model = model
        try:
            first = next(sent)
        finally:
            trainer.model = own
        return chain([first], sent)

    def _checked(
        self, sent: Iterator[tuple[str, Tensor]], part: nn.Module, frozen: list[Any]
    ) -> Iterator[tuple[str, Tensor]]:
        expected = (name for name, _ in part.named_parameters())
        for name, tensor in sent:
            if name != next(expected, None):
                raise self._unknown(f"and not those announced: {name!r}")
            yield name, tensor
        if (missing := next(expected, None)) is not None:
            raise self._unknown(f"and not those announced: no {missing!r}")
        self._sent = frozen


class _Trained(Part):
    """One of which all that is seen seems to train: TRL sends nothing else."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield plain_name(name), parameter.detach().requires_grad_()  # pyright: ignore[reportReturnType]


def _described(model: nn.Module) -> dict[str, list[Any]]:
    """Parameters as TRL describes them to vLLM."""
    parameters = dict(model.named_parameters())
    return {
        "names": [*parameters],
        "dtype_names": [str(p.dtype).removeprefix("torch.") for p in parameters.values()],
        "shapes": [[*p.shape] for p in parameters.values()],
    }
