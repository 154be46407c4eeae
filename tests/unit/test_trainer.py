"""The masked trainer trains the selection, says so, and lets nothing else move."""

import copy
import gc
import inspect
import json
import math
import pickle
import weakref
from abc import ABC, ABCMeta

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Adafactor, LlamaForSequenceClassification, TrainerCallback
from trl import (
    BEMACallback,
    DPOConfig,
    DPOTrainer,
    GRPOTrainer,
    RewardConfig,
    SFTConfig,
    SFTTrainer,
)

from layerrl import (
    LayerMaskedGRPOTrainer,
    LayerMaskedMixin,
    frozen,
    load_delta,
    select_layers,
)
from layerrl.errors import (
    DeltaError,
    FrozenTensorError,
    ModelError,
    SelectionError,
    TrainerError,
)
from layerrl.trainer import LayerMaskedRewardTrainer, LayerMaskedSFTTrainer
from layerrl.trainer.arguments import behind, generates
from tests.grpo import PROMPTS, QUIETLY, make, reward, tokenizer
from tests.models import tiny, tiny_config
from tests.runs import bits

UPDATE, GRAD_NORM = "layerrl/relative_update/layer_{}", "layerrl/grad_norm/layer_{}"

KEYWORDS = [
    "prefix_cache_bytes",
    "master_weights",
    "checkpoint_format",
]


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def names_of(model: nn.Module, *layers: int) -> list[str]:
    inside = tuple(f"model.layers.{layer}." for layer in layers)
    return [name for name, _ in model.named_parameters() if name.startswith(inside)]


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in bits(model).items() if not tensor.equal(before[name])]


