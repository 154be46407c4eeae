import dataclasses
import gc
import json
import math
import pickle
import re
import time
import weakref
from collections import deque
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from layerrl import LayerSelection, select_layers
from layerrl.errors import ModelError, SelectionError
from layerrl.selection.rates import learning_rate_factors
from tests.models import FAMILIES, TEXT_FAMILIES, Plain, linears, tiny, tiny_config

L28 = "LlamaConfig has 28 decoder layers (0 to 27)"


def config(num_layers):
    return tiny_config("llama", num_layers)


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def with_mixed_flags(model):
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 3 != 0)
    return model


# Which layers


@pytest.mark.parametrize(
    ("num_layers", "layers", "expected"),
    [
        (28, 10, [10]),
        (28, 0, [0]),
        (28, -1, [27]),
        (28, -28, [0]),
        (1, 0, [0]),
        (28, [12, 10], [10, 12]),
        (28, (3, -1, 0), [0, 3, 27]),
        pytest.param(28, {5, 4}, [4, 5], id="a set"),
        (28, range(3, 6), [3, 4, 5]),
        (28, range(27, 20, -3), [21, 24, 27]),
        (28, range(-2, 0), [26, 27]),
        (28, slice(3, 6), [3, 4, 5]),
        (28, slice(-2, None), [26, 27]),
        (28, slice(None, 2), [0, 1]),
        (28, slice(0, 28, 9), [0, 9, 18, 27]),
        (28, slice(-28, -26), [0, 1]),
        (28, slice(None, 24, -1), [25, 26, 27]),
        (3, slice(None), [0, 1, 2]),
        (3, "all", [0, 1, 2]),
        (3, "full", [0, 1, 2]),
        (28, "first:3", [0, 1, 2]),
        (28, "first:28", range(28)),
        (28, "last:2", [26, 27]),
        (28, "last:28", range(28)),
        # floor(L/2 - K/2) to floor(L/2 + K/2) - 1
        (28, "middle:5", [11, 12, 13, 14, 15]),
        (36, "middle:5", [15, 16, 17, 18, 19]),
        (30, "middle:5", [12, 13, 14, 15, 16]),
        (30, "middle:4", [13, 14, 15, 16]),
        (29, "middle:5", [12, 13, 14, 15, 16]),
        (29, "middle:4", [12, 13, 14, 15]),
        (28, "middle:28", range(28)),
        (28, "middle", [13]),
        (29, "middle", [14]),
        (30, "middle", [14]),
        (1, "middle", [0]),
        # k with LO L / 100 <= k < HI L / 100
        (28, "0%:100%", range(28)),
        (28, "40%:60%", [12, 13, 14, 15, 16]),
        (30, "40%:60%", [12, 13, 14, 15, 16, 17]),
        (30, "0%:40%", range(12)),
        (30, "60%:100%", range(18, 30)),
        (30, "33.3%:66.6%", range(10, 20)),
        (28, "12.5%:25%", [4, 5, 6]),
        (10, "29%:30.1%", [3]),
        (100, "28%:29%", [28]),
    ],
    ids=str,
)
def test_layers_are_the_ones_meant(num_layers, layers, expected):
    selection = select_layers(config(num_layers), layers)
    assert selection.layers == tuple(expected)
    assert selection.num_layers == num_layers
    assert selection.learning_rate_scale == (1.0,) * len(expected)
    assert selection.modules is None
    assert selection.full is (layers == "full")


LAYER_2 = {
    "numpy integer": np.int64(2),
    "numpy integers": [np.int32(2)],
    "numpy array": np.array([2]),
    "tensor without axes": torch.tensor(2),
    "tensor": torch.tensor([2]),
    "generator": (layer for layer in [2]),
    "deque": deque([2]),
    "keys": {2: "two"}.keys(),
    "range": range(2, 3),
    "slice": slice(2, 3),
    "slice of numpy integers": slice(np.int64(2), np.int64(3)),
}


@pytest.mark.parametrize("layers", LAYER_2.values(), ids=LAYER_2)
def test_layer_numbers_come_as_any_integer_or_iterable(layers):
    selection = select_layers(config(4), layers)
    assert selection == LayerSelection(num_layers=4, layers=(2,))
    assert [type(layer) for layer in selection.layers] == [int]
    assert LayerSelection.from_json(selection.to_json()) == selection


