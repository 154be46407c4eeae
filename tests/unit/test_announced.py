"""What TRL's asynchronous trainers announce to vLLM and send, real but for what needs a GPU."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from torch.testing import assert_close
from transformers import TrainerCallback

from layerrl import LayerMaskedMixin, select_layers
from layerrl.errors import ProbeError, SelectionError, TrainerError
from layerrl.trainer.schedule import LayerSchedule

pytest.importorskip("trl.experimental.async_grpo", reason="needs aiohttp", exc_type=ImportError)

from tests.asynchronous import (
    LAYER,
    TRAINERS,
    AsyncGRPOTrainer,
    Server,
    Worker,
    in_place_of_a_gpu,
    make,
)
from tests.grpo import PROMPTS, QUIETLY, reward, tokenizer
from tests.models import tiny
from tests.runs import assert_same_run, assert_trained, bits, in_layers, load, saved, train

BY_FLAG = Version(trl.__version__) >= Version("1.13")  # before, TRL announces every parameter


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    with in_place_of_a_gpu(monkeypatch):
        yield


@pytest.fixture
def folder(tmp_path) -> Path:
    return saved(tmp_path / "base")


@pytest.fixture
def masked(folder, tmp_path) -> Any:
    return lambda selection=LAYER, **changes: make(folder, tmp_path / "run", selection, **changes)


def names(trainer: Any, *layers: int) -> list[str]:
    """Of these layers, in the order of the model; of everything without any."""
    every = [name for name, _ in trainer.model.named_parameters()]
    return [name for name in every if not layers or in_layers(name, layers)]


def sent() -> list[list[str]]:
    """What the server has received, which is what had been announced to it."""
    server = Server.latest
    assert server.engine.syncs == server.announced
    return server.announced


def flags(trainer: Any) -> set[bool]:
    return {parameter.requires_grad for parameter in trainer.model.parameters()}


def assert_serves_the_policy(trainer: Any) -> None:
    assert_close(bits(Server.latest.engine.model), bits(trainer.model), rtol=0, atol=0)


class Recorder:
    """A user's own way to send weights, which announces nothing."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []

    def send_weights(self, iterator: Any) -> None:
        self.sent.append([name for name, _ in iterator])

    def init_weight_transfer(self) -> None:
        pass

    pause = resume = destroy = init_weight_transfer


