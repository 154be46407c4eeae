"""`selection="auto"`: the run's own first batches choose its layers."""

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, RLOOConfig

from layerrl import ContributionReport, LayerMaskedMixin, contribution_probe, select_layers
from layerrl.errors import DeltaError, ProbeError, SelectionError
from layerrl.scores import gradient
from layerrl.scores.gains import held_out_gains
from layerrl.trainer import LayerMaskedRLOOTrainer, LayerSchedule
from tests.devices import on_any_device
from tests.engines import in_place_of_vllm
from tests.grpo import PROMPTS, config, make, tokenizer
from tests.models import tiny
from tests.runs import assert_same_run, bits
from tests.trainers import PREFERENCES

pytestmark = on_any_device

TRAIN = Dataset.from_dict({"prompt": PROMPTS * 64})


class Counting:
    """A reward that says how often it was asked for."""

    def __init__(self) -> None:
        self.__name__ = "counting"
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self.asked.append(prompts)
        return [float(sum(letter < "P" for letter in text)) for text in completions]


def trainer(folder: Any, selection: Any = "auto", reward: Any = None, **changes: Any) -> Any:
    """One generation batch is 64 prompts, and one step."""
    values = {"per_device_train_batch_size": 256, "max_steps": 3, "learning_rate": 1e-3}
    given = changes.pop("arguments", {})
    return make(
        changes.pop("model", None) or tiny("llama", 4),
        folder,
        selection=selection,
        arguments={"reward_funcs": reward or Counting(), "train_dataset": TRAIN, **given},
        **(values | changes),
    )


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    one, other = bits(one.model), bits(other.model)
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.1, "num_iterations": 2},
        {"bf16": True},
        {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 4},
    ],
)
def test_the_run_is_that_of_the_layer_chosen(tmp_path, changes):
    auto = trainer(tmp_path / "auto", **changes)
    auto.train()
    assert len(auto.selection.layers) == 1
    plain = trainer(tmp_path / "plain", auto.selection, **changes)
    plain.train()
    assert_same_run(auto, plain)


def test_nothing_is_generated_or_rewarded_twice(tmp_path):
    auto, plain = Counting(), Counting()
    trainer(tmp_path / "auto", "auto", auto).train()
    trainer(tmp_path / "plain", 0, plain).train()
    assert len(auto.asked) == len(plain.asked) == 3
    assert auto.asked == plain.asked


