"""Episodes in a text environment, answered from a script, and what is wrong with bad ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from layerrl.agents.episodes import check_episodes
from layerrl.errors import EpisodeError
from layerrl.trainer import GiGPOConfig, Step, TextRollout
from tests.grpo import tokenizer

EOS = 2


class Count:
    """Counts from `start` to 5 by what is answered; everything but a digit is invalid."""

    def reset(self, start, **row):
        self.at, self.row = start, row
        return f"AT{self.at}"

    def step(self, action):
        valid = action.isdigit()
        self.at += int(action) if valid else 0
        return f"NOW{self.at}", float(self.at == 5), self.at >= 5, valid


class Scripted:
    """As much of a trainer as a rollout needs; answers from a script, one list a turn."""

    def __init__(self, *turns, rows, max_completion_length=100, logprobs=False):
        self.turns, self.rollout_rows = list(turns), rows
        self.max_completion_length = max_completion_length
        self.num_generations = self.num_generations_eval = 4
        self._tokenizer = tokenizer()
        self.eos_token_ids, self.chat_template, self.chat_template_kwargs = [EOS], None, {}
        self.generation_config = SimpleNamespace(max_new_tokens=max_completion_length)
        self.logprobs = logprobs
        self.asked, self.limits = [], []

    def _tokenize_prompts(self, prompts):
        self.prompts = prompts
        texts = [prompt if isinstance(prompt, str) else str(prompt) for prompt in prompts]
        return self._tokenizer(texts)["input_ids"], None, {}

    def _generate_single_turn(self, prompt_ids, images, fields, num_generations=None):
        assert (images, fields) == (None, {})
        assert (num_generations or self.num_generations) == 1
        self.asked.append(self._tokenizer.batch_decode(prompt_ids))
        self.limits.append(self.generation_config.max_new_tokens)
        ids = [self.ids(text)[: self.limits[-1]] for text in self.turns.pop(0)]
        assert len(ids) == len(prompt_ids)
        return ids, [[-0.5] * len(row) for row in ids] if self.logprobs else None

    def ids(self, text):
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def play(trainer, environment=Count, prompts=None, **limits):
    rollout = TextRollout(environment=environment, **{"max_turns": 9, **limits})
    prompts = prompts or ["P"] * len(trainer.rollout_rows)
    return rollout(prompts, trainer)


def text(trainer, ids):
    return trainer._tokenizer.decode(ids).replace(" ", "")


class TestTextRollout:
    def test_plays_side_by_side_until_each_has_ended(self):
        rows = [{"start": 1}, {"start": 3}]
        trainer = Scripted(["1<eos>", "2<eos>"], ["3<eos>"], rows=rows)
        output = play(trainer)
        assert trainer.prompts == ["PAT1", "PAT3"]
        assert [text(trainer, ids) for ids in output["completion_ids"]] == [
            "1<eos>NOW23<eos>",
            "2<eos>",
        ]
        assert output["env_mask"] == [[1, 1, 0, 0, 0, 0, 1, 1], [1, 1]]
        assert output["steps"] == [
            [
                Step(observation="AT1", reward=0.0, num_tokens=2),
                Step(observation="NOW2", reward=1.0, num_tokens=2),
            ],
            [Step(observation="AT3", reward=1.0, num_tokens=2)],
        ]
        assert output["finished"] == [True, True]
        assert output["logprobs"] is None
        assert check_episodes(output, 2) == output["env_mask"]
        # The second response is asked for with all that went before it.
        assert [asked.replace(" ", "") for asked in trainer.asked[1]] == ["PAT11<eos>NOW2"]

    def test_the_whole_row_reaches_reset(self):
        made = []
        trainer = Scripted(["5<eos>"], rows=[{"start": 0, "prompt": "P", "map": "x"}])
        play(trainer, lambda: made.append(Count()) or made[-1])
        assert made[0].row == {"prompt": "P", "map": "x"}

    def test_environments_are_made_once(self):
        made = []
        rollout = TextRollout(environment=lambda: made.append(0) or Count(), max_turns=1)
        for _ in range(2):
            rollout(["P"] * 3, Scripted(["5<eos>"] * 3, rows=[{"start": 0}] * 3))
        assert len(made) == 3

    def test_one_environment_for_all_episodes_is_refused(self):
        shared = Count()
        trainer = Scripted(["1<eos>", "2<eos>"], rows=[{"start": 1}] * 2)
        with pytest.raises(EpisodeError, match=r"Count object.* a second time, expected a new"):
            play(trainer, lambda: shared)

    def test_an_environment_may_change_what_it_was_reset_with(self):
        class Pops(Count):
            def reset(self, code, **row):
                self.code = code
                return "A"

            def step(self, action):
                right = action == self.code.pop(0)
                return "B", float(right), not self.code, True

        row = {"code": ["1", "2"]}  # one object for two episodes
        turns = ["1<eos>", "1<eos>"], ["2<eos>", "2<eos>"]
        output = play(Scripted(*turns, rows=[row, row]), Pops)
        assert [[step.reward for step in steps] for steps in output["steps"]] == [[1.0, 1.0]] * 2
        assert row == {"code": ["1", "2"]}  # rewards read it afterwards

    def test_a_prompt_with_a_list_of_contents(self):
        part = {"type": "text", "text": "P"}
        trainer = Scripted(["1<eos>"], rows=[{"start": 4}])
        play(trainer, prompts=[[{"role": "user", "content": [part]}]])
        [[message]] = trainer.prompts
        assert message["content"] == [part, {"type": "text", "text": "AT4"}]

    def test_invalid_actions_are_noted(self):
        output = play(Scripted(["X<eos>"], ["5<eos>"], rows=[{"start": 0}]))
        assert [step.valid for step in output["steps"][0]] == [False, True]

    def test_an_episode_that_does_not_end_is_cut_after_max_turns(self):
        output = play(Scripted(["1<eos>"], ["1<eos>"], rows=[{"start": 0}]), max_turns=2)
        assert output["finished"] == [False]
        assert len(output["steps"][0]) == 2
        assert output["completion_ids"][0][-1] == EOS  # and not with what nobody answers

    @pytest.mark.parametrize(("room", "num_steps"), [(13, 3), (12, 2), (7, 2), (6, 1), (1, 1)])
    def test_no_completion_is_longer_than_allowed(self, room, num_steps):
        # "1<eos>" and "NOW1" take turns: 2 + 4 tokens each.
        turns = [["1<eos>"]] * 5
        trainer = Scripted(*turns, rows=[{"start": 0}], max_completion_length=room)
        output = play(trainer)
        assert len(output["steps"][0]) == num_steps
        assert len(output["completion_ids"][0]) <= room
        assert output["env_mask"][0][-1] == 1
        assert output["finished"] == [False]
        check_episodes(output, 1)
        assert trainer.generation_config.max_new_tokens == room  # given back

    def test_a_response_cut_short_gets_its_end_from_the_environment(self):
        trainer = Scripted(["11"], ["4<eos>"], rows=[{"start": 0}])
        output = play(trainer, max_turn_tokens=1)
        assert trainer.limits == [1, 1]
        assert text(trainer, output["completion_ids"][0]) == "1<eos>NOW14"
        assert output["env_mask"] == [[1, 0, 0, 0, 0, 0, 1]]

    def test_log_probabilities_are_0_where_nothing_was_sampled(self):
        output = play(Scripted(["1<eos>"], ["4<eos>"], rows=[{"start": 0}], logprobs=True))
        assert output["logprobs"] == [[-0.5, -0.5, 0, 0, 0, 0, -0.5, -0.5]]

    def test_vllm_is_limited_too(self):
        trainer = Scripted(["5<eos>"], rows=[{"start": 0}])
        trainer.vllm_generation = SimpleNamespace(max_completion_length=100)
        generate = trainer._generate_single_turn

        def look(*args, **kwargs):
            assert trainer.vllm_generation.max_completion_length == 2
            return generate(*args, **kwargs)

        trainer._generate_single_turn = look
        play(trainer, max_turn_tokens=2)
        assert trainer.vllm_generation.max_completion_length == 100

    def test_observations_are_messages_in_a_conversation(self):
        trainer = Scripted(["1<eos>"], ["4<eos>"], rows=[{"start": 0}])
        trainer._tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role[0] | upper }}:{{ m.content }}<eos>;{% endfor %}"
            "{% if add_generation_prompt %}A:{% endif %}"
        )
        output = play(trainer, prompts=[[{"role": "user", "content": "P"}]])
        assert trainer.prompts == [[{"role": "user", "content": "PAT0"}]]
        assert text(trainer, output["completion_ids"][0]) == "1<eos>;U:NOW1<eos>;A:4<eos>"
        assert output["env_mask"] == [[1, 1, *[0] * 11, 1, 1]]

    def test_a_template_that_hides_what_was_answered(self):
        trainer = Scripted(["1<eos>"], ["4<eos>"], rows=[{"start": 0}])
        trainer._tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
        )
        with pytest.raises(EpisodeError, match="does not show an assistant's message as it is"):
            play(trainer, prompts=[[{"role": "user", "content": "P"}]])

    def test_a_trainer_that_has_no_rows(self):
        trainer = Scripted(["1<eos>"], rows=[{"start": 0}])
        del trainer.rollout_rows
        with pytest.raises(EpisodeError, match="needs the rows behind the prompts in Scripted"):
            play(trainer, prompts=["P"])

    def test_an_environment_that_cannot_be_made(self):
        trainer = Scripted(["1<eos>"], rows=[{"start": 0}])
        with pytest.raises(EpisodeError, match=r"environment is <.*, expected a class"):
            play(trainer, Count())

    @pytest.mark.parametrize("limits", [{"max_turns": 0}, {"max_turn_tokens": True}])
    def test_limits_are_positive(self, limits):
        [(name, value)] = limits.items()
        with pytest.raises(EpisodeError, match=f"{name} is {value}, expected an int from 1 up"):
            play(Scripted(rows=[]), **limits)


class Broken(Count):
    def __init__(self, **answers):
        self.answers = answers

    def reset(self, **row):
        return self.answers.get("reset", "AT0")

    def step(self, action):
        if "step" in self.answers:
            return self.answers["step"]
        raise ZeroDivisionError("no way")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, r"Broken.step\('1'\), turn 0 of the row \{'start': 7\}, raised ZeroDivisionError"),
        ({"reset": 3}, r"Broken.reset, turn 0 .* gave a int to observe, expected text \(3\)"),
        ({"step": ("a", None, False, True)}, "gave the reward None, expected a finite number"),
        ({"step": ("a", float("nan"), False, True)}, "gave the reward nan, expected a finite"),
        ({"step": (np.zeros(2), 0.0, False, True)}, "gave a ndarray to observe"),
        ({"step": ("a", 0.0, False)}, "expected 4, got 3"),
        (
            {"step": ("a\ud83d", 0.0, False, True)},
            r"Broken.step.*gave a text to observe that has '.ud83d', half of a character",
        ),
        ({"reset": "\ud83d"}, r"Broken.reset.*half of a character, which no tokenizer takes"),
        ({"step": ("a", 10**400, False, True)}, "expected a finite number"),
        ({"step": ("a", 0.0, False, {})}, r"gave \{\} for valid, expected True or False"),
        ({"step": ("a", 0.0, "False", True)}, "gave 'False' for done, expected True or False"),
    ],
)
def test_an_environment_that_goes_wrong_is_named_with_its_row_and_turn(answers, message):
    trainer = Scripted(["1<eos>"], rows=[{"start": 7, "prompt": "P"}])
    with pytest.raises(EpisodeError, match=message):
        play(trainer, lambda: Broken(**answers))


class Opaque:
    """Equal to nothing but itself."""


def output(steps=None, **changes):
    first = {"observation": "a", "reward": 1.0, "num_tokens": 2}
    steps = [[Step(**first)]] if steps is None else steps
    good = {"completion_ids": [[5, 6, 7]], "env_mask": [[1, 0, 1]], "steps": steps}
    return {key: value for key, value in (good | changes).items() if value is not None}


def step(**changes):
    return [[Step(**({"observation": "a", "reward": 1.0, "num_tokens": 2} | changes))]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([], "returned list and no list 'completion_ids'"),
        ({"completion_ids": []}, r"returned \['completion_ids'\] and no list 'steps'"),
        (output() | {"steps": None}, "and no list 'steps'"),
        (output(steps=[]), "steps of 0 episodes, expected 1"),
        (output(env_mask=[[1, 0, 1], [1]]), "env_mask of 2 episodes, expected 1"),
        (output(steps=[[]]), "episode 0 has no steps"),
        (output(steps=[[{"reward": 1}]]), "step 0 of episode 0 is a dict"),
        (output(env_mask=[[1, 1]]), r"has 2 values, \[1\] among them, for 3 completion tokens"),
        (output(step(num_tokens=3)), "have 3 response tokens, its completion has 2"),
        (output(env_mask=None), "have 2 response tokens, its completion has 3"),
        (output(step(num_tokens=-2)), "num_tokens of step 0 of episode 0 is -2"),
        (output(step(reward=None)), "reward of step 0 of episode 0 is None"),
        (output(step(reward=float("inf"))), "reward of step 0 of episode 0 is inf"),
        (output(step(observation=["a"])), "is a list that cannot be compared"),
        (output(step(observation=torch.ones(2))), "is a Tensor that cannot be compared"),
        (output(step(observation=np.zeros(2))), "is a ndarray that cannot be compared"),
        (output(step(observation=float("nan"))), "is a float that cannot be compared"),
        (output(step(observation=Opaque())), "is a Opaque that cannot be compared"),
        (output(step(observation=(1, (Opaque(),)))), "is a tuple that cannot be compared"),
        (output(step(observation=(float("nan"),))), "is a tuple that cannot be compared"),
        (output(step(observation=torch.ones(1))), "is a Tensor that cannot be compared"),
        (output(env_mask=[[2, 0, 0]]), r"3 values, \[0, 2\] among them, for 3 completion tokens"),
        (output(step(num_tokens=0), completion_ids=[[]], env_mask=[[]]), "has no tokens"),
        (output(step(reward=torch.ones(2))), "reward of step 0 of episode 0 is tensor"),
    ],
)
def test_bad_episodes_are_refused_in_a_sentence(returned, message):
    with pytest.raises(EpisodeError, match=message):
        check_episodes(returned, 1)


@pytest.mark.parametrize(
    "observation", ["", None, 3, (1, "a"), frozenset({1}), np.int64(1), np.float64(0.5)]
)
def test_whatever_is_compared_by_value_is_an_observation(observation):
    assert check_episodes(output(step(observation=observation)), 1) == [[1, 0, 1]]


def test_masks_may_be_arrays():
    assert check_episodes(output(env_mask=np.array([[1, 0, 1]])), 1) == [[1, 0, 1]]


def test_without_a_mask_every_token_is_of_a_response():
    assert check_episodes(output(step(num_tokens=3), env_mask=None), 1) == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("omega", -1.0, "from 0 up"),
        ("omega", float("inf"), "from 0 up"),
        ("gamma", 1.5, "from 0 to 1"),
        ("gamma", float("nan"), "from 0 to 1"),
        ("invalid_action_penalty", -0.1, "from 0 up"),
        ("omega", None, "from 0 up"),
        ("omega", "1", "from 0 up"),
    ],
)
def test_settings_are_checked(name, value, expected, tmp_path):
    message = f"{name} is {value!r}, expected a finite number {expected}"
    with pytest.raises(EpisodeError, match=message):
        GiGPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