@pytest.mark.parametrize("several", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_layer_numbers_come_as_an_array(several):
    assert select_layers(config(4), several([3, 1])) == select_layers(config(4), [1, 3])


@pytest.mark.parametrize("family", FAMILIES)
def test_config_real_model_and_meta_model_give_equal_selections(family):
    with torch.device("meta"):
        on_meta = tiny(family)
    expected = select_layers(tiny_config(family), [0, -1], boost={0: 2.0})
    assert select_layers(tiny(family), [0, -1], boost={0: 2.0}) == expected
    assert select_layers(on_meta, [0, -1], boost={0: 2.0}) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (28, f"layer 28 does not exist: {L28}"),
        (-29, f"layer -29 does not exist: {L28}"),
        ([3, 31, 28], f"layers [31, 28] do not exist: {L28}"),
        (range(26, 30), "layers [28, 29] do not exist"),
        (np.array([40]), "layer 40 does not exist"),
        ([3, 3, 5], "layers [3] are given more than once in [3, 3, 5]"),
        ([27, -1, 0, -28], "layers [0, 27] are given more than once in [27, -1, 0, -28]"),
        ([], "no layers given"),
        (range(0), "no layers given"),
        (slice(5, 5), "no layers given"),
        (slice(5, 3), f"no layers given: expected at least one, or also= without layers; {L28}"),
        (1.0, "1.0 is no layer: expected an integer, got float"),
        ([1, 2.5], "2.5 is no layer"),
        (math.nan, "nan is no layer"),
        (None, "no layers given"),
        ([None], "None is no layer: expected an integer, got NoneType"),
        (["3"], "'3' is no layer: expected an integer, got str"),
        ([[1]], "[1] is no layer: expected an integer, got list"),
        ({1: 2.0}, "{1: 2.0} is no layer: expected an integer, got dict"),
        (True, "True is no layer: expected an integer, got bool"),
        ([0, False], "False is no layer"),
        (np.True_, "True is no layer"),
        (np.array([False, True]), "False is no layer"),
        (torch.tensor([False, True]), "False is no layer"),
        (slice(0, 29), f"slice(0, 29, None) reaches outside the model: {L28}"),
        (slice(-29, None), f"slice(-29, None, None) reaches outside the model: {L28}"),
        (slice(40, 50), "slice(40, 50, None) reaches outside"),
        (slice(True, 3), "True is no layer"),
        (slice(0.0, 3), "0.0 is no layer"),
        (slice(0, 3, 0), "slice(0, 3, 0)"),
        (slice(0, 3, 0.5), "0.5"),
        ("middle:0", f"'middle:0' asks for 0 layers, expected 1 to 28: {L28}"),
        ("middle:29", "'middle:29' asks for 29 layers, expected 1 to 28"),
        ("middle:99", "'middle:99' asks for 99 layers, expected 1 to 28"),
        ("middle:-1", "'middle:-1' asks for -1 layers"),
        ("first:0", "'first:0' asks for 0 layers"),
        ("last:29", "'last:29' asks for 29 layers"),
        ("60%:40%", "'60%:40%' is no range of depth: expected 0 <= LO < HI <= 100"),
        ("40%:40%", "'40%:40%' is no range of depth"),
        ("40%:101%", "'40%:101%' is no range of depth"),
        ("36%:39%", f"'36%:39%' holds no layer: {L28}, 3.57 % of depth each"),
        ("99%:100%", "'99%:100%' holds no layer"),
        ("first", "'first' does not name layers"),
        ("last", "'last' does not name layers"),
        ("", "'' does not name layers"),
        ("10", "'10' does not name layers"),
        ("none", "'none' does not name layers"),
        ("Middle:5", "'Middle:5' does not name layers"),
        ("middle:five", "'middle:five' does not name layers"),
        ("middle:2.5", "'middle:2.5' does not name layers"),
        ("middle:5 ", "'middle:5 ' does not name layers"),
        ("40:60", "'40:60' does not name layers"),
        ("40%", "'40%' does not name layers"),
        ("-10%:60%", "'-10%:60%' does not name layers"),
    ],
    ids=repr,
)
def test_layers_that_make_no_sense_are_refused_by_value(layers, message):
    with pytest.raises(SelectionError, match=re.escape(message)):
        select_layers(config(28), layers)


def test_unknown_word_is_answered_with_the_known_ones():
    with pytest.raises(SelectionError) as caught:
        select_layers(config(28), "top")
    for word in ['"all"', '"full"', '"middle"', '"middle:K"', '"first:K"', '"last:K"', '"LO%:HI%"']:
        assert word in str(caught.value)


def test_missing_layer_of_a_model_names_its_class_and_where_its_layers_are():
    has = "LlamaForCausalLM has 3 decoder layers (0 to 2) under 'model.layers'"
    with pytest.raises(SelectionError, match=re.escape(f"layer 3 does not exist: {has}")):
        select_layers(tiny("llama"), 3)


# Learning-rate scale


@pytest.mark.parametrize(
    ("layers", "boost", "expected"),
    [
        ([1, 3], {3: 2.0}, (1.0, 2.0)),
        ([3, 1], {1: 2, 3: 0.5}, (2.0, 0.5)),
        ([1, 3], {-1: 4.0}, (1.0, 4.0)),
        ([1, 3], {np.int64(1): np.float64(2.0)}, (2.0, 1.0)),
        ("full", {2: 2.0}, (1.0, 1.0, 2.0, 1.0)),
        ("middle:2", {}, (1.0, 1.0)),
        ("middle:2", None, (1.0, 1.0)),
    ],
    ids=str,
)
def test_boost_scales_the_learning_rate_of_its_layers_only(layers, boost, expected):
    selection = select_layers(config(4), layers, boost=boost)
    assert selection.learning_rate_scale == expected
    assert {type(scale) for scale in selection.learning_rate_scale} == {float}


