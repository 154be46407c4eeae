"""Scores without training: against plain autograd, layer by layer."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from layerrl import select_layers
from layerrl.blocks import find_blocks
from layerrl.errors import ProbeError
from layerrl.scores.gains import held_out_gains
from layerrl.scores.gradient import warn_of_noise, widened
from layerrl.scores.position import position_scores
from layerrl.trained import TrainedLayers
from tests.models import tiny
from tests.operations import during

EPSILON = 1e-8


@pytest.fixture(params=["llama", "qwen3_moe", "gpt2"])
def model(request):
    if request.param == "qwen3_moe":  # its kernels know no float64
        return tiny(request.param, 4, num_experts_per_tok=1).eval()
    return tiny(request.param, 4).double().eval()


@pytest.fixture
def tokens_PBT():
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, 60, (6, 4, 9), generator=draw)


def loss(model, tokens_BT, share=1.0):
    logits = model(input_ids=tokens_BT, use_cache=False).logits
    return share * torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens_BT[:, 1:])


def plainly(model, tokens_PBT):
    """One layer after the other, every prompt's gradient kept."""
    rows = []
    for layer in range(4):
        parameters = [p for _, p in find_blocks(model).named_parameters(layer)]
        found = []
        for tokens_BT in tokens_PBT:
            gradients = torch.autograd.grad(loss(model, tokens_BT), parameters, allow_unused=True)
            pairs = zip(gradients, parameters, strict=True)
            filled = [torch.zeros_like(p) if g is None else g for g, p in pairs]
            found.append(torch.cat([g.flatten() for g in filled]))
        gains = [found[0].sum() * 0]
        for number in range(1, len(found)):
            mean = torch.stack(found[:number]).mean(0)
            gains.append(found[number] @ (mean / (mean.abs() + EPSILON)))
        rows.append(torch.stack(gains))
    return torch.stack(rows, dim=1).double()


def gains(model, prompts, layers="all"):
    selection = select_layers(model, layers)
    with selection.masked(model):
        return held_out_gains(TrainedLayers(model, selection).by_layer, prompts)


def test_is_what_plain_autograd_gives(model, tokens_PBT):
    found = gains(model, [[lambda t=t: loss(model, t)] for t in tokens_PBT])
    exact = model.dtype == torch.double
    tolerance = {"rtol": 1e-6, "atol": 1e-12} if exact else {"rtol": 1e-3, "atol": 1e-4}
    assert_close(found, plainly(model, tokens_PBT), **tolerance)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("parts", [2, 4])
def test_does_not_depend_on_micro_batches(parts, tokens_PBT):
    model = tiny("llama", 4).double()
    prompts = [
        [lambda c=chunk: loss(model, c, 1 / parts) for chunk in t.chunk(parts)] for t in tokens_PBT
    ]
    assert_close(gains(model, prompts), plainly(model, tokens_PBT), rtol=1e-6, atol=1e-12)


def test_adds_up_what_processes_have_of_a_prompt(tokens_PBT):
    """Two with the same half each, and a prompt of which this one has nothing."""
    model = tiny("llama", 4).double()
    halves = [[lambda t=t: loss(model, t, 0.5)] for t in tokens_PBT]
    with select_layers(model, "all").masked(model):
        layers = TrainedLayers(model, select_layers(model, "all")).by_layer
        found = held_out_gains(layers, halves, add_up=lambda gradient: gradient.mul_(2))
        elsewhere = held_out_gains(layers, [[], *halves], add_up=lambda gradient: gradient.add_(1))
    assert_close(found, plainly(model, tokens_PBT), rtol=1e-6, atol=1e-12)
    assert elsewhere[1].all()
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_scores_the_same_without_the_others(tokens_PBT):
    model = tiny("llama", 4)
    prompts = [[lambda t=t: loss(model, t)] for t in tokens_PBT]
    assert_close(gains(model, prompts, [1, 3]), gains(model, prompts)[:, [1, 3]], rtol=0, atol=0)


def test_a_prompt_without_a_loss_gains_nothing(tokens_PBT):
    model = tiny("llama", 4)
    prompts = [[lambda t=t: loss(model, t)] for t in tokens_PBT]
    with_empty = gains(model, [*prompts[:3], [], *prompts[3:]])
    assert not with_empty[3].any()
    assert gains(model, [[], []]).tolist() == [[0.0] * 4] * 2


