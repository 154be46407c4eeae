"""The reference is the policy with its first values swapped in, and costs no more than those."""

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as grpo_trainer
from datasets import Dataset
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel
from trl import DPOConfig
from trl.experimental.bema_for_ref_model import BEMACallback
from trl.experimental.bema_for_ref_model import DPOTrainer as BEMADPOTrainer

from layerrl import LayerMaskedMixin, select_layers
from layerrl.errors import ModelError, SelectionError
from layerrl.reference import ReferenceModel
from tests.devices import DEVICE, on_any_device, on_cpu
from tests.grpo import QUIETLY, config, make, tokenizer
from tests.models import tiny
from tests.runs import (
    assert_same_run,
    assert_trained,
    bits,
    in_layers,
    load,
    metric,
    saved,
    train,
)

pytestmark = on_any_device

IDS = torch.tensor([[5, 9, 11, 3]], device=DEVICE)


@pytest.fixture
def policy() -> PreTrainedModel:
    return tiny("llama", 4).to(DEVICE)


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
        policy = tiny("llama", 4, attention_dropout=0.5).to(DEVICE).train()
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
        source = tiny("llama", 4, seed=1)  # on the CPU, as what is read from a file
        before = bits(policy)
        reference.load_tensors(reference_of(source).tensors)
        assert_close(bits(policy), before, rtol=0, atol=0)
        mixed = tiny("llama", 4).to(DEVICE)
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


class TestAsTheModelThatItStandsFor:
    """Compared with a second model, which plain TRL has."""

    @pytest.fixture(params=[2, "full"], ids=str)
    def both(self, request, policy) -> tuple[ReferenceModel, PreTrainedModel]:
        second = copy.deepcopy(policy).eval()
        reference = reference_of(policy, request.param)
        change(policy, request.param)
        return reference, second

    def test_generates(self, both):
        reference, second = both
        [policy] = reference._policy
        policy.train()
        before, mode = bits(policy), modes(policy)
        settings = {"max_new_tokens": 8, "do_sample": False}
        found = reference.generate(IDS, **settings)
        assert_close(found, second.generate(IDS, **settings), rtol=0, atol=0)
        assert not torch.equal(policy.eval().generate(IDS, **settings), found)
        assert_close(bits(policy), before, rtol=0, atol=0)
        assert modes(policy.train()) == mode

    def test_has_its_settings(self, both):
        reference, second = both
        assert reference.config.to_dict() == second.config.to_dict()
        assert reference.generation_config.to_dict() == second.generation_config.to_dict()
        assert (reference.device, reference.dtype) == (second.device, second.dtype)
        assert reference.num_parameters() == second.num_parameters()
        assert reference.can_generate()
        reference.config.pad_token_id = 7
        assert reference._policy[0].config.pad_token_id == 0
        with pytest.raises(AttributeError, match="nonsense"):
            _ = reference.nonsense
        assert not hasattr(reference, "module")

    def test_has_its_names_and_values(self, both):
        reference, second = both
        expected = dict(second.named_parameters())
        found = dict(reference.named_parameters())
        assert list(found) == list(expected)
        assert_close(found, expected, rtol=0, atol=0)
        one_by_one = {name: reference.get_parameter(name) for name in expected}
        assert_close(one_by_one, expected, rtol=0, atol=0)
        assert_close(reference.state_dict(), second.state_dict(), rtol=0, atol=0)
        kept = reference.state_dict(keep_vars=True)
        assert_close(kept, second.state_dict(), rtol=0, atol=0)
        assert not any(p.requires_grad for p in [*found.values(), *one_by_one.values()])

    def test_has_its_parts(self, both):
        reference, second = both

        def values(model: Any) -> list[Tensor]:
            hidden = model.model(IDS).last_hidden_state
            return [
                hidden,
                model.lm_head(hidden),
                model.lm_head.weight,
                model.get_output_embeddings().weight,
                model.get_input_embeddings()(IDS),
                model.base_model.layers[2].mlp.down_proj.weight,
                [*model.model.layers][2].mlp(hidden),
                model.get_submodule("model.layers.2.mlp").state_dict()["up_proj.weight"],
                dict(model.model.layers.named_parameters())["2.mlp.up_proj.weight"],
            ]

        found, expected = values(reference), values(second)
        assert_close(found, expected, rtol=0, atol=0)
        assert not any(tensor.requires_grad for tensor in found)
        assert len(reference.model.layers) == 4

    def test_is_saved_as_it(self, both, tmp_path):
        reference, second = both
        reference.save_pretrained(tmp_path)
        assert_close(bits(load(tmp_path)), bits(second), rtol=0, atol=0)

    @pytest.mark.parametrize(
        "through",
        [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))],
        ids=["deepcopy", "pickle"],
    )
    def test_can_be_copied(self, both, through):
        reference, second = both
        again = through(reference)
        assert_close(again(IDS).logits, second(IDS).logits, rtol=0, atol=0)
        assert set(again._policy[0].parameters()).isdisjoint(reference._policy[0].parameters())

    def test_cannot_be_trained_moved_or_cast(self, both):
        reference, second = both
        for same in (
            reference.to(torch.float16),
            reference.half().requires_grad_(True),
            reference.eval(),
            reference.train(),
        ):
            assert same is reference
        for parameter in reference.named_parameters():
            parameter[1].requires_grad_(True)
        reference.model.requires_grad_(True)
        logits = reference(IDS).logits
        assert not logits.requires_grad
        assert_close(logits, second(IDS).logits, rtol=0, atol=0)

    @pytest.mark.parametrize(
        "change",
        [
            lambda r: r.gradient_checkpointing_enable(),
            lambda r: r.resize_token_embeddings(70),
            lambda r: r.set_input_embeddings(nn.Embedding(2, 2)),
            lambda r: r.model.set_input_embeddings(nn.Embedding(2, 2)),
        ],
        ids=["checkpointing", "vocabulary", "embedding", "embedding of a part"],
    )
    def test_refuses_what_would_change_the_policy(self, both, change):
        with pytest.raises(ModelError, match="would change the model that trains"):
            change(both[0])

    def test_writing_to_its_frozen_tensors_leaves_the_policy_alone(self, policy):
        reference = reference_of(policy)
        before = bits(policy)
        for _, parameter in reference.named_parameters():
            parameter.data.mul_(2)
        assert_close(bits(policy), before, rtol=0, atol=0)
        assert torch.equal(
            on_cpu(reference.tensors["model.layers.2.mlp.up_proj.weight"]),
            2 * before["model.layers.2.mlp.up_proj.weight"],
        )

    def test_loads_values_of_what_trains(self, policy):
        reference = reference_of(policy)
        before = bits(policy)
        other = {n: t + 1 if in_layers(n, [2]) else t for n, t in before.items()}
        assert reference.load_state_dict(other).missing_keys == []
        assert_close(bits(reference), other, rtol=0, atol=0)
        assert_close(bits(policy), before, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match=r"missing \['model.embed_tokens.weight'"):
            reference.load_state_dict({})
        reference.load_state_dict({}, strict=False)
        frozen = {**before, "lm_head.weight": before["lm_head.weight"] + 1}
        with pytest.raises(ModelError, match=r"lm_head\.weight is frozen"):
            reference.load_state_dict(frozen)
        assert_close(bits(reference), other, rtol=0, atol=0)


