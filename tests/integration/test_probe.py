"""Whole sweeps over a tiny model: exact, isolated, continued after any end."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from layerrl import (
    ContributionReport,
    LayerMaskedGRPOTrainer,
    contribution_probe,
    select_layers,
)
from layerrl.errors import JournalError, ProbeError, ReportError, SelectionError
from layerrl.scores.checks import check_held_out
from layerrl.scores.identity import digest_of_rows, identity_of, settings_of
from tests import processes
from tests.grpo import PROMPTS, config, reward, tokenizer
from tests.models import tiny, tiny_config
from tests.runs import bits

TRAIN = Dataset.from_dict({"prompt": PROMPTS * 4})
HELD_OUT = Dataset.from_dict({"prompt": ["mno", "ab", "cdef", "g"]})
LAYERS = [0, 2]


def probe(model: Any, folder: Any, **changes: Any) -> Any:
    values = {
        "method": "train",
        "reward_funcs": reward,
        "train_dataset": TRAIN,
        "eval_dataset": HELD_OUT,
        "processing_class": tokenizer(),
        "args": config(folder / "unused", max_steps=2),
        "layers": LAYERS,
        "output_dir": folder,
    }
    return contribution_probe(model, **(values | changes))


def scaled(completions: list[str], by: int, **_: Any) -> list[float]:
    return [by * value for value in reward(completions)]


class Scaled:
    """Counts its calls."""

    def __init__(self, by: int) -> None:
        self.by, self.calls = by, 0

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        self.calls += 1
        return scaled(completions, self.by)


def tiny_judge() -> Any:
    """A model that rewards."""
    settings = tiny_config("llama", 1, num_labels=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(settings)


def runs(folder: Any) -> list[tuple[str, int | None]]:
    lines = (folder / "journal.jsonl").read_text().splitlines()[1:]
    return [(entry["name"], entry["seed"]) for entry in map(json.loads, lines)]


def numbers(report: Any) -> Any:
    """Everything but the time it took."""
    found = json.loads(report.to_json())
    for entry in [*found["layers"], found["base"], found["full"]]:
        entry.pop("seconds")
    for clock in ("seconds", "fraction"):
        found["cost"].pop(clock)
    found["settings"].pop("rewards")  # another function may do the same
    return found


@pytest.fixture
def model():
    return tiny("llama", 3)


class TestSweep:
    def test_measures_base_full_and_each_layer_alone(self, model, tmp_path):
        report = probe(model, tmp_path)
        assert runs(tmp_path) == [("base", None), ("full", 0), ("0", 0), ("2", 0)]
        assert set(report.scores) == {0, 2}
        assert [entry.status for entry in report.layers] == ["done", "missing", "done"]
        assert report.full.steps == report.layers[0].steps == 2
        assert len(report.base.scores[0]) == len(HELD_OUT)

    def test_a_layers_score_is_that_of_training_it_alone(self, model, tmp_path):
        report = probe(model, tmp_path, layers=[2])
        alone = probe(tiny("llama", 3), tmp_path / "alone", layers=[2, 0])
        assert report.layers[2].scores == alone.layers[2].scores
        assert report.full.scores == alone.full.scores

    def test_leaves_the_model_as_it_was(self, model, tmp_path):
        model.train()
        model.lm_head.weight.requires_grad_(False)
        before = bits(model), [p.requires_grad for p in model.parameters()]
        probe(model, tmp_path)
        assert_close(bits(model), before[0], rtol=0, atol=0)
        assert [p.requires_grad for p in model.parameters()] == before[1]
        assert model.training

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_leaves_hooks_and_settings_as_they_were(self, model, tmp_path, reentrant):
        def seen():
            return {
                **{name: list(m._forward_pre_hooks) for name, m in model.named_modules()},
                "own": [sorted(vars(m)) for m in model.modules()],
                "config": model.config.to_dict(),
                "generation": model.generation_config.to_dict(),
                "checkpointing": model.is_gradient_checkpointing,
            }

        model.model.norm.register_forward_pre_hook(lambda *_: None)
        before = seen()
        checkpointing = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        args = config(tmp_path / "unused", max_steps=1, **checkpointing)
        probe(model, tmp_path, args=args, layers=[0])
        assert seen() == before

    def test_leaves_the_model_as_it_was_after_an_exception(self, model, tmp_path):
        before = bits(model)
        calls = []

        def failing(completions, **_):
            calls.append(1)
            if len(calls) == 4:
                raise OSError("out of cheese")
            return reward(completions)

        with pytest.raises(OSError, match="cheese"):
            probe(model, tmp_path, reward_funcs=failing)
        assert_close(bits(model), before, rtol=0, atol=0)
        assert all(p.requires_grad for p in model.parameters())

    def test_scores_along_the_way_change_nothing(self, model, tmp_path):
        plain = probe(model, tmp_path / "plain", layers=[2])
        args = config(tmp_path / "unused", max_steps=2, eval_strategy="steps", eval_steps=1)
        watched = probe(model, tmp_path / "watched", layers=[2], args=args)
        assert watched.layers[2].scores == plain.layers[2].scores
        [*_, last] = (tmp_path / "watched" / "journal.jsonl").read_text().splitlines()
        [[step, scores]] = json.loads(last)["curve"]
        assert step == 1
        assert watched.layers[2].curve == ((1, (tuple(scores),)),)

    def test_the_base_is_evaluated_in_the_precision_of_the_runs(self, model, tmp_path):
        dtypes = []
        model.lm_head.register_forward_hook(lambda *found: dtypes.append(found[-1].dtype))
        probe(model, tmp_path, layers=[1], args=config(tmp_path / "u", max_steps=1, bf16=True))
        assert {*dtypes} == {torch.bfloat16}

    @pytest.mark.parametrize(("greedy", "times"), [(True, 1), (False, 4)])
    def test_a_prompt_is_decoded_once_where_it_is_greedy(self, model, tmp_path, greedy, times):
        evaluated = []

        def counting(prompts, completions, **_):
            evaluated.extend(prompt for prompt in prompts if prompt in HELD_OUT["prompt"])
            return reward(completions)

        probe(model, tmp_path, reward_funcs=counting, layers=[0], greedy=greedy)
        runs_evaluated = 3  # base, full and the layer
        assert len(evaluated) == runs_evaluated * len(HELD_OUT) * times

    def test_several_seeds_and_parts_of_a_layer(self, model, tmp_path):
        report = probe(model, tmp_path, layers=[1], seeds=(3, 4), modules=["mlp.*"])
        assert runs(tmp_path)[1:] == [("full", 3), ("1", 3), ("full", 4), ("1", 4)]
        assert len(report.layers[1].scores) == 2
        assert report.settings["modules"] == ["mlp.*"]

    def test_a_selection_with_modules_is_measured_as_it_is(self, model, tmp_path):
        made = []

        def factory(**arguments):
            made.append(arguments["selection"])
            return LayerMaskedGRPOTrainer(**arguments)

        chosen = select_layers(model, [1], modules=["mlp.*"])
        report = probe(model, tmp_path, layers=chosen, trainer_class=factory)
        assert made[-1].modules == ("mlp.*",)
        assert report.top(1).modules == ("mlp.*",)

    def test_seeds_add_to_what_is_there(self, model, tmp_path):
        probe(model, tmp_path, layers=[0], seeds=[0])
        report = probe(model, tmp_path, layers=[0, 2], seeds=[1])
        assert [len(entry.scores or ()) for entry in report.layers] == [2, 0, 1]
        assert not report.partial
        assert [step for step, _ in report.layers[0].curve] == []

    def test_all_layers_that_were_asked_for_is_not_partial(self, model, tmp_path):
        assert not probe(model, tmp_path, layers=[0]).partial

    def test_the_loader_drops_no_prompt(self, model, tmp_path):
        args = config(tmp_path / "unused", max_steps=1, dataloader_drop_last=True)
        report = probe(model, tmp_path, layers=[0], args=args, eval_dataset=HELD_OUT)
        assert len(report.base.scores[0]) == len(HELD_OUT)

    def test_a_reward_model_is_given_back_too(self, model, tmp_path):
        judge = tiny_judge()
        forward = judge.forward
        changes = {"reward_funcs": judge, "layers": [0]}
        args = config(tmp_path / "unused", max_steps=1)
        factory = partial(LayerMaskedGRPOTrainer, reward_processing_classes=tokenizer())
        probe(model, tmp_path, args=args, trainer_class=factory, **changes)
        assert judge.forward == forward
        assert "forward" not in vars(judge)

    def test_a_head_that_was_cast_is_cast_back(self, tmp_path):
        model = tiny("llama", 3, tie_word_embeddings=False).to(torch.bfloat16)
        before = bits(model)
        args = config(tmp_path / "unused", max_steps=1, cast_lm_head_to_fp32=True)
        probe(model, tmp_path, args=args, layers=[0])
        assert_close(bits(model), before, rtol=0, atol=0)
        assert model.lm_head.weight.dtype == torch.bfloat16

    def test_the_reference_is_the_base_that_was_passed(self, model, tmp_path):
        """A model in memory that no name leads to, and one that is not what its name leads to."""
        args = config(tmp_path / "unused", max_steps=3, beta=0.5)
        report = probe(model, tmp_path / "nameless", args=args, layers=[0])
        model.save_pretrained(tmp_path / "saved")
        named = tiny("llama", 3, seed=1)
        named.config._name_or_path = str(tmp_path / "saved")
        named.load_state_dict(model.state_dict())
        again = probe(named, tmp_path / "named", args=args, layers=[0])
        assert again.full.scores == report.full.scores
        assert again.layers[0].scores == report.layers[0].scores

    def test_images_are_the_same_data_each_time(self):
        images = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
        rows = {"prompt": ["what is it?"] * 2, "image": images}
        found = {digest_of_rows(Dataset.from_dict(rows)) for _ in range(2)}
        assert len(found) == 1
        rows["image"] = images[::-1]
        assert digest_of_rows(Dataset.from_dict(rows)) not in found

    @pytest.mark.parametrize(
        ("value", "there"),
        [
            (np.int64(2), 2),
            (torch.tensor(2), 2),
            (np.array([2, 3]), [2, 3]),
            ((2, 3), [2, 3]),
            ({2: np.bool_(True)}, {"2": True}),
            (torch.float16, "torch.float16"),
            (Path("a"), "a"),
        ],
        ids=str,
    )
    def test_arguments_are_kept_as_json_has_them(self, tmp_path, value, there):
        args = config(tmp_path, generation_kwargs={"x": value})
        assert settings_of(args)["generation_kwargs"] == {"x": there}

    @pytest.mark.parametrize("method", ["train", "gradient"])
    def test_arguments_may_be_numpys(self, model, tmp_path, method):
        kwargs = {"generation_kwargs": {"eos_token_id": np.int64(2)}}
        args = config(tmp_path / "unused", max_steps=1, **kwargs)
        values = {
            "reward_funcs": letters,
            "train_dataset": Dataset.from_dict({"prompt": PROMPTS * 32}),
        }
        report = probe(model, tmp_path, args=args, method=method, budget=32, **values)
        assert ContributionReport.from_json(report.to_json()) == report

    @pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
    @pytest.mark.parametrize("columns", [None, ["prompt", "x"]])
    def test_data_of_any_format_gives_the_same_scores(self, model, tmp_path, kind, columns):
        held_out, train = (
            data.add_column("x", [*range(len(data))]).add_column("y", [0] * len(data))
            for data in (HELD_OUT, TRAIN)
        )
        expected = probe(model, tmp_path / "plain", eval_dataset=held_out, layers=[0])
        data = {"eval_dataset": held_out, "train_dataset": train}
        formatted = {name: each.with_format(kind, columns=columns) for name, each in data.items()}
        report = probe(model, tmp_path / "formatted", layers=[0], **formatted)
        assert report.base.scores == expected.base.scores
        assert report.layers[0].scores == expected.layers[0].scores

    @pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
    def test_messages_of_any_format_are_taken_as_they_are(self, kind):
        rows = [[{"role": "user", "content": text}] for text in "abc"]
        held_out = Dataset.from_dict({"prompt": rows}).with_format(kind)
        assert check_held_out(held_out, TRAIN)[0]["prompt"] == rows[0]

    def test_full_runs_may_have_their_own_settings(self, model, tmp_path):
        report = probe(model, tmp_path, full_args=config(tmp_path, max_steps=1))
        assert report.full.steps == 1
        assert report.settings["full_args"]["max_steps"] == 1
        assert report.settings["args"]["max_steps"] == 2

    def test_a_trainer_may_be_made_by_a_function(self, model, tmp_path):
        made = []

        def factory(**arguments):
            made.append(arguments["selection"])
            return LayerMaskedGRPOTrainer(**arguments)

        probe(model, tmp_path, trainer_class=factory)
        assert len(made) == 4


class TestHalving:
    """Eight steps: layers can be dropped after one, two and four."""

    @pytest.fixture
    def dropping(self, monkeypatch):
        """Have the worst layer dropped at each rung, sure or not, as long as there are two."""

        def worst(scores, **_):
            if len(scores) == 1 or not dropping.on:
                return {}
            means = {layer: sum(map(sum, rows)) for layer, rows in scores.items()}
            return {min(means, key=means.__getitem__): "behind"}

        dropping = SimpleNamespace(on=True)
        monkeypatch.setattr("layerrl.sweep.below_the_cut", worst)
        return dropping

    def eight(self, folder: Any, **changes: Any) -> dict[str, Any]:
        return {"args": config(folder / "unused", max_steps=8, **changes), "layers": "all"}

    @pytest.fixture(scope="class")
    @staticmethod
    def swept(tmp_path_factory) -> tuple[Any, ContributionReport]:
        """A folder of whole runs of every layer, and what they came to."""
        folder = tmp_path_factory.mktemp("whole")
        args = config(folder / "unused", max_steps=8)
        return folder, probe(tiny("llama", 3), folder, args=args, layers="all")

    @pytest.mark.parametrize("num_iterations", [1, 2])
    def test_the_last_ones_score_is_that_of_a_whole_run(
        self, model, tmp_path, dropping, swept, num_iterations
    ):
        changes = self.eight(tmp_path, num_iterations=num_iterations)
        _, whole = swept
        if num_iterations == 2:
            whole = probe(model, tmp_path / "whole", **changes)
        halved = probe(model, tmp_path / "halved", halving=True, **changes)
        rungs = [1, 2, 4] if num_iterations == 1 else [2, 4]
        assert halved.settings["rungs"] == rungs
        [survivor] = halved.scores
        assert halved.layers[survivor].scores == whole.layers[survivor].scores
        assert halved.layers[survivor].steps == 8
        assert sorted(entry.steps for entry in halved.layers) == [*rungs[:2], 8]
        assert {entry.status for entry in halved.layers} == {"done", "dropped"}
        assert "behind" in str(halved)
        assert halved.full.scores == whole.full.scores

    def test_what_was_dropped_can_be_finished(self, model, tmp_path, dropping, swept):
        changes = self.eight(tmp_path)
        _, whole = swept
        probe(model, tmp_path / "halved", halving=True, **changes)
        finished = probe(model, tmp_path / "halved", **changes)
        found = [entry.scores for entry in finished.layers]
        assert found == [entry.scores for entry in whole.layers]
        assert [entry.steps for entry in finished.layers] == [8, 8, 8]
        assert not [*(tmp_path / "halved" / "runs").rglob("checkpoint-*")]

    def test_continues_after_it_was_stopped(self, model, tmp_path, dropping):
        changes = self.eight(tmp_path)
        undisturbed = probe(model, tmp_path / "undisturbed", halving=True, **changes)
        calls = []

        def stopping(completions, **_):
            calls.append(1)
            if len(calls) in (20, 30, 33):
                raise KeyboardInterrupt
            return reward(completions)

        stopping.__name__ = reward.__name__
        stopped = {"reward_funcs": stopping, "halving": True, **changes}
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                probe(model, tmp_path / "stopped", **stopped)
        assert numbers(probe(model, tmp_path / "stopped", **stopped)) == numbers(undisturbed)

    @pytest.mark.slow
    def test_lost_checkpoints_cost_steps_but_no_result(self, model, tmp_path, dropping):
        changes = self.eight(tmp_path)
        dropping.on = False
        calls = []

        def losing(completions, **_):
            calls.append(1)
            shutil.rmtree(tmp_path / "lost" / "runs", ignore_errors=True)
            return reward(completions)

        losing.__name__ = reward.__name__
        whole = probe(model, tmp_path / "whole", halving=True, **changes)
        lost = probe(model, tmp_path / "lost", halving=True, reward_funcs=losing, **changes)
        assert [e.scores for e in lost.layers] == [e.scores for e in whole.layers]
        assert [e.steps for e in lost.layers] == [1 + 2 + 4 + 8] * 3

    def test_a_whole_sweeps_scores_are_not_measured_again(self, model, tmp_path, dropping, swept):
        folder, whole = swept
        folder = shutil.copytree(folder, tmp_path / "copy")
        lines = (folder / "journal.jsonl").read_text()
        again = probe(model, folder, halving=True, **self.eight(tmp_path))
        assert (folder / "journal.jsonl").read_text() == lines
        assert again.scores == whole.scores


def letters(completions: list[str], **_: Any) -> list[float]:
    """Something that a gradient says anything of."""
    return [float(sum(letter < "P" for letter in text)) for text in completions]


def numbers_of(report: Any) -> list[Any]:
    """Scores, steps and notes of layers."""
    return [(entry.scores, entry.note, entry.curve) for entry in report.layers]


class TestRace:
    """Four steps, of which a race takes two."""

    def race(self, model: Any, folder: Any, method: str = "race:2", **changes: Any) -> Any:
        values = {
            "method": method,
            "layers": "all",
            "budget": 32,
            "reward_funcs": letters,
            "train_dataset": Dataset.from_dict({"prompt": PROMPTS * 32}),
            "args": config(folder / "unused", max_steps=4),
        }
        return probe(model, folder, **(values | changes))

    def test_trains_the_best_of_the_probe_for_half_a_run(self, model, tmp_path):
        cheap = self.race(model, tmp_path / "cheap", "gradient")
        first, second, third = sorted(cheap.scores, key=cheap.scores.__getitem__, reverse=True)
        before = bits(model)
        report = self.race(model, tmp_path, seeds=(seed for seed in [0]))
        assert_close(bits(model), before, rtol=0, atol=0)
        assert set(report.scores) == {first, second}
        assert runs(tmp_path) == [("base", None), *((str(k), 0) for k in sorted(report.scores))]
        assert [report.layers[k].steps for k in (first, second, third)] == [2, 2, 0]
        assert report.layers[third].status == "dropped"
        assert report.layers[first].note.startswith('rank 1 of "gradient"')
        assert not report.partial
        assert report.full is None
        assert ContributionReport.from_json((tmp_path / "report.json").read_text()) == report
        along = config(tmp_path / "unused", max_steps=4, eval_strategy="steps", eval_steps=2)
        whole = self.race(model, tmp_path / "whole", "train", layers=[first], args=along)
        assert dict(whole.layers[first].curve)[2] == report.layers[first].scores

    def test_the_same_call_and_a_sweep_go_on_from_it(self, model, tmp_path, monkeypatch):
        raced = self.race(model, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("layerrl.sweep.race.GRADIENT", None)  # is not asked again
            assert numbers_of(self.race(model, tmp_path)) == numbers_of(raced)
        layer = max(raced.scores, key=raced.scores.__getitem__)
        whole = self.race(model, tmp_path, "train", layers=[layer])
        alone = self.race(model, tmp_path / "alone", "train", layers=[layer])
        assert whole.layers[layer].scores == alone.layers[layer].scores
        assert whole.layers[layer].steps == 4
        assert runs(tmp_path)[-2:] == [("full", 0), (str(layer), 0)]
        again = self.race(model, tmp_path)
        assert [entry.scores for entry in again.layers] == [entry.scores for entry in raced.layers]

    def test_says_what_it_cannot_tell_apart(self, model, tmp_path):
        with pytest.warns(UserWarning, match=r"after 2 steps, layers \d .* are not resolved from"):
            self.race(model, tmp_path)

    @pytest.mark.parametrize("method", ["race:1", "race:4", "race:x", "race:²", "race:-2"])
    def test_candidates_that_are_none(self, model, tmp_path, method):
        with pytest.raises(ProbeError, match=f"method='{method}' with 3 layers to score"):
            self.race(model, tmp_path, method)

    def test_is_refused_before_the_probe(self, model, tmp_path):
        with pytest.raises(ProbeError, match="max_steps is -1: a race ends after half"):
            self.race(model, tmp_path, args=config(tmp_path / "unused", max_steps=-1))
        with pytest.raises(ProbeError, match="halving=True with method='race'"):
            self.race(model, tmp_path, halving=True)
        with pytest.raises(ProbeError, match="needs eval_dataset"):
            self.race(model, tmp_path, eval_dataset=None)
        with pytest.raises(ProbeError, match="eval_dataset"):
            self.race(model, tmp_path, eval_dataset=TRAIN)
        assert not list(tmp_path.glob("gradient-*"))

    def test_a_kept_probe_of_other_layers_is_refused(self, model, tmp_path):
        self.race(model, tmp_path)
        [kept] = tmp_path.glob("gradient-*.json")
        kept.write_text(contribution_probe(tiny("llama", 2), method="position").to_json())
        with pytest.raises(ReportError, match="has scores of other layers"):
            self.race(model, tmp_path)


class TestJournal:
    def test_the_same_call_continues(self, model, tmp_path):
        undisturbed = probe(model, tmp_path / "undisturbed")
        folder = tmp_path / "stopped"
        probe(model, folder, layers=[0])
        again = probe(model, folder)
        assert runs(folder) == [("base", None), ("full", 0), ("0", 0), ("2", 0)]
        assert numbers(again) == numbers(undisturbed)

    def test_what_is_there_can_be_read_at_any_time(self, model, tmp_path):
        calls = []

        def failing(completions, **_):
            calls.append(1)
            if len(calls) > 4:
                raise OSError("out of cheese")
            return reward(completions)

        with pytest.raises(OSError, match="cheese"):
            probe(model, tmp_path, reward_funcs=failing)
        found = ContributionReport.from_json((tmp_path / "report.json").read_text())
        assert found.full.status == "done"
        assert found.partial
        assert "Partial: 2 of 4 are missing." in str(found)

    def test_other_settings_in_the_folder_are_refused(self, model, tmp_path):
        probe(model, tmp_path, layers=[0])
        args = config(tmp_path / "unused", max_steps=3)
        with pytest.raises(
            JournalError, match=r"args.max_steps: 2 there, 3 here; .*greedy: True there"
        ):
            probe(model, tmp_path, layers=[0], args=args, greedy=False)
        with torch.no_grad():
            model.model.norm.weight.add_(1)
        with pytest.raises(JournalError, match="base: "):
            probe(model, tmp_path, layers=[0])

    def test_killed_at_any_moment_it_ends_with_the_same_report(self, tmp_path):
        expected = numbers(probe(tiny("llama", 3), tmp_path / "undisturbed"))
        program = (
            "import sys; from pathlib import Path; from tests.integration.test_probe import probe\n"
            "from tests.models import tiny\n"
            "print(probe(tiny('llama', 3), Path(sys.argv[1])).to_json())"
        )
        killed = []
        for after in (1, 2, 3):  # lines in the journal
            running = processes.start("-c", program, tmp_path / "killed")
            journal = tmp_path / "killed" / "journal.jsonl"
            while running.is_alive():
                if journal.exists() and journal.read_bytes().count(b"\n") > after:
                    running.kill()
                    break
                time.sleep(0.02)
            running.join()
            killed.append(running.exitcode == -signal.SIGKILL)
        assert any(killed)
        assert numbers(probe(tiny("llama", 3), tmp_path / "killed")) == expected

    @pytest.mark.slow
    def test_killed_at_twenty_random_moments(self, tmp_path):
        changes = {"halving": True, "layers": "all"}
        args = {"max_steps": 8}
        started = time.monotonic()
        expected = probe(
            tiny("llama", 3), tmp_path / "whole", args=config(tmp_path / "u", **args), **changes
        )
        seconds = time.monotonic() - started
        program = (
            "import sys; from pathlib import Path\n"
            "from tests.integration.test_probe import config, probe, tiny\n"
            "print('ready', flush=True); folder = Path(sys.argv[1])\n"
            f"probe(tiny('llama', 3), folder, args=config(folder / 'u', **{args}), **{changes})"
        )
        environment = os.environ | {"PYTHONPATH": "."}
        draw, kills, finished = random.Random(0), 0, 0
        while kills < 20:
            folder = tmp_path / str(finished)
            running = subprocess.Popen(
                [sys.executable, "-c", program, str(folder)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            assert running.stdout is not None
            assert running.stdout.readline() == b"ready\n"
            try:
                running.wait(timeout=draw.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGKILL)
                running.wait()
                kills += 1
                continue
            assert running.returncode == 0
            finished += 1
            found = ContributionReport.from_json((folder / "report.json").read_text())
            assert numbers(found) == numbers(expected)
        found = probe(tiny("llama", 3), folder, args=config(tmp_path / "u", **args), **changes)
        assert numbers(found) == numbers(expected)


class TestBadInput:
    def test_prompts_that_are_trained_on_are_refused(self, model, tmp_path):
        shared = Dataset.from_dict({"prompt": ["mno", PROMPTS[0]]})
        with pytest.raises(ProbeError, match="1 of 2 evaluation prompts are trained on, 'abc'"):
            probe(model, tmp_path, eval_dataset=shared)

    def test_the_same_message_in_other_words_is_the_same_prompt(self):
        train, held_out = (
            Dataset.from_dict({"prompt": [[dict(reversed(pair)) if flip else dict(pair)]] * 1})
            for flip, pair in ((flip, [("role", "user"), ("content", "ab")]) for flip in (0, 1))
        )
        other = Dataset.from_dict({"prompt": [[{"role": "user", "content": "cd"}]]})
        with pytest.raises(ProbeError, match="1 of 2 evaluation prompts are trained on"):
            check_held_out(concatenate_datasets([held_out, other]), train)

    def test_one_question_on_other_images_is_another_prompt(self):
        def rows(*colors):
            images = [Image.new("RGB", (2, 2), color) for color in colors]
            return Dataset.from_dict({"prompt": ["what is it?"] * len(images), "image": images})

        check_held_out(rows("red", "blue"), rows("green"))
        with pytest.raises(ProbeError, match="1 of 2 evaluation prompts are trained on, 'what"):
            check_held_out(rows("red", "blue"), rows("red"))

    def test_prompts_that_occur_twice_are_refused(self, model, tmp_path):
        twice = Dataset.from_dict({"prompt": ["mno", "ab", "mno"]})
        with pytest.raises(ProbeError, match=r"3 rows but 2 different prompts. Intervals count"):
            probe(model, tmp_path, eval_dataset=twice)

    def test_runs_that_would_be_evaluated_differently_are_refused(self, model, tmp_path):
        full_args = config(tmp_path / "unused", max_steps=2, max_completion_length=2)
        with pytest.raises(ProbeError, match=r"differ in max_completion_length: 6 and 2. Runs are"):
            probe(model, tmp_path, full_args=full_args)

    def test_samples_that_do_not_fill_a_batch_are_refused(self, model, tmp_path):
        args = config(tmp_path / "unused", max_steps=2, num_generations_eval=3)
        with pytest.raises(ProbeError, match="batch_size is 8, expected a multiple of 3"):
            probe(model, tmp_path, args=args, greedy=False)

    def test_another_reward_of_the_same_name_is_refused(self, model, tmp_path):
        probe(model, tmp_path, layers=[0], reward_funcs=partial(scaled, by=1))
        with pytest.raises(JournalError, match=r"rewards: \['scaled .* there"):
            probe(model, tmp_path, layers=[0], reward_funcs=partial(scaled, by=2))
        texts = [
            identity_of(f) for f in (lambda c: [len(t) for t in c], lambda c: [1.0 for _ in c])
        ]
        assert texts[0] != texts[1]

    def test_another_reward_or_trainer_of_the_same_code_is_refused(self, model, tmp_path):
        def factory(seen):
            return lambda **arguments: seen.append(1) or LayerMaskedGRPOTrainer(**arguments)

        changes = {"reward_funcs": Scaled(1), "trainer_class": factory([])}
        report = probe(model, tmp_path, layers=[0], **changes)
        lines = (tmp_path / "journal.jsonl").read_text()
        other = {"reward_funcs": Scaled(2)}, {"trainer_class": factory([0])}
        for name, change in zip(("rewards", "trainer"), other, strict=True):
            with pytest.raises(JournalError, match=rf"other settings. {name}: .* there, "):
                probe(model, tmp_path, layers=[0], **(changes | change))
        # As in a process that starts again, and in this one after the calls were counted.
        for again in ({"reward_funcs": Scaled(1), "trainer_class": factory([])}, changes):
            assert numbers(probe(model, tmp_path, layers=[0], **again)) == numbers(report)
        assert changes["reward_funcs"].calls
        assert (tmp_path / "journal.jsonl").read_text() == lines

    @pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
    def test_data_that_cannot_be_counted_is_refused(self, model, tmp_path, name):
        for data in (HELD_OUT.to_iterable_dataset(), [{"prompt": "a"}]):
            with pytest.raises(ProbeError, match=f"{name} is a .*, expected a datasets.Dataset"):
                probe(model, tmp_path, **{name: data})

    @pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
    @pytest.mark.parametrize("columns", [None, ["prompt"]])
    def test_data_that_is_transformed_as_it_is_read_is_refused(
        self, model, tmp_path, name, columns
    ):
        for data in (TRAIN, HELD_OUT):
            other = data.with_transform(lambda rows: rows, columns=columns)
            with pytest.raises(ProbeError, match=rf"{name} has a transform .* give what map\(\)"):
                probe(model, tmp_path, **{name: other.select(range(2))})
        assert not [*tmp_path.iterdir()]

    def test_hidden_prompts_are_refused(self, model, tmp_path):
        data = HELD_OUT.add_column("x", [1] * 4).with_format(None, columns=["x"])
        with pytest.raises(ProbeError, match=r"eval_dataset has the columns \['x'\], expected a"):
            probe(model, tmp_path, eval_dataset=data)

    @pytest.mark.parametrize("name", ["args", "full_args"])
    @pytest.mark.parametrize("value", [{1, 2}, object(), [Scaled], 10**50, {(1, 2): 3}, b"x"])
    def test_arguments_that_a_journal_cannot_hold_are_refused(self, model, tmp_path, name, value):
        changed = config(tmp_path / "unused", max_steps=2, lr_scheduler_kwargs={"x": [value]})
        for method in ["train", "gradient"] if name == "args" else ["train"]:
            with pytest.raises(ProbeError, match=rf"{name}.lr_scheduler_kwargs is .*, expected n"):
                probe(model, tmp_path, method=method, **{name: changed})
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize("seeds", [3, [], [1, 1], [True], ["a"]])
    def test_seeds_that_are_none(self, model, tmp_path, seeds):
        with pytest.raises(ProbeError, match=r"seeds is .*, expected different ints from 0 "):
            probe(model, tmp_path, seeds=seeds)

    def test_a_boost_is_refused(self, model, tmp_path):
        boosted = select_layers(model, [0, 1], boost={1: 2.0})
        with pytest.raises(ProbeError, match=r"layers are scored alike. Select them without boost"):
            probe(model, tmp_path, layers=boosted)

    @pytest.mark.parametrize("prompts", [[], ["mno"], ["mno", "mno"]])
    def test_too_few_prompts_are_refused(self, model, tmp_path, prompts):
        with pytest.raises(ProbeError, match=r"expected at least 2|eval_dataset has no rows"):
            probe(model, tmp_path, eval_dataset=Dataset.from_dict({"prompt": prompts}))

    def test_prompts_that_nothing_rewards_are_refused(self, model, tmp_path):
        def nothing(completions, **_):
            return [None] * len(completions)

        with pytest.raises(ProbeError, match="prompt 0 of the evaluation set got the rewards"):
            probe(model, tmp_path, reward_funcs=nothing)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", [1.0]])
    def test_rewards_that_are_no_numbers_are_refused(self, model, tmp_path, value):
        def odd(completions, **_):
            return [1.0] * (len(completions) - 1) + [value]

        with pytest.raises(
            ProbeError, match=r"the reward odd returned .* of the prompt '\w+', exp"
        ):
            probe(model, tmp_path, reward_funcs=[reward, odd])

    def test_too_few_rewards_are_refused(self, model, tmp_path):
        def short(completions, **_):
            return [1.0] * (len(completions) - 1)

        with pytest.raises(ProbeError, match="the reward short returned 3 rewards for 4 compl"):
            probe(model, tmp_path, reward_funcs=short)

    def test_a_reward_that_raises_is_named(self, model, tmp_path):
        def failing(completions, **_):
            raise OSError("out of cheese")

        with pytest.raises(OSError, match="cheese") as raised:
            probe(model, tmp_path, reward_funcs=failing)
        [note] = raised.value.__notes__
        assert re.fullmatch(
            r"raised by the reward failing on 4 completions, the first .* for the prompt '\w+'",
            note,
        )

    def test_equal_rewards_end_it_early(self, model, tmp_path):
        calls = []

        def same(completions, **_):
            calls.append(1)
            return [1.0] * len(completions)

        args = config(tmp_path / "unused", max_steps=100)
        with pytest.raises(
            ProbeError,
            match=r"in the first 64 generation batches \(128 prompts\), all 4 .* \(same\)",
        ):
            probe(model, tmp_path, reward_funcs=same, args=args)
        evaluations = 1
        assert len(calls) == evaluations + 64
        with pytest.raises(ProbeError, match="in the whole run, all 4 completions"):
            probe(model, tmp_path / "short", reward_funcs=same)

    @pytest.mark.parametrize("method", ["train", "gradient"])
    def test_completions_without_any_reward_are_refused(self, model, tmp_path, method):
        def rarely(prompts, **_):
            return [1.0 if prompt in HELD_OUT["prompt"] else None for prompt in prompts]

        message = r"completions got no reward, the first of them for the prompt '\w+': rarely ret"
        with pytest.raises(ProbeError, match=message):
            probe(model, tmp_path, reward_funcs=rarely, method=method)

    @pytest.mark.parametrize("value", [None, 1.0, "no", {1.0}])
    def test_a_reward_that_returns_no_list_is_named(self, model, tmp_path, value):
        def forgetful(completions, **_):
            return value

        with pytest.raises(ProbeError, match=f"reward forgetful returned {value!r}, expected a l"):
            probe(model, tmp_path, reward_funcs=forgetful)

    def test_none_from_one_of_two_rewards_is_no_mistake(self, model, tmp_path):
        def sometimes(prompts, **_):
            return [1.0 if prompt in HELD_OUT["prompt"] else None for prompt in prompts]

        probe(model, tmp_path, reward_funcs=[reward, sometimes], layers=[1])

    def test_anything_else_is_refused_before_a_run(self, model, tmp_path):
        with pytest.raises(ProbeError, match="method is 'magic', expected one of"):
            probe(model, tmp_path, method="magic")
        with pytest.raises(ProbeError, match="expected different ints"):
            probe(model, tmp_path, seeds=(1, 1))
        with pytest.raises(ProbeError, match="executor is 'slurm', expected \"serial\" or"):
            probe(model, tmp_path, executor="slurm")
        args = config(tmp_path, max_steps=-1, num_train_epochs=1)
        with pytest.raises(ProbeError, match="max_steps is -1, expected a number above 0"):
            probe(model, tmp_path, args=args, halving=True)
        with pytest.raises(ProbeError, match='expected a "prompt"'):
            probe(model, tmp_path, eval_dataset=Dataset.from_dict({"text": ["a", "b"]}))
        with pytest.raises(SelectionError):
            probe(model, tmp_path, layers=7)
        assert not (tmp_path / "journal.jsonl").exists()

    def test_no_gain_leaves_contributions_undefined(self, model, tmp_path):
        args = config(tmp_path / "unused", max_steps=1, learning_rate=1e-12)
        report = probe(model, tmp_path, args=args)
        with pytest.raises(ReportError, match="not resolved above zero"):
            _ = report.contributions
