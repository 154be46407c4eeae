"""GiGPO's arithmetic against numbers worked by hand."""

import pytest
import torch
from torch.testing import assert_close

from layerrl.agents.advantages import (
    anchor_groups,
    discounted_returns,
    on_response_tokens,
    step_advantages,
)

# Two tasks, three episodes each. A step is what was seen and what it was rewarded with.
A = [
    [("s0", 0.0), ("s1", 1.0)],  # returns 0 + 1/2 * 1 = 0.5, then 1
    [("s0", 0.0), ("s2", 0.0)],  # 0, 0
    [("s0", 1.0), ("s1", 0.0)],  # 1, 0
]
B = [
    [("s0", 2.0)],  # 2
    [("s0", 0.0), ("s0", 4.0)],  # 0 + 1/2 * 4 = 2, then 4
    [("s0", 0.0), ("s1", 0.0), ("s0", 0.0)],  # 0, 0, 0
]
GAMMA = 0.5
RETURNS = [0.5, 1, 0, 0, 1, 0, 2, 2, 4, 0, 0, 0]
# A's s0: 0.5, 0, 1; A's s1: 1, 0; A's s2 alone; B's s0: 2, 2, 4, 0, 0; B's s1 alone.
GROUPS = [0, 1, 0, 2, 0, 1, 3, 3, 3, 3, 4, 3]
# A's s0: mean 0.5, variance (0 + 0.25 + 0.25) / 2 = 0.5^2. A's s1: mean 0.5, variance
# (0.25 + 0.25) / 1 = 0.70711^2. B's s0: mean 8 / 5 = 1.6, variance
# (0.16 + 0.16 + 5.76 + 2.56 + 2.56) / 4 = 2.8 = 1.67332^2.
UNSCALED = [0, 0.5, -0.5, 0, 0.5, -0.5, 0.4, 0.4, 2.4, -1.6, 0, -1.6]
SCALED = [0, 0.70711, -1, 0, 1, -0.70711, 0.23905, 0.23905, 1.43427, -0.95618, 0, -0.95618]


def steps():
    return [
        (task, *step)
        for task, episodes in zip("AB", (A, B), strict=True)
        for e in episodes
        for step in e
    ]


def test_returns_are_discounted_backwards():
    assert discounted_returns([1.0, 0.0, 2.0], 0.5) == [1.5, 1.0, 2.0]
    assert discounted_returns([1.0, 0.0, 2.0], 0.0) == [1.0, 0.0, 2.0]
    assert discounted_returns([1.0, 0.0, 2.0], 1.0) == [3.0, 2.0, 2.0]
    assert discounted_returns([], 0.5) == []
    found = [r for episode in A + B for r in discounted_returns([r for _, r in episode], GAMMA)]
    assert found == RETURNS


def test_steps_of_a_task_with_equal_observations_are_a_group():
    tasks, seen, _ = zip(*steps(), strict=True)
    assert anchor_groups(tasks, seen).tolist() == GROUPS


def test_observations_are_compared_by_value():
    seen = [(1, "a"), (1, "b"), (1.0, "a"), "a"]
    assert anchor_groups([0] * 4, seen).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(("scale", "expected"), [(True, SCALED), (False, UNSCALED)])
def test_step_advantages_by_hand(scale, expected):
    found = step_advantages(torch.tensor(RETURNS), torch.tensor(GROUPS), scale=scale)
    assert_close(found, torch.tensor(expected, dtype=torch.double), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_of_one_gives_exactly_nothing(scale):
    found = step_advantages(torch.tensor([0.1, 7e8]), torch.tensor([0, 1]), scale=scale)
    assert found.tolist() == [0, 0]


def test_equal_returns_are_not_told_apart_by_their_rounding():
    equal = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3, 0.3], dtype=torch.double)
    found = step_advantages(equal, torch.zeros(5, dtype=torch.long), scale=True)
    assert found.abs().max() < 1e-9


def test_deviation_is_added_a_millionth():
    found = step_advantages(torch.tensor([0.0, 2e-6]), torch.tensor([0, 0]), scale=True)
    # 1e-6 from the mean, standard deviation 1.41421e-6.
    assert_close(found, torch.tensor([-0.41421, 0.41421]).double(), rtol=0, atol=1e-5)


def test_every_response_token_has_its_steps_value():
    found = on_response_tokens(
        [torch.tensor([1.0, -2.0]), torch.tensor([3.0])],
        [[2, 1], [3]],
        [[1, 1, 0, 0, 1], [1, 1, 1]],
        length=6,
    )
    assert found.tolist() == [[1, 1, 0, 0, -2, 0], [3, 3, 3, 0, 0, 0]]


def test_a_step_without_tokens_leaves_the_others_in_place():
    found = on_response_tokens([torch.tensor([1.0, 2.0, 3.0])], [[1, 0, 1]], [[1, 0, 1]], length=3)
    assert found.tolist() == [[1, 0, 3]]