def steps(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """What was logged at each step, without the summary at the end."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Do(TrainerCallback):
    """Runs one function at one event, with the event's arguments by name."""

    def __init__(self, **actions):
        self.__dict__.update(
            {event: (lambda *args, do=do, **kwargs: do(**kwargs)) for event, do in actions.items()}
        )


@pytest.fixture
def model():
    return tiny("llama", 3)


@pytest.fixture
def flags(model) -> dict[str, bool]:
    """An arrangement of `requires_grad` that nothing in layerrl would choose, set on `model`."""
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def flags_of(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


class TestSelection:
    @pytest.mark.parametrize(
        ("selection", "layers"),
        [
            (1, [1]),
            (-1, [2]),
            ([2, 0], [0, 2]),
            (range(2), [0, 1]),
            (slice(1, None), [1, 2]),
            ("middle", [1]),
            ("last:2", [1, 2]),
            ("0%:50%", [0, 1]),
            ("all", [0, 1, 2]),
        ],
        ids=str,
    )
    def test_takes_what_select_layers_takes(self, model, tmp_path, selection, layers):
        trainer = make(model, tmp_path, selection=selection)
        assert trainer.selection == select_layers(model, selection)
        assert trainable(model) == names_of(model, *layers)

    @pytest.mark.parametrize("value", [-1, 1.5, True, "1 GB"])
    def test_a_budget_that_is_no_number_of_bytes_is_refused(self, model, tmp_path, value):
        with pytest.raises(SelectionError, match=r"cache_bytes is .*, expected a number of bytes"):
            make(model, tmp_path, selection=1, arguments={"prefix_cache_bytes": value})

    def test_a_switch_that_is_none_is_refused(self, model, tmp_path):
        with pytest.raises(SelectionError, match="master_weights is 'no', expected True or False"):
            make(model, tmp_path, selection=1, arguments={"master_weights": "no"})

    @pytest.mark.parametrize(
        ("name", "instead"),
        [
            ("activation_bytes", "gradient_checkpointing=False"),
            ("record_while_generating", "recorded in the first pass"),
        ],
    )
    def test_a_removed_keyword_is_refused_with_what_replaces_it(
        self, model, tmp_path, name, instead
    ):
        with pytest.raises(SelectionError, match=f"{name} was removed: .*{instead}"):
            make(model, tmp_path, selection=1, arguments={name: 0})

    def test_takes_a_selection_with_modules(self, model, tmp_path):
        selection = select_layers(model.config, [0, 1], modules="mlp.*")
        trainer = make(model, tmp_path, selection=selection)
        assert trainer.selection == selection
        assert trainable(model) == [n for n in names_of(model, 0, 1) if ".mlp." in n]

    def test_full_trains_everything(self, model, tmp_path):
        make(model, tmp_path, selection="full")
        assert trainable(model) == [name for name, _ in model.named_parameters()]

    def test_overrules_flags_set_before(self, model, flags, tmp_path):
        make(model, tmp_path, selection=1)
        assert trainable(model) == names_of(model, 1)

    def test_leaves_a_tied_embedding_frozen(self, tmp_path):
        model = tiny("llama", 2, tie_word_embeddings=True)
        make(model, tmp_path, selection="all")
        assert not model.lm_head.weight.requires_grad

    def test_takes_a_model_by_its_path(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model")
        trainer = make(str(tmp_path / "model"), tmp_path / "out", selection=-1)
        assert trainable(trainer.model) == names_of(model, 2)
        trainer.train()
        assert changed(trainer.model, bits(model)) == names_of(model, 2)
        trainer.save_delta(tmp_path / "delta")
        load_delta(model, tmp_path / "delta")
        assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)

    def test_is_keyword_only_and_required(self, model):
        with pytest.raises(TypeError, match="selection"):
            LayerMaskedGRPOTrainer(model, reward)

    @pytest.mark.parametrize(
        ("selection", "message"),
        [
            (7, "layer 7 does not exist: Llama(ForCausalLM|Config) has 3 decoder layers"),
            ("middle:9", "'middle:9' asks for 9 layers, expected 1 to 3"),
            (True, "True is no layer"),
            ([], "no layers given"),
        ],
    )
    @pytest.mark.parametrize("by_path", [False, True], ids=["instance", "path"])
    def test_that_does_not_fit_is_refused(self, model, tmp_path, selection, message, by_path):
        model.save_pretrained(tmp_path / "model")
        given = str(tmp_path / "model") if by_path else model
        with pytest.raises(SelectionError, match=message):
            make(given, tmp_path / "out", selection=selection)

    def test_of_another_depth_is_refused(self, model, tmp_path):
        with pytest.raises(SelectionError, match=r"made for 5 decoder layers, but .* has 3"):
            make(model, tmp_path, selection=select_layers(tiny("llama", 5), 1))

    def test_in_a_model_without_layers_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match="Linear has no decoder layers"):
            make(nn.Linear(2, 2), tmp_path, selection=1)

    def test_of_a_model_that_generation_would_cast_is_refused(self, model, tmp_path):
        changes = {"use_transformers_continuous_batching": True, "bf16": True}
        with pytest.raises(
            SelectionError, match=r"cast the model from torch\.float32 to torch\.bf"
        ):
            make(model, tmp_path, selection=1, **changes)
        make(model, tmp_path, selection=1, **(changes | {"bf16": False}))
        make(model.to(torch.bfloat16), tmp_path, selection=1, **changes)

    @pytest.mark.parametrize("put", ["transformers", "peft", "ia3"])
    @pytest.mark.parametrize("selection", [1, "full"])
    def test_together_with_adapters_in_the_model_is_refused(self, model, tmp_path, put, selection):
        put_adapter(model, put)
        before = flags_of(model)
        with pytest.raises(
            SelectionError, match=r"given together with a model with adapters, in .*not wrapped"
        ):
            make(model, tmp_path, selection=selection)
        assert flags_of(model) == before

    @pytest.mark.parametrize("put", ["transformers", "peft"])
    def test_adapters_put_into_the_model_later_are_refused(self, model, flags, tmp_path, put):
        trainer = make(model, tmp_path, selection=1)
        put_adapter(model, put)
        with pytest.raises(
            SelectionError, match=r"given together with a model with adapters, in .*not wrapped"
        ):
            trainer.train()

    def test_adapters_that_were_taken_out_again_are_no_problem(self, model, tmp_path):
        put_adapter(model, "transformers")
        model.delete_adapter("default")
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        make(adapted.merge_and_unload(), tmp_path, selection=1).train()


def put_adapter(model: nn.Module, how: str) -> None:
    """Adapters in the model, which is not wrapped."""
    if how == "transformers":
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    elif how == "peft":
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    else:
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        inject_adapter_in_model(config, model)


class Interruption(Exception):
    pass


def failing_reward(error: BaseException, calls: int = 1):
    """Rewards like the usual ones, but call number `calls` raises, once."""
    count = 0

    def fail(completions, **_):
        nonlocal count
        count += 1
        if count == calls:
            raise error
        return reward(completions)

    return fail


class TestFlagsAreRestored:
    @pytest.mark.parametrize("selection", [9, "middle:4", "nonsense", [1, 1]])
    def test_after_a_bad_selection(self, model, flags, tmp_path, selection):
        with pytest.raises(SelectionError):
            make(model, tmp_path, selection=selection)
        assert flags_of(model) == flags

    def test_after_peft_config(self, model, flags, tmp_path):
        with pytest.raises(SelectionError):
            make(model, tmp_path, selection=1, arguments={"peft_config": LoraConfig(bias="all")})
        assert flags_of(model) == flags

    def test_after_a_peft_model(self, model, tmp_path):
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        before = flags_of(adapted)
        with pytest.raises(SelectionError):
            make(adapted, tmp_path, selection="full")
        assert flags_of(adapted) == before
        assert any(before.values())

    def test_after_an_error_of_trl(self, model, flags, tmp_path):
        # Found by TRL near the end of its constructor.
        with pytest.raises(ValueError, match="sync_ref_model"):
            make(model, tmp_path, selection=1, sync_ref_model=True, beta=0.0)
        assert flags_of(model) == flags

    def test_after_wrong_arguments(self, model, flags, tmp_path):
        with pytest.raises(TypeError, match="no_such_argument"):
            make(model, tmp_path, selection=1, arguments={"no_such_argument": 1})
        assert flags_of(model) == flags

    @pytest.mark.parametrize("error", [Interruption(), KeyboardInterrupt()], ids=repr)
    def test_after_training_raised_in_the_middle(self, model, flags, tmp_path, error):
        failing = failing_reward(error, calls=3)
        trainer = make(model, tmp_path, selection=1, arguments={"reward_funcs": failing})
        with pytest.raises(type(error)):
            trainer.train()
        assert trainer.state.global_step == 2
        assert flags_of(model) == flags

    @pytest.mark.parametrize("checkpoint", [True, "none-there"])
    def test_after_a_checkpoint_that_is_not_there(self, model, flags, tmp_path, checkpoint):
        trainer = make(model, tmp_path, selection=1)
        with pytest.raises(DeltaError):
            trainer.train(resume_from_checkpoint=checkpoint)
        assert flags_of(model) == flags

    def test_after_a_callback_that_is_refused(self, model, flags, tmp_path):
        trainer = make(model, tmp_path, selection=1)
        trainer.add_callback(BEMACallback())
        with pytest.raises(SelectionError):
            trainer.train()
        assert flags_of(model) == flags

    def test_after_a_model_that_no_one_can_train(self, tmp_path):
        with torch.inference_mode():
            model = tiny("llama", 3)
        flags = flags_of(model)
        with pytest.raises(ModelError, match=r"inside torch\.inference_mode\(\), and torch lets"):
            make(model, tmp_path, selection=1)
        assert flags_of(model) == flags
        with pytest.raises(ModelError, match="Load it outside"):
            select_layers(model, 1).masked(model).__enter__()
        assert flags_of(model) == flags

    @pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
    def test_of_a_trainer_that_was_copied_with_its_model(self, model, flags, tmp_path, copied):
        trainer = make(model, tmp_path, selection=1)
        other, its_model = copied((trainer._mask, model))
        other.take_off()
        assert flags_of(its_model) == flags
        assert flags_of(model) != flags
        trainer._mask.take_off()
        assert flags_of(model) == flags

    @pytest.mark.parametrize("used", ["made", "evaluated", "trained", "paused"])
    def test_a_trainer_that_is_forgotten_keeps_no_model(self, tmp_path, used):
        model = tiny("llama", 3)
        rows = Dataset.from_dict({"prompt": PROMPTS})
        trainer = make(model, tmp_path, selection=1, arguments={"eval_dataset": rows})
        if used == "evaluated":
            trainer.evaluate()
        elif used == "trained":
            trainer.train()
        elif used == "paused":
            with select_layers(model, 0).masked(model):
                pass
        gone = weakref.ref(model)
        del trainer, model
        gc.collect()
        assert gone() is None

    def test_after_a_frozen_tensor_changed(self, model, flags, tmp_path):
        def move(model, **_):
            model.lm_head.weight.data += 1

        callback = Do(on_step_end=move)
        trainer = make(model, tmp_path, selection=1, arguments={"callbacks": [callback]})
        with pytest.raises(FrozenTensorError):
            trainer.train()
        assert flags_of(model) == flags

    def test_after_every_tensor_was_replaced_by_another_base(self, model, flags, tmp_path):
        trainer = make(model, tmp_path, selection=1)
        model.load_state_dict(tiny("llama", seed=1).state_dict(), assign=True)
        with pytest.raises(FrozenTensorError, match="frozen tensors"):
            trainer.train()

    @pytest.mark.parametrize("names", [(), ("model.layers.1.mlp.up_proj.weight",)], ids=str)
    def test_after_tensors_were_replaced_during_the_training(self, model, flags, tmp_path, names):
        def replace(model, **_):
            values = {
                n: v.clone() for n, v in model.state_dict().items() if not names or n in names
            }
            model.load_state_dict(values, strict=False, assign=True)

        callbacks = [Do(on_step_end=replace)]
        trainer = make(model, tmp_path, selection=1, arguments={"callbacks": callbacks})
        num = len(names) or 9
        with pytest.raises(SelectionError, match=f"{num} of 9 trained tensors were replaced"):
            trainer.train()
        assert flags_of(model) == flags
        assert trainer.state.global_step == 1

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, model, flags, tmp_path, context):
        trainer = make(model, tmp_path, selection=1)
        with context(), pytest.raises(TrainerError, match=r"train\(\) inside torch\.no_grad"):
            trainer.train()
        assert flags_of(model) == flags
        trainer.train()
        assert trainer.state.global_step == 3

    @pytest.mark.parametrize("own", [False, True], ids=["the args' optimizer", "its own"])
    def test_and_a_checkpoint_is_loaded_into_tensors_that_were_replaced(self, tmp_path, own):
        class Own(LayerMaskedGRPOTrainer):
            def create_optimizer(self, *args, **kwargs):
                if self.optimizer is None and own:
                    trained = self.selection.parameters(self.model).values()
                    self.optimizer = torch.optim.SGD(trained, lr=1e-2)
                return self.optimizer if own else super().create_optimizer(*args, **kwargs)

        saves = {"selection": 1, "save_strategy": "steps", "save_steps": 1, "trainer": Own}
        first = make(tiny("llama", 3), tmp_path, max_steps=1, **saves)
        first.train()
        again = make(tiny("llama", 3), tmp_path, max_steps=1, **saves)
        clones = {name: value.clone() for name, value in again.model.state_dict().items()}
        again.model.load_state_dict(clones, assign=True)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert_close(bits(again.model), bits(first.model), rtol=0, atol=0)

    def test_and_the_reference_has_the_values_of_tensors_that_were_replaced(self, tmp_path):
        runs = []
        for replaced in (False, True):
            trainer = make(tiny("llama", 3), tmp_path / str(replaced), selection=1, beta=0.5)
            if replaced:
                clones = {name: value.clone() for name, value in trainer.model.state_dict().items()}
                trainer.model.load_state_dict(clones, assign=True)
            trainer.train()
            runs.append(bits(trainer.model))
            assert steps(trainer)[-1]["kl"] > 0
        assert_close(runs[1], runs[0], rtol=0, atol=0)

    def test_of_another_model_that_took_the_place_of_the_first(self, model, flags, tmp_path):
        trainer = make(model, tmp_path, selection=1)
        trainer.model = trainer.model_wrapped = other = copy.deepcopy(model)
        before = bits(other)
        trainer.train()
        assert changed(other, before) == names_of(other, 1)
        with torch.no_grad():
            other.lm_head.weight.add_(1)
        with pytest.raises(FrozenTensorError, match=r"lm_head\.weight"):
            trainer.check_frozen()

    def test_and_reference_and_replay_are_of_another_model_that_took_its_place(
        self, model, tmp_path
    ):
        trainer = make(model, tmp_path, selection=1, beta=0.5)
        at_the_start = bits(model)
        with torch.no_grad():
            for name in names_of(model, 1):
                model.get_parameter(name).add_(1)
        trainer.model = trainer.model_wrapped = copy.deepcopy(model)
        trainer.create_optimizer()
        assert_close(bits(trainer.ref_model), at_the_start, rtol=0, atol=0)
        assert trainer.masked_run.replay.model is trainer.model

    def test_after_trained_tensors_were_replaced_by_others(self, model, flags, tmp_path):
        trainer = make(model, tmp_path, selection=1)
        mine = {name: value.clone() for name, value in model.state_dict().items()}
        mine = {name: value for name, value in mine.items() if name in names_of(model, 1)}
        model.load_state_dict(mine, strict=False, assign=True)
        before = bits(model)
        trainer.train()
        assert changed(model, before) == names_of(model, 1)
        expected = relative_update(model, before, 1)
        assert_close(steps(trainer)[-1][UPDATE.format(1)], expected, rtol=1e-5, atol=0)

    def test_and_training_again_masks_again(self, model, flags, tmp_path):
        before = bits(model)
        failing = failing_reward(Interruption(), calls=2)
        trainer = make(
            model,
            tmp_path,
            selection=select_layers(model, [1, 2], boost={2: 2.0}),
            arguments={"reward_funcs": failing},
        )
        with pytest.raises(Interruption):
            trainer.train()
        assert flags_of(model) == flags
        trainer.train()
        assert trainer.state.global_step == 3
        assert flags_of(model) == flags
        assert changed(model, before) == names_of(model, 1, 2)
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-2, 2e-2}
        # The update counts from the first call, not from the state that the failure left.
        expected = relative_update(model, before, 1)
        assert_close(steps(trainer)[-1][UPDATE.format(1)], expected, rtol=1e-5, atol=0)

    def test_after_training_ended_well(self, model, flags, tmp_path):
        trainer = make(model, tmp_path, selection=1, max_steps=1)
        for _ in range(2):
            trainer.train()
            assert flags_of(model) == flags