class TestBEMA:
    """TRL's callback that averages weights, also into the reference."""

    @staticmethod
    def trained(folder: Path, name: str, kind: type, **selection: Any) -> Any:
        callback = BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=2)
        trainer = kind(
            load(folder),
            args=DPOConfig(str(folder / name), max_steps=4, max_length=16, **QUIETLY),
            train_dataset=Dataset.from_dict(
                {"prompt": ["ab"] * 4, "chosen": ["c", "de"] * 2, "rejected": ["fg", "h"] * 2}
            ),
            processing_class=tokenizer(),
            callbacks=[callback],
            **selection,
        )
        train(trainer)
        return trainer

    def test_moves_the_reference_of_full_as_it_moves_a_second_model(self, folder):
        plain = self.trained(folder, "plain", BEMADPOTrainer)
        masked = self.trained(folder, "masked", MaskedBEMA, selection="full")
        assert_same_run(masked, plain)
        found, expected = bits(masked.ref_model), bits(plain.ref_model)
        assert_close(found, expected, rtol=0, atol=0)
        assert not torch.equal(found["lm_head.weight"], load(folder).lm_head.weight)
        assert_close(masked.ref_model(IDS).logits, plain.ref_model(IDS).logits, rtol=0, atol=0)

    def test_is_refused_where_it_would_fail_later(self, folder):
        with pytest.raises(SelectionError, match=r"BEMACallback was given for layer 2 of 4"):
            self.trained(folder, "masked", MaskedBEMA, selection=2)


class MaskedBEMA(LayerMaskedMixin, BEMADPOTrainer):
    pass


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
            assert_close(on_cpu(tensor), before[key], rtol=0, atol=0)
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
            expected = on_cpu(start[name]) * 0.75 + policy[name] * 0.25
            assert_close(on_cpu(tensor), expected, rtol=0, atol=1e-6)
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
