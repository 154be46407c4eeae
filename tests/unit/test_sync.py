"""What reaches vLLM, with TRL's real `VLLMGeneration` in front of a stand-in for the engine."""

import inspect
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from layerrl import LayerMaskedGRPOTrainer, LayerMaskedMixin, select_layers
from layerrl.blocks import with_fused_siblings
from layerrl.errors import FrameworkError
from tests.engines import Client, Engine, in_place_of_vllm
from tests.grpo import make
from tests.runs import assert_same_run, bits, evaluation, load, moved, pair, saved, train

MODES = ["colocate", "server"]
EXPERTS = ["0.b.experts.0.w2.weight", "0.b.experts.1.w2.weight", "0.b.experts.down_proj"]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    with in_place_of_vllm(monkeypatch):
        yield


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "base")


def masked(folder, mode: str = "colocate", selection: Any = 2, **changes: Any) -> Any:
    """A trainer on TRL's vLLM path, three steps by default."""
    arguments = {"selection": selection} | changes.pop("arguments", {})
    return make(
        load(folder),
        folder.parent / "run",
        arguments=arguments,
        trainer=changes.pop("trainer", LayerMaskedGRPOTrainer),
        use_vllm=True,
        vllm_mode=mode,
        **changes,
    )


def names(trainer) -> list[str]:
    return [name for name, _ in trainer.model.named_parameters()]


def of_layer(trainer, layer: int) -> list[str]:
    return [name for name in names(trainer) if f".layers.{layer}." in name]