class Flags(TrainerCallback):
    """Notes which tensors train at the start, in each step and at the end."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, *args, model, **_):
        self.seen.append(trainable(model))

    on_step_end = on_save = on_train_end = on_train_begin


class TestMaskOfATraining:
    def test_lasts_through_its_end_and_its_last_save(self, model, flags, tmp_path):
        during = Flags()
        trainer = make(
            model,
            tmp_path,
            selection=1,
            save_strategy="steps",
            save_steps=3,
            arguments={"callbacks": [during]},
        )
        for times in (1, 2):
            trainer.train()
            assert during.seen == [names_of(model, 1)] * 6 * times
            assert flags_of(model) == flags

    def test_what_follows_a_training_needs_none(self, model, tmp_path):
        trainer = make(
            model,
            tmp_path,
            selection=1,
            arguments={"eval_dataset": Dataset.from_dict({"prompt": ["abc"] * 8})},
        )
        trainer.train()
        assert math.isfinite(trainer.evaluate()["eval_reward"])
        trainer.save_model(str(tmp_path / "whole"))
        trainer.save_delta(tmp_path / "delta")
        assert trainable(model) == [name for name, _ in model.named_parameters()]

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_an_optimizer_made_outside_of_training_holds_what_trains(self, model, tmp_path, when):
        trainer = make(model, tmp_path, selection=1)
        if when == "after":
            trainer.train()
            trainer.optimizer = None
        optimizer = trainer.create_optimizer()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.model.layers[1].parameters()}
        trainer.train()
        assert trainable(model) == [name for name, _ in model.named_parameters()]

    def test_a_plain_trainer_afterwards_trains_what_it_would_have(self, model, flags, tmp_path):
        make(model, tmp_path, selection=1).train()
        before = bits(model)
        make(model, tmp_path).train()
        moved = [name for name in changed(model, before) if "embed_tokens" not in name]
        expected = [name for name, flag in flags.items() if flag and "embed_tokens" not in name]
        assert moved == expected

    def test_another_selection_afterwards_trains_its_own(self, model, flags, tmp_path):
        make(model, tmp_path, selection=1).train()
        before = bits(model)
        make(model, tmp_path, selection=[0, 2]).train()
        assert changed(model, before) == names_of(model, 0, 2)
        assert flags_of(model) == flags

    def test_two_trainers_on_one_model_take_turns(self, model, flags, tmp_path):
        first, second = (make(model, tmp_path, selection=1, max_steps=1) for _ in range(2))
        for trainer in (first, second, first, second):
            before = bits(model)
            trainer.train()
            assert changed(model, before) == names_of(model, 1)
            assert flags_of(model) == flags

    def test_a_trainer_whose_base_another_one_moved_says_so(self, model, flags, tmp_path):
        first = make(model, tmp_path, selection=1)
        second = make(model, tmp_path, selection=2)
        first.train()
        assert flags_of(model) == flags
        with pytest.raises(FrozenTensorError, match=r"model\.layers\.1\."):
            second.train()
        assert flags_of(model) == flags

    def test_flags_that_were_set_while_a_trainer_waited_are_the_users(self, model, tmp_path):
        model.requires_grad_(False)
        trainer = make(model, tmp_path, selection=1)
        model.lm_head.requires_grad_(True)
        trainer.train()
        assert trainable(model) == ["lm_head.weight"]

    def test_of_a_trainer_made_inside_a_mask(self, model, flags, tmp_path):
        with select_layers(model, 2).masked(model):
            trainer = make(model, tmp_path, selection=1)
            assert trainable(model) == names_of(model, 1)
        assert flags_of(model) == flags
        trainer.train()
        assert flags_of(model) == flags

    def test_of_a_trainer_that_trains_inside_a_mask(self, model, flags, tmp_path):
        with select_layers(model, 2).masked(model):
            make(model, tmp_path, selection=1).train()
            assert trainable(model) == names_of(model, 2)
        assert flags_of(model) == flags

    def test_of_a_trainer_that_was_made_before_a_mask_and_trains_inside(
        self, model, flags, tmp_path
    ):
        trainer = make(model, tmp_path, selection=1)
        with select_layers(model, 2).masked(model):
            trainer.train()
            assert trainable(model) == names_of(model, 2)
        assert flags_of(model) == flags

    def test_of_a_trainer_that_waits_comes_back_after_another(self, model, flags, tmp_path):
        trainer = make(model, tmp_path, selection=1)
        with select_layers(model, 2).masked(model):
            make(model, tmp_path, selection=0)
        assert trainable(model) == names_of(model, 1)
        trainer.train()
        assert flags_of(model) == flags

    def test_of_a_training_inside_another(self, model, flags, tmp_path):
        inner = []

        def other(model, **_):
            before = trainable(model)
            make(model, tmp_path / "inner", selection=1, max_steps=1).train()
            inner.append((before, trainable(model)))

        outer = make(
            model, tmp_path, selection=1, arguments={"callbacks": [Do(on_train_end=other)]}
        )
        outer.train()
        assert inner == [(names_of(model, 1), names_of(model, 1))]
        assert flags_of(model) == flags


def relative_update(model: nn.Module, before: dict[str, Tensor], layer: int) -> float:
    """Norm of a layer's change over its norm before, in float64."""
    now = bits(model)
    names = names_of(model, layer)
    change = sum((now[name].double() - before[name].double()).square().sum() for name in names)
    start = sum(before[name].double().square().sum() for name in names)
    return math.sqrt(change / start)


