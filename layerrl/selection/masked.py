"""The training mask: which tensors require gradients, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerrl.blocks import plain_name, unwrap
from layerrl.errors import LayerRLError, ModelError
from layerrl.selection.parts import rows_kept

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection


def check_gradients_on(called: str, error: type[LayerRLError]) -> None:
    """Refuse to train where torch computes no gradients.

    Raises:
        error: Inside `torch.no_grad()` or `torch.inference_mode()`.
    """
    if not torch.is_grad_enabled():
        raise error(
            f"{called} inside torch.no_grad() or torch.inference_mode(), where torch computes no "
            "gradients: call it outside of them"
        )


def check_can_change(model: nn.Module, error: type[LayerRLError] = ModelError) -> None:
    """Refuse a model whose tensors torch neither trains nor lets anyone write to.

    Raises:
        error: If it was made or loaded inside `torch.inference_mode()`, and this is outside of it.
    """
    made_inside = not torch.is_inference_mode_enabled() and [
        name for name, parameter in model.named_parameters() if parameter.is_inference()
    ]
    if made_inside:
        raise error(
            f"this {type(model).__name__} was made or loaded inside torch.inference_mode(), and "
            f"torch lets nobody train or change such tensors ({made_inside[0]} and "
            f"{len(made_inside) - 1} more). Load it outside, or inside torch.no_grad()."
        )


class Masked(AbstractContextManager[dict[str, nn.Parameter]]):
    """Requires gradients of a selection alone inside, and restores all flags; can be re-entered.

    A class and no generator: one that is dropped while suspended would restore the flags.
    """

    def __init__(self, selection: LayerSelection, model: nn.Module) -> None:
        unwrap(model)  # refuses what is none, before the block
        self._selection, self._model = selection, model
        self._entered: list[tuple[dict[str, bool], dict[str, bool], TrainingMask | None]] = []
        self._hooks: list[list[RemovableHandle]] = []

    def __enter__(self) -> dict[str, nn.Parameter]:
        check_can_change(self._model)
        trained = self._selection.parameters(self._model)
        kept = rows_kept(self._selection, unwrap(self._model))
        before, waiting = _flags(self._model), _waiting.get(unwrap(self._model))
        self._entered.append((before, waiting.pause() if waiting else before, waiting))
        _mask(self._model, trained)
        self._hooks.append(_without_gradient(trained, kept))
        return trained

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks.pop():
            hook.remove()
        before, users, waiting = self._entered.pop()
        if made_inside := _waiting.pop(unwrap(self._model), None):
            made_inside.forget()
        # A trainer that has trained inside waits no more, and its mask must not come back.
        still_waits = waiting is not None and waiting.resume()
        _restore(self._model, before if still_waits else users)


class TrainingMask:
    """The mask of one trainer: from when the trainer is made until its training returns.

    A model has the mask of one waiting trainer at most. What is restored are the flags that the
    user set, and never the mask of another trainer that was made and has not trained yet.
    """

    def __init__(self) -> None:
        self._models: _Models = ()
        self._before: dict[str, bool] = {}
        self._masked: dict[str, bool] = {}
        self._paused: tuple[_Models, dict[str, bool], dict[str, bool]] | None = None
        self._trains = False
        self._hooks: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """With the model itself, and not waiting: a copy in another process masks anew."""
        return {**vars(self), "_models": _alive(self._models), "_paused": None, "_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_models"]
        models = () if model is None else (ref(model), ref(unwrap(model)))
        vars(self).update(state | {"_models": models})

    @contextmanager
    def during_training(self) -> Iterator[None]:
        """Inside, `put_on` masks for the training; afterwards the flags are the user's again."""
        self._trains = True
        try:
            yield
        finally:
            self.take_off()
            self._trains = False

    def put_on(self, selection: LayerSelection, model: nn.Module) -> None:
        """Require gradients of a selection alone; of one that does not fit, nothing changes."""
        check_can_change(model)
        trained, kept = selection.parameters(model), rows_kept(selection, unwrap(model))
        self._paused = None
        self.take_off()
        if waiting := _waiting.get(unwrap(model)):
            waiting.take_off()
        self._models = ref(model), ref(unwrap(model))
        self._before = _flags(model)
        _mask(model, trained)
        self._masked = _flags(model)
        if self._trains:
            self._hooks = _without_gradient(trained, kept)
        else:
            _waiting[unwrap(model)] = self

    def take_off(self) -> None:
        """Restore the flags: those from before, but for ones that the user set while it waited."""
        model = _alive(self._models)
        if model is None:
            return
        before = self._before
        if _waiting.get(unwrap(model)) is self:
            before = self._users_flags(model)
            del _waiting[unwrap(model)]
        _restore(model, before)
        self.forget()

    def _users_flags(self, model: nn.Module) -> dict[str, bool]:
        now = _flags(model)
        changed = {name: flag for name, flag in now.items() if flag != self._masked.get(name)}
        return self._before | changed

    def pause(self) -> dict[str, bool]:
        """Let another mask take this one's place while it waits, given the user's flags."""
        model = _alive(self._models)
        assert model is not None
        users = self._users_flags(model)
        paused = (self._models, self._before, self._masked)
        del _waiting[unwrap(model)]
        self.forget()
        self._paused = paused
        return users

    def resume(self) -> bool:
        """Whether it waits again: not if the trainer has been masked for a training since."""
        paused, self._paused = self._paused, None
        if paused is None:
            return False
        self._models, self._before, self._masked = paused
        if (model := _alive(self._models)) is not None:
            _waiting[unwrap(model)] = self
        return True

    def forget(self) -> None:
        """Leave the flags as they are: another mask has restored them."""
        self._models, self._before, self._masked = (), {}, {}
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


_Models = tuple["ref[nn.Module]", ...]
"""A model and what is in its wrapper: a mask that waits keeps neither."""


def _alive(models: _Models) -> nn.Module | None:
    return next((model for reference in models if (model := reference()) is not None), None)


# The masks of trainers that were made and have not trained since, by their models.
_waiting: WeakKeyDictionary[nn.Module, TrainingMask] = WeakKeyDictionary()


# All by name: FSDP2 replaces parameters, and frees the old ones if nobody holds them.
def _flags(model: nn.Module) -> dict[str, bool]:
    return {plain_name(name): p.requires_grad for name, p in model.named_parameters()}


def _mask(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    chosen = {id(parameter) for parameter in trained.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def _without_gradient(
    trained: Mapping[str, nn.Parameter], kept: Mapping[str, Sequence[slice]]
) -> list[RemovableHandle]:
    """Hooks that make the gradient of rows zero before it is summed, averaged or clipped."""
    return [trained[name].register_hook(partial(_zeroed, runs)) for name, runs in kept.items()]


def _zeroed(runs: Sequence[slice], gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    for run in runs:
        gradient[run] = 0
    return gradient


def _restore(model: nn.Module, flags: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(plain_name(name), parameter.requires_grad))
