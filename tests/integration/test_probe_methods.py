"""Scores of a tiny model's layers without a sweep, from the one door."""

import random
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

from layerrl import (
    ContributionReport,
    contribution_probe,
    published_contributions,
    select_layers,
)
from layerrl.blocks import meta_model
from layerrl.errors import ModelError, ProbeError, ReportError, SelectionError
from tests.grpo import PROMPTS, config, make, tokenizer
from tests.models import tiny
from tests.runs import bits

TRAIN = Dataset.from_dict({"prompt": PROMPTS * 32})


def letters(completions: list[str], **_: Any) -> list[float]:
    """Something to learn: characters of the first half of the alphabet."""
    return [float(sum(letter < "P" for letter in text)) for text in completions]


def gradient(model: Any, folder: Any, **changes: Any) -> ContributionReport:
    arguments = changes.pop("arguments", {})
    values = {
        "method": "gradient",
        "reward_funcs": letters,
        "train_dataset": TRAIN,
        "processing_class": tokenizer(),
        "args": config(folder / "unused", **{"max_steps": 100, **arguments}),
        "budget": 64,
    }
    return contribution_probe(model, **(values | changes))


@pytest.fixture
def model():
    return tiny("llama", 3)


def test_a_model_made_in_inference_mode_is_refused_as_it_is(tmp_path):
    with torch.inference_mode():
        model = tiny("llama", 3)
    before = {name: {**vars(module)} for name, module in model.named_modules()}
    with pytest.raises(ModelError, match=r"made or loaded inside torch\.inference_mode"):
        gradient(model, tmp_path)
    assert {name: {**vars(module)} for name, module in model.named_modules()} == before


@pytest.fixture(params=["gradient", "step"])
def method(request):
    return request.param


class TestPriors:
    def test_position(self, model):
        report = contribution_probe(model, method="position")
        assert report.scores == {0: -0.5, 1: 0.0, 2: -0.5}
        assert contribution_probe(model, method="position:1").scores[2] == 0

    @pytest.mark.parametrize("centre", ["1.5", "-1", "middle"])
    def test_a_position_that_is_none(self, model, centre):
        with pytest.raises(ProbeError, match=rf"method='position:{centre}': expected a relative"):
            contribution_probe(model, method=f"position:{centre}")

    def test_published_at_the_same_relative_depth(self):
        table = published_contributions("Qwen3-1.7B-Base").contributions
        same = contribution_probe(tiny("llama", 28), method="published")
        assert same.scores == pytest.approx(table)
        other = contribution_probe(tiny("llama", 55), method="published", layers=[1, 2])
        assert set(other.scores) == {1, 2}
        assert other.scores[1] == pytest.approx((table[0] + table[1]) / 2)
        assert other.scores[2] == pytest.approx(table[1])
        assert "2607.01232" in str(other)

    def test_published_of_another_model(self):
        known = published_contributions("Qwen3-8B-Base").contributions
        found = contribution_probe(tiny("llama", 36), method="published:Qwen3-8B-Base")
        assert found.scores == pytest.approx(known)
        with pytest.raises(ReportError, match="no contributions were published for 'nobody'"):
            contribution_probe(tiny("llama", 3), method="published:nobody")


