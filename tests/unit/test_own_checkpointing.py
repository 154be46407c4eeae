"""Models that checkpoint their layers in code of their own, as code on the hub does."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from layerrl import select_layers
from layerrl.activations import backward_from_first_trained
from tests.grpo import make
from tests.models import tiny
from tests.runs import assert_same_run, train
from tests.unit.test_backward import IDS, Visits, flags, gradients, hooks

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
WAYS = ["positional", "by name", "in a tuple", "in place"]


class Double(torch.autograd.Function):
    """A function with a backward of its own, in a layer."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 2


class Own(nn.Module):
    """A layer that checkpoints what is in it."""

    def __init__(self, layer: nn.Module, reentrant: bool, way: str) -> None:
        super().__init__()
        self.layer, self.reentrant, self.way = layer, reentrant, way

    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        def run(hidden: Tensor) -> Tensor:
            return self.layer.forward(Double.apply(hidden) / 2, **kwargs)  # pyright: ignore

        if isinstance(hidden_states, tuple):
            [hidden_states] = hidden_states
        if self.way == "in place":
            hidden_states.add_(1)
        if torch.is_grad_enabled() and self.training:
            return checkpoint(run, hidden_states, use_reentrant=self.reentrant)
        return run(hidden_states)


class Calling(nn.ModuleList):
    """A list whose layers are called in the way that they ask for."""

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        return [self._call(layer) for layer in list(self)[index]]

    @staticmethod
    def _call(layer: Any) -> Any:
        if layer.way == "by name":
            return lambda hidden, **kwargs: layer(hidden_states=hidden, **kwargs)
        if layer.way == "in a tuple":
            return lambda hidden, **kwargs: layer((hidden,), **kwargs)
        return layer


class Around(nn.ModuleList):
    """A list around whose layers, or segments of layers, the model checkpoints."""

    def __init__(self, layers: Any, reentrant: bool, size: int, function: Any = checkpoint) -> None:
        super().__init__(layers)
        self.reentrant, self.size, self.function = reentrant, size, function

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        layers = list(self)[index]
        starts = range(0, len(layers), self.size)
        return [self._segment(layers[start : start + self.size]) for start in starts]

    def _segment(self, layers: list[nn.Module]) -> Any:
        def run(hidden: Tensor, **kwargs: Any) -> Tensor:
            def through(hidden: Tensor) -> Tensor:
                for layer in layers:
                    hidden = layer(hidden, **kwargs)
                return hidden

            if torch.is_grad_enabled() and self.training:
                return self.function(through, hidden, use_reentrant=self.reentrant)
            return through(hidden)

        return run


class Reentrant(torch.autograd.Function):
    """Checkpointing as other libraries have it, without torch's."""

    @staticmethod
    def forward(ctx, run, hidden):
        ctx.run = run
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return run(hidden)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        [hidden] = ctx.saved_tensors
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            torch.autograd.backward(ctx.run(hidden), grad)
        return None, hidden.grad


class RemoteLayer(LlamaDecoderLayer):
    """A layer from outside transformers, which does not heed its flag."""

    __call__ = nn.Module.__call__  # where transformers before 5.23 checkpoints

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = LlamaDecoderLayer.forward
        return getattr(forward, "__wrapped__", forward)(self, *args, **kwargs)


def own(reentrant: bool, way: str = "positional", dropout: float = 0.0) -> Any:
    model = tiny("llama", 4, attention_dropout=dropout).train()
    model.model.layers = Calling(Own(layer, reentrant, way) for layer in model.model.layers)
    model.enable_input_require_grads()
    return model


def around(reentrant: bool, size: int, dropout: float = 0.0, function: Any = checkpoint) -> Any:
    model = tiny("llama", 4, attention_dropout=dropout).train()
    for layer in model.model.layers:
        layer.__class__ = RemoteLayer
    model.model.layers = Around(model.model.layers, reentrant, size, function)
    model.enable_input_require_grads()
    return model


def seeded_gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return gradients(model)


def loss_inside(model: Any, selection: Any) -> dict[str, Tensor]:
    """The gradients where the loss is computed inside, and the backward runs outside."""
    torch.manual_seed(0)
    model.zero_grad()
    with backward_from_first_trained(model, selection):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@REENTRANT
@pytest.mark.parametrize("layers", [0, 2, 3, [1, 3]], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_layers_that_checkpoint_themselves(reentrant, layers, way):
    if way == "in place" and layers == 0:
        pytest.skip("what leaves the embedding is a leaf, in plain TRL too")
    model = own(reentrant, way)
    selection = select_layers(model, layers)
    with selection.masked(model) as trained:
        expected = gradients(model) if way != "in place" else None
        before = hooks(model), flags(model)
        visits = Visits(model) if way == "positional" else None
        after = hooks(model)
        for _ in range(2):
            found = loss_inside(model, selection)
        assert hooks(model) == after
        assert flags(model) == before[1]
    assert found.keys() == trained.keys()
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    if expected is not None:
        assert_close(found, expected, rtol=0, atol=0)
    if visits is not None:
        assert visits.visited == [0] * selection.first + [2] * (4 - selection.first)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@REENTRANT
def test_a_model_that_checkpoints_around_its_layers(reentrant, size, dropout, caplog):
    model = around(reentrant, size, dropout)
    selection = select_layers(model, 2)
    with selection.masked(model) as trained, caplog.at_level(logging.WARNING):
        expected = seeded_gradients(model)
        before = hooks(model)
        for _ in range(2):
            found = loss_inside(model, selection)
            assert found.keys() == trained.keys()
            assert_close(found, expected, rtol=0, atol=0)
        assert hooks(model) == before
    said = [r for r in caplog.records if "around its layers" in r.getMessage()]
    assert len(said) == reentrant


@pytest.mark.parametrize("size", [1, 3])
def test_a_model_with_a_checkpointing_that_is_not_torch_s(size):
    def function(run: Any, hidden: Tensor, **_: Any) -> Any:
        return Reentrant.apply(run, hidden)

    model = around(True, size, function=function)
    selection = select_layers(model, 2)
    with selection.masked(model):
        expected = gradients(model)
        assert_close(loss_inside(model, selection), expected, rtol=0, atol=0)


def test_a_pass_without_gradient_says_nothing_of_the_layers(caplog):
    model = own(True)
    selection = select_layers(model, 2)
    with selection.masked(model), backward_from_first_trained(model, selection):
        with torch.no_grad():
            model(input_ids=IDS)
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert not caplog.records


def test_trl_s_own_hook_is_found_too():
    model = own(True)
    model.disable_input_require_grads()

    def make_inputs_require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(make_inputs_require_grad)
    selection = select_layers(model, 2)
    visits = Visits(model)
    with selection.masked(model):
        loss_inside(model, selection)
    assert visits.visited == [0, 0, 1, 1]


@REENTRANT
@pytest.mark.parametrize("where", ["in", "around"])
def test_trains_as_the_plain_trainer_does(tmp_path, reentrant, where):
    def trainer(name: str, **selection: Any) -> Any:
        model = own(reentrant) if where == "in" else around(reentrant, 2)
        model.disable_input_require_grads()
        for name_, parameter in model.named_parameters():
            parameter.requires_grad_(".layers.2." in name_)
        changes = {"gradient_checkpointing": True, "max_steps": 2, "num_iterations": 2}
        return make(model, tmp_path / name, **changes, **selection)

    plain, masked = trainer("plain"), trainer("masked", selection=2)
    train(plain, masked)
    assert_same_run(masked, plain)
