"""What layerrl leans on in transformers, TRL and PyTorch, and what others lean on in its metrics.

A failure here after an upgrade says which part of layerrl to look at before anything else.
"""

import inspect
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers.trainer
from accelerate.utils.constants import OPTIMIZER_NAME as OPTIMIZER_NAME_OF_FSDP
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler

from layerrl.compatibility import end_tokens, generated_one_each
from layerrl.trainer.arguments import StandIn
from tests.engines import Engine, in_place_of_vllm
from tests.grpo import make
from tests.models import FAMILIES, VISION_FAMILIES, tiny
from tests.runs import load, saved
from tests.trainers import CASES

GRAD_NORM = "callbacks.GradNorms measures the layers' shares of the clipped gradients"
SAMPLER = "callbacks.EpochOrder draws the orders of the epochs that a resumed run has done"
OPTIMIZER = "LayerMaskedMixin.create_optimizer masks by requires_grad and regroups what it gets"
FROZEN = "_FrozenCheck compares the frozen tensors at train start and train end"
SAVING = "LayerMaskedMixin.save_model refuses before anything of a checkpoint is written"
LOGGING = "LayerMaskedMixin.log adds the layers' metrics to those of a training step"
NAMES = "delta.record.checkpoint_form gives tensors the names that save_pretrained would"
TOWER = "selection.towers asks a vision-language model for its tower, and its layers for that flag"
BLOCKS = "blocks.find_blocks asks a vision-language model for its text stack"
CONSTRUCTOR = (
    "LayerMaskedMixin.__init__ reads `model` and `peft_config` from the trainer's arguments"
)
BYTES = "delta.merging._replace_bytes writes tensors at the offsets in a safetensors header"
BACKWARD = "checkpointing.backward_from_first_trained removes that hook and sets that flag"
SCORING = "the prefix is replayed around each pass that scores completions"
REFERENCE = "the mixin passes a stand-in for ref_model, and MaskedRun replaces it"
IN_LOSS = "LayerMaskedMixin.compute_loss holds the passes of a policy and its reference"
SYNC = "trainer.sync.WeightSync swaps the model and the metadata of a sync"
MASTERS = "precision.step_in_float32 replaces two methods of an optimizer"
EPISODES = "agents.gigpo and agents.environments play episodes behind TRL's rollout_func"
LAUNCHERS = "trainer.launchers and LayerMaskedMixin follow a model that is sharded in between"
SCHEDULE = "trainer.schedule refuses other schedules than the one in a checkpoint, and AsyncGRPO"
QUANTISED = "quantisation.quantised_base replaces what the trainer calls with a quantised model"
BUFFERS = "frozen.frozen_tensors leaves out buffers that are not saved with the model"


def parameters_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture
def model():
    return tiny("llama", 2)