class TestGradient:
    """Scores from rollouts, to first order and after a step."""

    def test_scores_every_layer_with_an_interval(self, model, tmp_path, method):
        report = gradient(model, tmp_path, method=method)
        assert set(report.scores) == {0, 1, 2}
        assert sum(report.scores.values()) == pytest.approx(3)
        for layer, score in report.scores.items():
            assert score in report.interval(layer)
        assert len(report.layers[0].scores[0]) == {"gradient": 48, "step": 64}[method]
        assert ContributionReport.from_json(report.to_json()) == report

    def test_is_the_same_each_time_but_for_another_seed(self, model, tmp_path, method):
        first, again, other = (
            gradient(model, tmp_path, seeds=[seed], method=method) for seed in (0, 0, 1)
        )
        assert first.layers == again.layers
        assert first.layers != other.layers

    def test_some_layers_and_parts_of_them(self, model, tmp_path, method):
        report = gradient(model, tmp_path, layers=[0, 2], modules=["mlp.*"], method=method)
        assert [entry.status for entry in report.layers] == ["done", "missing", "done"]
        assert report.settings["modules"] == ["mlp.*"]

    # Which loss has nothing to do with where a batch is cut, but for DAPO, which counts tokens.
    @pytest.mark.parametrize(
        ("loss_type", "sizes"), [("grpo", (8, 1)), ("dapo", (8, 2, 1)), ("dr_grpo", (8, 2))]
    )
    def test_does_not_depend_on_the_micro_batches(self, model, tmp_path, loss_type, sizes, method):
        reports = [
            gradient(
                model,
                tmp_path,
                method=method,
                arguments={
                    "per_device_train_batch_size": rows,
                    "gradient_accumulation_steps": 8 // rows,
                    "loss_type": loss_type,
                },
            )
            for rows in sizes
        ]
        expected = [entry.scores for entry in reports[0].layers]
        for report in reports[1:]:
            found = [entry.scores for entry in report.layers]
            assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "arguments", [{}, {"beta": 0.1, "num_iterations": 2}, {"steps_per_generation": 4}]
    )
    def test_prompts_are_those_that_training_starts_with(self, model, tmp_path, arguments):
        seen: list[list[str]] = []

        def noting(prompts, completions, **_):
            seen[-1].extend(prompts)
            return letters(completions)

        seen.append([])
        trainer = make(
            model,
            tmp_path,
            selection="all",
            arguments={"reward_funcs": noting, "train_dataset": TRAIN},
            **{"max_steps": 6, "seed": 0, **arguments},
        )
        trainer.train()
        seen.append([])
        gradient(model, tmp_path, reward_funcs=noting, arguments=arguments)
        batch = trainer.args.generation_batch_size
        twice = seen[1][:batch] + seen[1][2 * batch :]  # the first batch is rewarded twice
        assert seen[1][:batch] == seen[1][batch : 2 * batch]
        assert len(twice) == 64 * 4
        assert twice[: len(seen[0])] == seen[0]

    @pytest.mark.parametrize("bf16", [True, False])
    def test_passes_are_in_the_precision_of_the_training(self, model, tmp_path, bf16):
        seen = []
        layer = model.model.layers[0].mlp
        hook = layer.register_forward_pre_hook(
            lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
        )
        gradient(
            model,
            tmp_path,
            arguments={"bf16": bf16, "per_device_train_batch_size": 64},
        )
        hook.remove()
        assert {*seen} == {bf16}

    def test_leaves_everything_as_it_was(self, model, tmp_path, method):
        model.eval()
        model.lm_head.weight.requires_grad_(False)
        model.model.norm.weight.grad = torch.ones(16)

        def seen():
            return (
                [p.requires_grad for p in model.parameters()],
                [module.training for module in model.modules()],
                {name: list(m._forward_pre_hooks) for name, m in model.named_modules()},
                [sorted(vars(module)) for module in model.modules()],
                model.config.to_dict(),
                model.generation_config.to_dict(),
                [p.grad is None for p in model.parameters()],
                torch.get_rng_state().tolist(),
                random.getstate(),
                np.random.get_state()[1].tolist(),
            )

        weights, before = bits(model), seen()
        gradient(model, tmp_path, method=method)
        assert seen() == before
        calls = []

        def failing(completions, **_):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return letters(completions)

        with pytest.raises(KeyboardInterrupt):
            gradient(model, tmp_path, reward_funcs=failing, method=method)
        assert seen() == before
        assert_close(bits(model), weights, rtol=0, atol=0)

    def test_says_what_it_cost(self, model, tmp_path):
        report = gradient(model, tmp_path, budget=16)
        assert report.cost.seconds > 0
        assert 0 < report.cost.tokens <= 16 * 4 * 6
        found = report.settings["prompts_with_signal"]
        assert report.cost.forwards == report.cost.backwards == found * 4
        # Each of the run's 800 completions: generated, one pass over, and one recomputed.
        assert report.cost.fraction == pytest.approx((16 * 4 + 4 * found * 4) / (800 * (1 + 4)))
        longer = gradient(model, tmp_path, budget=16, arguments={"num_iterations": 2, "beta": 0.1})
        run = 400 * 2 + 800 * 4  # half of them generated, with a reference
        assert longer.cost.fraction == pytest.approx((16 * 4 + 4 * found * 4) / run)
        assert "% of a full-parameter run" in str(report)


