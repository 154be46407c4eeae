"""The reference is the policy with its first values swapped in, and costs no more than those."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as grpo_trainer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from layerrl import select_layers
from layerrl.reference import ReferenceModel
from tests.grpo import config, make
from tests.models import tiny
from tests.runs import assert_trained, bits, load, metric, saved

IDS = torch.tensor([[5, 9, 11, 3]])


@pytest.fixture
def policy() -> PreTrainedModel:
    return tiny("llama", 4)


def reference_of(policy: nn.Module, layers: Any = 2) -> ReferenceModel:
    return ReferenceModel(policy, select_layers(policy, layers).parameters(policy))


def change(policy: nn.Module, layers: Any = 2) -> None:
    """As training would: other values in the same tensors."""
    with torch.no_grad():
        for parameter in select_layers(policy, layers).parameters(policy).values():
            parameter.add_(0.1)


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def storages(model: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


class TestReferenceModel:
    def test_returns_what_the_policy_did_at_the_start(self, policy):
        reference = reference_of(policy)
        expected = policy.eval()(IDS).logits
        policy.train()
        change(policy)
        assert not torch.equal(policy(IDS).logits, expected)
        assert_close(reference(input_ids=IDS).logits, expected, rtol=0, atol=0)

    def test_computes_no_gradients(self, policy):
        logits = reference_of(policy)(IDS).logits
        assert policy(IDS).logits.requires_grad
        assert not logits.requires_grad

    def test_runs_the_policy_in_evaluation_mode(self):
        policy = tiny("llama", 4, attention_dropout=0.5).train()
        reference = reference_of(policy)
        first, second = reference(IDS).logits, reference(IDS).logits
        assert not torch.equal(policy(IDS).logits, policy(IDS).logits)
        assert_close(first, second, rtol=0, atol=0)

    def test_gives_the_policy_back_as_it_was(self, policy):
        reference = reference_of(policy)
        change(policy)
        policy.train()
        policy.model.layers[1].eval()  # modes may be mixed
        policy.lm_head.training = False
        before, mode, places = bits(policy), modes(policy), storages(policy)
        reference(IDS)
        assert_close(bits(policy), before, rtol=0, atol=0)
        assert modes(policy) == mode
        assert storages(policy) == places

    @pytest.mark.parametrize("where", ["in the model", "in the block"])
    def test_gives_the_policy_back_after_an_exception(self, policy, where):
        reference = reference_of(policy)
        change(policy)
        policy.train()
        policy.model.layers[0].mlp.eval()
        before, mode, places = bits(policy), modes(policy), storages(policy)

        def fail(*_: Any) -> None:
            raise OSError("out of cheese")

        if where == "in the model":
            policy.lm_head.register_forward_pre_hook(fail)
            with pytest.raises(OSError, match="out of cheese"):
                reference(IDS)
        else:
            with pytest.raises(OSError, match="out of cheese"), reference.swapped_in():
                fail()
        assert_close(bits(policy), before, rtol=0, atol=0)
        assert modes(policy) == mode
        assert storages(policy) == places

    def test_gives_back_tensors_and_gradients_not_copies(self, policy):
        reference = reference_of(policy)
        parameters = dict(policy.named_parameters())
        policy(IDS).logits.sum().backward()
        gradients = {name: p.grad for name, p in parameters.items()}
        reference(IDS)
        for name, parameter in policy.named_parameters():
            assert parameter is parameters[name]
            assert parameter.grad is gradients[name]
            assert parameter.requires_grad

    def test_moves_no_weight_while_swapped_in(self, policy):
        reference = reference_of(policy)
        own, initial = storages(policy), [p.data_ptr() for p in reference.initial]
        trained = list(reference.trained)
        with reference.swapped_in() as swapped:
            assert swapped is policy
            inside = storages(policy)
        assert [inside[name] for name in trained] == initial
        assert {name: place for name, place in inside.items() if name not in trained} == {
            name: place for name, place in own.items() if name not in trained
        }

    @pytest.mark.parametrize("layers", [0, [1, 3], "all"], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_keeps_the_bytes_of_the_trained_tensors(self, policy, layers, dtype):
        policy = policy.to(dtype)
        trained = select_layers(policy, layers).parameters(policy)
        reference = reference_of(policy, layers)
        kept = [*reference.parameters(), *reference.buffers()]
        assert sum(t.nbytes for t in kept) == sum(p.nbytes for p in trained.values())
        assert not any(p.requires_grad for p in reference.parameters())
        assert not {p.data_ptr() for p in kept} & {p.data_ptr() for p in policy.parameters()}

    def test_does_not_hold_the_policy_as_a_part_of_itself(self, policy):
        reference = reference_of(policy)
        assert not set(reference.modules()) & set(policy.modules())
        assert reference.train().training
        policy.eval()
        reference.train()
        assert not policy.training

    def test_names_its_tensors_as_the_policy_does(self, policy):
        reference = reference_of(policy, [1, 3])
        trained = select_layers(policy, [1, 3]).parameters(policy)
        assert list(reference.tensors) == list(reference.trained) == list(trained)
        for name, parameter in trained.items():
            assert reference.trained[name] is parameter
            assert_close(reference.tensors[name], parameter.detach(), rtol=0, atol=0)

    def test_load_tensors_changes_the_reference_and_not_the_policy(self, policy):
        reference = reference_of(policy)
        source = tiny("llama", 4, seed=1)
        before = bits(policy)
        reference.load_tensors(reference_of(source).tensors)
        assert_close(bits(policy), before, rtol=0, atol=0)
        mixed = tiny("llama", 4)
        mixed.model.layers[2].load_state_dict(source.model.layers[2].state_dict())
        assert_close(reference(IDS).logits, mixed.eval()(IDS).logits, rtol=0, atol=0)

    def test_load_tensors_takes_other_dtypes_and_refuses_missing_names(self, policy):
        reference = reference_of(policy)
        name, *_ = reference.tensors
        halves = {n: torch.full_like(t, 0.5, dtype=torch.bfloat16) for n, t in bits(policy).items()}
        reference.load_tensors(halves)
        assert reference.tensors[name].dtype == torch.float32
        assert all((tensor == 0.5).all() for tensor in reference.tensors.values())
        with pytest.raises(KeyError, match=name):
            reference.load_tensors({})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the models that TRL loads by name."""
    names: list[str] = []
    load_by_name = grpo_trainer.create_model_from_path

    def noting(name: str, *args: Any, **kwargs: Any) -> nn.Module:
        names.append(str(name))
        return load_by_name(name, *args, **kwargs)

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", noting)
    return names


