"""Numbers that callers give, of whichever library."""

import numpy as np
import pytest
import torch

from layerrl.checks import finite_number, listed, whole_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_a_number_of_any_library_is_pythons_own(value):
    assert whole_number(value, least=3) == 3
    assert type(whole_number(value)) is int


@pytest.mark.parametrize(
    "value",
    [
        *(True, np.bool_(True), torch.tensor(True), 3.0, np.float64(2), "4", None, [3]),
        *(torch.ones(2, dtype=torch.int64), torch.ones((), dtype=torch.int64, device="meta")),
    ],
)
def test_anything_else_is_none(value):
    assert whole_number(value) is None


def test_nor_is_one_that_is_too_small():
    assert whole_number(2, least=3) is None
    assert whole_number(-5) == -5


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5)], ids=repr)
def test_a_quantity_is_pythons_own_float(value):
    assert finite_number(value, least=0.5) == 0.5
    assert type(finite_number(value)) is float
    assert finite_number(np.int64(2)) == finite_number(2) == 2.0


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), "0.5", None, float("nan"), float("-inf"), 10**400, 1j, [0.5]],
    ids=lambda value: repr(value)[:9],
)
def test_any_other_quantity_is_none(value):
    assert finite_number(value) is None


def test_nor_is_a_quantity_that_is_too_small():
    assert finite_number(-0.1, least=0) is None
    assert finite_number(-0.1) == -0.1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"b", "a", "c"}, ("a", "b", "c")),
        (frozenset({10, 9, 8}), (8, 9, 10)),
        ({frozenset({10, 1}), frozenset({1, 9})}, (frozenset({1, 9}), frozenset({1, 10}))),
        ({2, (1, 2), "a", None}, (None, 2, "a", (1, 2))),
        (["b", "a"], ("b", "a")),
        ({"b": 1, "a": 2}.keys(), ("b", "a")),
    ],
)
def test_a_set_is_listed_in_an_order_that_does_not_change_with_the_process(given, expected):
    assert listed(given) == expected
