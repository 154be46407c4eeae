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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

from layerrl import ContributionReport, LayerMaskedGRPOTrainer, contribution_probe
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
    for clock in ("seconds", "fraction"):
        found["cost"].pop(clock)
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


class TestHalving:
    """Eight steps: layers can be dropped after one, two and four."""

    @pytest.fixture
    def dropping(self, monkeypatch):
        """Have the worst layer dropped at each rung, sure or not, as long as there are two."""

        def worst(scores):
            if len(scores) == 1 or not dropping.on:
                return {}
            means = {layer: sum(map(sum, rows)) for layer, rows in scores.items()}
            return {min(means, key=means.__getitem__): "behind"}

        dropping = SimpleNamespace(on=True)
        monkeypatch.setattr("layerrl.sweep.below_the_cut", worst)
        return dropping

    def eight(self, folder: Any, **changes: Any) -> dict[str, Any]:
        return {"args": config(folder / "unused", max_steps=8, **changes), "layers": "all"}

    @pytest.mark.parametrize("num_iterations", [1, 2])
    def test_the_last_ones_score_is_that_of_a_whole_run(
        self, model, tmp_path, dropping, num_iterations
    ):
        changes = self.eight(tmp_path, num_iterations=num_iterations)
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

    def test_what_was_dropped_can_be_finished(self, model, tmp_path, dropping):
        changes = self.eight(tmp_path)
        whole = probe(model, tmp_path / "whole", **changes)
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

    def test_a_whole_sweeps_scores_are_not_measured_again(self, model, tmp_path, dropping):
        changes = self.eight(tmp_path)
        whole = probe(model, tmp_path, **changes)
        lines = (tmp_path / "journal.jsonl").read_text()
        again = probe(model, tmp_path, halving=True, **changes)
        assert (tmp_path / "journal.jsonl").read_text() == lines
        assert again.scores == whole.scores


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
        assert "Partial: 3 of 5 are missing." in str(found)

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

    @pytest.mark.parametrize("prompts", [[], ["mno"], ["mno", "mno"]])
    def test_too_few_prompts_are_refused(self, model, tmp_path, prompts):
        with pytest.raises(ProbeError, match="expected at least 2"):
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
            ProbeError, match=r"in the first 8 generation batches, all 4 .* \(same\)"
        ):
            probe(model, tmp_path, reward_funcs=same, args=args)
        evaluations = 1
        assert len(calls) == evaluations + 8
        with pytest.raises(ProbeError, match="in the whole run, all 4 completions"):
            probe(model, tmp_path / "short", reward_funcs=same)

    def test_rewards_that_are_not_given_are_no_signal(self, model, tmp_path):
        def rarely(prompts, **_):
            return [1.0 if prompt in HELD_OUT["prompt"] else None for prompt in prompts]

        with pytest.raises(ProbeError, match="in the whole run, all 4 completions"):
            probe(model, tmp_path, reward_funcs=rarely)

    def test_anything_else_is_refused_before_a_run(self, model, tmp_path):
        with pytest.raises(ProbeError, match="method is 'magic', expected one of"):
            probe(model, tmp_path, method="magic")
        with pytest.raises(ProbeError, match="expected different ints"):
            probe(model, tmp_path, seeds=(1, 1))
        with pytest.raises(ProbeError, match="executor is 'slurm', expected one of serial, ray"):
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
        with pytest.raises(ReportError, match="not resolved from zero"):
            _ = report.contributions
