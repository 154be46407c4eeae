"""`selection="auto:step"`: the run's own first batches choose its layers, measured after steps."""

import itertools
import logging
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import set_seed
from trl import RLOOConfig

from layerrl import ContributionReport, LayerMaskedGRPOTrainer, contribution_probe, select_layers
from layerrl.errors import SelectionError
from layerrl.scores import step
from layerrl.trainer import LayerMaskedRLOOTrainer, auto
from layerrl.trainer.auto import AutoSelection
from tests.devices import on_any_device
from tests.grpo import config, tokenizer
from tests.integration.test_auto import TRAIN, Counting, alike, same, trainer
from tests.models import tiny
from tests.runs import assert_same_run, bits

pytestmark = on_any_device

# A generation batch is 16 prompts, and one step.
VALUES = {"learning_rate": 1e-4, "per_device_train_batch_size": 128, "num_generations": 8}


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """A quarter of those that a run takes: each is passed over by itself."""
    monkeypatch.setattr(auto, "NUM_PROMPTS", 16)
    monkeypatch.setattr(auto, "MOST_PROMPTS", 64)


def by_step(folder: Any, selection: Any = "auto:step", reward: Any = None, **changes: Any) -> Any:
    return trainer(folder, selection, reward, **(VALUES | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.1, "num_iterations": 2},
        {"bf16": True},
        {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 4},
        {"trainer": LayerMaskedRLOOTrainer, "kind": RLOOConfig},
    ],
    ids=["plain", "beta", "bf16", "accumulated", "rloo"],
)
def test_the_run_is_that_of_the_layer_chosen(tmp_path, changes):
    chosen = by_step(tmp_path / "auto", **changes)
    chosen.train()
    assert chosen.masked_run.auto.report.method == "step"
    assert len(chosen.selection.layers) == 1
    plain = by_step(tmp_path / "plain", chosen.selection, **changes)
    plain.train()
    assert_same_run(chosen, plain)


def test_the_layers_are_those_of_the_probe_and_nothing_is_generated_twice(tmp_path):
    reward = Counting()
    run = by_step(tmp_path, "auto:2:step", reward)
    run.train()
    assert len(reward.asked) == 3
    found = contribution_probe(
        tiny("llama", 4),
        method="step",
        reward_funcs=Counting(),
        train_dataset=TRAIN,
        processing_class=tokenizer(),
        args=config(tmp_path / "probe", max_steps=3, **VALUES),
        budget=16,
        seeds=[42],
    )
    report = run.masked_run.auto.report
    assert report.scores == pytest.approx(found.scores, rel=1e-4)
    assert {*run.selection.layers} == {*sorted(found.scores, key=found.scores.__getitem__)[-2:]}
    assert (report.method, report.settings["budget"]) == ("step", 16)
    assert (report.cost.forwards, report.cost.backwards) == (
        found.cost.forwards,
        found.cost.backwards,
    )


def test_batches_of_few_prompts_are_trained_on_in_their_order(tmp_path):
    reward = Counting()
    run = by_step(tmp_path, "auto:step", reward, per_device_train_batch_size=32, max_steps=5)
    run.train()
    assert run.masked_run.auto.report.settings["budget"] == 16
    assert len(reward.asked) == 5


@contextmanager
def dtypes_of(model: Any, monkeypatch: pytest.MonkeyPatch):
    """What a layer computes in while steps are measured."""
    computed: list[torch.dtype] = []
    measure = step._in_float32

    @contextmanager
    def watched(trainer: Any) -> Any:
        layer = model.model.layers[1].mlp.down_proj
        hook = layer.register_forward_hook(lambda *call: computed.append(call[-1].dtype))
        with measure(trainer):
            yield
        hook.remove()

    with monkeypatch.context() as patch:
        patch.setattr(step, "_in_float32", watched)
        yield computed