class TestMetrics:
    @pytest.mark.parametrize("max_grad_norm", [1.0, 1e-3, 0.0], ids=["default", "clipping", "none"])
    def test_layers_share_the_gradient_norm(self, model, tmp_path, max_grad_norm):
        trainer = make(model, tmp_path, selection=[0, 2], max_grad_norm=max_grad_norm)
        trainer.train()
        assert len(steps(trainer)) == 3
        for entry in steps(trainer):
            shares = [entry[GRAD_NORM.format(layer)] for layer in (0, 2)]
            assert min(shares) > 0
            assert_close(math.hypot(*shares), entry["grad_norm"], rtol=1e-4, atol=0)
            assert entry["grad_norm"] > 1e-2

    @pytest.mark.parametrize("max_grad_norm", [1e-3, 0.0], ids=["clipping", "none"])
    @pytest.mark.parametrize("selection", [[1, 2], "full"], ids=str)
    def test_gradient_norms_are_those_before_clipping(
        self, model, tmp_path, selection, max_grad_norm
    ):
        seen = []

        def note(model, **_):
            grads = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}
            squares = {name: grad.square().sum().item() for name, grad in grads.items()}
            by_layer = {
                layer: math.sqrt(sum(squares.get(name, 0.0) for name in names_of(model, layer)))
                for layer in range(3)
            }
            seen.append((math.sqrt(sum(squares.values())), by_layer))

        trainer = make(
            model,
            tmp_path,
            selection=selection,
            max_grad_norm=max_grad_norm,
            arguments={"callbacks": [Do(on_pre_optimizer_step=note)]},
        )
        trainer.train()
        for entry, (total, by_layer) in zip(steps(trainer), seen, strict=True):
            factor = entry["grad_norm"] / total
            assert factor > 50 if max_grad_norm else abs(factor - 1) < 1e-4
            for layer in trainer.selection.layers:
                found = entry[GRAD_NORM.format(layer)]
                assert_close(found, by_layer[layer] * factor, rtol=1e-4, atol=0)
            if selection == "full":
                shares = [entry[GRAD_NORM.format(layer)] for layer in range(3)]
                assert math.hypot(*shares) < 0.99 * entry["grad_norm"]

    def test_without_gradient_are_zero(self, model, tmp_path):
        constant = {"reward_funcs": lambda completions, **_: [1.0] * len(completions)}
        trainer = make(model, tmp_path, selection=1, arguments=constant)
        trainer.train()
        for entry in steps(trainer):
            assert entry["grad_norm"] == 0
            assert entry[GRAD_NORM.format(1)] == 0
            assert entry[UPDATE.format(1)] == 0

    def test_relative_update_is_the_change_since_the_start(self, model, tmp_path):
        before = bits(model)
        expected = []

        def note(model, **_):
            expected.append({layer: relative_update(model, before, layer) for layer in (1, 2)})

        trainer = make(
            model,
            tmp_path,
            selection=[1, 2],
            arguments={"callbacks": [Do(on_step_end=note)]},
        )
        trainer.train()
        for entry, values in zip(steps(trainer), expected, strict=True):
            for layer, value in values.items():
                assert value > 0
                assert_close(entry[UPDATE.format(layer)], value, rtol=1e-5, atol=0)

    def test_relative_update_counts_from_when_the_trainer_was_made(self, model, tmp_path):
        before = bits(model)
        trainer = make(model, tmp_path, selection=1, max_steps=1)
        trainer.train()
        trainer.train()
        expected = relative_update(model, before, 1)
        assert_close(steps(trainer)[-1][UPDATE.format(1)], expected, rtol=1e-5, atol=0)

    def test_relative_update_is_not_measured_for_full(self, model, tmp_path):
        trainer = make(model, tmp_path, selection="full", max_steps=1)
        trainer.train()
        logged = {name for name in steps(trainer)[0] if name.startswith("layerrl/")}
        norms = {GRAD_NORM.format(layer) for layer in range(3)}
        assert logged == {"layerrl/trained_parameters", *norms}

    @pytest.mark.parametrize(
        ("selection", "count"),
        [
            # A block: q and o 16*16 each, k and v 8*16 each; three matrices 16*32; two norms of 16.
            (1, 768 + 1536 + 32),
            ([0, 1], 2 * 2336),
            ("full", 3 * 2336 + 2 * 64 * 16 + 16),
        ],
        ids=str,
    )
    def test_count_the_trained_elements(self, model, tmp_path, selection, count):
        trainer = make(model, tmp_path, selection=selection, max_steps=1)
        trainer.train()
        assert steps(trainer)[0]["layerrl/trained_parameters"] == count

    def test_are_in_no_log_but_those_of_steps(self, model, tmp_path):
        trainer = make(model, tmp_path, selection=1, max_steps=1)
        trainer.train()
        trainer.log({"eval_loss": 1.0})
        for entry in trainer.state.log_history:
            has = any(name.startswith("layerrl/") for name in entry)
            assert has == ("loss" in entry)

    def test_can_be_written_as_json(self, model, tmp_path):
        trainer = make(model, tmp_path, selection=1, max_steps=1)
        trainer.train()
        assert all(type(value) is float for k, value in steps(trainer)[0].items() if "layerrl" in k)
        json.dumps(trainer.state.log_history, allow_nan=False)


