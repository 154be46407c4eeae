"""Whole sweeps over a tiny model: exact, isolated, continued after any end."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

from layerrl import LayerMaskedGRPOTrainer, contribution_probe
from layerrl.errors import JournalError, ProbeError, ReportError, SelectionError
from tests.grpo import PROMPTS, config, reward, tokenizer
from tests.models import tiny
from tests.runs import bits

TRAIN = Dataset.from_dict({"prompt": PROMPTS * 4})
HELD_OUT = Dataset.from_dict({"prompt": ["mno", "ab", "cdef", "g"]})
LAYERS = [0, 2]


def probe(model: Any, folder: Any, **changes: Any) -> Any:
    values = {
        "reward_funcs": reward,
        "train_dataset": TRAIN,
        "eval_dataset": HELD_OUT,
        "processing_class": tokenizer(),
        "args": config(folder / "unused", max_steps=2),
        "layers": LAYERS,
        "output_dir": folder,
    }
    return contribution_probe(model, **(values | changes))


def runs(folder: Any) -> list[tuple[str, int | None]]:
    lines = (folder / "journal.jsonl").read_text().splitlines()[1:]
    return [(entry["name"], entry["seed"]) for entry in map(json.loads, lines)]


def numbers(report: Any) -> Any:
    """Everything but the time it took."""
    found = json.loads(report.to_json())
    for entry in [*found["layers"], found["base"], found["full"]]:
        entry.pop("seconds")
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
        [[step, score]] = json.loads(last)["curve"]
        assert step == 1
        assert 0 <= score <= 17

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


class TestJournal:
    def test_the_same_call_continues(self, model, tmp_path):
        undisturbed = probe(model, tmp_path / "undisturbed")
        folder = tmp_path / "stopped"
        probe(model, folder, layers=[0])
        again = probe(model, folder)
        assert runs(folder) == [("base", None), ("full", 0), ("0", 0), ("2", 0)]
        assert numbers(again) == numbers(undisturbed)

    def test_other_settings_in_the_folder_are_refused(self, model, tmp_path):
        probe(model, tmp_path, layers=[0])
        args = config(tmp_path / "unused", max_steps=3)
        with pytest.raises(JournalError, match=r"args: .*greedy: True there, False here"):
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
        command = [sys.executable, "-c", program, str(tmp_path / "killed")]
        environment = os.environ | {"PYTHONPATH": "."}
        for after in (1, 2, 3):  # lines in the journal
            running = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
            journal = tmp_path / "killed" / "journal.jsonl"
            while running.poll() is None:
                if journal.exists() and journal.read_bytes().count(b"\n") > after:
                    running.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.02)
            running.wait()
        assert numbers(probe(tiny("llama", 3), tmp_path / "killed")) == expected


class TestBadInput:
    def test_prompts_that_are_trained_on_are_refused(self, model, tmp_path):
        shared = Dataset.from_dict({"prompt": ["mno", PROMPTS[0]]})
        with pytest.raises(ProbeError, match="1 of 2 evaluation prompts are trained on, 'abc'"):
            probe(model, tmp_path, eval_dataset=shared)

    @pytest.mark.parametrize("prompts", [[], ["mno"], ["mno", "mno"]])
    def test_too_few_prompts_are_refused(self, model, tmp_path, prompts):
        with pytest.raises(ProbeError, match="expected at least 2"):
            probe(model, tmp_path, eval_dataset=Dataset.from_dict({"prompt": prompts}))

    @pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
    def test_rewards_that_are_no_numbers_are_refused(self, model, tmp_path, value):
        def nothing(completions, **_):
            return [value] * len(completions)

        with pytest.raises(ProbeError, match="prompt 0 of the evaluation set got the rewards"):
            probe(model, tmp_path, reward_funcs=nothing)

    def test_anything_else_is_refused_before_a_run(self, model, tmp_path):
        with pytest.raises(ProbeError, match="method is 'magic', expected \"train\""):
            probe(model, tmp_path, method="magic")
        with pytest.raises(ProbeError, match="expected different ints"):
            probe(model, tmp_path, seeds=(1, 1))
        with pytest.raises(ProbeError, match='expected a "prompt"'):
            probe(model, tmp_path, eval_dataset=Dataset.from_dict({"text": ["a", "b"]}))
        with pytest.raises(SelectionError):
            probe(model, tmp_path, layers=7)
        assert not (tmp_path / "journal.jsonl").exists()

    def test_no_gain_leaves_contributions_undefined(self, model, tmp_path):
        def same(completions, **_):
            return [1.0] * len(completions)

        report = probe(model, tmp_path, reward_funcs=same)
        with pytest.raises(ReportError, match="not resolved from zero"):
            _ = report.contributions
