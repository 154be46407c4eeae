from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerrl import LayerSelection, select_layers
from layerrl.errors import SelectionError
from tests.models import tiny, tiny_config

MOST = 40
numbers_of_layers = st.integers(1, MOST)


@cache
def config(num_layers):
    return tiny_config("llama", num_layers)


@cache
def shared_model():
    return tiny("llama", 3)


def resolve(num_layers, layers):
    return select_layers(config(num_layers), layers).layers


def percents():
    return st.one_of(
        st.integers(0, 100).map(Fraction), st.integers(0, 10000).map(lambda n: Fraction(n, 100))
    )


def depth(low, high):
    return f"{float(low):g}%:{float(high):g}%"


@st.composite
def layers_of(draw):
    """A number of layers and distinct layers of it, in any order."""
    num_layers = draw(numbers_of_layers)
    layers = draw(st.lists(st.integers(0, num_layers - 1), min_size=1, unique=True))
    return num_layers, layers


@st.composite
def selections(draw):
    num_layers, layers = draw(layers_of())
    full = draw(st.booleans())
    layers = range(num_layers) if full else sorted(layers)
    scales = st.floats(
        min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False, width=32
    )
    keys = st.tuples(st.none() | st.sampled_from(layers), st.text('mlp.*[é]"\\\n ', min_size=1))
    boosts = draw(st.dictionaries(keys, scales))
    globs = st.lists(st.text('mlp.*[é]"\\\n ', min_size=1), min_size=1, unique=True).map(tuple)
    return LayerSelection(
        num_layers=num_layers,
        layers=tuple(layers),
        learning_rate_scale=tuple(
            draw(st.lists(scales, min_size=len(layers), max_size=len(layers)))
        ),
        modules=None if full else draw(st.none() | globs),
        full=full,
        boosts=tuple(
            (layer, glob, boosts[layer, glob])
            for layer, glob in sorted(boosts, key=lambda k: (-1 if k[0] is None else k[0], k[1]))
        ),
    )


@given(layers_of())
def test_layers_are_the_given_ones_ascending(case):
    num_layers, layers = case
    assert resolve(num_layers, layers) == tuple(sorted(layers))


@given(layers_of(), st.data())
def test_counting_from_the_end_makes_no_difference(case, data):
    num_layers, layers = case
    signs = data.draw(st.lists(st.booleans(), min_size=len(layers), max_size=len(layers)))
    mixed = [k - num_layers if sign else k for k, sign in zip(layers, signs, strict=True)]
    assert resolve(num_layers, mixed) == resolve(num_layers, layers)


@given(numbers_of_layers, st.lists(st.integers(-2 * MOST, 2 * MOST), max_size=6))
def test_integers_either_name_distinct_layers_or_are_refused(num_layers, layers):
    exist = all(-num_layers <= k < num_layers for k in layers)
    distinct = len({k % num_layers for k in layers}) == len(layers)
    if layers and exist and distinct:
        assert resolve(num_layers, layers) == tuple(sorted(k % num_layers for k in layers))
    else:
        with pytest.raises(SelectionError):
            resolve(num_layers, layers)


@given(numbers_of_layers, st.slices(MOST))
def test_slice_is_that_of_a_list_or_refused(num_layers, chosen):
    inside = all(
        bound is None or -num_layers <= bound <= num_layers for bound in (chosen.start, chosen.stop)
    )
    expected = list(range(num_layers))[chosen] if inside else []
    if expected:
        assert resolve(num_layers, chosen) == tuple(sorted(expected))
    else:
        with pytest.raises(SelectionError):
            resolve(num_layers, chosen)


def test_middle_is_the_formula_of_the_paper():
    for num_layers in range(1, 101):
        for k in range(1, num_layers + 1):
            half, reach = Fraction(num_layers, 2), Fraction(k, 2)
            expected = range(floor(half - reach), floor(half + reach))
            assert resolve(num_layers, f"middle:{k}") == tuple(expected)


@given(numbers_of_layers, st.data())
def test_first_and_last_split_the_layers(num_layers, data):
    k = data.draw(st.integers(1, num_layers))
    first = resolve(num_layers, f"first:{k}")
    assert len(first) == k
    rest = resolve(num_layers, f"last:{num_layers - k}") if k < num_layers else ()
    assert first + rest == tuple(range(num_layers))


@given(numbers_of_layers, percents(), percents())
def test_depth_range_holds_the_layers_from_low_to_below_high(num_layers, low, high):
    expected = tuple(k for k in range(num_layers) if low <= Fraction(100 * k, num_layers) < high)
    if expected:
        assert resolve(num_layers, depth(low, high)) == expected
    else:
        with pytest.raises(SelectionError, match=f"{float(low):g}%"):
            resolve(num_layers, depth(low, high))


@given(numbers_of_layers, st.lists(percents(), max_size=4))
def test_neighbouring_depth_ranges_share_no_layer_and_lose_none(num_layers, cuts):
    bounds = sorted({Fraction(0), *cuts, Fraction(100)})
    parts = []
    for low, high in pairwise(bounds):
        try:
            parts += resolve(num_layers, depth(low, high))
        except SelectionError as error:
            assert "holds no layer" in str(error)  # noqa: PT017 - an empty part is as good
    assert parts == list(range(num_layers))


@given(selections())
def test_selection_survives_json(selection):
    copy = LayerSelection.from_json(selection.to_json())
    assert copy == selection
    assert hash(copy) == hash(selection)
    assert copy.to_json() == selection.to_json()


@given(selections())
def test_selection_says_the_same_of_itself_as_of_its_layers(selection):
    assert selection.first == min(selection.layers)
    trained = range(selection.num_layers) if selection.full else selection.layers
    assert set(selection.frozen_prefix).isdisjoint(trained)
    assert len(selection.learning_rate_scale) == len(selection.layers)


@given(layers_of(), st.data())
def test_boost_changes_the_scale_of_its_layers_only(case, data):
    num_layers, layers = case
    boosted = data.draw(
        st.dictionaries(st.sampled_from(layers), st.floats(min_value=0.125, max_value=8))
    )
    selection = select_layers(config(num_layers), layers, boost=boosted)
    for layer, scale in zip(selection.layers, selection.learning_rate_scale, strict=True):
        assert scale == boosted.get(layer, 1.0)


@given(
    st.one_of(
        st.sets(st.integers(0, 2), min_size=1), st.sampled_from(["all", "full", "middle", "last:2"])
    ),
    st.sampled_from([None, "mlp", "self_attn.*", ["*norm*", "mlp.up_proj"]]),
    st.randoms(use_true_random=False),
)
def test_mask_is_exact_and_restores_any_pattern_of_flags(layers, modules, random):
    model = shared_model()
    for parameter in model.parameters():
        parameter.requires_grad_(random.random() < 0.5)
    before = [parameter.requires_grad for parameter in model.parameters()]
    selection = select_layers(model, layers, modules=None if layers == "full" else modules)
    with selection.masked(model) as trained:
        assert list(trained) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert [parameter.requires_grad for parameter in model.parameters()] == before