OPTIMIZERS = ["adamw_torch", "sgd", "adafactor", "rmsprop"]
SCHEDULERS = ["linear", "cosine", "constant_with_warmup", "reduce_lr_on_plateau"]


def scale_of(model: nn.Module, parameter: Tensor, scales: dict[int, float]) -> float:
    for layer, scale in scales.items():
        if any(p is parameter for p in model.model.layers[layer].parameters()):
            return scale
    return 1.0


class TestOptimizer:
    @pytest.mark.parametrize("optim", OPTIMIZERS)
    def test_boosts_times_weight_decay(self, model, tmp_path, optim):
        before = bits(model)
        scales = {0: 2.0, 2: 0.5}
        selection = select_layers(model, "all", boost=scales)
        trainer = make(
            model,
            tmp_path,
            selection=selection,
            optim=optim,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            max_steps=2,
        )
        trainer.train()
        groups = trainer.optimizer.param_groups
        # Per weight decay first what is not scaled, then the smaller scale.
        found = [(group["weight_decay"], group["lr"]) for group in groups]
        rates = (1e-2, 0.5e-2, 2e-2)
        assert found == [(decay, rate) for decay in (0.1, 0.0) for rate in rates]
        for group in groups:
            for parameter in group["params"]:
                assert group["lr"] == 1e-2 * scale_of(model, parameter, scales)
                assert (parameter.ndim > 1) == (group["weight_decay"] > 0)
        assert sum(len(group["params"]) for group in groups) == 27
        assert changed(model, before) == names_of(model, 0, 1, 2)

    @pytest.mark.parametrize("optim", OPTIMIZERS)
    def test_holds_no_frozen_tensor_and_no_state_of_one(self, model, tmp_path, optim):
        trainer = make(model, tmp_path, selection=1, optim=optim, max_steps=1)
        trainer.train()
        trained = {id(parameter) for parameter in model.model.layers[1].parameters()}
        assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == trained
        assert {id(parameter) for parameter in trainer.optimizer.state} <= trained

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_scheduler_moves_every_scaled_rate(self, model, tmp_path, scheduler):
        factors, changes = [], {}
        if scheduler == "reduce_lr_on_plateau":
            # Every evaluation after the first counts as no better: the rate halves each time.
            plateau = {"factor": 0.5, "patience": 0, "threshold": 1e9, "threshold_mode": "abs"}
            changes = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_kwargs": plateau}
        elif scheduler == "constant_with_warmup":
            changes = {"warmup_steps": 2}

        def note(optimizer, **_):
            rates = [group["lr"] for group in optimizer.param_groups]
            assert_close(rates[1], 3.0 * rates[0], rtol=1e-12, atol=0)
            factors.append(rates[0] / 1e-2)

        prompts = Dataset.from_dict({"prompt": ["abc", "de"]})
        trainer = make(
            model,
            tmp_path,
            selection=select_layers(model, [1, 2], modules="mlp.*", boost={2: 3.0}),
            lr_scheduler_type=scheduler,
            max_steps=4,
            per_device_eval_batch_size=8,
            arguments={"callbacks": [Do(on_step_begin=note)], "eval_dataset": prompts},
            **changes,
        )
        trainer.train()
        expected = {
            "linear": [1.0, 0.75, 0.5, 0.25],
            "cosine": [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)],
            "constant_with_warmup": [0.0, 0.5, 1.0, 1.0],
            "reduce_lr_on_plateau": [1.0, 1.0, 0.5, 0.25],
        }
        assert_close(factors, expected[scheduler], rtol=1e-9, atol=1e-12)

    def test_passed_in_is_used_when_it_holds_the_trained_tensors(self, model, tmp_path):
        before = bits(model)
        selection = select_layers(model, 1)
        optimizer = torch.optim.SGD(selection.parameters(model).values(), lr=0.5)
        arguments = {"optimizers": (optimizer, None)}
        trainer = make(model, tmp_path, selection=selection, arguments=arguments)
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer
        assert changed(model, before) == names_of(model, 1)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (
                None,
                r"the SGD holds frozen 'lm_head\.weight' \(0 missing, 21 too many; layer 1 of 3",
            ),
            (2, r"the SGD misses trained 'model\.layers\.1\..* \(9 missing, 9 too many"),
        ],
        ids=["whole model", "other layer"],
    )
    def test_passed_in_with_other_tensors_is_refused_before_the_first_step(
        self, model, flags, tmp_path, layers, message
    ):
        before = bits(model)
        held = model if layers is None else model.model.layers[layers]
        arguments = {"optimizers": (torch.optim.SGD(held.parameters(), lr=0.5), None)}
        trainer = make(model, tmp_path, selection=1, arguments=arguments)
        with pytest.raises(SelectionError, match=message):
            trainer.train()
        assert_close(bits(model), before, rtol=0, atol=0)
        assert flags_of(model) == flags

    def test_passed_in_cannot_be_boosted(self, model, tmp_path):
        selection = select_layers(model, 1, boost={1: 2.0})
        optimizer = torch.optim.SGD(selection.parameters(model).values(), lr=0.5)
        arguments = {"optimizers": (optimizer, None)}
        trainer = make(model, tmp_path, selection=selection, arguments=arguments)
        with pytest.raises(SelectionError, match=r"by \{1: 2\.0\}: .* SGD, which was passed"):
            trainer.train()

    def test_that_cannot_be_boosted_is_refused_every_time(self, model, tmp_path):
        class OwnRate(GRPOTrainer):
            def create_optimizer(self, *args, **kwargs):
                if self.optimizer is None:
                    trained = [p for p in self.model.parameters() if p.requires_grad]
                    self.optimizer = Adafactor(trained)
                return self.optimizer

        class Masked(LayerMaskedMixin, OwnRate):
            pass

        before = bits(model)
        selection = select_layers(model, 1, boost={1: 2.0})
        trainer = make(model, tmp_path, selection=selection, trainer=Masked)
        for _ in range(2):
            with pytest.raises(SelectionError, match=r"Adafactor .*lr=None.*\{2\.0\}"):
                trainer.train()
        assert_close(bits(model), before, rtol=0, atol=0)

    def test_is_scaled_once_however_often_it_is_asked_for(self, model, tmp_path):
        selection = select_layers(model, 1, boost={1: 2.0})
        trainer = make(
            model, tmp_path, selection=selection, max_steps=1, lr_scheduler_type="constant"
        )
        trainer.create_optimizer()
        trainer.create_optimizer()
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {2e-2}
        trainer.train()
        trainer.train()
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {2e-2}