@pytest.mark.parametrize("evaluates", [False, True])
def test_mixed_precision_is_left_also_by_a_model_that_was_evaluated(
    tmp_path, monkeypatch, evaluates
):
    """An evaluation has accelerate put mixed precision around the model's forward."""
    model = tiny("llama", 4)
    evaluated = {"eval_dataset": TRAIN.select(range(8))}
    run = by_step(tmp_path, model=model, bf16=True, arguments=evaluated)
    if evaluates:
        run.evaluate()
    assert hasattr(model, "_original_forward") == evaluates  # accelerate's mark
    with dtypes_of(model, monkeypatch) as computed:
        run.train()
    assert {*computed} == {torch.float32}
    assert run.masked_run.auto.report.method == "step"


def test_a_model_in_half_precision(tmp_path, monkeypatch):
    model: Any = tiny("llama", 4)
    model.to(torch.bfloat16)
    run = by_step(tmp_path / "auto", model=model)
    with dtypes_of(model, monkeypatch) as computed:
        run.train()
    assert {*computed} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    other: Any = tiny("llama", 4)
    other.to(torch.bfloat16)
    plain = by_step(tmp_path / "plain", run.selection, model=other)
    plain.train()
    assert_same_run(run, plain)


def test_adapters_in_every_layer_are_scored(tmp_path):
    set_seed(3)
    run = by_step(tmp_path, arguments={"peft_config": LoraConfig(r=2)}, beta=0.1)
    before = bits(run.model)
    run.train()
    assert run.masked_run.auto.report.method == "step"
    [chosen] = run.selection.layers
    moved = {name for name, now in bits(run.model).items() if not torch.equal(now, before[name])}
    assert moved
    assert all(f".layers.{chosen}." in name and "lora_" in name for name in moved)


