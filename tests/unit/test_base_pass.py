"""Passes that start at the layer that moved, and when they do not."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from layerrl.scores.base_pass import BasePass, ShortPasses


class Layer(nn.Module):
    """Adds a vector."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.num_calls = 0

    def forward(self, hidden):
        self.num_calls += 1
        return hidden * 1.5 + self.weight


class Model(nn.Module):
    """Layers in a row; what tests put between them is `between`."""

    def __init__(self, *layers: Any):
        super().__init__()
        self.embedding = nn.Embedding(2, 2)
        self.layers: Any = nn.ModuleList(layers or [Layer(1.0), Layer(2.0), Layer(3.0)])
        self.head = nn.Linear(2, 1)
        self.between: Any = lambda hidden: hidden
        self.order = [0, 1, 2]

    def forward(self):
        hidden = self.embedding(torch.tensor([0, 1]))
        for index in self.order:
            hidden = self.between(self.layers[index](hidden))
        return self.head(hidden).sum()


@contextmanager
def moved(layer):
    before = layer.weight.data
    layer.weight.data = before + 0.5
    try:
        yield
    finally:
        layer.weight.data = before


def values(model, passes, times=1):
    moves = {k: lambda k=k: moved(model.layers[k]) for k in range(3)}
    with torch.no_grad():
        found = [passes.values(model, moves) for _ in range(times)]
    return found[-1]


@torch.no_grad()
def plainly(model):
    after = []
    for layer in model.layers:
        with moved(layer):
            after.append(model())
    return model(), torch.stack(after)


def calls(model):
    counts = [layer.num_calls for layer in model.layers]
    for layer in model.layers:
        layer.num_calls = 0
    return counts


def test_layers_before_the_one_that_moved_do_not_run(caplog):
    model = Model()
    passes = ShortPasses(model, model.layers)
    expected = plainly(model)
    calls(model)
    assert_close(values(model, passes), expected, rtol=0, atol=0)
    assert calls(model) == [1 + 1 + 3, 1 + 2 + 3, 1 + 3 + 3]  # base, short, compared
    before = passes.passes
    assert_close(values(model, passes), expected, rtol=0, atol=0)
    assert calls(model) == [1 + 1, 1 + 2, 1 + 3]
    # Layers of 2 weights and a head of 3; the embedding is looked up.
    assert passes.passes - before == pytest.approx(1 + (9 + 7 + 5) / 9)
    assert not caplog.records
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_kind_is_compared_once():
    model = Model()
    passes = ShortPasses(model, model.layers)
    with torch.no_grad():
        for kind, expected in [("text", 1 + 1 + 1), ("images", 3), ("text", 2), ("images", 2)]:
            passes.values(model, {2: lambda: moved(model.layers[2])}, kind=kind, weight=2.0)
            assert calls(model)[2] == expected


def tied():
    model = Model()
    model.layers[0].weight = model.layers[2].weight
    return model


def handing_on_more():
    """The last layer reads what the first has left elsewhere."""
    model, left = Model(), []
    first, last = model.layers[0].forward, model.layers[2].forward

    def leaving(hidden):
        left.append(first(hidden))
        return left[-1]

    model.layers[0].forward, model.layers[2].forward = leaving, lambda h: last(h) + left.pop()
    return model


def remembering():
    """The same, where the first has left something before, too: of a pass in which it had moved."""
    model, left = Model(), {}
    first, last = model.layers[0].forward, model.layers[2].forward

    def leaving(hidden):
        left["it"] = first(hidden)
        return left["it"]

    model.layers[0].forward, model.layers[2].forward = leaving, lambda h: last(h) + left["it"]
    return model


def written_between():
    model = Model()
    model.between = lambda hidden: hidden.mul_(2)
    return model


def written_inside():
    model = Model()
    last = model.layers[2].forward
    model.layers[2].forward = lambda hidden: last(hidden.add_(1))
    return model


def returning_dicts():
    """In which no write can be seen."""
    model = Model()
    for layer in model.layers:
        layer.forward = lambda hidden, own=layer.forward: {"hidden": own(hidden)}
    model.between = lambda output: output["hidden"]
    return model


def called_twice():
    model = Model()
    model.order = [0, 1, 1, 2]
    return model


def one_module_twice():
    layer = Layer(1.0)
    return Model(layer, layer, Layer(2.0))


def random_in_the_head():
    model = Model()
    head = model.head.forward
    noise = iter(torch.randn(100))
    model.head.forward = lambda hidden: head(hidden) + next(noise)
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (tied, "another"),
        (handing_on_more, "IndexError: pop from empty list"),
        (remembering, "another"),
        (written_between, "once each, in order, or what one returned is written into"),
        (written_inside, "once each, in order, or what one returned is written into"),
        (returning_dicts, "or no tensor"),
        (called_twice, "once each, in order"),
        (one_module_twice, "once each, in order"),
    ],
)
def test_whole_passes_where_short_ones_would_differ(make, why, caplog):
    model = make()
    expected = plainly(model)
    passes = ShortPasses(model, model.layers)
    assert_close(values(model, passes, times=2), expected, rtol=0, atol=0)
    [record] = caplog.records
    assert why in record.message
    own = {name: vars(module).get("forward") for name, module in model.named_modules()}
    values(model, passes)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == own
    before = passes.passes
    values(model, passes)
    assert passes.passes - before == 4


def test_a_number_that_no_layer_moves_proves_nothing(caplog):
    model = remembering()
    passes = ShortPasses(model, model.layers)
    moves = {k: lambda k=k: moved(model.layers[k]) for k in range(3)}
    expected = plainly(model)
    with torch.no_grad():  # the weights of a micro-batch whose advantages are all zero
        passes.values(lambda: 0 * model(), moves)
    assert_close(values(model, passes), expected, rtol=0, atol=0)
    assert "another" in caplog.text


def test_what_is_random_stays_so(caplog):
    model = random_in_the_head()
    passes = ShortPasses(model, model.layers)
    values(model, passes)
    assert "another" in caplog.text


def test_a_failure_after_the_comparison(caplog):
    model = Model()
    passes = ShortPasses(model, model.layers)
    expected = values(model, passes)
    first, runs = model.layers[0].forward, []
    model.layers[0].forward = lambda hidden: (runs.append(1), first(hidden))[1]
    last = model.layers[2].forward

    def failing(hidden):
        if not runs:
            raise ValueError("nothing came before")
        runs.clear()
        return last(hidden)

    model.layers[2].forward = failing
    assert_close(values(model, passes), expected, rtol=0, atol=0)
    assert "ValueError: nothing came before" in caplog.text


def test_compiled_models_run_whole():
    model = Model()
    model._compiled_call_impl = lambda: model.forward()
    passes = ShortPasses(model, model.layers)
    assert_close(values(model, passes), plainly(model), rtol=0, atol=0)
    assert passes.passes == 4


def test_an_interruption_passes_through():
    model = Model()

    def interrupted(_):
        raise KeyboardInterrupt

    model.layers[2].forward = interrupted
    own = {name: vars(module).get("forward") for name, module in model.named_modules()}
    with pytest.raises(KeyboardInterrupt):
        values(model, ShortPasses(model, model.layers))
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == own


def test_tuples_of_tensors_are_watched_too():
    class Pair(Layer):
        def forward(self, hidden):
            return super().forward(hidden), hidden * 2

    model = Model(Pair(1.0), Pair(2.0), Pair(3.0))
    model.between = lambda pair: pair[0]
    base = BasePass(model.layers)
    with torch.no_grad(), base.recorded():
        model()
    assert base.usable
    base._returned[1][1].add_(1)
    assert not base.usable