class TestBadInput:
    @pytest.mark.parametrize("method", ["magic", None, "gradient:1", ""])
    def test_an_unknown_method(self, model, method):
        with pytest.raises(ProbeError, match=rf"method is {re.escape(repr(method))}, expected"):
            contribution_probe(model, method=method)

    def test_a_removed_method_says_what_to_take_instead(self, model):
        with pytest.raises(ProbeError, match=r"method='rollout' was removed: .*method='gradient'"):
            contribution_probe(model, method="rollout")

    def test_a_model_without_weights(self, model, tmp_path):
        with pytest.raises(ProbeError, match=r"'gradient' reads weights, .* on the meta device"):
            gradient(meta_model(model.config), tmp_path, budget=16)

    def test_what_is_missing_is_named(self, model):
        with pytest.raises(ProbeError, match="'gradient' needs reward_funcs, train_dataset, args,"):
            contribution_probe(model)
        with pytest.raises(ProbeError, match=r"'train' needs .*, eval_dataset, output_dir, which"):
            contribution_probe(model, method="train")

    @pytest.mark.parametrize("budget", [0, 7, -1, 64.0, True, None])
    def test_a_budget_that_is_too_small_or_none(self, model, tmp_path, budget):
        with pytest.raises(ProbeError, match=f"budget is {budget} prompts; method='gradient'"):
            gradient(model, tmp_path, budget=budget)

    def test_rewards_without_a_difference(self, model, tmp_path):
        def same(completions, **_):
            return [0.1] * len(completions)  # whose mean over eight is not 0.1 in float32

        arguments = {"num_generations": 8}
        with pytest.raises(ProbeError, match=r"of 64 prompts tried, 0 have .* \(same, 8 compl"):
            gradient(model, tmp_path, reward_funcs=same, arguments=arguments)

    def test_rewards_that_change_their_mind(self, model, tmp_path):
        draw = random.Random(0)

        def noisy(completions, **_):
            return [value + draw.random() for value in letters(completions)]

        message = "rewards of 8 of 8 completions were others when"
        with pytest.warns(UserWarning, match=message) as warned:
            report = gradient(model, tmp_path, reward_funcs=noisy)
        assert {w.filename for w in warned if message in str(w.message)} == {__file__}
        assert 0 < report.settings["reward_noise"] < 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", module="(torch|transformers|trl|accelerate)")
            assert gradient(model, tmp_path).settings["reward_noise"] == 0

    def test_completions_that_are_all_cut_off(self, model, tmp_path):
        arguments = {"max_completion_length": 1, "mask_truncated_completions": True}
        arguments["generation_kwargs"] = {"suppress_tokens": [0, 2]}  # padding and end
        with pytest.raises(
            ProbeError, match=r"all \d+ completions were cut off at max_completion_l"
        ):
            gradient(model, tmp_path, arguments=arguments)

    def test_fewer_prompts_than_a_batch(self, model, tmp_path):
        with pytest.raises(ProbeError, match=r"fewer prompts than a generation batch, .* 2"):
            gradient(model, tmp_path, train_dataset=Dataset.from_dict({"prompt": ["ab"]}))

    def test_parts_outside_the_layers(self, model, tmp_path):
        selection = select_layers(model, 1, also="final_norm")
        with pytest.raises(ProbeError, match="layers alone are scored"):
            gradient(model, tmp_path, layers=selection)

    def test_a_quantised_layer(self, model, tmp_path):
        linear = model.model.layers[1].mlp.up_proj
        linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(SelectionError, match="Leave the selected layers out of the quantisa"):
            gradient(model, tmp_path)