class TestResume:
    def test_trains_the_same_layers_without_probing_again(self, tmp_path, caplog):
        whole = by_step(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
        whole.train()
        kept = tmp_path / "whole" / "checkpoint-2"
        report = ContributionReport.from_json((kept / "contributions.json").read_text())
        assert report == whole.masked_run.auto.report
        assert report.method == "step"
        for selection, says in (
            ("auto:step", f"trains {whole.selection}, with"),
            ("auto", f'trains {whole.selection}, which its run chose by "step", with'),
        ):
            caplog.clear()
            reward = Counting()
            resumed = by_step(tmp_path / selection[4:], selection, reward, max_steps=4)
            with caplog.at_level(logging.WARNING, logger="layerrl"):
                resumed.train(resume_from_checkpoint=str(kept))
            assert f'selection="{selection}" {says}' in caplog.text
            assert len(reward.asked) == 2
            assert resumed.selection == whole.selection
            assert same(resumed, whole)

    def test_says_how_its_run_was_asked_for(self, tmp_path):
        saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        by_step(tmp_path, "auto:2:step", **saving).train()
        for selection in ("auto:step", "auto"):
            with pytest.raises(SelectionError, match='resume with selection="auto:2:step"'):
                by_step(tmp_path, selection).train(resume_from_checkpoint=True)


class TestTakesTheMiddle:
    """It never ends a run: with a sentence, also where no number of prompts would do."""

    def test_where_one_half_has_no_signal(self, tmp_path):
        count = itertools.count()

        def every_other(completions: list[str], **_: Any) -> list[float]:
            return [float(len(text)) * (next(count) // 8 % 2) for text in completions]

        run = by_step(tmp_path, "auto:2:step", every_other, max_steps=5)
        message = r"takes the middle of the model. .* takes steps from every other prompt, and 0 of"
        with pytest.warns(UserWarning, match=message):
            run.train()
        report = run.masked_run.auto.report
        assert (report.method, report.settings["budget"]) == ("position", 64)
        assert run.selection.layers == (1, 2)

    def test_where_all_rewards_are_alike(self, tmp_path):
        saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        run = by_step(tmp_path / "auto", "auto:step", alike, **saving)
        message = 'selection="auto:step" takes the middle of the model. of 32 prompts tried, 0'
        with pytest.warns(UserWarning, match=message):
            run.train()
        for selection in ("auto:step", "auto"):
            resumed = by_step(tmp_path / "auto", selection, alike, **saving)
            resumed.train(resume_from_checkpoint=str(tmp_path / "auto" / "checkpoint-1"))
            assert resumed.selection == run.selection

    def test_where_the_attention_is_for_half_precision(self, tmp_path, monkeypatch):
        reward = Counting()
        run = by_step(tmp_path, "auto:step", reward)
        check = step._check

        def of_another(*args: Any) -> None:
            with monkeypatch.context() as patch:
                name = "_attn_implementation_internal"
                patch.setattr(run.model.config, name, "flash_attention_2")
                check(*args)

        monkeypatch.setattr(step, "_check", of_another)
        message = (
            r"takes the middle of the model. .* which flash_attention_2 does not compute. Load"
        )
        with pytest.warns(UserWarning, match=message):
            run.train()
        report = run.masked_run.auto.report
        assert report.source.endswith(': "step" could not score the layers.')
        assert (report.method, report.settings["budget"]) == ("position", 0)
        assert len(reward.asked) == 3

    def test_where_the_loss_is_made_of_no_log_probabilities(self, tmp_path):
        class OwnLoss(LayerMaskedGRPOTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                return model(input_ids=inputs["completion_ids"]).logits.mean()

        reward = Counting()
        run = by_step(tmp_path, "auto:step", reward, trainer=OwnLoss)
        with pytest.warns(UserWarning, match="middle of the model. .* that of OwnLoss asks its"):
            run.train()
        assert len(reward.asked) == 3
        assert run.masked_run.auto.report.method == "position"

    def test_where_steps_leave_the_numbers(self, tmp_path, monkeypatch):
        monkeypatch.setattr(step, "LENGTH", float("inf"))
        run = by_step(tmp_path)
        with pytest.warns(UserWarning, match=r"middle of the model. .* is not finite. Expected"):
            run.train()
        assert all(value.isfinite().all() for value in bits(run.model).values())


@pytest.mark.parametrize("stage", [1, 9, 12])  # backward, at the base, after steps
def test_ctrl_c_leaves_no_step_behind(tmp_path, monkeypatch, stage):
    model: Any = tiny("llama", 4)
    model.to(torch.bfloat16)
    before, calls, objective = bits(model), itertools.count(1), step._Part.objective

    def failing(part: Any) -> Any:
        if next(calls) == stage:
            raise KeyboardInterrupt
        return objective(part)

    run = by_step(tmp_path, model=model)
    own = {name: vars(module).get("forward") for name, module in model.named_modules()}
    with monkeypatch.context() as patch:
        patch.setattr(step._Part, "objective", failing)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    assert_close(bits(model), before, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert own == {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert not any(module._forward_hooks for module in model.modules())
    run.train()
    assert run.masked_run.auto.report.method == "step"


class TestSpelled:
    @pytest.mark.parametrize(
        "selection",
        [
            "auto:stp",
            "auto:step:2",
            "auto:0:step",
            "auto::step",
            "auto:2:",
            "auto:2:step:",
            "auto:2:train",
        ],
    )
    def test_otherwise(self, tmp_path, selection):
        with pytest.raises(SelectionError) as refused:
            by_step(tmp_path, selection)
        assert f"selection='{selection}'" in str(refused.value)
        assert '"auto:step", "auto:3:step"' in str(refused.value)

    @pytest.mark.parametrize(
        ("selection", "shortest"),
        [
            ("auto", "auto:1"),
            ("auto:gradient", "auto:1"),
            ("auto:2:gradient", "auto:2"),
            ("auto:step", "auto:1:step"),
            ("auto:2:step", "auto:2:step"),
        ],
    )
    def test_in_one_way_for_all_processes(self, selection, shortest):
        assert str(AutoSelection.of(selection)) == shortest

    def test_of_more_layers_than_there_are(self, tmp_path):
        with pytest.raises(SelectionError, match='"auto:5:step" asks for 5 layers'):
            by_step(tmp_path, "auto:5:step")

    def test_outside_of_a_trainer(self):
        with pytest.raises(SelectionError, match="'auto:step' is chosen by a trainer"):
            select_layers(tiny("llama", 4), "auto:step")
