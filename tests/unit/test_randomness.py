"""Random states of all devices that a pass of a model may draw on."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerrl.randomness import devices_of, random_state, same_random_state, set_random_state
from layerrl.replay.entering import Request
from layerrl.scores.evaluation import random_state_kept
from tests.models import tiny

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def generators(monkeypatch):
    """One for each of two devices, in place of those that torch keeps for GPUs."""
    states = {FIRST: torch.tensor([1]), SECOND: torch.tensor([2])}
    module = SimpleNamespace(
        get_rng_state=lambda device: states[device].clone(),
        set_rng_state=lambda state, device: states.update({device: state}),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    return states


def test_a_pass_draws_where_its_model_lies_and_where_it_is_called():
    """FSDP2 with CPU offload has its parameters on the CPU between passes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(2, 3, device=SECOND, dtype=torch.long)
        split = torch.nn.Linear(2, 2, device="meta")
        split.weight = torch.nn.Parameter(torch.empty(2, 2, device=FIRST))
    assert devices_of(split, ids, None, 3) == {FIRST, SECOND}
    assert Request(tiny("llama"), (ids,), {}).devices == {torch.device("cpu"), SECOND}


@pytest.mark.parametrize("drawn_on", [FIRST, SECOND, "cpu", "python", "numpy"])
def test_states_of_every_device_are_told_apart_and_given_back(generators, drawn_on):
    before = random_state(torch.device("cpu"), FIRST, SECOND)
    assert same_random_state(before, random_state(SECOND, FIRST))
    if drawn_on in generators:
        generators[drawn_on] += 7
    else:
        {"cpu": lambda: torch.rand(1), "python": random.random, "numpy": np.random.rand}[drawn_on]()
    assert not same_random_state(before, random_state(FIRST, SECOND))
    set_random_state(before)
    assert same_random_state(before, random_state(FIRST, SECOND))
    assert [int(state) for state in generators.values()] == [1, 2]


def test_a_state_is_kept_on_devices_named_by_number(monkeypatch):
    """Of a host with several, torch would warn that it keeps the states of all."""
    kept: list[list[int]] = []

    def fork_rng(numbers, device_type):
        kept.append([*numbers])
        return nullcontext()

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    before = random_state()
    with random_state_kept():
        _ = torch.rand(1), random.random(), np.random.rand()
    assert kept == [[0, 1]]
    assert same_random_state(before, random_state())