class TestGradNorm:
    def test_a_callback_sees_clipped_gradients_once_before_each_step(self, model, tmp_path):
        events = []

        class Steps(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
                left = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
                events.append(("clipped", state.global_step, left))

            def on_optimizer_step(self, args, state, control, **kwargs):
                events.append(("step", state.global_step))

        arguments = {"callbacks": [Steps()]}
        changes = {"max_steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 1e-3}
        trainer = make(model, tmp_path, arguments=arguments, **changes)
        trainer.train()
        assert [event[:2] for event in events] == [
            ("clipped", 0),
            ("step", 0),
            ("clipped", 1),
            ("step", 1),
        ], GRAD_NORM
        for (*_, left), entry in zip(events[::2], trainer.state.log_history[:2], strict=True):
            assert entry["grad_norm"] > 1e-2, GRAD_NORM
            assert left == pytest.approx(1e-3, rel=1e-3), GRAD_NORM

    @pytest.mark.parametrize("max_grad_norm", [1e-3, 0.0], ids=["clipping", "none"])
    def test_the_norm_before_clipping_is_logged_with_the_loss(self, model, tmp_path, max_grad_norm):
        made = {}
        for limit in (max_grad_norm, 1e9):
            trainer = make(deepcopy(model), tmp_path, max_steps=1, max_grad_norm=limit)
            trainer.train()
            made[limit] = trainer.state.log_history[0]
        assert "loss" in made[max_grad_norm], GRAD_NORM
        assert made[max_grad_norm]["grad_norm"] == made[1e9]["grad_norm"], GRAD_NORM


class TestSampler:
    def test_a_callback_at_train_begin_finds_the_sampler_not_yet_drawn_from(self, model, tmp_path):
        found = []

        class Begin(TrainerCallback):
            def on_train_begin(self, args, state, control, *, train_dataloader, **kwargs):
                sampler = train_dataloader.batch_sampler.sampler
                found.append((sampler, sampler.generator.get_state(), state.epoch))

        trainer = make(model, tmp_path, max_steps=1, arguments={"callbacks": [Begin()]})
        trainer.train()
        [(sampler, state, epoch)] = found
        assert isinstance(sampler, RepeatSampler), SAMPLER
        assert torch.equal(state, torch.Generator().manual_seed(trainer.args.seed).get_state())
        assert not epoch, SAMPLER

    def test_draws_an_order_when_an_epoch_begins(self):
        sampler = RepeatSampler(range(8), mini_repeat_count=1, seed=3)
        orders = [[*sampler] for _ in range(2)]
        again = RepeatSampler(range(8), mini_repeat_count=1, seed=3)
        next(iter(again))
        assert orders[0] != orders[1], SAMPLER
        assert [*again] == orders[1], SAMPLER


class TestOptimizer:
    def test_holds_only_what_requires_grad_with_and_without_weight_decay(self, model, tmp_path):
        model.requires_grad_(False)
        trained = set(model.model.layers[1].requires_grad_(True).parameters())
        trainer = make(model, tmp_path, weight_decay=0.1)
        optimizer = trainer.create_optimizer()
        assert optimizer is trainer.optimizer, OPTIMIZER
        groups = optimizer.param_groups
        assert {p for group in groups for p in group["params"]} == trained, OPTIMIZER
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0], OPTIMIZER

    def test_passed_in_is_there_before_it_is_created(self, model, tmp_path):
        given = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = make(model, tmp_path, arguments={"optimizers": (given, None)})
        assert trainer.optimizer is given, OPTIMIZER
        assert trainer.create_optimizer() is given, OPTIMIZER
        assert make(model, tmp_path).optimizer is None, OPTIMIZER

    def test_is_created_before_the_scheduler(self, model, tmp_path):
        created = []

        class Spy(GRPOTrainer):
            def create_optimizer(self, *args, **kwargs):
                created.append("optimizer")
                return super().create_optimizer(*args, **kwargs)

            def create_scheduler(self, *args, **kwargs):
                created.append("scheduler")
                return super().create_scheduler(*args, **kwargs)

        make(model, tmp_path, trainer=Spy, max_steps=1).train()
        assert created == ["optimizer", "scheduler"], OPTIMIZER

    def test_layer_wise_ones_are_told_apart_by_their_class(self):
        assert issubclass(LayerWiseDummyOptimizer, torch.optim.Optimizer), OPTIMIZER

    def test_splitting_groups_keeps_options(self):
        tensors = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": tensors, "weight_decay": 0.1}], lr=1.0)
        [group] = optimizer.param_groups
        optimizer.param_groups.clear()
        for tensor in tensors:
            optimizer.add_param_group({**group, "params": [tensor], "lr": 2.0})
        for split, tensor in zip(optimizer.param_groups, tensors, strict=True):
            assert split == {**group, "params": [tensor], "lr": 2.0}, OPTIMIZER


class TestFrozenCheck:
    def test_train_begins_after_a_checkpoint_was_loaded(self, tmp_path):
        first = make(tiny("llama", 2), tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
        first.train()
        seen = []

        class Begin(TrainerCallback):
            def on_train_begin(self, *args, model, **kwargs):
                seen.append(model.lm_head.weight.detach().clone())

        model = tiny("llama", 2)
        before = model.lm_head.weight.detach().clone()
        resumed = make(model, tmp_path / "second", max_steps=1, arguments={"callbacks": [Begin()]})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        [at_start] = seen
        assert not torch.equal(at_start, before), FROZEN
        assert torch.equal(at_start, first.model.lm_head.weight), FROZEN

    def test_train_ends_after_the_best_model_was_loaded(self, model, tmp_path):
        happened = []

        class Noting(GRPOTrainer):
            def _load_best_model(self):
                happened.append("loads")
                super()._load_best_model()
                happened.append("loaded")

        class End(TrainerCallback):
            def on_train_end(self, *args, **kwargs):
                happened.append("ends")

        trainer = make(
            model,
            tmp_path,
            trainer=Noting,
            arguments={
                "callbacks": [End()],
                "eval_dataset": Dataset.from_dict({"prompt": ["ab"] * 4}),
            },
            max_steps=1,
            load_best_model_at_end=True,
            **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
            **dict.fromkeys(("eval_steps", "save_steps"), 1),
        )
        trainer.train()
        assert happened == ["loads", "loaded", "ends"], FROZEN

    def test_callbacks_run_in_the_order_they_were_added(self, model, tmp_path):
        ran = []

        class Named(TrainerCallback):
            def __init__(self, name):
                self.name = name

            def on_train_end(self, *args, **kwargs):
                ran.append(self.name)

        arguments = {"callbacks": [Named("the user's")]}
        trainer = make(model, tmp_path, max_steps=1, arguments=arguments)
        trainer.add_callback(Named("added later"))
        trainer.train()
        assert ran == ["the user's", "added later"], FROZEN

    def test_errors_in_callbacks_end_training(self, model, tmp_path):
        class Fails(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                raise ZeroDivisionError

        trainer = make(model, tmp_path, arguments={"callbacks": [Fails()]})
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert trainer.state.global_step == 0, FROZEN

    def test_modules_know_which_buffers_are_not_saved(self, model):
        module = model.model.rotary_emb
        assert "inv_freq" in module._non_persistent_buffers_set, BUFFERS
        assert "inv_freq" not in module.state_dict(), BUFFERS


class TestSaving:
    def test_a_checkpoint_starts_with_save_model(self, model, tmp_path):
        class Refuses(GRPOTrainer):
            def save_model(self, *args, **kwargs):
                raise ZeroDivisionError

        changes = {"save_strategy": "steps", "save_steps": 1}
        with pytest.raises(ZeroDivisionError):
            make(model, tmp_path, trainer=Refuses, **changes).train()
        # TRL's model card is all that may be there.
        assert {file.name for file in tmp_path.iterdir()} <= {"README.md"}, SAVING


class TestLogging:
    def test_only_training_steps_log_a_loss(self, model, tmp_path):
        trainer = make(model, tmp_path, max_steps=2)
        trainer.train()
        has_loss = ["loss" in entry for entry in trainer.state.log_history]
        assert has_loss == [True, True, False], LOGGING
        assert parameters_of(GRPOTrainer.log)[:2] == ["self", "logs"], LOGGING


class TestDelta:
    def test_names_on_disk_come_from_one_function(self):
        found = parameters_of(revert_weight_conversion)
        assert found == ["model", "state_dict"], NAMES

    @pytest.mark.parametrize("family", FAMILIES)
    def test_reverting_gives_what_save_pretrained_writes(self, tmp_path, family):
        model = tiny(family, 1)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        reverted = revert_weight_conversion(model, dict(model.named_parameters()))
        assert {name: list(tensor.shape) for name, tensor in reverted.items()}.items() <= {
            name: list(tensor.shape) for name, tensor in saved.items()
        }.items(), NAMES

    def test_safetensors_files_are_a_length_a_json_header_and_bytes(self, tmp_path):
        tensor = torch.arange(6.0).view(2, 3)
        save_file({"a": torch.zeros(5), "b": tensor}, tmp_path / "file", metadata={"format": "pt"})
        data = Path(tmp_path / "file").read_bytes()
        size = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + size])["b"]
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        assert (entry["dtype"], entry["shape"]) == ("F32", [2, 3]), BYTES
        assert data[begin:end] == tensor.numpy().tobytes(), BYTES

    def test_models_know_where_they_came_from(self, model, tmp_path):
        where = "delta.DeltaBase.of records the config's _name_or_path, _commit_hash, model_type"
        assert not model.config._name_or_path, where
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.config._name_or_path == str(tmp_path), where
        assert loaded.config.model_type == "llama", where
        assert getattr(loaded.config, "_commit_hash", None) is None, where


class TestBlocks:
    @pytest.mark.parametrize("family", VISION_FAMILIES)
    def test_vision_language_models_name_their_text_stack(self, family):
        model = tiny(family, 3)
        decoder = model.get_decoder()
        assert model.get_submodule(FAMILIES[family].path) in set(decoder.modules()), BLOCKS
        assert model.config.get_text_config(decoder=True).num_hidden_layers == 3, BLOCKS

    @pytest.mark.parametrize("family", VISION_FAMILIES)
    def test_vision_language_models_name_their_tower_and_what_can_be_checkpointed(self, family):
        model = tiny(family)
        tower = model.get_encoder(modality="image")
        blocks = model.get_submodule(FAMILIES[family].tower)
        assert blocks in set(tower.modules()), TOWER
        assert all(hasattr(block, "gradient_checkpointing") for block in blocks), TOWER
        assert tiny("llama").get_encoder(modality="image") is not None, TOWER


class TestConstructor:
    def test_has_the_arguments_layerrl_reads(self):
        found = parameters_of(GRPOTrainer)
        assert found[0] == "model", CONSTRUCTOR
        assert "peft_config" in found, CONSTRUCTOR
        assert "selection" not in found, CONSTRUCTOR

    def test_takes_every_setting_of_its_config(self):
        # The README promises the user's own GRPOConfig.
        names = {"optim", "lr_scheduler_type", "max_grad_norm", "weight_decay", "beta"}
        assert names <= set(parameters_of(GRPOConfig)), CONSTRUCTOR


class TestReference:
    @pytest.mark.parametrize("name", ["DPO", "KTO", "Online DPO"])
    def test_is_an_argument_that_is_taken_as_it_is(self, tmp_path, name):
        given = StandIn()
        folder = saved(tmp_path / "base")
        trainer = CASES[name].make(folder, tmp_path, arguments={"ref_model": given})
        assert trainer.accelerator.unwrap_model(trainer.ref_model) is given, REFERENCE

    @pytest.mark.parametrize("name", ["DPO", "KTO"])
    def test_is_computed_in_the_loss_after_the_policy_with_tokens_by_name(self, tmp_path, name):
        trainer = CASES[name].make(saved(tmp_path / "base"), tmp_path)
        calls = []
        for who, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
            model.register_forward_pre_hook(
                lambda _, args, kwargs, who=who: calls.append((who, args, set(kwargs))),
                with_kwargs=True,
            )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.compute_loss(trainer.model, batch)
        order = list(dict.fromkeys(who for who, *_ in calls))
        assert order == ["policy", "reference"], IN_LOSS
        assert all(not args and "input_ids" in names for _, args, names in calls), IN_LOSS

    def test_async_trainers_have_a_method_for_what_they_send(self):
        why = "trainer.announced.AnnouncedSync replaces it; tests/unit/test_announced.py runs it"
        assert list(inspect.signature(AsyncGRPOTrainer._streaming_iter).parameters) == ["self"], why
        assert hasattr(AsyncGRPOConfig, "weight_sync_steps"), SCHEDULE
        assert not hasattr(GRPOConfig, "weight_sync_steps"), SCHEDULE

    def test_callbacks_with_a_state_are_in_the_trainers_and_listed_where_they_are_two(self):
        class Kept(TrainerCallback, ExportableState):
            def state(self):
                return {"args": {"a": 1}, "attributes": {}}

        for callbacks, expected in (
            ([Kept()], Kept().state()),
            ([Kept(), Kept()], [Kept().state()] * 2),
        ):
            found = TrainerState(stateful_callbacks=callbacks).stateful_callbacks
            assert found["Kept"] == expected, SCHEDULE

    def test_quantised_models_are_validated_by_a_function_of_this_name(
        self, model, tmp_path, monkeypatch
    ):
        seen = []
        monkeypatch.setattr(transformers.trainer, "validate_quantization_for_training", seen.append)
        make(model, tmp_path)
        assert seen == [model], QUANTISED


class TestFastPath:
    def test_checkpointing_has_one_flag_a_layer_and_a_hook_of_that_name(self, model):
        model.gradient_checkpointing_enable()
        embedding = model.get_input_embeddings()
        names = [hook.__name__ for hook in embedding._forward_hooks.values()]
        assert names == ["make_inputs_require_grads"], BACKWARD
        assert all(layer.gradient_checkpointing for layer in model.model.layers), BACKWARD

    @pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
    def test_completions_are_generated_and_scored_in_these_methods(self, trainer):
        scored = parameters_of(trainer._get_per_token_logps_and_entropies)
        assert scored[1] == "model", SCORING
        assert hasattr(trainer, "_generate_and_score_completions"), SCORING

    def test_continuous_batching_casts_the_model(self, model, tmp_path, monkeypatch):
        cast = []

        def note(dtype):
            cast.append(dtype)
            raise ZeroDivisionError

        trainer = make(model, tmp_path, use_transformers_continuous_batching=True)
        trainer.args.bf16 = True  # which a trainer on a CPU would refuse when it is made
        monkeypatch.setattr(model, "to", note)
        with pytest.raises(ZeroDivisionError):
            trainer._generate_and_score_completions(list(trainer.train_dataset)[:8])
        assert cast == [torch.bfloat16], "trainer.arguments.refuse_cast need no longer refuse"

    def test_sync_walks_the_model_and_keeps_metadata(self, tmp_path, monkeypatch):
        folder = saved(tmp_path / "base")  # which the stand-in is of the shape of
        with in_place_of_vllm(monkeypatch):
            trainer = make(load(folder), tmp_path, use_vllm=True, vllm_mode="server")
            generation, engine = trainer.vllm_generation, Engine.latest
            assert type(generation) is VLLMGeneration, SYNC
            generation.sync_weights()
            every = [name for name, _ in trainer.model.named_parameters()]
            assert engine.syncs[-1] == every, SYNC
            if hasattr(generation, "_iter_named_params"):  # before TRL 1.10, without metadata
                assert [name for name, *_ in generation._weight_metadata] == every, SYNC

            class One(nn.Module):
                def named_parameters(self, *args, **kwargs):
                    yield next(trainer.model.named_parameters())

            generation.model, generation._weight_metadata = One(), None
            generation.sync_weights()
            assert engine.syncs[-1] == every[:1], SYNC

    def test_torch_counts_writes_in_place(self):
        parameter = nn.Parameter(torch.zeros(2))
        before = parameter._version
        with torch.no_grad():
            parameter.add_(1)
        assert parameter._version > before, SYNC

    def test_optimizers_load_state_in_the_parameters_dtype_and_keep_lists(self):
        parameter = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([parameter], momentum=0.9)
        held = optimizer.param_groups[0]["params"]
        state = {"momentum_buffer": torch.zeros(2, dtype=torch.bfloat16)}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
        assert optimizer.state[parameter]["momentum_buffer"].dtype == torch.float32, MASTERS
        assert optimizer.param_groups[0]["params"] is held, MASTERS

    def test_two_tensors_can_trade_what_they_stand_for_and_back(self):
        one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2).double())
        loss = one.sum()  # a backward under way, and a hook as DDP hangs there
        calls = []
        one.register_post_accumulate_grad_hook(calls.append)
        torch._C._swap_tensor_impl(one, other)
        assert one.dtype == torch.float64, MASTERS
        torch._C._swap_tensor_impl(one, other)
        loss.backward()
        assert torch.equal(one.grad, torch.ones(2)), MASTERS
        assert calls[0] is one, MASTERS