class Shown(TrainerCallback):
    """The rows that TRL would print at each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.rows: list[list[list[Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        logs = self.trainer._logs
        columns = logs["prompt"], logs["completion"], *logs["rewards"].values()
        if state.global_step == len(self.rows) + 1:
            self.rows.append([[*column] for column in columns])


def test_completions_are_logged_with_the_step_that_trains_on_them(tmp_path):
    reward, shown = Counting(), Shown()
    batches = {"per_device_train_batch_size": 64, "max_steps": 5, "logging_steps": 1}
    run = trainer(tmp_path, "auto", reward, **batches, arguments={"callbacks": [shown]})
    shown.trainer = run
    run.train()
    assert len(reward.asked) == len(shown.rows) == 5  # four of them before the first step
    for asked, (prompts, completions, rewards) in zip(reward.asked, shown.rows, strict=True):
        assert prompts == asked
        assert rewards == Counting()(prompts=prompts, completions=completions)
    assert len({str(rows) for rows in shown.rows}) == 5


def test_batches_of_few_prompts_are_taken_until_there_are_enough(tmp_path):
    reward = Counting()
    run = trainer(
        tmp_path, "auto:2", reward, per_device_train_batch_size=64, max_steps=6, logging_steps=1
    )
    seen = []
    compute = run._compute_loss

    def watched(model: Any, inputs: Any) -> Any:
        if run.masked_run.auto.report is not None and "old_per_token_logps" in inputs:
            policy, *_ = run._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].size(1),
            )
            mask = inputs["completion_mask"].bool()
            difference = (policy - inputs["old_per_token_logps"])[mask].abs().max().item()
            seen.append((run.state.global_step, difference))
        return compute(model, inputs)

    run._compute_loss = watched
    run.train()
    # Four batches of 16 prompts; the last three are older than the policy that they train.
    assert [step for step, _ in seen] == [1, 2, 3]
    assert 0 < seen[0][1] < seen[2][1]
    assert len(run.selection.layers) == 2
    assert run.masked_run.auto.report.settings["budget"] == 64
    assert len(reward.asked) == 6


def test_a_run_shorter_than_the_probe_generates_no_more_than_it_trains_on(tmp_path):
    reward = Counting()
    trainer(tmp_path, "auto", reward, per_device_train_batch_size=64, max_steps=2).train()
    assert len(reward.asked) == 2


def test_the_layers_are_those_of_the_probe(tmp_path):
    run = trainer(tmp_path)
    run.train()
    found = contribution_probe(
        tiny("llama", 4),
        method="gradient",
        reward_funcs=Counting(),
        train_dataset=TRAIN,
        processing_class=tokenizer(),
        args=config(tmp_path / "probe", per_device_train_batch_size=256, max_steps=3),
        budget=64,
        seeds=[42],
    )
    assert max(found.scores, key=found.scores.__getitem__) in run.selection.layers
    assert run.masked_run.auto.report.scores == pytest.approx(found.scores, rel=1e-4)


def test_only_the_chosen_layers_train(tmp_path):
    before = bits(tiny("llama", 4))
    run = trainer(tmp_path)
    run.train()
    chosen = set(run.selection.parameters(run.model))
    after = bits(run.model)
    assert {name for name in after if not torch.equal(after[name], before[name])} <= chosen
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.selection.parameters(run.model).values()}
    assert run.save_delta(tmp_path / "delta").is_dir()


@pytest.mark.parametrize("checkpoint_format", ["delta", "full"])
def test_resume_trains_the_same_layers_without_probing_again(tmp_path, checkpoint_format):
    options = {"max_steps": 4, "arguments": {"checkpoint_format": checkpoint_format}}
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=2, **options)
    whole.train()
    kept = tmp_path / "whole" / "checkpoint-2"
    report = ContributionReport.from_json((kept / "contributions.json").read_text())
    assert report == whole.masked_run.auto.report
    reward = Counting()
    options["arguments"] = {"checkpoint_format": checkpoint_format}
    resumed = trainer(tmp_path / "resumed", "auto", reward, **options)
    resumed.train(resume_from_checkpoint=str(kept))
    assert len(reward.asked) == 2
    assert resumed.selection == whole.selection
    assert same(resumed, whole)


def test_a_checkpoint_of_another_selection_is_refused(tmp_path):
    trainer(tmp_path, 1, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ProbeError, match=r"-1 has no readable contributions.json.*pass the sel"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_second_training_keeps_the_choice(tmp_path):
    reward = Counting()
    run = trainer(tmp_path, "auto", reward, max_steps=1)
    run.train()
    chosen = run.selection
    run.train()
    assert run.selection == chosen
    assert len(reward.asked) == 2


def test_the_log_says_what_was_chosen_and_how_surely(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="layerrl"):
        run = trainer(tmp_path)
        run.train()
    [line] = [r.getMessage() for r in caplog.records if 'selection="auto"' in r.getMessage()]
    assert f"trains {run.selection}" in line
    assert "times the average layer's score; the best other layer has" in line
    assert "resolved" in line


@pytest.mark.parametrize("when", [{"eval_on_start": True}, {}])
def test_evaluations_between_are_their_own(tmp_path, when):
    reward = Counting()
    other = Dataset.from_dict({"prompt": ["zz", "yy"]})
    run = trainer(
        tmp_path,
        "auto",
        reward,
        per_device_train_batch_size=64,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        arguments={"eval_dataset": other},
        **when,
    )
    run.train()
    evaluated = [asked for asked in reward.asked if {*asked} <= {"zz", "yy"}]
    assert len(evaluated) == 4 + len(when)
    assert len(reward.asked) == 4 + len(evaluated)


def test_metrics_of_later_batches_are_theirs_alone(tmp_path):
    options = {"per_device_train_batch_size": 64, "max_steps": 4, "logging_steps": 1}
    auto = trainer(tmp_path / "auto", **options)
    auto.train()
    plain = trainer(tmp_path / "plain", auto.selection, **options)
    plain.train()
    logs = [[row for row in run.state.log_history if "loss" in row] for run in (auto, plain)]
    # The first two policies are the same in both runs, and all lengths of prompts are.
    assert logs[0][0]["entropy"] == logs[1][0]["entropy"]
    assert logs[0][0]["reward"] == logs[1][0]["reward"]
    tokens = [row["num_tokens"] for row in logs[0]]
    assert tokens == sorted(tokens)
    assert tokens[-1] < 4 * 1.5 * tokens[0]
    assert logs[0][1]["entropy"] != logs[0][0]["entropy"]


def test_rloo(tmp_path):
    kinds = {"trainer": LayerMaskedRLOOTrainer, "kind": RLOOConfig}
    auto = trainer(tmp_path / "auto", **kinds)
    auto.train()
    plain = trainer(tmp_path / "plain", auto.selection, **kinds)
    plain.train()
    assert_same_run(auto, plain)


def test_vllm_is_sent_everything_and_then_what_was_chosen(tmp_path, monkeypatch):
    with in_place_of_vllm(monkeypatch):
        run = trainer(tmp_path, use_vllm=True, vllm_mode="colocate")
        run.train()
    chosen = set(run.selection.parameters(run.model))
    syncs = [set(names) for names in run.vllm_generation.llm.syncs]
    # For the probe, once more when a layer has been chosen, and then what that has learned.
    everything = {name for name, _ in run.model.named_parameters()}
    assert syncs[:-1] == [everything, everything]
    assert syncs[-1] == chosen


def alike(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


class TestTooLittleSignal:
    """It never ends a run: more batches are taken, and then the middle of the model."""

    def test_takes_more_batches_until_they_say_enough(self, tmp_path):
        reward = Counting()

        def late(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            rewards = reward(prompts, completions)
            return rewards if len(reward.asked) > 1 else [1.0] * len(rewards)

        auto = trainer(tmp_path / "auto", "auto", late, max_steps=5)
        auto.train()
        report = auto.masked_run.auto.report
        assert report.method == "gradient"
        assert report.settings["budget"] == 128
        assert report.settings["prompts_with_signal"] <= 64
        assert len(reward.asked) == 5

    def test_trains_the_middle_where_they_never_do(self, tmp_path):
        asked, reward = [], alike

        def counted(completions: list[str], **_: Any) -> list[float]:
            asked.append(completions)
            return reward(completions)

        saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5}
        run = trainer(tmp_path / "auto", "auto:2", counted, **saving)
        message = "takes the middle of the model. of 256 prompts tried, 0 have .* Raise num_gen"
        with pytest.warns(UserWarning, match=message) as warned:
            run.train()
        assert {w.filename for w in warned if "takes the middle" in str(w.message)} == {__file__}
        assert not any("budget" in str(w.message) for w in warned)
        assert len(asked) == 6
        assert run.selection.layers == (1, 2)
        report = run.masked_run.auto.report
        assert (report.method, report.settings["budget"]) == ("position", 256)
        resumed = trainer(tmp_path / "auto", "auto:2", counted, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "auto" / "checkpoint-5"))
        assert resumed.selection == run.selection
        assert len(asked) == 7

    def test_of_gradients_that_have_nothing_in_common(self, tmp_path, monkeypatch):
        gains = iter([-1.0, -1.0, 1.0])

        def noisy(*args: Any, **kwargs: Any) -> torch.Tensor:
            return held_out_gains(*args, **kwargs).abs() * next(gains)

        monkeypatch.setattr(gradient, "held_out_gains", noisy)
        run = trainer(tmp_path, max_steps=4)
        run.train()
        assert run.masked_run.auto.report.settings["budget"] == 256

    def test_of_completions_that_are_all_cut_off(self, tmp_path):
        cut = {"max_completion_length": 1, "mask_truncated_completions": True}
        cut["generation_kwargs"] = {"suppress_tokens": [0, 2]}  # padding and end
        run = trainer(tmp_path, max_steps=1, **cut)
        with pytest.warns(UserWarning, match="256 completions were cut off at max_completion_l"):
            run.train()
        assert run.masked_run.auto.report.method == "position"

    def test_of_data_that_end_before(self, tmp_path):
        data = {"train_dataset": TRAIN.select(range(64))}
        run = trainer(tmp_path, "auto", alike, max_steps=3, arguments=data)
        with pytest.warns(UserWarning, match="of 64 prompts tried, 0 have"):
            run.train()


class TestRefused:
    def test_a_delta_before_anything_was_chosen(self, tmp_path):
        with pytest.raises(SelectionError, match="nothing is trained yet"):
            trainer(tmp_path).save_delta(tmp_path / "delta")
        assert not (tmp_path / "delta").exists()

    def test_a_schedule_beside_it(self, tmp_path):
        schedule = LayerSchedule([0, 1], every=1)
        with pytest.raises(SelectionError, match="and so does a LayerSchedule"):
            trainer(tmp_path, arguments={"callbacks": [schedule]})

    def test_resuming_where_there_is_nothing(self, tmp_path):
        reward = Counting()
        with pytest.raises(DeltaError, match="there is no checkpoint in"):
            trainer(tmp_path, "auto", reward).train(resume_from_checkpoint=True)
        assert not reward.asked

    @pytest.mark.parametrize("checkpoint_format", ["delta", "full"])
    def test_resuming_with_another_number_of_layers(self, tmp_path, checkpoint_format):
        options = {"arguments": {"checkpoint_format": checkpoint_format}}
        trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, **options).train()
        options = {"arguments": {"checkpoint_format": checkpoint_format}}
        with pytest.raises(SelectionError, match=r'resume with selection="auto:1"'):
            trainer(tmp_path, "auto:2", **options).train(resume_from_checkpoint=True)

    def test_a_report_that_an_earlier_run_left(self, tmp_path):
        saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer(tmp_path, **saving).train()
        trainer(tmp_path, 1, **saving).train()
        with pytest.raises(ProbeError, match=r"has no readable contributions\.json"):
            trainer(tmp_path).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("selection", ["auto:0", "auto:", "auto:x", "auto:-1"])
    def test_a_number_that_is_none(self, tmp_path, selection):
        with pytest.raises(SelectionError, match=r'expected "auto" \(one\) or "auto:K"'):
            trainer(tmp_path, selection)

    def test_more_layers_than_there_are(self, tmp_path):
        with pytest.raises(SelectionError, match=r'"auto:5" asks for 5 layers.*the model has 4'):
            trainer(tmp_path, "auto:5")

    def test_outside_of_a_trainer(self):
        with pytest.raises(SelectionError, match="'auto:2' is chosen by a trainer"):
            select_layers(tiny("llama", 4), "auto:2")

    def test_a_trainer_that_does_not_generate(self, tmp_path):
        class Masked(LayerMaskedMixin, DPOTrainer):
            pass

        with pytest.raises(ProbeError, match=r'selection="auto" needs a trainer that generates'):
            Masked(
                tiny("llama", 4),
                args=DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
                train_dataset=Dataset.from_dict(PREFERENCES),
                processing_class=tokenizer(),
                selection="auto",
            )

    def test_an_optimizer_of_ones_own(self, tmp_path):
        model = tiny("llama", 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(SelectionError, match="there is a SGD already"):
            trainer(tmp_path, model=model, arguments={"optimizers": (optimizer, None)})

    def test_ctrl_c(self, tmp_path):
        model = tiny("llama", 4)
        before = bits(model)

        def stop(**_: Any) -> list[float]:
            raise KeyboardInterrupt

        run = trainer(tmp_path, "auto", stop, model=model)
        with pytest.raises(KeyboardInterrupt):
            run.train()
        assert all(p.requires_grad for p in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
        run.reward_funcs = [Counting()]
        run.train()
        assert len(run.selection.layers) == 1

    def test_a_loader_that_gives_other_prompts(self, tmp_path):
        run = trainer(tmp_path)
        choose = run.masked_run.auto.choose

        def other(*args: Any) -> Any:
            chosen = choose(*args)
            run.train_dataset = run.train_dataset.select(range(100, 200)).map(
                lambda row: {"prompt": row["prompt"] + "z"}
            )
            return chosen

        run.masked_run.auto.choose = other
        with pytest.raises(ProbeError, match="now it gives others"):
            run.train()
