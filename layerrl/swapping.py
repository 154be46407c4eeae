"""Other values in a model's tensors for a while: how the reference runs without a second model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from layerrl.shards import is_sharded, parts, with_parameter, write


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
        parameter.data = with_parameter(values[parameter], parameter).data