class TestLaunchers:
    """What really launched processes do is in tests/launchers."""

    def test_training_state_is_made_before_the_model_is_prepared(self, model, tmp_path):
        calls = []

        class Noting(GRPOTrainer):
            def _init_training_state(self, *args, **kwargs):
                calls.append("state")
                return super()._init_training_state(*args, **kwargs)

        trainer = make(model, tmp_path, trainer=Noting, max_steps=1)
        prepare = trainer.accelerator.prepare

        def preparing(*given, **kwargs):
            calls.extend("model" for one in given if isinstance(one, nn.Module))
            return prepare(*given, **kwargs)

        trainer.accelerator.prepare = preparing
        trainer.train()
        assert calls == ["state", "model"], LAUNCHERS

    def test_one_attribute_says_how_an_optimizer_is_saved_and_loaded(
        self, model, tmp_path, monkeypatch
    ):
        trainer = make(model, tmp_path, max_steps=1)
        trainer.train()
        sharded = []
        for name in ("save_fsdp_model", "save_fsdp_optimizer", "load_fsdp_optimizer"):
            monkeypatch.setattr(
                transformers.trainer, name, lambda *_, n=name, **__: sharded.append(n)
            )
        monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", None, raising=False)
        trainer._save_optimizer_and_scheduler(str(tmp_path))
        assert (tmp_path / OPTIMIZER_NAME).is_file(), LAUNCHERS
        trainer.optimizer.state.clear()
        trainer._load_optimizer_and_scheduler(str(tmp_path))
        assert trainer.optimizer.state, LAUNCHERS
        assert not sharded, LAUNCHERS
        trainer.is_fsdp_enabled = True
        trainer._save_optimizer_and_scheduler(str(tmp_path))
        (tmp_path / OPTIMIZER_NAME).unlink()
        (tmp_path / f"{OPTIMIZER_NAME_OF_FSDP}_0").mkdir()
        trainer._load_optimizer_and_scheduler(str(tmp_path))
        assert sharded == ["save_fsdp_model", "save_fsdp_optimizer", "load_fsdp_optimizer"]