def test_gradients_are_freed_as_they_arrive(tokens_PBT):
    """When the first layer's gradient is there, the last one's is gone."""
    model = tiny("llama", 4)
    first, last = (find_blocks(model).modules[i].mlp.down_proj.weight for i in (0, -1))
    seen = []
    first.register_post_accumulate_grad_hook(lambda _: seen.append(last.grad))
    gains(model, [[lambda t=t: loss(model, t)] for t in tokens_PBT])
    assert seen == [None] * len(tokens_PBT)


def test_a_prompt_is_read_from_the_device_once(monkeypatch):
    """Every read waits until the device has done all that it was given."""
    copies, copy = [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (copies.append(tensor), copy(tensor))[1])
    model = tiny("llama", 4)
    prompts = [[lambda: sum(p.square().sum() for p in model.model.layers.parameters())]] * 5
    operations = during(lambda: gains(model, prompts))
    assert len(copies) == len(prompts)
    assert operations.num_reads == len(prompts)  # whether the copy is finite


@pytest.mark.parametrize("odd", [0, 2])
def test_a_gradient_that_is_not_finite_is_named(odd, tokens_PBT):
    model = tiny("llama", 4)

    def prompt(number):
        return [lambda: loss(model, tokens_PBT[number], float("inf") if number == odd else 1.0)]

    with pytest.raises(ProbeError, match=rf"prompt {odd} is not finite in the layers \[0, 1, 2, 3"):
        gains(model, [prompt(number) for number in range(4)])


def test_nothing_hangs_on_the_model_after_an_exception(tokens_PBT):
    model = tiny("llama", 4)

    def failing():
        raise OSError("out of cheese")

    with pytest.raises(OSError, match="cheese"):
        gains(model, [[lambda: loss(model, tokens_PBT[0])], [failing]])
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_positions():
    assert position_scores(5, 0.5) == [-0.5, -0.25, 0.0, -0.25, -0.5]
    assert position_scores(1, 0.0) == [0.0]


def test_an_order_that_may_be_noise_is_said():
    """As of sorting-llama with 128 prompts and seed 1, whose order said nothing of its layers."""
    draw = torch.Generator().manual_seed(0)
    gains_PL = torch.randn(128, 12, generator=draw, dtype=torch.double) + torch.randn(128, 1)
    trainer = SimpleNamespace(reward_func_names=["right"], num_generations=8)
    rollouts: Any = SimpleNamespace(with_signal=[True] * 128, trainer=trainer)
    gains_P = gains_PL[32:].mean(dim=1)
    error = gains_P.std() / 96**0.5
    weak, clear = (gains_PL - gains_P.mean() + errors * error for errors in (0.5, 3.0))
    with pytest.warns(UserWarning, match=r"0\.5 standard errors .* About 204. prompts would tell"):
        warn_of_noise(weak[32:], rollouts)
    with warnings.catch_warnings(action="error"):
        warn_of_noise(clear[32:], rollouts)
    with pytest.warns(UserWarning, match=r"1\.5 standard errors"):  # of prompts that count twice
        warn_of_noise(clear[32:], rollouts, error_times=2.0)


@pytest.mark.parametrize("mean", [0.0, 1e-200, 1e-3])
def test_no_number_of_prompts_is_no_advice(mean):
    gains_PL = torch.tensor([[1.0], [-1.0]] * 8, dtype=torch.double) + mean
    trainer = SimpleNamespace(reward_func_names=["right"], num_generations=8)
    rollouts: Any = SimpleNamespace(with_signal=[True] * 16, trainer=trainer)
    with pytest.warns(UserWarning, match=r"noise\. No number of prompts that could be had"):
        warn_of_noise(gains_PL, rollouts)


def test_gains_that_count_twice_are_further_apart():
    gains_PL = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 9.0]], dtype=torch.double)
    assert widened(gains_PL, 1.0) is gains_PL
    expected = torch.tensor([[-1.0, -3.0], [3.0, -3.0], [7.0, 15.0]], dtype=torch.double)
    assert_close(widened(gains_PL, 2.0), expected, rtol=0, atol=0)