def initial(trainer: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in trainer.ref_model.tensors.items()}


class TestTrainer:
    @pytest.mark.parametrize("as_path", [False, True])
    def test_loads_no_second_model(self, folder, loaded, tmp_path, as_path):
        model = str(folder) if as_path else load(folder)
        trainer = make(model, tmp_path / "out", selection=2, beta=0.04)
        assert loaded == ([str(folder)] if as_path else [])
        assert isinstance(trainer.ref_model, ReferenceModel)
        trainer.train()
        assert any(metric(trainer, "kl"))

    def test_plain_trl_loads_one(self, folder, loaded, tmp_path):
        make(load(folder), tmp_path / "out", beta=0.04)
        assert loaded == [str(folder)]

    def test_keeps_one_model_in_memory(self, folder, tmp_path):
        model = load(folder)
        counts = []
        for selection in (2, "full"):
            gc.collect()
            before = sum(type(thing) is type(model) for thing in gc.get_objects())
            trainer = make(model, tmp_path / "out", selection=selection, beta=0.04)
            gc.collect()
            after = sum(type(thing) is type(model) for thing in gc.get_objects())
            counts.append(after - before)
            assert trainer.model is model
        assert counts == [0, 0]

    @pytest.mark.parametrize("name", ["", "/nowhere", "nobody/nothing"])
    def test_refers_to_the_instance_wherever_its_config_points(self, folder, tmp_path, name):
        model = load(folder)
        change(model, "all")
        model.config._name_or_path = name
        before = bits(model)
        trainer = make(model, tmp_path / "out", selection=2, beta=0.04)
        for key, tensor in trainer.ref_model.tensors.items():
            assert_close(tensor, before[key], rtol=0, atol=0)
        trainer.train()
        assert metric(trainer, "kl")[0] == 0.0
        assert metric(trainer, "kl")[-1] > 0.0
        assert_trained(trainer, before, [2])

    def test_stays_what_it_was_during_training(self, folder, tmp_path):
        trainer = make(load(folder), tmp_path / "out", selection=2, beta=0.04, num_iterations=2)
        start = initial(trainer)
        trainer.train()
        assert_close(initial(trainer), start, rtol=0, atol=0)
        assert not torch.equal(
            trainer.model.model.layers[2].mlp.up_proj.weight,
            start["model.layers.2.mlp.up_proj.weight"],
        )

    def test_follows_the_policy_where_it_is_synced(self, folder, tmp_path):
        trainer = make(
            load(folder),
            tmp_path / "out",
            selection=2,
            beta=0.04,
            sync_ref_model=True,
            ref_model_sync_steps=3,
            ref_model_mixup_alpha=0.25,
        )
        start = initial(trainer)
        trainer.train()
        policy = bits(trainer.model)
        for name, tensor in trainer.ref_model.tensors.items():
            expected = start[name] * 0.75 + policy[name] * 0.25
            assert_close(tensor.detach(), expected, rtol=0, atol=1e-6)
            assert not torch.equal(tensor, start[name])

    @pytest.mark.parametrize("synced", [False, True])
    def test_arguments_are_as_given_when_it_was_made(self, folder, tmp_path, synced):
        given = config(tmp_path / "out", beta=0.04, sync_ref_model=synced)
        trainer = make(load(folder), tmp_path, selection=2, arguments={"args": given})
        assert trainer.args is given
        assert (given.beta, given.sync_ref_model) == (0.04, synced)
        assert trainer.beta == 0.04

    @pytest.mark.parametrize("synced", [False, True])
    @pytest.mark.parametrize(
        ("broken", "error"),
        [
            pytest.param({"train_dataset": None}, ValueError, id="by-trl"),
            pytest.param({"selection": 7}, ValueError, id="by-layerrl"),
            pytest.param({"reward_funcs": 3, "callbacks": 3}, Exception, id="anywhere"),
        ],
    )
    def test_arguments_are_as_given_when_it_could_not_be_made(
        self, folder, tmp_path, synced, broken, error
    ):
        given = config(tmp_path / "out", beta=0.04, sync_ref_model=synced)
        with pytest.raises(error):
            make(str(folder), tmp_path, selection=2, arguments={"args": given, **broken})
        assert (given.beta, given.sync_ref_model) == (0.04, synced)

    def test_there_is_none_where_beta_is_zero(self, folder, loaded, tmp_path):
        trainer = make(load(folder), tmp_path / "out", selection=2)
        assert trainer.ref_model is None
        assert trainer.beta == 0.0
        assert loaded == []

    def test_syncing_without_beta_is_refused_as_in_trl(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"`beta=0\.0`"):
            make(load(folder), tmp_path / "out", selection=2, sync_ref_model=True)

    def test_full_copies_the_model_that_was_passed(self, folder, loaded, tmp_path):
        model = load(folder)
        trainer = make(model, tmp_path / "out", selection="full", beta=0.04)
        assert loaded == []
        assert trainer.ref_model.tensors.keys() == dict(model.named_parameters()).keys()