class TestWhatIsSent:
    @pytest.mark.skipif(
        not BY_FLAG, reason="TRL announces every parameter, whatever it is masked to"
    )
    def test_only_what_trains_is_announced_when_the_trainer_is_made(self, masked):
        trainer = masked()
        assert trainer.weight_transfer._weight_update_info["names"] == names(trainer, LAYER)

    def test_everything_once_then_the_trained_layer(self, masked):
        trainer = masked()
        trainer.train()
        assert sent() == [names(trainer)] + [names(trainer, LAYER)] * 5
        assert_serves_the_policy(trainer)

    def test_siblings_that_vllm_fuses_travel_together(self, masked, folder):
        trainer = masked(select_layers(load(folder), LAYER, modules="*q_proj.weight"), max_steps=2)
        trainer.train()
        siblings = [f"model.layers.{LAYER}.self_attn.{part}_proj.weight" for part in "qkvo"]
        assert sent()[1:] == [siblings] * 2
        assert_serves_the_policy(trainer)

    def test_everything_again_after_a_resume(self, masked, tmp_path):
        masked(max_steps=2, save_strategy="steps", save_steps=1).train()
        checkpoint = tmp_path / "run" / "checkpoint-1"
        assert (checkpoint / "delta.safetensors").exists()
        trainer = masked(max_steps=2)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 2
        assert sent() == [names(trainer), names(trainer, LAYER)]
        assert_serves_the_policy(trainer)

    def test_everything_again_after_a_frozen_layer_was_written_to(self, masked, caplog):
        trainer = masked(max_steps=1)
        trainer.train()
        with torch.no_grad():
            trainer.model.model.layers[0].mlp.up_proj.weight.normal_()
        trainer._sync_weight()
        assert sent()[-1] == names(trainer)
        assert "all weights and not only the trained ones: a frozen tensor" in caplog.text
        assert_serves_the_policy(trainer)

    def test_everything_again_after_a_failure(self, masked, monkeypatch):
        trainer, finish = masked(), Server.finish_weight_update

        def failing(server: Server, timeout: float = 0) -> None:
            finish(server)
            if len(server.announced) == 2:
                raise RuntimeError("the engine is gone")

        with monkeypatch.context() as patch:
            patch.setattr(Server, "finish_weight_update", failing)
            with pytest.raises(RuntimeError, match="the engine is gone"):
                trainer.train()
        trainer._sync_weight()
        assert sent() == [names(trainer), names(trainer, LAYER), names(trainer)]

    def test_everything_again_after_nothing_was_read(self, masked):
        trainer = masked(max_steps=1)
        trainer.train()
        group, trainer.weight_transfer.model_update_group = (
            trainer.weight_transfer.model_update_group,
            None,  # as after the training
        )
        trainer._sync_weight()
        trainer.weight_transfer.model_update_group = group
        trainer._sync_weight()
        assert sent() == [names(trainer), names(trainer, LAYER), names(trainer)]

    def test_a_transfer_of_the_users_gets_what_trains(self, masked, caplog):
        transfer = Recorder()
        trainer = masked(max_steps=1, arguments={"weight_transfer": transfer})
        trainer.train()
        assert transfer.sent == [names(trainer, LAYER)] * 2
        assert caplog.text.count("the trained ones alone: the engine behind Recorder") == 1

    def test_a_transfer_of_the_users_that_announces_gets_everything_first(self, masked):
        transfer = TRAINERS.WeightTransferClient(
            Server(), {"names": [], "dtype_names": ["float32"], "shapes": [], "packed": True}
        )
        trainer = masked(max_steps=1, arguments={"weight_transfer": transfer})
        Server.latest = transfer.vllm
        trainer.train()
        assert sent() == [names(trainer), names(trainer, LAYER)]
        assert transfer._weight_update_info["packed"] is True

    def test_parts_of_a_model_that_trl_has_frozen_are_never_sent(self, tmp_path):
        if not BY_FLAG:
            pytest.skip("trains the text of a model that sees images since TRL 1.13")
        folder = saved(tmp_path / "base", tiny("qwen2_5_vl", 3))
        trainer = make(folder, tmp_path / "run", 1)
        text = [name for name in names(trainer) if "visual" not in name]
        assert len(text) < len(names(trainer))
        layer = [name for name in text if ".layers.1." in name]
        for expected in (text, layer):
            assert [name for name, _ in trainer._streaming_iter()] == expected
            assert trainer.weight_transfer._weight_update_info["names"] == expected

    def test_by_asynchronous_distillation(self, folder, tmp_path, monkeypatch):
        module = pytest.importorskip(
            "trl.experimental.async_distillation", reason="TRL 1.12 has it"
        )

        class Masked(LayerMaskedMixin, module.AsyncDistillationTrainer):
            pass

        with in_place_of_a_gpu(monkeypatch, module.AsyncDistillationTrainer):
            trainer = Masked(
                str(folder),
                args=module.AsyncDistillationConfig(str(tmp_path / "run"), **QUIETLY, max_steps=1),
                train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
                processing_class=tokenizer(),
                rollout_worker=Worker(),
                selection=LAYER,
            )
            trainer.weight_transfer.init_weight_transfer()
            for _ in range(2):
                trainer._sync_weight()
        assert sent() == [names(trainer), names(trainer, LAYER)]
        assert_serves_the_policy(trainer)


class TestTraining:
    def test_of_a_layer_is_that_of_trl_with_the_rest_frozen_by_hand(self, folder, tmp_path):
        runs = []
        for name, selection in (("plain", "by hand"), ("masked", LAYER)):
            runs.append(make(folder, tmp_path / name, selection))
            train(runs[-1])
        assert_same_run(*reversed(runs))
        assert_trained(runs[1], bits(load(folder)), [LAYER])

    def test_of_everything_is_that_of_trl(self, folder, tmp_path):
        runs = []
        for name, selection in (("plain", None), ("full", "full")):
            runs.append(make(folder, tmp_path / name, selection))
            train(runs[-1])
            assert sent() == [names(runs[-1])] * 6
        assert_same_run(*reversed(runs))


