"""Other values in tensors for a while: how a reference runs, and an optimizer steps in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from layerrl.shards import is_sharded, parts, with_parameter, write

_DTENSOR_SLOTS = ("_local_tensor", "_spec")


@contextmanager
def swapped_in(model: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> Iterator[nn.Module]:
    """Give a model's parameters other values; afterwards they have their own again.

    Of a sharded parameter, the value is this process's part.

    Yields:
        The model, in evaluation mode. Values and modes are restored also after an exception.
    """
    training = [module for module in model.modules() if module.training]
    own = {p: parts(p).detach().clone() if is_sharded(p) else p.data for p in values}
    try:
        for module in training:
            module.training = False
        _give(model, values)
        yield model
    finally:
        _give(model, own)
        for module in training:
            module.training = True


def _give(model: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> None:
    """Put values into a model: into parts, where it has some, which are known by storage."""
    sharded = {parameter: value for parameter, value in values.items() if is_sharded(parameter)}
    if sharded:
        write(model, sharded.items())
    # Inside a caller's autocast, casts of the values before would be used again.
    torch.clear_autocast_cache()
    for parameter in values.keys() - sharded.keys():
        value = with_parameter(values[parameter], parameter).data
        parameter.data = value.to(parameter.dtype)  # which may be cast for an evaluation


@contextmanager
def cast_undone(model: nn.Module) -> Iterator[None]:
    """Inside, a model may be cast as a whole; afterwards it has its own tensors again."""
    values = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module._buffers, module._buffers.copy()) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, value in values:
            parameter.data = value
        for now, before in buffers:
            now.update(before)


@contextmanager
def swapped(pairs: list[tuple[Any, Any]]) -> Iterator[None]:
    """Inside, the tensors of each pair stand for each other."""
    for half, master in pairs:
        swap(half, master)
    try:
        yield
    finally:
        for half, master in pairs:
            swap(half, master)


def swap(one: Any, other: Any) -> None:
    """Exchange what two Python tensors stand for; twice is as if nothing had been.

    References, attributes and hashes stay with the Python objects; values, gradients, and the hooks
    on these (DDP's too) go with what they belong to. `torch.utils.swap_tensors` is the same for
    good, and so forbids the next backward of a graph that is under way.
    """
    if isinstance(one, DTensor):
        for slot in _DTENSOR_SLOTS:
            kept = getattr(one, slot)
            setattr(one, slot, getattr(other, slot))
            setattr(other, slot, kept)
    torch._C._swap_tensor_impl(one, other)
