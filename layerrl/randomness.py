"""The global random number generators: what state they are in, and back to one before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def devices_of(model: nn.Module, *given: Any) -> set[torch.device]:
    """Devices on which a pass of a model, called with some values, may draw random numbers."""
    # A model may lie on several, and sharded on the CPU until it is gathered.
    tensors = (*model.parameters(), *(value for value in given if isinstance(value, Tensor)))
    return {tensor.device for tensor in tensors if not tensor.is_meta}


def random_state(*devices: torch.device) -> tuple[Any, ...]:
    """States of the global generators of Python, numpy, torch on the CPU and torch on devices."""
    on_devices = {
        device: torch.get_device_module(device).get_rng_state(device)
        for device in devices
        if device.type != "cpu"
    }
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_devices


def set_random_state(state: tuple[Any, ...]) -> None:
    """Restore the states of the random number generators."""
    python, array, cpu, on_devices = state
    random.setstate(python)
    np.random.set_state(array)
    torch.set_rng_state(cpu)
    for device, own in on_devices.items():
        torch.get_device_module(device).set_rng_state(own, device)


def same_random_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between two states of the same devices."""
    python, array, cpu, on_devices = zip(a, b, strict=True)
    return (
        python[0] == python[1]
        and all(np.array_equal(*parts) for parts in zip(*array, strict=True))
        and torch.equal(*cpu)
        and all(torch.equal(own, on_devices[1][device]) for device, own in on_devices[0].items())
    )
