"""The global random number generators: what state they are in, and back to one before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> tuple[Any, ...]:
    """States of the global generators of Python, numpy, torch on the CPU and torch on a device.

    Args:
        device: An accelerator; the CPU adds nothing.

    Returns:
        What `set_random_state` takes.
    """
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), own


def set_random_state(state: tuple[Any, ...], device: torch.device) -> None:
    """Go on from states that were taken before.

    Args:
        state: What `random_state` gave.
        device: As it was given there.
    """
    python, array, cpu, own = state
    random.setstate(python)
    np.random.set_state(array)
    torch.set_rng_state(cpu)
    if own is not None:
        torch.get_device_module(device).set_rng_state(own, device)


def same_random_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between two states."""
    python, array, *tensors = zip(a, b, strict=True)
    return (
        python[0] == python[1]
        and all(np.array_equal(*parts) for parts in zip(*array, strict=True))
        and all(one is None or torch.equal(one, other) for one, other in tensors)
    )