@pytest.mark.parametrize(
    ("boost", "message"),
    [
        ({28: 2.0}, f"boost of layer 28, which does not exist: {L28}"),
        ({-29: 2.0}, "boost of layer -29, which does not exist"),
        ({9: 2.0}, "boost of layer 9, which does not train. Selected: 10, 12-13."),
        ({-1: 2.0}, "boost of layer 27, which does not train"),
        ({10: 0}, "boost of layer 10 is 0, expected a positive finite factor"),
        ({10: 0.0}, "boost of layer 10 is 0.0"),
        ({12: -1.5}, "boost of layer 12 is -1.5"),
        ({12: math.nan}, "boost of layer 12 is nan"),
        ({12: math.inf}, "boost of layer 12 is inf"),
        ({12: -math.inf}, "boost of layer 12 is -inf"),
        ({12: 10**400}, "boost of layer 12 is 1000"),
        ({12: True}, "boost of layer 12 is True"),
        ({12: "2"}, "boost of layer 12 is '2'"),
        ({12: None}, "boost of layer 12 is None"),
        ({"12": 2.0}, "boost of '12' matches nothing that trains in layers 10, 12-13"),
        ({True: 2.0}, "boost of True, which is no layer, glob or pair"),
        ({1.5: 2.0}, "boost of 1.5, which is no layer, glob or pair"),
        ({"": 2.0}, "boost of '', which is no layer, glob or pair"),
        ({(10,): 2.0}, "boost of (10,), which is no layer, glob or pair"),
        ({(10, None): 2.0}, "boost of (10, None), which is no layer, glob or pair"),
        ({("mlp", 10): 2.0}, "boost of ('mlp', 10), which is no layer, glob or pair"),
        ({13: 2.0, -15: 3.0}, "13"),
        ({(9, "mlp"): 2.0}, "boost of layer 9, which does not train"),
        ({(28, "mlp"): 2.0}, "boost of layer 28, which does not exist"),
        ({"mlp": 0}, "boost of 'mlp' is 0, expected a positive finite factor"),
        ({(10, "mlp"): math.nan}, "boost of (10, 'mlp') is nan"),
        ({"mlp": math.inf}, "boost of 'mlp' is inf"),
        ({(12, "mlp"): 1.0, (-16, "mlp"): 2.0}, "boost of (12, 'mlp') is given twice"),
        ([2.0, 1.0, 1.0], 'or is "decay:D" with 0 < D <= 1; got [2.0, 1.0'),
        (2.0, "with 0 < D <= 1; got 2.0"),
        ("mlp.*", "with 0 < D <= 1; got 'mlp.*'"),
        ("decay", "boost='decay': expected a number above 0, at most 1"),
        ("decay:abc", "boost='decay:abc': expected a number above 0, at most 1"),
        ("decay:0", "boost='decay:0': expected a number above 0, at most 1"),
        ("decay:-0.5", "boost='decay:-0.5': expected a number above 0, at most 1"),
        ("decay:1.5", "at most 1, so that lower layers learn more slowly"),
        ("decay:nan", "boost='decay:nan': expected a number above 0, at most 1"),
        ("decay:inf", "boost='decay:inf': expected a number above 0, at most 1"),
        ("decay:1e-200", "boost='decay:1e-200' over 3 layers is 0 in floating point"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_boost_that_makes_no_sense_is_refused_by_value(boost, message):
    with pytest.raises(SelectionError, match=re.escape(message)):
        select_layers(config(28), [10, 12, 13], boost=boost)


def rates(model, *args, **kwargs):
    """Factor of each trained tensor that has another than 1, by name."""
    selection = select_layers(model, *args, **kwargs)
    trained = selection.parameters(model)
    factors = learning_rate_factors(selection, model, trained)
    found = {name: factors.get(id(p), 1.0) for name, p in trained.items()}
    return {name: factor for name, factor in found.items() if factor != 1}


BLOCK = [name for name, _ in tiny("llama").model.layers[0].named_parameters()]


def of(layer, part=""):
    return [f"model.layers.{layer}.{name}" for name in BLOCK if name.startswith(part)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"boost": {"mlp.*": 0.5}}, [(0.5, of(1, "mlp")), (0.5, of(3, "mlp"))]),
        ({"boost": {"mlp": 0.5, 3: 1.0}}, [(0.5, of(1, "mlp")), (0.5, of(3, "mlp"))]),
        ({"boost": {(-1, "*.q_proj"): 3}}, [(3.0, of(3, "self_attn.q_proj"))]),
        # A glob before a layer, a pair before both; nothing is multiplied.
        (
            {"boost": {(3, "mlp.up_proj"): 1.0, "mlp.*": 0.5, 3: 2.0}},
            [(2.0, of(3)), (0.5, of(3, "mlp")), (0.5, of(1, "mlp")), (1.0, of(3, "mlp.up_proj"))],
        ),
        ({"boost": {"mlp": 0.5, "mlp.up_*": 0.5, 1: 1}, "modules": "mlp.up_proj"},
         [(0.5, of(1, "mlp.up_proj")), (0.5, of(3, "mlp.up_proj"))]),
        # Where two globs disagree a pair decides, and only there would they be an error.
        (
            {"boost": {"mlp": 0.5, "*.up_proj": 2.0, (1, "mlp.up_*"): 3.0, (3, "mlp.up_*"): 4.0}},
            [
                (0.5, of(1, "mlp")), (0.5, of(3, "mlp")),
                (3.0, of(1, "mlp.up_proj")), (4.0, of(3, "mlp.up_proj")),
            ],
        ),
        ({"also": "head", "boost": {"head": 0.1}}, [(0.1, ["lm_head.weight"])]),
        (
            {"also": ["*norm*", "head"], "boost": {"*norm*": 0.1}},
            [
                (0.1, ["model.norm.weight"]), (0.1, of(1, "input_l")), (0.1, of(3, "input_l")),
                (0.1, of(1, "post_a")), (0.1, of(3, "post_a")),
            ],
        ),
        # By distance in layers: layer 2 between them does not train, and counts.
        ({"boost": "decay:0.5"}, [(0.25, of(1))]),
        ({"boost": "decay:1"}, []),
        (
            {"also": ["embeddings", "head", "final_norm"], "boost": "decay:0.5"},
            [(0.25, of(1)), (0.0625, ["model.embed_tokens.weight"])],
        ),
        (
            {"layers": "full", "boost": "decay:0.5"},
            [
                (0.5, of(2)), (0.25, of(1)), (0.125, of(0)),
                (0.0625, ["model.embed_tokens.weight"]),
            ],
        ),
        (
            {"layers": "full", "boost": {"head": 0.1, "final_norm": 0.2}},
            [(0.1, ["lm_head.weight"]), (0.2, ["model.norm.weight"])],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_boost_gives_each_tensor_the_factor_of_the_most_specific_key(options, expected):
    options = {"layers": [1, 3], **options}
    factors = {name: factor for factor, names in expected for name in names}
    factors = {name: factor for name, factor in factors.items() if factor != 1}
    model = tiny("llama", 4)
    assert rates(model, **options) == factors
    selection = select_layers(model.config, **options)
    assert selection == select_layers(model, **options) == select_layers(model, selection)
    assert selection.is_boosted == bool(factors)


def test_boost_of_a_tied_head_is_that_of_the_embeddings():
    model = tiny("llama", tie_word_embeddings=True)
    embeddings = {"model.embed_tokens.weight": 0.1}
    also = ["embeddings", "head"]
    assert rates(model, 1, also=also, boost={"head": 0.1}) == embeddings
    assert rates(model, "full", boost={"embeddings": 0.1, "head": 0.1}) == embeddings
    assert rates(model, 2, also=also, boost="decay:0.5") == {"model.embed_tokens.weight": 0.125}
    for layers, parts in [(1, also), ("full", None)]:
        with pytest.raises(SelectionError, match=r"'embeddings' \(0.2\) and 'head' \(0.1\) disag"):
            select_layers(model, layers, also=parts, boost={"embeddings": 0.2, "head": 0.1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boost": {"mpl.*": 2.0}}, r"of 'mpl\.\*' matches nothing that trains in layers 1, 3"),
        ({"boost": {"mpl": 2.0}}, r"What trains in layer 1 is self_attn\.q_proj\.weight, "),
        ({"boost": {(3, "mpl"): 2.0}}, r"\(3, 'mpl'\) matches .* in layer 3\. What .* layer 3 is"),
        ({"boost": {"model.layers.1.mlp*": 2.0}}, "compared with names inside a layer, not with"),
        ({"boost": {"mlp": 1.0, "mpl": 1.0}}, "boost of 'mpl' matches nothing"),
        (
            {"boost": {"mlp": 2.0}, "modules": "self_attn.q_proj"},
            r"'mlp' .*What trains in layer 1 is self_attn\.q_proj\.weight$",
        ),
        ({"boost": {"head": 2.0}}, "'head', which does not train: also='head' would train it"),
        ({"boost": {"embeddings": 2.0}, "also": "head"}, r"'embeddings', .* none of also=\['head'"),
        ({"boost": {"head": 2.0}, "also": "lm_head.*"}, r"'head', .*none of also=\['lm_head\.\*'"),
        (
            {"boost": {"model.norm.weight": 2.0}, "also": "model.norm*"},
            r"trains in layers 1, 3, and is none of also=\['model\.norm\*'\]",
        ),
        ({"layers": None, "also": "head", "boost": {"mlp": 2.0}}, "layers: none is selected"),
        ({"layers": None, "also": "head", "boost": {1: 2.0}}, "does not train. Selected: none"),
        ({"layers": None, "also": "head", "boost": "decay:0.9"}, "no layer is selected"),
        (
            {"boost": {"mlp.*": 0.5, "*.up_proj.*": 2.0}},
            r"'\*\.up_proj\.\*' \(2\.0\) and 'mlp\.\*' \(0\.5\) disagree: both name "
            r"'model\.layers\.1\.mlp\.up_proj\.weight'",
        ),
        ({"boost": {(3, "mlp"): 0.5, (3, "*.up_proj"): 1.0}}, "both name 'model.layers.3"),
        (
            {"boost": {"mlp": 0.5, "*.up_proj": 2.0, (1, "mlp"): 1.0}},
            r"disagree: both name 'model\.layers\.3\.mlp\.up_proj",
        ),
        ({"also": ["head", "lm_*"], "boost": {"head": 1.0, "lm_*": 2.0}}, "name 'lm_head.weight'"),
    ],
    ids=str,
)  # fmt: skip
def test_boost_that_does_not_fit_the_model_is_refused(options, message):
    model = tiny("llama", 4)
    for source in (model, model.config):
        with pytest.raises(SelectionError, match=message):
            select_layers(source, **{"layers": [1, 3], **options})


def test_boosts_of_two_layers_that_share_a_tensor_are_refused():
    layers = linears(3)
    layers[2].weight = layers[0].weight
    model = Plain(layers=layers)
    assert rates(model, [0, 2], boost={0: 2.0, 2: 2.0}) == {"layers.0.weight": 2.0}
    with pytest.raises(SelectionError, match=r"boosts of 0 \(2.0\) and 2 \(1.0\) disagree"):
        select_layers(model, [0, 2], boost={0: 2.0})


def test_boosts_in_another_order_are_the_same_selection():
    boost = {"mlp": 0.5, (1, "mlp"): 2.0, 3: 4.0, (3, "self_attn"): 2.0, "self_attn": 1}
    turned = dict(reversed(boost.items()))
    model = config(4)
    one, other = (select_layers(model, [1, 3], boost=given) for given in (boost, turned))
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == str(other)


# Modules


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (
            "self_attn.*",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
        ),
        (
            "self_attn",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
        ),
        ("mlp.down_proj.weight", ["mlp.down_proj"]),
        ("mlp.down_proj", ["mlp.down_proj"]),
        ("*.[qk]_proj", ["self_attn.q_proj", "self_attn.k_proj"]),
        ("*norm*", ["input_layernorm", "post_attention_layernorm"]),
        (["mlp.up_proj", "self_attn.q_proj"], ["self_attn.q_proj", "mlp.up_proj"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", [1, [0, 2]], ids=str)
def test_modules_choose_tensors_inside_the_layers(layers, modules, expected):
    model = tiny("llama")
    selection = select_layers(model, layers, modules=modules)
    assert list(selection.parameters(model)) == [
        f"model.layers.{layer}.{name}.weight" for layer in selection.layers for name in expected
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_of_a_config_are_checked_as_those_of_its_model(family):
    model = tiny(family)
    name = next(n for n in select_layers(model, 0).parameters(model) if n.endswith(".weight"))
    inside = name.removeprefix(f"{FAMILIES[family].path}.0.")
    selection = select_layers(tiny_config(family), 0, modules=inside)
    assert selection == select_layers(model, 0, modules=inside)
    assert list(selection.parameters(model)) == [name]
    with pytest.raises(SelectionError, match=r"'self_attn\.q_porj' matches no tensor"):
        select_layers(tiny_config(family), 0, modules=["*", "self_attn.q_porj"])


def test_modules_are_kept_as_given_without_repeats():
    selection = select_layers(tiny("llama"), 1, modules=["mlp.*", "self_attn.q_proj", "mlp.*"])
    assert selection.modules == ("mlp.*", "self_attn.q_proj")
    assert select_layers(tiny("llama"), 1, modules="mlp.*").modules == ("mlp.*",)
    given = {"self_attn.q_proj", "mlp.*", "self_attn.k_proj"}  # in the order of this process
    assert select_layers(tiny("llama"), 1, modules=given).modules == tuple(sorted(given))
    assert select_layers(tiny("llama"), also={"head", "final_norm"}).also == ("final_norm", "head")


@pytest.mark.parametrize("model", [tiny("llama"), tiny_config("llama")], ids=["model", "config"])
@pytest.mark.parametrize(
    ("modules", "messages"),
    [
        (
            "mlp.donw_proj",
            [
                "'mlp.donw_proj' matches no tensor inside layers 1",
                "Layer 1 holds self_attn.q_proj.weight, ",
                "mlp.down_proj.weight",
            ],
        ),
        (["mlp.*", "attn"], ["glob 'attn' matches no tensor"]),
        ("mlp.gate", ["'mlp.gate' matches no tensor"]),
        ("self_attn.q_proj.weigh", ["'self_attn.q_proj.weigh' matches no tensor"]),
        (
            "lm_head",
            [
                "'lm_head' matches no tensor",
                "outside the blocks it matches 'lm_head.weight', which also='lm_head.weight'",
            ],
        ),
        ("*embed_tokens*", ["outside the blocks it matches 'model.embed_tokens.weight'"]),
        ("model.norm.weight", ["outside the blocks it matches 'model.norm.weight'"]),
        (
            "model.layers.1.mlp.down_proj.weight",
            [
                "'model.layers.1.mlp.down_proj.weight' matches no tensor",
                "globs are relative to the block",
            ],
        ),
        ("model.layers.*.mlp.*", ["globs are relative to the block, leave out the path to it"]),
        ("layers.1.mlp", ["'layers.1.mlp' matches no tensor"]),
        ([], ["got []"]),
        ("", ["got ''"]),
        (["mlp.*", ""], ["got ['mlp.*', '']"]),
        ([3], ["got [3]"]),
        (5, ["5"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_modules_that_match_nothing_are_refused_with_the_reason(model, modules, messages):
    with pytest.raises(SelectionError) as caught:
        select_layers(model, 1, modules=modules)
    for message in messages:
        assert message in str(caught.value)


def test_modules_that_miss_one_of_the_layers_are_refused():
    blocks = [Plain(mlp=nn.Linear(2, 2)), Plain(experts=linears(2)), Plain(mlp=nn.Linear(2, 2))]
    model = Plain(layers=nn.ModuleList(blocks))
    message = "layers [1] hold no tensor that modules=['mlp'] match"
    with pytest.raises(SelectionError, match=re.escape(message)) as caught:
        select_layers(model, "all", modules="mlp")
    assert "Layer 1 holds experts.0.weight, experts.1.weight" in str(caught.value)
    assert select_layers(model, [0, 2], modules="mlp").layers == (0, 2)


def test_modules_of_the_full_model_are_refused():
    with pytest.raises(SelectionError, match='"full" trains every parameter: use "all"'):
        select_layers(config(3), "full", modules="mlp.*")


# A selection in place of layers


def test_selection_is_taken_as_it_is():
    model = tiny("llama", 4)
    for selection in [
        select_layers(model, [1, 3], modules="mlp.*", boost={3: 2.0}),
        select_layers(model, "full", boost={0: 2.0}),
        select_layers(model, [1, 3], also="head", boost={"mlp.*": 2.0, "head": 0.5}),
        select_layers(model, "full", boost="decay:0.9"),
    ]:
        assert select_layers(model, selection) == selection
        assert select_layers(model.config, selection) == selection


def test_selection_with_other_modules_or_boost_keeps_the_rest():
    model = tiny("llama", 4)
    selection = select_layers(model, [1, 3], modules="mlp.*", boost={3: 2.0})
    other = select_layers(model, selection, modules="self_attn")
    assert other == select_layers(model, [1, 3], modules="self_attn", boost={3: 2.0})
    other = select_layers(model, selection, boost={1: 3.0})
    selection = select_layers(model, [1, 3], modules="mlp.*", boost={"mlp.up_proj": 2.0})
    with pytest.raises(SelectionError, match=r"boost of 'mlp\.up_proj' matches nothing"):
        select_layers(model, selection, modules="self_attn")
    assert other == select_layers(model, [1, 3], modules="mlp.*", boost={1: 3.0})


@pytest.mark.parametrize("layers", [1, "full"])
def test_selection_for_another_number_of_layers_is_refused(layers):
    selection = select_layers(config(28), layers)
    model = tiny("llama", 3)
    made = "the selection was made for 28 decoder layers, but "
    has = "LlamaForCausalLM has 3 decoder layers (0 to 2) under 'model.layers'"
    for use in [
        lambda: select_layers(model, selection),
        lambda: selection.parameters(model),
        lambda: selection.masked(model).__enter__(),
    ]:
        with pytest.raises(SelectionError, match=re.escape(made + has)):
            use()
    with pytest.raises(SelectionError, match=re.escape(made + "LlamaConfig has 3 decoder layers")):
        select_layers(model.config, selection)


def test_selection_whose_modules_the_model_does_not_have_is_refused():
    selection = select_layers(config(3), 1, modules="self_attn.q_proj")
    with pytest.raises(SelectionError, match=r"'self_attn\.q_proj' matches no tensor"):
        select_layers(tiny("gpt2", 3), selection)
    with pytest.raises(SelectionError, match=r"'self_attn\.q_proj' matches no tensor"):
        select_layers(tiny_config("gpt2", 3), selection)


# The value


def some_selections():
    return {
        "one layer": LayerSelection(num_layers=28, layers=(10,)),
        "several": LayerSelection(num_layers=28, layers=(3, 10), learning_rate_scale=(1.0, 2.0)),
        "modules": LayerSelection(num_layers=28, layers=(3,), modules=("mlp.*", "self_attn")),
        "all": LayerSelection(num_layers=3, layers=(0, 1, 2)),
        "full": LayerSelection(num_layers=3, layers=(0, 1, 2), full=True),
        "also": LayerSelection(num_layers=3, layers=(), also=("head",)),
        "boosts": LayerSelection(
            num_layers=28, layers=(3, 10), boosts=((None, "mlp.*", 0.5), (10, "self_attn", 2.0))
        ),
    }


SELECTIONS = some_selections()
each_selection = pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)


@each_selection
def test_selection_is_the_same_after_pickling_and_after_json(selection):
    text = selection.to_json()
    assert "\n" not in text
    for copy in [pickle.loads(pickle.dumps(selection)), LayerSelection.from_json(text)]:
        assert copy == selection
        assert hash(copy) == hash(selection)
        assert repr(copy) == repr(selection)


@each_selection
def test_selection_cannot_be_changed(selection):
    for field in dataclasses.fields(selection):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(selection, field.name, None)


def test_selections_that_differ_are_different_keys():
    assert len({*SELECTIONS.values(), *some_selections().values()}) == len(SELECTIONS)


@pytest.mark.parametrize(
    ("layers", "options", "text"),
    [
        (3, {}, "layer 3 of 6"),
        ([1, 3, 4, 5], {}, "layers 1, 3-5 of 6"),
        ([0, 2, 4], {}, "layers 0, 2, 4 of 6"),
        ("all", {}, "layers 0-5 of 6"),
        ("full", {}, "every parameter (6 layers)"),
        (3, {"modules": ["mlp.*", "self_attn"]}, "layer 3 of 6, modules mlp.*, self_attn"),
        ("full", {"boost": {3: 2}}, "every parameter (6 layers), learning rate scaled by {3: 2.0}"),
        (
            [1, 2],
            {"modules": "mlp", "boost": {2: 0.5, 1: 1.0}},
            "layers 1-2 of 6, modules mlp, learning rate scaled by {2: 0.5}",
        ),
        (
            [1, 2],
            {"boost": {(2, "mlp"): 1, "mlp.*": 0.5, 1: 2, "*norm*": 0.25}},
            "layers 1-2 of 6, learning rate scaled by "
            "{1: 2.0, '*norm*': 0.25, 'mlp.*': 0.5, (2, 'mlp'): 1.0}",
        ),
        (
            "last:4",
            {"boost": "decay:0.9", "also": "head"},
            "layers 2-5 of 6, also head, learning rate scaled by {2: 0.729, 3: 0.81, 4: 0.9}",
        ),
    ],
    ids=str,
)
def test_str_says_what_trains(layers, options, text):
    assert str(select_layers(config(6), layers, **options)) == text


@pytest.mark.parametrize(
    ("layers", "first", "prefix"),
    [
        (3, 3, range(3)),
        ([5, 2], 2, range(2)),
        (0, 0, range(0)),
        ("all", 0, range(0)),
        ("last:1", 5, range(5)),
        ("full", 0, range(0)),
    ],
    ids=str,
)
def test_frozen_prefix_ends_below_the_first_layer_that_trains(layers, first, prefix):
    selection = select_layers(config(6), layers)
    assert selection.first == first
    assert selection.frozen_prefix == prefix


def test_full_model_of_any_depth_has_no_frozen_prefix():
    selection = LayerSelection(num_layers=2, layers=(0, 1), full=True)
    assert list(selection.frozen_prefix) == []
    assert selection != LayerSelection(num_layers=2, layers=(0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "layers=(): expected at least one"),
        ({"layers": (3, 1)}, "layers=(3, 1): expected at least one, ascending"),
        ({"layers": (1, 1)}, "layers=(1, 1)"),
        (
            {"layers": (-1,)},
            "layers=(-1,): expected at least one, ascending, without duplicates, from 0 to 3",
        ),
        ({"layers": (4,)}, "layers=(4,)"),
        ({"layers": [1]}, "layers of a selection is a tuple, got [1]"),
        ({"modules": ["mlp"]}, "modules is None or a tuple of globs, got ['mlp']"),
        ({"learning_rate_scale": [2.0]}, "got [2.0]"),
        ({"layers": (True,)}, "True is no layer"),
        ({"layers": (1.0,)}, "1.0 is no layer"),
        ({"num_layers": 2.0}, "num_layers is 2.0"),
        ({"learning_rate_scale": (1.0, 2.0)}, "each of 1 layers, got (1.0, 2.0)"),
        ({"learning_rate_scale": (0.0,)}, "got (0.0,)"),
        ({"learning_rate_scale": (math.nan,)}, "got (nan,)"),
        ({"learning_rate_scale": (True,)}, "got (True,)"),
        *(
            ({"boosts": boosts}, f"without duplicates; got {boosts!r}")
            for boosts in [
                None,
                [(1, "mlp", 2.0)],
                ([1, "mlp", 2.0],),
                ((1, "mlp"),),
                ((0, "mlp", 2.0),),
                ((True, "mlp", 2.0),),
                ((1.0, "mlp", 2.0),),
                ((1, "", 2.0),),
                ((1, None, 2.0),),
                ((1, "mlp", 0.0),),
                ((1, "mlp", math.inf),),
                ((1, "mlp", "2"),),
                ((1, "mlp", 2.0), (1, "mlp", 2.0)),
                ((1, "mlp", 2.0), (None, "mlp", 2.0)),
            ]
        ),
        ({"full": True}, '"full" trains every parameter'),
        (
            {"full": True, "layers": (0, 1, 2, 3), "modules": ("mlp",)},
            '"full" trains every parameter',
        ),
    ],
    ids=str,
)
def test_impossible_value_is_refused(changes, message):
    with pytest.raises(SelectionError, match=re.escape(message)):
        LayerSelection(**{"num_layers": 4, "layers": (1,), **changes})


def test_numbers_of_other_libraries_become_pythons_own():
    selection = LayerSelection(
        num_layers=np.int64(4),
        layers=(np.int64(1), torch.tensor(2)),
        learning_rate_scale=(np.float32(0.5), Fraction(1, 4)),
        boosts=((1, "mlp", torch.tensor(2.0)),),
    )
    same = LayerSelection(
        num_layers=4, layers=(1, 2), learning_rate_scale=(0.5, 0.25), boosts=((1, "mlp", 2.0),)
    )
    assert selection == LayerSelection.from_json(selection.to_json()) == same
    assert hash(selection) == hash(same)


VALID = {
    "num_layers": 4,
    "layers": [1, 2],
    "learning_rate_scale": [1.0, 2.0],
    "modules": None,
    "full": False,
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not the JSON of a LayerSelection"),
        ("{", "not the JSON of a LayerSelection"),
        ("3", "is 3"),
        ("null", "is None"),
        ('"layers"', "is 'layers'"),
        ("[1, 2]", "is [1, 2]"),
        ("{}", "has the fields [], expected ['full', 'layers', "),
    ],
)
def test_text_that_is_no_selection_is_refused(text, message):
    with pytest.raises(SelectionError, match=re.escape(message)):
        LayerSelection.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "'version'"),
        ({"layers": [2, 1]}, "layers=(2, 1)"),
        ({"layers": []}, "layers=()"),
        ({"layers": [1, 4]}, "layers=(1, 4)"),
        ({"layers": [1, "2"]}, "layers[1] is '2'"),
        ({"layers": "12"}, "layers is '12', expected a list"),
        ({"layers": None}, "layers is None"),
        ({"layers": 1}, "layers is 1"),
        ({"num_layers": "4"}, "num_layers is '4'"),
        ({"learning_rate_scale": [1.0]}, "got (1.0,)"),
        ({"learning_rate_scale": [1.0, -2.0]}, "got (1.0, -2.0)"),
        ({"learning_rate_scale": [1.0, math.nan]}, "learning_rate_scale[1] is nan"),
        (
            {"learning_rate_scale": [1.0, "2"]},
            "learning_rate_scale[1] is '2', expected a finite number",
        ),
        ({"learning_rate_scale": [1.0, 10**400]}, "a number of 401 digits"),
        ({"learning_rate_scale": 2.0}, "learning_rate_scale is 2.0"),
        ({"modules": "mlp"}, "modules is 'mlp', expected a list"),
        ({"modules": ""}, "modules"),
        ({"modules": [5]}, "5"),
        ({"modules": []}, "modules"),
        ({"full": True}, '"full" trains every parameter'),
        ({"layers": [0, 1, 2, 3], "learning_rate_scale": [], "full": "no"}, "'no'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_json_of_an_impossible_selection_is_refused_by_value(changes, message):
    LayerSelection.from_json(json.dumps(VALID))
    with pytest.raises(SelectionError, match=re.escape(message)):
        LayerSelection.from_json(json.dumps(VALID | changes))


@pytest.mark.parametrize(
    "boosts",
    [2.0, "mlp", None, {"mlp": 2.0}, [1], [[]], [[3, "mlp", 2.0]], [[1, "mlp", [2.0]]],
     [[[1], "mlp", 2.0]], [[1, "mlp", math.nan]], [["1", "mlp", 2.0]],
     [[2, "a", 2.0], [1, "a", 2.0]]],
    ids=str,
)  # fmt: skip
def test_json_of_impossible_boosts_is_refused_by_value(boosts):
    possible = VALID | {"format_version": 2, "boosts": [[None, "mlp", 2.0], [1, "mlp", 3]]}
    assert LayerSelection.from_json(json.dumps(possible)).boosts == (
        (None, "mlp", 2.0),
        (1, "mlp", 3),
    )
    with pytest.raises(SelectionError, match=r"boosts.* expected|boosts of a selection are tuples"):
        LayerSelection.from_json(json.dumps(possible | {"boosts": boosts}))


def test_json_is_of_the_first_version_where_that_can_say_it():
    first = json.dumps(VALID)
    assert LayerSelection.from_json(first).to_json() == first
    boosted = select_layers(config(4), [1, 2], boost={2: 2.0, "mlp": 0.5})
    assert json.loads(boosted.to_json()) == {
        **VALID,
        "boosts": [[None, "mlp", 0.5]],
        "format_version": 2,
    }


@pytest.mark.parametrize("field", VALID)
def test_json_without_one_of_the_fields_is_refused(field):
    text = json.dumps({name: value for name, value in VALID.items() if name != field})
    with pytest.raises(SelectionError, match="expected .*" + field):
        LayerSelection.from_json(text)


# Tensors


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_all_trains_every_block_and_full_trains_every_parameter(family, tied):
    model = tiny(family, tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is embedding) is tied
    everything = dict(model.named_parameters())
    inside = {n: p for n, p in everything.items() if n.startswith(FAMILIES[family].path + ".")}
    every_block = select_layers(model, "all").parameters(model)
    full = select_layers(model, "full").parameters(model)
    assert list(every_block) == list(inside)
    assert list(full) == list(everything)
    assert all(full[name] is everything[name] for name in everything)
    assert all(parameter is not embedding for parameter in every_block.values())
    assert sum(parameter is embedding for parameter in full.values()) == 1


def test_tensors_come_in_the_order_of_the_model_whatever_the_order_of_the_globs():
    model = tiny("llama")
    selection = select_layers(model, [2, 0], modules=["mlp", "self_attn"])
    order = [name for name, _ in model.named_parameters()]
    names = list(selection.parameters(model))
    assert names == sorted(names, key=order.index)
    assert names[0] == "model.layers.0.self_attn.q_proj.weight"


def test_selecting_changes_no_flag():
    model = with_mixed_flags(tiny("llama"))
    before = flags(model)
    select_layers(model, [0, 2], modules="mlp", boost={0: 2.0}).parameters(model)
    assert flags(model) == before


def share(model, path, other):
    module, _, name = path.rpartition(".")
    other_module, _, other_name = other.rpartition(".")
    tensor = getattr(model.get_submodule(module), name)
    setattr(model.get_submodule(other_module), other_name, tensor)


@pytest.mark.parametrize(
    ("layers", "modules", "named"),
    [
        (0, None, "model.layers.2.mlp.up_proj.weight"),
        (2, None, "model.layers.0.mlp.up_proj.weight"),
        ([1, 2], "mlp", "model.layers.0.mlp.up_proj.weight"),
    ],
    ids=str,
)
def test_tensor_shared_with_a_frozen_layer_is_refused_by_name(layers, modules, named):
    model = tiny("llama")
    share(model, "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")
    before = flags(model)
    with pytest.raises(SelectionError, match=re.escape(f"shared with '{named}', which is frozen")):
        select_layers(model, layers, modules=modules)
    assert flags(model) == before


def test_tensor_of_layer_1_shared_with_layer_10_is_refused():
    model = tiny("llama", 12)
    share(model, "model.layers.1.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight")
    with pytest.raises(SelectionError, match=r"'model\.layers\.10\.mlp\.up_proj\.weight'"):
        select_layers(model, 1)
    assert select_layers(model, [1, 10]).layers == (1, 10)


def test_tensor_shared_with_something_outside_the_blocks_is_refused_by_name():
    model = tiny("llama", intermediate_size=64)
    share(model, "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(SelectionError, match=r"shared with 'model\.embed_tokens\.weight'"):
        select_layers(model, 1)


@pytest.mark.parametrize(
    ("modules", "frozen"), [("mlp.up_proj", "gate_proj"), ("mlp.gate_proj", "up_proj")]
)
def test_tensor_shared_with_one_that_the_modules_leave_out_is_refused(modules, frozen):
    model = tiny("llama")
    share(model, "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(SelectionError, match=rf"'model\.layers\.1\.mlp\.{frozen}\.weight'"):
        select_layers(model, 1, modules=modules)
    assert select_layers(model, 1, modules=["mlp.up_proj", "mlp.gate_proj"]).layers == (1,)


def test_tensor_shared_by_selected_layers_trains_once():
    model = tiny("llama")
    share(model, "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")
    for layers in ([0, 2], "all", "full"):
        names = list(select_layers(model, layers).parameters(model))
        assert "model.layers.0.mlp.up_proj.weight" in names
        assert "model.layers.2.mlp.up_proj.weight" not in names
    assert select_layers(model, 1).layers == (1,)
    assert select_layers(model, 0, modules="self_attn").layers == (0,)


def quantise(model, path, dtype):
    module, _, name = path.rpartition(".")
    tensor = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    setattr(model.get_submodule(module), name, tensor)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_integer_tensors_are_refused_only_where_they_would_train(dtype):
    model = tiny("llama")
    for k in (1, 2):
        quantise(model, f"model.layers.{k}.mlp.up_proj.weight", dtype)
    first = f"first is model.layers.1.mlp.up_proj.weight ({dtype})"
    for layers in ([1, 2], "all", "full"):
        with pytest.raises(SelectionError, match="2 selected tensors are quantised") as e:
            select_layers(model, layers)
        assert first in str(e.value)
    assert select_layers(model, 0).layers == (0,)
    assert select_layers(model, 1, modules="self_attn").layers == (1,)
    with select_layers(model, 0).masked(model) as trained:
        assert trainable(model) == set(trained)


# Masking


@pytest.mark.parametrize("start", [True, False, None], ids=["trainable", "frozen", "mixed"])
@pytest.mark.parametrize(
    ("layers", "modules"),
    [(1, None), ([0, 2], None), ("all", None), ("full", None), (1, "mlp.*"), ("all", "*norm*")],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "llava"])
def test_masked_lets_exactly_the_selected_tensors_train(family, layers, modules, start):
    if family == "gpt2" and modules == "*norm*":
        modules = "ln_*"
    model = tiny(family)
    with_mixed_flags(model) if start is None else model.requires_grad_(start)
    before = flags(model)
    selection = select_layers(model, layers, modules=modules)
    with selection.masked(model) as trained:
        assert trainable(model) == set(trained) == set(selection.parameters(model))
        assert all(trained[name] is p for name, p in model.named_parameters() if name in trained)
    assert flags(model) == before


def test_masked_gives_gradients_to_the_selected_tensors_only():
    model = tiny("llama", tie_word_embeddings=True)
    tokens = torch.arange(3, 11)[None]
    with select_layers(model, 1, modules="mlp").masked(model) as trained:
        model(input_ids=tokens, labels=tokens).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trained)
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())


def test_a_mask_holds_no_tensors_and_gives_flags_back_by_name():
    """FSDP2 puts parameters in the place of others, whose memory is free if nobody has them."""
    model = tiny("llama")
    found = weakref.ref(model.model.norm.weight)
    with select_layers(model, 1).masked(model):
        values = model.model.norm.weight.detach().clone()
        model.model.norm.weight = nn.Parameter(values, requires_grad=False)
        gc.collect()
        assert found() is None
    assert model.model.norm.weight.requires_grad


def test_tied_embedding_stays_frozen_unless_everything_trains():
    model = tiny("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with select_layers(model, "all").masked(model):
        assert not model.lm_head.weight.requires_grad
    with select_layers(model, "full").masked(model) as trained:
        assert model.lm_head.weight.requires_grad
        assert "model.embed_tokens.weight" in trained
        assert "lm_head.weight" not in trained


def test_masked_restores_after_an_exception():
    model = with_mixed_flags(tiny("llama"))
    before = flags(model)

    def stop():
        assert flags(model) != before
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), select_layers(model, 1).masked(model):
        stop()
    assert flags(model) == before


def test_masked_restores_what_was_changed_inside():
    model = with_mixed_flags(tiny("llama"))
    before = flags(model)
    with select_layers(model, 1).masked(model):
        model.requires_grad_(True)
    assert flags(model) == before


def test_masks_nest():
    model = with_mixed_flags(tiny("llama"))
    before = flags(model)
    outer, inner = select_layers(model, [0, 1]), select_layers(model, 2)
    with outer.masked(model) as trained:
        with inner.masked(model):
            assert trainable(model) == set(inner.parameters(model))
        assert trainable(model) == set(trained)
    assert flags(model) == before


def test_a_mask_can_be_entered_again():
    model = with_mixed_flags(tiny("llama"))
    before = flags(model)
    mask = select_layers(model, 1).masked(model)
    for _ in range(2):
        with mask as trained:
            model.requires_grad_(True)
            with mask:
                assert trainable(model) == set(trained)
            assert all(flags(model).values())
        assert flags(model) == before


def test_mask_of_a_wrapped_model_covers_what_the_wrapper_adds():
    wrapped = Plain(module=tiny("llama"), value_head=nn.Linear(16, 1))
    with select_layers(wrapped, 1).masked(wrapped) as trained:
        assert trainable(wrapped) == {f"module.{name}" for name in trained}
    assert trainable(wrapped) == {name for name, _ in wrapped.named_parameters()}


def test_mask_works_on_meta():
    with torch.device("meta"):
        model = tiny("llama")
    with select_layers(model, 1).masked(model) as trained:
        assert trainable(model) == set(trained)


@pytest.mark.parametrize(
    ("selection", "spoil"),
    [
        (LayerSelection(num_layers=4, layers=(1,)), None),
        (LayerSelection(num_layers=3, layers=(1,), modules=("mlp.*", "attn")), None),
        (
            LayerSelection(num_layers=3, layers=(0, 1)),
            lambda model: quantise(model, "model.layers.1.mlp.up_proj.weight", torch.int8),
        ),
        (
            LayerSelection(num_layers=3, layers=(0, 1)),
            lambda model: share(
                model, "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
            ),
        ),
    ],
    ids=["other depth", "glob without match", "integers", "shared"],
)
def test_mask_that_fails_changes_nothing(selection, spoil):
    model = with_mixed_flags(tiny("llama"))
    if spoil:
        spoil(model)
    before = flags(model)
    with pytest.raises(SelectionError), selection.masked(model):
        pytest.fail("entered")
    assert flags(model) == before


def test_mask_of_a_model_without_layers_changes_nothing():
    model = with_mixed_flags(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    before = flags(model)
    selection = LayerSelection(num_layers=2, layers=(1,))
    with pytest.raises(ModelError, match="Sequential"), selection.masked(model):
        pytest.fail("entered")
    assert flags(model) == before


# Cost


LLAMA_70B = LlamaConfig(
    num_hidden_layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)


@pytest.mark.parametrize("layers", ["middle:5", "full", "40%:60%", [-1, 10]], ids=str)
def test_config_of_70_billion_parameters_takes_under_50_ms(layers):
    def seconds():  # of this process, whatever else the machine does
        start = time.process_time()
        select_layers(LLAMA_70B, layers, boost={-1: 2.0} if layers == "full" else None)
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.05


class NoTensorOperation(TorchDispatchMode):
    """Any operation on a tensor, creating one included, is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


@pytest.mark.parametrize("source", ["config", "model"])
def test_selecting_touches_no_weight(source):
    model = tiny("llama", tie_word_embeddings=True)
    with NoTensorOperation():
        selection = select_layers(getattr(model, source, model), "middle", boost={1: 2.0})
        selection.parameters(model)
        with selection.masked(model):
            pass
