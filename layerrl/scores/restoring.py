"""Give models back as they were before a trainer had them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor, nn

_TENSORS = {"_parameters", "_buffers"}


@contextmanager
def as_found(*models: nn.Module) -> Iterator[None]:
    """Give models back with all that they had, but for their weights.

    That is flags, gradients, dtypes, devices, modes, hooks and settings. A trainer sets many of
    these: checkpointing, `use_cache`, a cast. Buffers have their values again, which some modules
    write into whenever they run (spectral norm, batch norm).
    """
    modules = [module for model in models for module in model.modules()]
    parameters = [parameter for model in models for parameter in model.parameters()]
    kinds = [
        (of_module, name, tensor.dtype, tensor.device)
        for module in modules
        for of_module in (module._parameters, module._buffers)
        for name, tensor in of_module.items()
        if tensor is not None
    ]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    owners: dict[int, object] = {id(module): module for module in modules}
    for module in modules:
        for name in ("config", "generation_config"):
            settings = getattr(module, name, None)
            if hasattr(settings, "__dict__"):
                owners[id(settings)] = settings
    held = [
        (
            vars(owner),
            {
                name: copy(value) if isinstance(value, dict) else value
                for name, value in vars(owner).items()
                if name not in _TENSORS
            },
        )
        for owner in owners.values()
    ]
    try:
        with _buffers_kept(modules):
            yield
    finally:
        for of_module, name, dtype, device in kinds:
            tensor = of_module.get(name)
            if tensor is not None and (tensor.dtype, tensor.device) != (dtype, device):
                tensor.data = tensor.data.to(device, dtype)
        for parameter, flag, grad in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for now, before in held:
            for name in {*now} - {*before} - _TENSORS:
                del now[name]
            for name, value in before.items():
                if isinstance(value, dict) and isinstance(now.get(name), dict):
                    now[name].clear()  # in place: handles of hooks refer to their dict
                    now[name].update(value)
                else:
                    now[name] = value


@contextmanager
def _buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    buffers = [(module._buffers, module._buffers.copy()) for module in modules]
    values = {
        tensor: tensor.detach().clone()
        for _, own in buffers
        for tensor in own.values()
        if tensor is not None and _may_move(tensor)
    }
    try:
        yield
    finally:
        for now, before in buffers:
            now.clear()
            now.update(before)
        for buffer, value in values.items():
            if (buffer.dtype, buffer.device) != (value.dtype, value.device):
                buffer.data = value
            elif not torch.equal(buffer, value):
                buffer.data.copy_(value)


def _may_move(buffer: Tensor) -> bool:
    """Whether a buffer may hold a state, and not weights that GPTQ and others pack: large ones."""
    dense = type(buffer) is Tensor and not (buffer.is_meta or buffer.is_sparse)
    return dense and (buffer.is_floating_point() or buffer.dim() < 2)
