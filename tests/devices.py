"""Where the tests train: on a CPU, or with `-m cuda` on a GPU.

A file whose tests hold on both says `pytestmark = on_any_device`. Those that call a model
themselves make their tensors on `DEVICE`.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cpu")
on_any_device = pytest.mark.any_device


def choose(device: str) -> None:
    """Train there. To be called before a test file is imported.

    On a GPU two runs of the same thing agree bit for bit with deterministic algorithms alone.
    """
    global DEVICE
    DEVICE = torch.device(device)
    if device != "cpu":
        # Read by cuBLAS when the first matrix is multiplied.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def generator(seed: int) -> torch.Generator:
    """Random numbers for tensors on `DEVICE`."""
    return torch.Generator(DEVICE).manual_seed(seed)


def on_cpu(value: Any) -> Any:
    """A copy that later training, or a move of its model, leaves alone."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def random_state() -> list[Tensor]:
    """Of every generator that a model may draw from."""
    states = [torch.get_rng_state()]
    return states if DEVICE.type == "cpu" else [*states, torch.cuda.get_rng_state(DEVICE)]


def set_random_state(states: list[Tensor]) -> None:
    """Back to what `random_state` gave."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, DEVICE)