def move(model: nn.Module, name: str) -> None:
    {**dict(model.named_parameters()), **dict(model.named_buffers())}[name].data.view(-1)[0] += 1


class TestFrozenCheck:
    """Whatever changes a frozen tensor, a callback here, is noticed at the next check."""

    @pytest.fixture(
        params=["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.counts"]
    )
    def name(self, request, model) -> str:
        model.model.layers[1].mlp.register_buffer("counts", torch.zeros(4))
        return request.param

    def test_before_the_first_step(self, model, tmp_path, name):
        callback = Do(on_train_begin=lambda model, **_: move(model, name))
        trainer = make(model, tmp_path, selection=1, arguments={"callbacks": [callback]})
        with pytest.raises(FrozenTensorError, match=rf"1 of \d+ frozen tensors .*: {name}\."):
            trainer.train()
        assert trainer.state.global_step == 0

    @pytest.mark.parametrize("event", ["on_step_end", "on_train_end"])
    def test_at_the_end(self, model, tmp_path, name, event):
        callback = Do(**{event: lambda model, **_: move(model, name)})
        trainer = make(
            model, tmp_path, selection=1, max_steps=1, arguments={"callbacks": [callback]}
        )
        with pytest.raises(FrozenTensorError, match=rf"1 of \d+ frozen tensors .*: {name}\."):
            trainer.train()
        assert trainer.state.global_step == 1

    def test_at_a_checkpoint_which_is_then_not_written(self, model, tmp_path, name):
        callback = Do(on_step_end=lambda model, **_: move(model, name))
        trainer = make(
            model,
            tmp_path / "out",
            selection=1,
            save_strategy="steps",
            save_steps=2,
            arguments={"callbacks": [callback]},
        )
        with pytest.raises(FrozenTensorError, match=rf": {name}\."):
            trainer.train()
        assert trainer.state.global_step == 2
        assert not list((tmp_path / "out").rglob("checkpoint-*"))
        assert not list((tmp_path / "out").rglob("*.safetensors"))

    def test_at_every_way_of_saving_none_of_which_writes(self, model, tmp_path, name):
        trainer = make(model, tmp_path / "out", selection=1)
        move(model, name)
        for save in (trainer.save_model, trainer.save_delta):
            with pytest.raises(FrozenTensorError, match=rf": {name}\."):
                save(str(tmp_path / "saved"))
        assert not (tmp_path / "saved").exists()

    def test_when_a_checkpoint_of_another_base_is_resumed(self, tmp_path):
        other = make(
            tiny("llama", 3, seed=1),
            tmp_path,
            selection=1,
            save_strategy="steps",
            save_steps=2,
            arguments={"checkpoint_format": "full"},
        )
        other.train()
        trainer = make(tiny("llama", 3), tmp_path / "mine", selection=1)
        # All but the five norms, which start as ones whatever the seed.
        with pytest.raises(FrozenTensorError, match="16 of 21 frozen tensors"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_close(bits(trainer.model), bits(tiny("llama", 3)), rtol=0, atol=0)
        assert trainer.state.global_step == 0

    def test_accepts_a_checkpoint_of_its_own(self, tmp_path):
        first = make(tiny("llama", 3), tmp_path, selection=1, save_strategy="steps", save_steps=2)
        first.train()
        model = tiny("llama", 3)
        trainer = make(model, tmp_path / "second", selection=1)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trainer.state.global_step == 3
        assert_close(bits(model), bits(first.model), rtol=0, atol=0)

    def test_ignores_everything_under_full(self, model, tmp_path):
        callback = Do(on_step_end=lambda model, **_: move(model, "lm_head.weight"))
        make(model, tmp_path, selection="full", arguments={"callbacks": [callback]}).train()

    def test_is_computed_on_the_device_of_the_accelerator(self, model, tmp_path, monkeypatch):
        """A model that will be sharded lies on the CPU when it is masked and when it is checked."""
        devices = []
        on_device = frozen._chunk_sums

        def look(tensor: Tensor, device: torch.device | None) -> Tensor:
            devices.append(device)
            return on_device(tensor, device)

        monkeypatch.setattr(frozen, "_chunk_sums", look)
        trainer = make(model, tmp_path, selection=1)
        trainer.check_frozen()
        num_tensors = len(names_of(model, 1)) + 2 * len(trainer.masked_run.frozen.fingerprints)
        assert devices == [trainer.accelerator.device] * num_tensors


class TestSaving:
    def test_save_model_writes_the_whole_model(self, model, tmp_path):
        trainer = make(model, tmp_path / "out", selection=1, max_steps=1)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        assert_close(
            bits(type(model).from_pretrained(tmp_path / "saved")), bits(model), rtol=0, atol=0
        )

    def test_save_delta_writes_what_was_trained(self, model, tmp_path):
        trainer = make(model, tmp_path / "out", selection=[0, 2], max_steps=1)
        trainer.train()
        assert trainer.save_delta(tmp_path / "delta") == tmp_path / "delta"
        assert sorted(load_file(tmp_path / "delta" / "delta.safetensors")) == sorted(
            names_of(model, 0, 2)
        )
        fresh = tiny("llama", 3)
        assert load_delta(fresh, tmp_path / "delta") == trainer.selection
        assert_close(bits(fresh), bits(model), rtol=0, atol=0)

    def test_save_delta_is_on_the_model_the_trainer_was_made_with(self, model, tmp_path):
        # Also after several calls of train and a first delta.
        trainer = make(model, tmp_path / "out", selection=1, max_steps=1)
        for i in range(2):
            trainer.train()
            trainer.save_delta(tmp_path / f"delta-{i}")
        fresh = tiny("llama", 3)
        load_delta(fresh, tmp_path / "delta-1")
        assert_close(bits(fresh), bits(model), rtol=0, atol=0)

    def test_save_delta_refuses_a_folder_that_exists(self, model, tmp_path):
        trainer = make(model, tmp_path / "out", selection=1)
        (tmp_path / "delta").mkdir()
        with pytest.raises(DeltaError, match=f"{tmp_path / 'delta'} exists already"):
            trainer.save_delta(tmp_path / "delta")

    def test_save_delta_works_after_training_failed(self, model, tmp_path):
        failing = failing_reward(Interruption(), calls=3)
        trainer = make(model, tmp_path, selection=1, arguments={"reward_funcs": failing})
        with pytest.raises(Interruption):
            trainer.train()
        trainer.save_delta(tmp_path / "delta")
        fresh = tiny("llama", 3)
        load_delta(fresh, tmp_path / "delta")
        assert_close(bits(fresh), bits(model), rtol=0, atol=0)


class Logging(GRPOTrainer):
    """A user's own trainer, with its own constructor."""

    def __init__(self, *args, note: str = "none", **kwargs):
        self.note = note
        super().__init__(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "note": len(self.note)}, *args, **kwargs)