class TestEpisodes:
    def test_rollout_func_gets_prompts_and_its_fields_get_to_rewards(self, model, tmp_path):
        given = {}

        def rollout(prompts, trainer):
            given["prompts"] = prompts
            return {
                "prompt_ids": [[5]] * 8,
                "completion_ids": [[6, 7]] * 4 + [[6]] * 4,
                "env_mask": [[0, 1]] * 4 + [[1]] * 4,
                "logprobs": None,
                "steps": list(range(8)),
            }

        def reward(steps, log_metric, **kwargs):
            given.update(kwargs, steps=steps)
            return [0.0] * 8

        arguments = {"rollout_func": rollout, "reward_funcs": reward}
        trainer = make(model, tmp_path, arguments=arguments)
        rows = [dict(row) for row in trainer.train_dataset.select(range(8))]
        batch = trainer._generate_and_score_completions(rows)
        assert given["prompts"] == [row["prompt"] for row in rows], EPISODES
        assert given["steps"] == list(range(8)), EPISODES
        assert "env_mask" not in given, EPISODES
        assert batch["tool_mask"][0].tolist() == [0, 1], EPISODES
        assert batch["completion_mask"][7].tolist() == [1, 0], EPISODES

    def test_rollouts_tokenize_and_generate_with_these(self, model, tmp_path):
        trainer = make(model, tmp_path)
        found = parameters_of(trainer._generate_single_turn)
        assert found[:3] == ["prompt_ids", "images", "multimodal_fields"], EPISODES
        ids, images, fields = trainer._tokenize_prompts(["ab", "c"])
        assert (len(ids), images, fields) == (2, None, {}), EPISODES
        trainer.generation_config.max_new_tokens = 1
        completions, logprobs = generated_one_each(trainer, ids)
        assert [len(completion) for completion in completions] == [1, 1], EPISODES
        assert logprobs is None, EPISODES
        assert end_tokens(trainer) == [2], EPISODES
        assert trainer._tokenizer is trainer.processing_class, EPISODES
        assert (trainer.chat_template, trainer.chat_template_kwargs) == (None, {}), EPISODES

    def test_metrics_of_a_batch_are_logged_with_it(self, model, tmp_path):
        trainer = make(model, tmp_path)
        for value in (1.0, 2.0):
            trainer._log_metric("name", value)
        trainer._generate_and_score_completions(list(trainer.train_dataset)[:8])
        assert trainer._metrics["train"]["name"] == [1.5], EPISODES

    def test_the_loss_takes_an_advantage_for_each_token(self, model, tmp_path):
        trainer = make(model, tmp_path, loss_type="grpo")
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._generate_and_score_completions(list(trainer.train_dataset)[:8])
        of_rows = trainer.compute_loss(model, batch)
        ones_BT = torch.ones_like(batch["completion_mask"], dtype=torch.float)
        advantages_BT = batch["advantages"][:, None] * ones_BT
        of_tokens = trainer.compute_loss(model, {**batch, "advantages": advantages_BT})
        assert torch.equal(of_rows, of_tokens), EPISODES
        advantages_BT[:, 0] += 1
        other = trainer.compute_loss(model, {**batch, "advantages": advantages_BT})
        assert not torch.equal(of_rows, other), EPISODES
        trainer.current_gradient_accumulation_steps = 2
        half = trainer.compute_loss(model, batch)
        assert torch.equal(half, of_rows / 2), "scores.rollouts adds up losses of parts"


def test_metric_names_are_public(tmp_path):
    trainer = make(tiny("llama", 3), tmp_path, selection=[0, 2], max_steps=1)
    trainer.train()
    logged = [name for name in trainer.state.log_history[0] if name.startswith("layerrl/")]
    assert logged == [
        "layerrl/trained_parameters",
        "layerrl/grad_norm/layer_0",
        "layerrl/grad_norm/layer_2",
        "layerrl/relative_update/layer_0",
        "layerrl/relative_update/layer_2",
    ]
