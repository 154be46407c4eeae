"""Layers are dropped where they are sure to be behind, and nowhere else."""

import random

import pytest

from layerrl.sweep.halving import below_the_cut, rungs

NUM_PROMPTS = 100
ENDS = {"base": 0.0, "full": 0.5}


def scored(share: float, seed: int, seeds: int = 1) -> list[list[float]]:
    draw = random.Random(seed)
    return [[float(draw.random() < share) for _ in range(NUM_PROMPTS)] for _ in range(seeds)]


@pytest.mark.parametrize(
    ("num_steps", "cycle", "expected"),
    [(80, 1, (10, 20, 40)), (20, 1, (3, 5, 10)), (20, 4, (4, 8, 12)), (2, 1, (1,)), (1, 1, ())],
)
def test_rungs_are_ends_of_generation_batches(num_steps, cycle, expected):
    assert rungs(num_steps, cycle) == expected


def test_what_is_far_behind_is_dropped_and_says_why():
    scores = {layer: scored(share, layer) for layer, share in enumerate((0.8, 0.1, 0.8, 0.8))}
    dropped = below_the_cut(scores, **ENDS)
    assert set(dropped) == {1}
    assert "against layer" in dropped[1]


def test_what_is_not_sure_stays():
    scores = {layer: scored(0.5, layer) for layer in range(8)}
    assert below_the_cut(scores, **ENDS) == {}


def test_nothing_is_dropped_before_the_cut_has_half_of_the_gain():
    scores = {layer: scored(share, layer) for layer, share in enumerate((0.5, 0.05, 0.5, 0.5))}
    [cut, *_] = sorted(sum(scores[layer][0]) / NUM_PROMPTS for layer in (0, 2, 3))[1:]
    assert set(below_the_cut(scores, base=0.1, full=2 * cut - 0.1 - 1e-6)) == {1}
    assert below_the_cut(scores, base=0.1, full=2 * cut - 0.1 + 1e-6) == {}


def test_the_better_half_stays_whatever_the_rest():
    scores = {layer: scored(0.1 * layer, layer, seeds=2) for layer in range(9)}
    assert not {*below_the_cut(scores, **ENDS)} & {4, 5, 6, 7, 8}
    assert below_the_cut({3: scored(0.2, 0)}, **ENDS) == {}


def test_chance_drops_few():
    """Of equal layers, 95 % intervals drop 2.5 % of those compared, and half are compared."""
    dropped = sum(
        len(below_the_cut({layer: scored(0.5, 100 * turn + layer) for layer in range(6)}, **ENDS))
        for turn in range(20)
    )
    assert dropped <= 5  # 1.5 expected