class Mine(LayerMaskedMixin, Logging):
    def __init__(self, *args, verbose: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.verbose = verbose


class TestSubclasses:
    def test_of_the_users_own_trainer_train_the_selection(self, model, tmp_path):
        before = bits(model)
        trainer = make(
            model,
            tmp_path,
            selection=1,
            trainer=Mine,
            arguments={"note": "four", "verbose": True},
        )
        assert trainer.verbose
        trainer.train()
        assert changed(model, before) == names_of(model, 1)
        assert all(entry["note"] == 4 for entry in trainer.state.log_history)
        assert UPDATE.format(1) in steps(trainer)[0]

    def test_of_another_trainer_of_trl_train_the_selection(self, model, tmp_path):
        class MaskedSFTTrainer(LayerMaskedMixin, SFTTrainer):
            pass

        before = bits(model)
        config = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            **QUIETLY,
        )
        texts = Dataset.from_dict({"text": ["abcd", "efgh"] * 4})
        trainer = MaskedSFTTrainer(
            model, config, train_dataset=texts, processing_class=tokenizer(), selection=[0, 2]
        )
        trainer.train()
        assert changed(model, before) == names_of(model, 0, 2)
        shares = [steps(trainer)[0][GRAD_NORM.format(layer)] for layer in (0, 2)]
        assert_close(math.hypot(*shares), steps(trainer)[0]["grad_norm"], rtol=1e-4, atol=0)

    def test_of_dpo_keep_the_reference_they_were_given(self, model, tmp_path):
        class MaskedDPOTrainer(LayerMaskedMixin, DPOTrainer):
            pass

        other = tiny("llama", 3)
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
        config = DPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            **QUIETLY,
        )
        rows = {"prompt": ["ab", "cd"] * 4, "chosen": ["e", "f"] * 4, "rejected": ["g", "h"] * 4}
        trainer = MaskedDPOTrainer(
            model, other, args=config, train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer(), selection=1,
        )  # fmt: skip
        before = bits(model)
        trainer.train()
        assert trainer.accelerator.unwrap_model(trainer.ref_model) is other
        assert set(changed(model, before)) == set(names_of(model, 1))

    def test_take_positional_arguments_like_the_trainer_they_wrap(self, model, tmp_path):
        template = make(tiny("llama", 3), tmp_path, selection=1)
        trainer = LayerMaskedGRPOTrainer(
            model, reward, template.args, template.train_dataset, None, template.processing_class,
            selection=2,
        )  # fmt: skip
        assert trainable(trainer.model) == names_of(model, 2)


class TestSignature:
    def test_shows_the_arguments_of_trl_and_the_selection(self):
        wrapped = inspect.signature(GRPOTrainer).parameters
        own = inspect.signature(LayerMaskedGRPOTrainer).parameters
        assert list(own) == [*wrapped, "selection", *KEYWORDS]
        assert all(own[name] == wrapped[name] for name in wrapped)
        assert own["selection"].kind is inspect.Parameter.KEYWORD_ONLY
        assert own["selection"].default is inspect.Parameter.empty

    def test_of_a_mixed_class_shows_the_wrapped_arguments(self):
        class Mixed(LayerMaskedMixin, Logging):
            pass

        own = ["selection", *KEYWORDS]
        assert list(inspect.signature(Mixed).parameters) == ["args", "note", *own, "kwargs"]

    def test_a_class_between_that_has_no_constructor_hides_nothing(self):
        class Between:
            pass

        class Mixed(LayerMaskedMixin, Between, GRPOTrainer):
            pass

        assert inspect.signature(Mixed) == inspect.signature(LayerMaskedGRPOTrainer)

    def test_of_a_class_with_its_own_constructor_is_its_own(self):
        assert list(inspect.signature(Mine).parameters) == ["args", "verbose", "kwargs"]

    def test_of_a_subclass_is_inherited(self):
        class Further(Mine):
            pass

        assert inspect.signature(Further) == inspect.signature(Mine)

    def test_leaves_the_wrapped_trainer_alone(self):
        assert "selection" not in inspect.signature(GRPOTrainer).parameters
        assert "selection" not in inspect.signature(Logging).parameters


class TestClasses:
    def test_need_a_trainer_behind_the_mixin(self):
        with pytest.raises(TrainerError, match=r"Mine has Linear, Module behind .*GRPOTrainer\)"):
            type("Mine", (LayerMaskedMixin, nn.Linear), {})

    def test_need_the_mixin_in_front(self):
        with pytest.raises(TrainerError, match=r"Mine has nothing behind LayerMaskedMixin"):
            type("Mine", (GRPOTrainer, LayerMaskedMixin), {})

    def test_have_the_trainer_behind_all_bases_of_the_mixin(self):
        """These have the hooks of any trainer, which says nothing of this one."""
        assert behind(LayerMaskedSFTTrainer, LayerMaskedMixin)[0] is SFTTrainer
        assert not generates(LayerMaskedSFTTrainer, LayerMaskedMixin)
        assert generates(LayerMaskedGRPOTrainer, LayerMaskedMixin)

    def test_are_masked_once(self):
        with pytest.raises(TypeError, match=r"\(MRO\) for bases LayerMaskedMixin, LayerM"):
            type("Mine", (LayerMaskedMixin, LayerMaskedGRPOTrainer), {})

    def test_may_have_abstract_methods(self):
        class Abstract(GRPOTrainer, ABC):
            pass

        class Masked(LayerMaskedMixin, Abstract):
            pass

        assert isinstance(Masked, ABCMeta)