class TestMaking:
    def test_keeps_the_users_callbacks_and_no_other(self, masked):
        own = TrainerCallback()
        handler = masked(arguments={"callbacks": [own]}).callback_handler
        assert own in handler.callbacks
        assert "EarlyMask" not in handler.callback_list

    def test_takes_callbacks_by_position(self, folder, tmp_path):
        own, plain = TrainerCallback(), make(folder, tmp_path / "run")

        class Masked(LayerMaskedMixin, AsyncGRPOTrainer):
            pass

        given = (str(folder), reward, plain.args, plain.train_dataset, plain.processing_class)
        trainer = Masked(*given, [own], rollout_worker=plain.rollout_worker, selection=LAYER)
        assert own in trainer.callback_handler.callbacks

    def test_gives_the_flags_back_where_it_fails(self, masked):
        class Keep(TrainerCallback):
            def on_init_end(self, *_: Any, model: Any, **__: Any) -> None:
                self.model = model

        keep = Keep()
        with pytest.raises(AttributeError, match="rollout_buffer"):
            masked(arguments={"callbacks": [keep], "rollout_worker": object()})
        assert flags(keep) == {True}

    def test_and_training_give_the_flags_back(self, masked):
        trainer = masked(max_steps=1)
        assert flags(trainer) == {True, False}  # until it has trained
        trainer.train()
        assert flags(trainer) == {True}

    @pytest.mark.parametrize("selection", [7, "middle:9"])
    def test_refuses_what_does_not_fit(self, masked, selection):
        with pytest.raises(SelectionError):
            masked(selection)

    def test_refuses_to_choose_layers(self, masked):
        with pytest.raises(ProbeError, match='selection="auto" needs a trainer that generates'):
            masked("auto")

    @pytest.mark.skipif(
        "peft_config" not in inspect.signature(AsyncGRPOTrainer).parameters, reason="takes none"
    )
    def test_refuses_adapters(self, masked):
        with pytest.raises(TrainerError, match="announces to vLLM the names of what trains, and"):
            masked(arguments={"peft_config": LoraConfig(r=2)})

    def test_refuses_layers_that_take_turns(self, masked):
        trainer = masked([1, 2], arguments={"callbacks": [LayerSchedule([1, 2], every=1)]})
        with pytest.raises(SelectionError, match="AsyncGRPOConfig: the trainer told vLLM"):
            trainer.train()


class TestAnotherTRL:
    """One that does it in another way is an error that says so, and what is known."""

    KNOWN = r"TRL 1\.9 to 1\.16 is known here: install one of these"

    def test_with_another_method(self):
        new = type("AsyncGRPOTrainer", (trl.SFTTrainer,), {"__module__": "trl.trainer.async_grpo"})
        masked = type("Masked", (LayerMaskedMixin, new), {})
        with pytest.raises(TrainerError, match=f"without its method _streaming_iter.*{self.KNOWN}"):
            masked("nowhere", selection=1)  # before it is loaded

    def test_whose_class_is_the_users_own(self, folder, tmp_path):
        class AsyncSFTTrainer(trl.SFTTrainer):
            pass

        masked = type("Masked", (LayerMaskedMixin, AsyncSFTTrainer), {})
        with pytest.raises(TypeError, match="nonsense"):
            masked(str(folder), selection=1, nonsense=True)

    @pytest.mark.parametrize("items", [[], [("another", torch.zeros(1))]], ids=["none", "other"])
    def test_that_takes_weights_from_another_place(self, masked, items):
        class Another(AsyncGRPOTrainer):
            def _streaming_iter(self) -> Any:
                yield from items

        with pytest.raises(TrainerError, match=f"Masked.*from another place.*{self.KNOWN}"):
            masked(trainer=Another)

    def test_with_other_arguments(self, masked):
        class Another(AsyncGRPOTrainer):
            def _streaming_iter(self, model: Any) -> Any:
                yield from model.named_parameters()

        with pytest.raises(TrainerError, match=f"from another place.*{self.KNOWN}"):
            masked(trainer=Another)

    def test_that_announced_others(self, masked):
        class Another(AsyncGRPOTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.weight_transfer._weight_update_info["names"] = ["another"]

        with pytest.raises(TrainerError, match=f"after announcing others.*{self.KNOWN}"):
            masked(trainer=Another)

    def test_that_calls_what_sends_them_something_else(self, masked):
        class Another(AsyncGRPOTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.transport = self.weight_transfer
                del self.weight_transfer

        with pytest.raises(TrainerError, match=f"other means than its weight_tran.*{self.KNOWN}"):
            masked(trainer=Another)

    @pytest.mark.parametrize("lost", ["input_layernorm", "post_attention_layernorm"])
    def test_that_sends_others_than_announced(self, masked, lost):
        class Another(AsyncGRPOTrainer):
            def _streaming_iter(self) -> Any:
                return (pair for pair in super()._streaming_iter() if lost not in pair[0])

        stream = masked(trainer=Another, arguments={"weight_transfer": Recorder()})._streaming_iter
        with pytest.raises(TrainerError, match=f"not those announced: .*{self.KNOWN}"):
            list(stream())
