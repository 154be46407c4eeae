"""Activations are kept within a budget that was measured, and change nothing."""

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from layerrl import select_layers
from layerrl.blocks import find_blocks
from layerrl.checkpointing import KeptActivations
from layerrl.errors import SelectionError
from tests.grpo import make
from tests.models import tiny
from tests.runs import REENTRANT, assert_same_run, load, pair, saved, train

IDS = torch.tensor([[5, 9, 11, 3], [7, 8, 3, 12]])
FIRST = 1
PLENTY = 2**30


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny("llama", 4).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def kept_in(model: nn.Module, max_bytes: int) -> KeptActivations:
    return KeptActivations(model, select_layers(model, FIRST), max_bytes)


def flags(model: nn.Module) -> list[bool]:
    return [layer.gradient_checkpointing for layer in find_blocks(model).modules]


def saved_bytes(model: nn.Module) -> int:
    """What one layer that is not checkpointed keeps for its backward, counted here."""
    layer = find_blocks(model).modules[FIRST]
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    sizes: dict[int, int] = {}
    given: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in given:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(*IDS.shape, 16, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    given += [hidden.untyped_storage().data_ptr()]
    layer.gradient_checkpointing = False
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        _ = layer(hidden, position_embeddings=rotary)
    layer.gradient_checkpointing = True
    return sum(sizes.values())


def scored(kept: KeptActivations, model: nn.Module) -> None:
    with torch.no_grad(), kept.during(IDS.numel()):
        model(input_ids=IDS)


def kept_layers(kept: KeptActivations, model: nn.Module, num_tokens: int = IDS.numel()) -> int:
    with kept.during(num_tokens):
        return flags(model).count(False)


class TestKeptActivations:
    def test_measures_what_a_layer_saves(self, model):
        kept = kept_in(model, PLENTY)
        scored(kept, model)
        assert kept._bytes_per_token * IDS.numel() == pytest.approx(saved_bytes(model), rel=0.05)

    @pytest.mark.parametrize("num", [0, 1, 2, 3, 9])
    def test_keeps_as_many_upper_layers_as_fit(self, model, num):
        kept = kept_in(model, PLENTY)
        scored(kept, model)
        a_layer = kept._bytes_per_token * IDS.numel()
        kept._max_bytes = int(num * a_layer + 1)
        with kept.during(IDS.numel()):
            expected = min(num, 4 - FIRST)
            assert flags(model) == [True] * (4 - expected) + [False] * expected
        assert flags(model) == [True] * 4

    def test_more_tokens_leave_room_for_fewer_layers(self, model):
        kept = kept_in(model, PLENTY)
        scored(kept, model)
        kept._max_bytes = int(2 * kept._bytes_per_token * IDS.numel() + 1)
        assert kept_layers(kept, model) == 2
        assert kept_layers(kept, model, 2 * IDS.numel()) == 1
        with kept.during(IDS.numel(), held=kept._max_bytes // 2):
            assert flags(model).count(False) == 1

    def test_nothing_is_kept_or_measured_without_a_budget(self, model):
        kept = kept_in(model, 0)
        scored(kept, model)
        assert kept_layers(kept, model) == 0
        assert kept._bytes_per_token == 0

    def test_measures_in_the_first_policy_pass_where_none_came_before(self, model):
        kept = kept_in(model, PLENTY)
        with kept.during(IDS.numel()):
            assert flags(model) == [True, False, True, True]
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert kept_layers(kept, model) == 3

    def test_measuring_holds_on_to_nothing(self, model):
        def tensors() -> int:
            return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

        kept = kept_in(model, PLENTY)
        scored(kept, model)
        gc.collect()
        gc.disable()  # a cycle would wait for it
        try:
            before = tensors()
            for _ in range(3):
                scored(kept, model)
                kept._bytes_per_token = 0.0
                with kept.during(IDS.numel()):
                    model(input_ids=IDS, labels=IDS).loss.backward()
                model.zero_grad()
            assert tensors() == before
        finally:
            gc.enable()

    def test_gradients_are_the_same(self, model):
        def gradients() -> dict[str, torch.Tensor]:
            model.zero_grad()
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        kept = kept_in(model, PLENTY)
        with select_layers(model, FIRST).masked(model):
            expected = gradients()
            with kept.during(IDS.numel()):
                assert_close(gradients(), expected, rtol=0, atol=0)
            with kept.during(IDS.numel()):
                assert_close(gradients(), expected, rtol=0, atol=0)

    def test_after_an_exception_nothing_stays_changed(self, model):
        kept = kept_in(model, PLENTY)

        def stopped(kept: KeptActivations) -> None:
            with kept.during(IDS.numel()):
                model(input_ids=IDS)
                raise OSError("out of cheese")

        for grad in (False, True, True):
            with torch.set_grad_enabled(grad), pytest.raises(OSError, match="cheese"):
                stopped(kept)
            assert flags(model) == [True] * 4
            assert all("forward" not in vars(layer) for layer in find_blocks(model).modules)


class TestTrainer:
    @pytest.mark.parametrize("kind", [{}, REENTRANT], ids=["default", "reentrant"])
    @pytest.mark.parametrize("beta", [0.0, 0.04])
    @pytest.mark.parametrize("activation_bytes", [None, 0, PLENTY])
    def test_is_layers_frozen_by_hand_whatever_the_budget(
        self, tmp_path, kind, beta, activation_bytes
    ):
        changes = {"beta": beta, "masked": {"activation_bytes": activation_bytes}, **kind}
        trainers = pair(saved(tmp_path / "base"), layers=(FIRST,), **changes)
        train(*trainers)
        assert_same_run(*trainers)

    @pytest.mark.parametrize(("budget", "expected"), [(0, 0), (PLENTY, 3)])
    def test_keeps_activations_in_a_real_run(self, tmp_path, budget, expected):
        arguments = {"activation_bytes": budget}
        model = load(saved(tmp_path / "base"))
        trainer = make(
            model, tmp_path / "run", selection=FIRST, beta=0.04, num_iterations=2,
            arguments=arguments, max_steps=4,
        )  # fmt: skip
        found, score = [], trainer._compute_loss

        def noting(*args: Any, **kwargs: Any) -> Any:
            handle = (
                find_blocks(model)
                .modules[-1]
                .register_forward_pre_hook(
                    lambda *_: found.append(flags(model)[FIRST:].count(False))
                )
            )
            try:
                return score(*args, **kwargs)
            finally:
                handle.remove()

        trainer._compute_loss = noting
        trainer.train()
        assert set(found) == {expected}

    @pytest.mark.parametrize("beta", [0.0, 0.04])
    def test_by_default_spends_what_a_second_model_would_have_taken(self, tmp_path, beta):
        model = load(saved(tmp_path / "base"))
        trainer = make(model, tmp_path / "run", selection=FIRST, beta=beta)
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        assert trainer._passes._kept._max_bytes == (frozen if beta else 0)

    @pytest.mark.parametrize("value", [-1, 1.5, True, "1 GB"])
    @pytest.mark.parametrize("name", ["activation_bytes", "prefix_cache_bytes"])
    def test_a_budget_that_is_no_number_of_bytes_is_refused(self, tmp_path, name, value):
        arguments: dict[str, Any] = {name: value}
        with pytest.raises(SelectionError, match=rf"{name} is .*, expected a number of bytes"):
            make(tiny("llama"), tmp_path, selection=1, arguments=arguments)

    def test_a_switch_that_is_none_is_refused(self, tmp_path):
        with pytest.raises(SelectionError, match="master_weights is 'no', expected True or False"):
            make(tiny("llama"), tmp_path, selection=1, arguments={"master_weights": "no"})