@pytest.mark.parametrize("trained", [False, True], ids=["before", "after"])
def test_a_selection_is_for_good(model, tmp_path, trained):
    trainer = make(model, tmp_path, selection=1, max_steps=1)
    if trained:
        trainer.train()
    with pytest.raises(SelectionError, match=r"selection=2 was set .* made for layer 1 of 3"):
        trainer.selection = 2
    assert trainer.selection == select_layers(model, 1)


class Freezing(TrainerCallback):
    """Freezes all that it is given the name of a part of, at some time."""

    def __init__(self, event: str, part: str) -> None:
        setattr(self, event, lambda *_, model, **others: self.freeze(model))
        self.part = part

    def freeze(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if self.part in name:
                parameter.requires_grad_(False)


def test_what_processes_share_stays_behind_callbacks_that_training_adds(model, tmp_path):
    """Or one process would do alone what a callback behind asks for."""
    seen = []

    class Last(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            callbacks = trainer.callback_handler.callbacks
            seen.append([type(callback).__name__ for callback in callbacks])

    class Adds(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            trainer.add_callback(Last())

    trainer = make(model, tmp_path, selection=1, max_steps=1, arguments={"callbacks": [Adds()]})
    trainer.train()
    assert [names[-2:] for names in seen] == [["Last", "SameControl"]]


class TestNothingWithAGradient:
    @pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin", "on_step_end"])
    @pytest.mark.parametrize("reentrant", [None, False, True])
    @pytest.mark.parametrize("part", ["", "layers.1."])
    def test_names_what_a_callback_has_frozen(self, model, tmp_path, event, reentrant, part):
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        changes = {"gradient_checkpointing": reentrant is not None, **options}
        trainer = make(model, tmp_path, selection=1, **changes)
        trainer.add_callback(Freezing(event, part))
        match = r"none of the 9 tensors of layer 1 of 3 .* 'model\.layers\.1\.self_attn\.q_proj"
        with pytest.raises(SelectionError, match=match):
            trainer.train()

    def test_a_part_may_be_frozen(self, model, tmp_path):
        trainer = make(model, tmp_path, selection=1, max_steps=1)
        trainer.add_callback(Freezing("on_step_begin", "mlp"))
        before = bits(model)
        trainer.train()
        assert {name.split(".")[3] for name in changed(model, before)} == {
            *("self_attn", "input_layernorm", "post_attention_layernorm")
        }

    def test_says_that_a_loss_is_cut_off(self, model, tmp_path):
        class Detaching(LayerMaskedGRPOTrainer):
            def compute_loss(self, *args, **kwargs):
                return super().compute_loss(*args, **kwargs).detach()

        trainer = make(model, tmp_path, selection=1, trainer=Detaching)
        with pytest.raises(
            SelectionError, match=r"loss depends on no tensor that trains, .*detach"
        ):
            trainer.train()

    def test_another_gradient_that_a_loss_asks_for_is_its_own_error(self, model, tmp_path):
        class Adversarial(LayerMaskedGRPOTrainer):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                torch.autograd.grad(loss, [self.model.get_input_embeddings().weight])
                return loss

        trainer = make(model, tmp_path, selection=1, trainer=Adversarial)
        with pytest.raises(RuntimeError, match=r"^One of the differentiated Tensors does not"):
            trainer.train()


HALF = "a\ud83d"  # as in a JSON file that was cut


class TestTextsThatNoTokenizerTakes:
    @pytest.mark.parametrize("prompt", [HALF, [{"role": "user", "content": HALF}]])
    def test_of_a_prompt(self, model, tmp_path, prompt):
        rows = IterableDataset.from_generator(lambda: iter([{"prompt": prompt}] * 8))
        own = tokenizer()
        own.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        arguments = {"train_dataset": rows, "processing_class": own}
        trainer = make(model, tmp_path, selection=1, arguments=arguments)
        match = r"prompt of row 0 of a batch has '.ud83d', half of a character.*'a.ud83d'"
        with pytest.raises(TrainerError, match=match):
            trainer.train()

    def test_of_something_else(self, model, tmp_path):
        def rollout(prompts, trainer):
            return trainer.processing_class(HALF)

        arguments = {"rollout_func": rollout}
        trainer = make(model, tmp_path, selection=1, arguments=arguments)
        with pytest.raises(TrainerError, match=r"text that is none of the prompts: what a tool"):
            trainer.train()

    def test_another_character_that_a_file_cannot_hold(self, model, tmp_path):
        def noting(completions, **_):
            (tmp_path / "log").write_text("caf\u00e9", encoding="ascii")

        trainer = make(model, tmp_path, selection=1, arguments={"reward_funcs": noting})
        with pytest.raises(UnicodeEncodeError, match="'ascii' codec"):
            trainer.train()

    def test_other_errors_of_a_type_are_as_they_are(self, model, tmp_path):
        def odd(**_):
            raise TypeError("of the reward")

        trainer = make(model, tmp_path, selection=1, arguments={"reward_funcs": odd})
        with pytest.raises(TypeError, match=r"^of the reward$"):
            trainer.train()


class TestScoreHead:
    def make(self, tmp_path, selection):
        config = tiny_config("llama", 3)
        config.num_labels = 1
        return LayerMaskedRewardTrainer(
            LlamaForSequenceClassification(config),
            RewardConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
            train_dataset=Dataset.from_dict({"chosen": ["ab"] * 8, "rejected": ["cd"] * 8}),
            processing_class=tokenizer(),
            selection=selection,
        )

    def test_that_stays_as_it_is_is_warned_of(self, tmp_path):
        message = r"^score\.weight of LlamaForSequenceClass.* layer 1 "
        with pytest.warns(UserWarning, match=message) as warned:
            trainer = self.make(tmp_path, 1)
        assert __file__ in [
            warning.filename for warning in warned if "score" in str(warning.message)
        ]
        assert not trainer.model.score.weight.requires_grad

    def test_trains_under_full(self, tmp_path, recwarn):
        trainer = self.make(tmp_path, "full")
        assert trainer.model.score.weight.requires_grad
        assert not [w for w in recwarn if "score.weight" in str(w.message)]
