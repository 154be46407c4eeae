"""Rows of trained tensors that stay as they are, whatever happens to the tensor as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from layerrl.copies import refuse_copies
from layerrl.precision import other_methods, unwrap_optimizer
from layerrl.trained import TrainedLayers

_KEPT = "layerrl_kept_rows"


def keep_rows(optimizer: Any, layers: TrainedLayers) -> None:
    """Let an optimizer change the rows that train, and no other row of their tensors.

    Weight decay, momentum and what an optimizer scales by all of a tensor move rows without a
    gradient, too. They are put back, bit for bit, after each method that may write to the weights.

    Args:
        optimizer: Any torch optimizer, in accelerate's wrapper or not, before `step_in_float32`:
            what is put back then are rows of the float32 masters. `step` and its class's further
            public methods are replaced on the instance, once.
        layers: What trains.
    """
    optimizer = unwrap_optimizer(optimizer)
    if _KEPT in vars(optimizer):  # of a training before
        setattr(optimizer, _KEPT, layers)
    elif layers.frozen_rows:
        setattr(optimizer, _KEPT, layers)
        for name in {"step"} | other_methods(type(optimizer)):
            method = _keeping_rows(getattr(optimizer, name))
            setattr(optimizer, name, MethodType(method, optimizer))
        refuse_copies(optimizer, "would not keep the other rows of the embedding as they are")


def _keeping_rows(method: Callable[..., Any]) -> Callable[..., Any]:
    def keeping_rows(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        with _kept(getattr(optimizer, _KEPT)):
            return method(*args, **kwargs)

    return keeping_rows


@contextmanager
def _kept(layers: TrainedLayers) -> Iterator[None]:
    parameters, rows = layers.parameters, layers.frozen_rows
    runs = [(parameters[name], run) for name, each in rows.items() for run in each]
    before = [parameter.detach()[run].clone() for parameter, run in runs]
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, run), values in zip(runs, before, strict=True):
                parameter[run] = values