def assert_serves_the_policy(trainer) -> None:
    trainer.vllm_generation.sync_weights()
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        assert_close(Engine.latest.model(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
class TestWhatIsSent:
    def test_everything_once_then_the_trained_layer(self, folder, mode):
        trainer = masked(folder, mode)
        trainer.train()
        first, *others = Engine.latest.syncs
        assert first == names(trainer)
        assert others == [of_layer(trainer, 2)] * 2
        assert_serves_the_policy(trainer)

    def test_bytes_are_those_of_the_trained_tensors(self, folder, mode):
        trainer = masked(folder, mode)
        trainer.train()
        trained = sum(p.nbytes for p in trainer.selection.parameters(trainer.model).values())
        assert Engine.latest.num_bytes[1:] == [trained] * 2

    def test_training_is_that_of_trl_with_layers_frozen_by_hand(self, folder, mode):
        changes = {"use_vllm": True, "vllm_mode": mode, "beta": 0.04, "num_iterations": 2}
        trainers = pair(folder, **changes)
        train(*trainers)
        assert_same_run(*trainers)

    def test_siblings_that_vllm_fuses_travel_together(self, folder, mode):
        trainer = masked(folder, mode, select_layers(load(folder), 2, modules="*q_proj.weight"))
        trainer.train()
        sent = [f"model.layers.2.self_attn.{part}_proj.weight" for part in "qkvo"]
        assert Engine.latest.syncs[1:] == [sent] * 2
        assert_serves_the_policy(trainer)

    def test_everything_again_after_a_resume(self, folder, mode):
        changes = {"save_strategy": "steps", "save_steps": 1}
        trainer = masked(folder, mode, **changes)
        trainer.train()
        checkpoint = folder.parent / "run" / "checkpoint-1"
        before = len(Engine.latest.syncs)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert [len(sync) for sync in Engine.latest.syncs[before:]] == [
            len(names(trainer)),
            len(of_layer(trainer, 2)),
        ]
        assert_serves_the_policy(trainer)

    def test_everything_again_after_a_frozen_layer_was_written_to(self, folder, mode):
        trainer = masked(folder, mode)
        trainer.train()
        with torch.no_grad():
            trainer.model.model.layers[0].mlp.up_proj.weight.normal_()
        assert_serves_the_policy(trainer)
        assert len(Engine.latest.syncs[-1]) == len(names(trainer))

    def test_everything_again_after_a_failure(self, folder, mode):
        trainer = masked(folder, mode)
        trainer.train()
        generation, engine = trainer.vllm_generation, Engine.latest
        engine.fails = True
        with pytest.raises(RuntimeError, match="the engine is gone"):
            generation.sync_weights()
        assert generation.model is trainer.model
        engine.fails, engine._sync_open = False, False
        assert_serves_the_policy(trainer)
        assert engine.syncs[-1] == names(trainer)

    def test_everything_again_at_a_step_that_was_synced_before(self, folder, mode):
        changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        masked(folder, mode, **changes).train()
        trainer = masked(folder, mode, **changes)
        trainer.train()
        trainer.train(resume_from_checkpoint=str(folder.parent / "run" / "checkpoint-1"))
        assert [len(sent) == len(names(trainer)) for sent in Engine.latest.syncs] == [
            True,
            False,
            True,
        ]

    def test_full_leaves_trl_as_it_is(self, folder, mode):
        trainer = masked(folder, mode, "full")
        trainer.train()
        assert "sync_weights" not in vars(trainer.vllm_generation)
        assert Engine.latest.syncs == [names(trainer)] * 3


def test_an_engine_that_slept_is_sent_everything_and_that_is_said_once(folder, caplog):
    trainer = masked(folder, vllm_enable_sleep_mode=True)
    trainer.train()
    assert Engine.latest.syncs == [names(trainer)] * 3
    [said] = [r.getMessage() for r in caplog.records if r.name == "layerrl.trainer.sync"]
    assert "slept and lost its weights" in said


def test_nothing_is_said_where_only_what_was_trained_is_sent(folder, caplog):
    masked(folder).train()
    assert not [r for r in caplog.records if r.name == "layerrl.trainer.sync"]


def test_the_best_model_is_served_after_training(folder):
    changes = evaluation(save_strategy="steps", save_steps=1, load_best_model_at_end=True)
    trainer = masked(folder, metric_for_best_model="eval_reward", **changes)
    trainer.train()
    before = len(Engine.latest.syncs)
    trainer.evaluate()
    assert len(Engine.latest.syncs) == before + 1
    assert_serves_the_policy(trainer)


class TestSiblings:
    @pytest.mark.parametrize(
        ("trained", "sent"),
        [
            (["0.a.q_proj.bias"], ["0.a.q_proj.weight", "0.a.q_proj.bias", "0.a.k_proj.weight"]),
            (["0.b.up_proj.weight"], ["0.b.gate_proj.weight", "0.b.up_proj.weight"]),
            (["0.b.experts.0.w2.weight"], EXPERTS),
            (["0.b.experts.down_proj"], EXPERTS),
            (["norm.weight"], ["norm.weight"]),
            (["embed.weight"], ["embed.weight"]),
            ([], []),
        ],
    )
    def test_are_all_under_one_parent(self, trained, sent):
        all_names = [
            *("0.a.q_proj.weight", "0.a.q_proj.bias", "0.a.k_proj.weight", "norm.weight"),
            "embed.weight",
            *("0.b.gate_proj.weight", "0.b.up_proj.weight", *EXPERTS, "other.q_proj.weight"),
        ]
        assert with_fused_siblings(all_names, trained) == sent


# Before TRL 1.11 it was one by one.
SENDS = "update_named_param" + ("s" if hasattr(VLLMClient, "update_named_params") else "")


class TestStandIn:
    """The seam is as thin as these signatures."""

    @pytest.mark.parametrize("method", [SENDS, "reset_prefix_cache"])
    def test_client_takes_what_the_real_one_takes(self, method):
        real, ours = (inspect.signature(getattr(c, method)) for c in (VLLMClient, Client))
        assert list(real.parameters) == list(ours.parameters)


@pytest.mark.parametrize("name", ["generate", "sync_weights"])
def test_what_a_subclass_put_on_the_instance_is_called_too(folder, name):
    called = []

    class Wrapping(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            given = getattr(self.vllm_generation, name)

            def wrapper(*args, **kwargs):
                called.append(name)
                return given(*args, **kwargs)

            setattr(self.vllm_generation, name, wrapper)

    class Masked(LayerMaskedMixin, Wrapping):
        pass

    trainer = masked(folder, trainer=Masked)
    trainer.train()
    assert called == [name] * 3
    assert Engine.latest.syncs[1:] == [of_layer(trainer, 2)] * 2


def test_a_rollout_that_asks_the_engine_itself_gets_a_loaded_checkpoint(folder):
    served = []

    def rollout(prompts, trainer):
        engine = Engine.latest.model
        served.append(
            all(
                torch.equal(engine.get_parameter(n), p) for n, p in trainer.model.named_parameters()
            )
        )
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {
            "prompt_ids": ids,
            "completion_ids": [[5, 6 + row % 7] for row in range(len(ids))],
            "logprobs": [[-1.0] * 2] * len(ids),
        }

    changes = evaluation(save_strategy="steps", save_steps=1)
    changes["arguments"] = {**changes["arguments"], "rollout_func": rollout}
    trainer = masked(folder, **changes)
    trainer.train()
    trainer.state.best_model_checkpoint = str(folder.parent / "run" / "checkpoint-1")
    before = bits(trainer.model)
    trainer._load_best_model()
    assert moved(trainer, before)
    served.clear()
    trainer.evaluate()
    assert served
    assert all(served)


def test_a_trl_that_walks_the_model_in_another_way_is_no_silent_success(folder, monkeypatch):
    sent = VLLMGeneration.sync_weights

    def from_a_copy(self):
        own, self.model = self.model, self.accelerator._models[-1]
        sent(self)
        self.model = own

    trainer = masked(folder)
    trainer.train()
    monkeypatch.setattr(VLLMGeneration, "sync_weights", from_a_copy)
    with pytest.raises(FrameworkError, match=r"trl .* did not ask the model for its parameters"):
        trainer.vllm_generation.sync_weights()


@pytest.mark.skipif(
    not hasattr(VLLMGeneration, "_iter_named_params"), reason="before TRL 1.10 it is inside"
)
def test_what_is_sent_may_be_walked_as_a_state_dict(folder, monkeypatch):
    """TRL did so under FSDP2 once."""

    def iter_named_params(self):
        yield from self.model.state_dict().items()

    monkeypatch.setattr(VLLMGeneration, "_iter_named_params", iter_named_params)
    trainer = masked(folder)
    trainer.train()
    assert Engine.latest.syncs[1:] == [of_layer(trainer, 2)] * 2
    assert_serves_the_policy(trainer)
