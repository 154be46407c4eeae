"""GiGPO trainers: hand-worked advantages, agreement with TRL's GRPO, and life with a selection."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification
from trl import GRPOConfig, GRPOTrainer

from layerrl.errors import EpisodeError
from layerrl.scores.evaluation import prompt_scores
from layerrl.trainer import GiGPOConfig, GiGPOTrainer, LayerMaskedGiGPOTrainer, Step, TextRollout
from tests.grpo import PROMPTS, make, tokenizer
from tests.models import tiny, tiny_config
from tests.runs import (
    Passes,
    assert_same_run,
    assert_trained,
    bits,
    freeze_by_hand,
    metric,
    moved,
    train,
)

TASKS = Dataset.from_list([{"prompt": prompt, "start": i} for i, prompt in enumerate(PROMPTS)] * 4)


class Letters:
    """Moves on a circle of three by what is answered, for at most three turns."""

    def reset(self, start: int, **_: Any) -> str:
        self.at, self.turns = start % 3, 0
        return "xyz"[self.at]

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        number, self.turns = sum(map(ord, action)), self.turns + 1
        self.at = (self.at + number) % 3
        done = number % 4 == 0 or self.turns == 3
        return "xyz"[self.at], float(number % 5), done, number % 2 == 0


ROLLOUT = partial(TextRollout, environment=Letters, max_turns=3, max_turn_tokens=2)


def gigpo(folder: Any, *, trainer: type = GiGPOTrainer, **changes: Any) -> Any:
    """A GiGPO trainer for a tiny model of four layers; keywords as for `make`."""
    arguments = {"reward_funcs": None, "train_dataset": TASKS, "rollout_func": ROLLOUT()}
    arguments |= changes.pop("arguments", {})
    model = changes.pop("model", None) or tiny("llama", 4)
    changes = {"kind": GiGPOConfig, "max_completion_length": 10, **changes}
    return make(model, folder, trainer=trainer, arguments=arguments, **changes)


class Plain(GRPOTrainer):
    """TRL's own, but for letting the environment see the rows."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.rollout_rows = inputs
        return super()._generate_and_score_completions(inputs)


def episode_reward(steps: list[list[Step]], **_: Any) -> list[float]:
    return [sum(step.reward for step in episode) for episode in steps]


# The episodes of tests/unit/test_advantages.py, with one response token and one observed to a step.
SEEN = [["s0", "s1"], ["s0", "s2"], ["s0", "s1"], ["s0"], ["s0", "s0"], ["s0", "s1", "s0"]]
REWARDS = [[0, 1], [0, 0], [1, 0], [2], [0, 4], [0, 0, 0]]


def scripted(prompts: list[Any], trainer: Any, *, invalid: tuple[int, int] | None = None) -> Any:
    steps = [
        [
            Step(observation=o, reward=r, num_tokens=1, valid=(row, turn) != invalid)
            for turn, (o, r) in enumerate(zip(seen, rewards, strict=True))
        ]
        for row, (seen, rewards) in enumerate(zip(SEEN, REWARDS, strict=True))
    ]
    return {
        "prompt_ids": [[5]] * 6,
        "completion_ids": [[6, 7] * len(episode) for episode in steps],
        "env_mask": [[1, 0] * len(episode) for episode in steps],
        "logprobs": None,
        "steps": steps,
    }


def scripted_batch(folder: Any, rollout: Any = scripted, **changes: Any) -> Tensor:
    values = {"per_device_train_batch_size": 6, "num_generations": 3, "gamma": 0.5, **changes}
    trainer = gigpo(folder, arguments={"rollout_func": rollout}, **values)
    rows = [TASKS[0]] * 3 + [TASKS[1]] * 3
    return trainer._generate_and_score_completions(rows)["advantages"]


class TestAdvantages:
    def test_by_hand(self, tmp_path):
        # Episodes' rewards are 1, 0, 1 (mean 2/3, standard deviation 0.57735) and 2, 4, 0 (2, 2):
        # TRL's advantages, which divide by that plus 1e-4, are
        # 0.57725, -1.15450, 0.57725 and 0, 0.99995, -0.99995. Half the steps' is added.
        found_BT = scripted_batch(tmp_path, omega=0.5)
        expected = [
            [0.57725, 0.57725 + 0.35355],
            [-1.15450 - 0.5, -1.15450],
            [0.57725 + 0.5, 0.57725 - 0.35355],
            [0.11952],
            [0.99995 + 0.11952, 0.99995 + 0.71714],
            [-0.99995 - 0.47809, -0.99995, -0.99995 - 0.47809],
        ]
        assert found_BT.shape == (6, 6)
        for row_T, steps in zip(found_BT, expected, strict=True):
            found = row_T[: 2 * len(steps) : 2]
            assert_close(found, torch.tensor(steps), rtol=0, atol=2e-5)

    def test_unscaled(self, tmp_path):
        found_BT = scripted_batch(tmp_path, scale_rewards="none")
        assert_close(found_BT[0, [0, 2]], torch.tensor([1 / 3, 1 / 3 + 0.5]))
        assert_close(found_BT[4, [0, 2]], torch.tensor([2 + 0.4, 2 + 2.4]))

    def test_an_invalid_action_costs_its_step_and_its_episode(self, tmp_path):
        rollout = partial(scripted, invalid=(0, 1))
        found_BT = scripted_batch(
            tmp_path, rollout, scale_rewards="none", invalid_action_penalty=0.4
        )
        # The first episode is worth 0.6 and not 1: the mean of 0.6, 0, 1 is 1.6 / 3. In s1 it is
        # 0.6 against 0; in s0, before it, 0.5 among 0.5, 0, 1 as if it had been valid.
        episode = 0.6 - 1.6 / 3
        assert_close(found_BT[0, [0, 2]], torch.tensor([episode, episode + 0.3]))

    def test_of_two_rewards_the_episodes_own_is_the_first(self, tmp_path):
        changes: dict[str, Any] = {"reward_weights": [2.0, 3.0], "omega": 0.0}
        arguments = {"rollout_func": scripted, "reward_funcs": lambda steps, **_: [1, 0, 0] * 2}
        values = {"per_device_train_batch_size": 6, "num_generations": 3, "scale_rewards": "none"}
        trainer = gigpo(tmp_path, arguments=arguments, **values, **changes)
        rows = [TASKS[0]] * 3 + [TASKS[1]] * 3
        found_B = trainer._generate_and_score_completions(rows)["advantages"]
        # 2 * 1 + 3, 0, 2 * 1: mean 7 / 3.
        assert_close(found_B[:3], torch.tensor([5, 0, 2]) - 7 / 3)

    def test_they_stay_with_their_tokens_when_batches_are_shuffled_and_split(self, tmp_path):
        made, used = [], []

        class Watched(GiGPOTrainer):
            def _generate_and_score_completions(self, inputs: Any) -> Any:
                batch = super()._generate_and_score_completions(inputs)
                made.extend(rows(batch))
                return batch

            def _compute_loss(self, model: Any, inputs: Any) -> Any:
                used.extend(rows(inputs))
                return super()._compute_loss(model, inputs)

        def rows(batch: Any) -> list[Any]:
            names = ("prompt_ids", "completion_ids", "tool_mask", "advantages")
            return list(zip(*(batch[name].tolist() for name in names), strict=True))

        trainer = gigpo(
            tmp_path,
            trainer=Watched,
            per_device_train_batch_size=4,
            steps_per_generation=2,
            gradient_accumulation_steps=2,
            num_iterations=2,
            max_steps=2,
        )
        trainer.train()
        assert len(made) == 8
        assert made != used[:8]
        assert sorted(used) == sorted(made * 2)
        # Or all this would say nothing: some episode has steps of different advantages.
        assert any(
            len({a for a, m in zip(adv, mask, strict=True) if m}) > 1 for *_, mask, adv in made
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.1, "loss_type": "grpo"},
        {"num_iterations": 2, "importance_sampling_level": "sequence"},
    ],
    ids=["plain", "reused", "sequence"],
)
def test_without_step_advantages_it_is_grpo_bit_for_bit(tmp_path, changes):
    model = tiny("llama", 2)
    model.save_pretrained(tmp_path / "model")
    changes = {"max_steps": 5, "model": str(tmp_path / "model"), **changes}
    plain = gigpo(
        tmp_path / "plain",
        trainer=Plain,
        arguments={"reward_funcs": episode_reward},
        kind=GRPOConfig,
        **changes,
    )
    values = {"invalid_action_penalty": 0.0, **changes}
    without = gigpo(tmp_path / "without", omega=0.0, **values)
    with_steps = gigpo(tmp_path / "with", omega=1.0, **values)
    train(plain, without, with_steps)
    assert_same_run(without, plain)
    assert moved(with_steps, bits(plain.model))


def test_one_turn_is_a_completion_of_grpo(tmp_path):
    class Once(Letters):
        def reset(self, **_: Any) -> str:
            return ""

        def step(self, action: str) -> tuple[str, float, bool, bool]:
            return "", float(sum(map(ord, action)) % 17), True, True

    def episode_reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 17) for text in completions]

    plain = make(
        tiny("llama", 2),
        tmp_path / "plain",
        arguments={"reward_funcs": episode_reward, "train_dataset": TASKS},
    )
    episodes = gigpo(
        tmp_path / "episodes",
        model=tiny("llama", 2),
        omega=0.0,
        max_completion_length=6,
        arguments={"rollout_func": TextRollout(environment=Once, max_turns=3)},
    )
    train(plain, episodes)
    assert_same_run(episodes, plain)


class TestWithASelection:
    def test_is_what_freezing_by_hand_gives_and_replays_the_prefix(self, tmp_path):
        changes = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4, "beta": 0.1}
        saved = tmp_path / "saved"
        tiny("llama", 4).save_pretrained(saved)
        plain = gigpo(tmp_path / "plain", model=str(saved), **changes)
        freeze_by_hand(plain.model, [2])
        masked = gigpo(
            tmp_path / "masked",
            trainer=LayerMaskedGiGPOTrainer,
            arguments={"selection": 2},
            **changes,
        )
        before = bits(masked.model)
        passes = Passes(masked, masked.model.model.layers[1])
        train(plain, masked)
        assert_same_run(masked, plain)
        assert_trained(masked, before, [2])
        # Recorded where the batch was made, compared at first, and replayed from there on.
        assert passes.ran.count(False) >= 3

    def test_full_is_the_plain_trainer(self, tmp_path):
        plain = gigpo(tmp_path / "plain", max_steps=3)
        masked = partial(gigpo, trainer=LayerMaskedGiGPOTrainer, arguments={"selection": "full"})
        full = masked(tmp_path / "full", max_steps=3)
        train(plain, full)
        assert_same_run(full, plain)

    def test_resumes_from_a_delta(self, tmp_path):
        masked = partial(
            gigpo, trainer=LayerMaskedGiGPOTrainer, max_steps=3, arguments={"selection": 2}
        )
        whole = masked(tmp_path / "whole", save_strategy="steps", save_steps=2)
        train(whole)
        checkpoint = tmp_path / "whole" / "checkpoint-2"
        assert (checkpoint / "delta.json").is_file()
        resumed = masked(tmp_path / "resumed")
        train(resumed, resume_from_checkpoint=str(checkpoint))
        assert_close(bits(resumed.model), bits(whole.model), rtol=0, atol=0)

    def test_chooses_its_layers_by_its_first_episodes(self, tmp_path):
        class Low(Letters):
            def step(self, action: str) -> tuple[str, float, bool, bool]:
                seen, _, done, valid = super().step(action)
                return seen, float(sum(letter < "P" for letter in action)), done, valid

        def run(folder: str, selection: Any) -> Any:
            made = gigpo(
                tmp_path / folder,
                trainer=LayerMaskedGiGPOTrainer,
                selection=selection,
                per_device_train_batch_size=256,
                arguments={
                    "train_dataset": Dataset.from_list(TASKS.to_list() * 8),
                    "rollout_func": partial(ROLLOUT, environment=Low)(),
                },
            )
            made.train()
            return made

        auto = run("auto", "auto")
        assert len(auto.selection.layers) == 1
        assert_same_run(auto, run("plain", auto.selection))


class TestEvaluation:
    def test_a_step_of_an_only_episode_has_nothing_to_be_compared_with(self, tmp_path):
        once = TextRollout(environment=Letters, max_turns=1, max_turn_tokens=2)
        trainer = gigpo(
            tmp_path,
            num_generations_eval=1,
            per_device_eval_batch_size=2,
            arguments={"eval_dataset": TASKS.select(range(4)), "rollout_func": once},
        )
        rows = [TASKS[0]] * 4  # in training all four are compared
        assert trainer._generate_and_score_completions(rows)["advantages"].any()
        trainer.model.eval()
        assert not trainer._generate_and_score_completions(rows)["advantages"].any()
        assert trainer.evaluate()["eval_layerrl/episode_turns"] == 1

    def test_prompts_are_scored_greedily_without_a_trace(self, tmp_path):
        trainer = gigpo(tmp_path, per_device_eval_batch_size=4)
        state = torch.random.get_rng_state()
        first, second = (prompt_scores(trainer, TASKS.select(range(4)), greedy=True) for _ in "ab")
        assert first == second
        assert torch.equal(torch.random.get_rng_state(), state)


def test_metric_names_are_public(tmp_path):
    trainer = gigpo(tmp_path, max_steps=1)
    trainer.train()
    logged = [name for name in trainer.state.log_history[0] if name.startswith("layerrl/")]
    assert logged == [
        "layerrl/anchored_steps",
        "layerrl/episode_turns",
        "layerrl/invalid_actions",
        "layerrl/unfinished_episodes",
    ]


def test_metrics_count_steps_and_episodes(tmp_path):
    def rollout(prompts: list[Any], trainer: Any) -> Any:
        return scripted(prompts, trainer, invalid=(5, 0)) | {"finished": [True] * 4 + [False] * 2}

    values = {"per_device_train_batch_size": 6, "num_generations": 3, "max_steps": 1}
    trainer = gigpo(tmp_path, arguments={"rollout_func": rollout}, **values)
    trainer.train()
    # 12 steps; those in s2 of the first task and in s1 of the second have no other.
    assert metric(trainer, "layerrl/episode_turns") == [2]
    assert metric(trainer, "layerrl/anchored_steps") == [pytest.approx(10 / 12)]
    assert metric(trainer, "layerrl/invalid_actions") == [pytest.approx(1 / 12)]
    assert metric(trainer, "layerrl/unfinished_episodes") == [pytest.approx(2 / 6)]


class TestBadInput:
    def test_a_rollout_without_steps(self, tmp_path):
        def rollout(prompts: list[Any], trainer: Any) -> Any:
            output = scripted(prompts, trainer)
            del output["steps"]
            return output

        with pytest.raises(EpisodeError, match=r"'prompt_ids'\] and no list 'steps'"):
            scripted_batch(tmp_path, rollout)

    def test_episodes_of_a_prompt_that_start_differently(self, tmp_path):
        class Anywhere(Letters):
            starts = iter("xyxyxyxy")

            def reset(self, **_: Any) -> str:
                super().reset(start=0)
                return next(self.starts)

        rollout = TextRollout(environment=Anywhere, max_turns=1)
        trainer = gigpo(tmp_path, arguments={"rollout_func": rollout})
        with pytest.raises(EpisodeError, match="start from different observations, 'x' and 'y'"):
            trainer.train()

    @pytest.mark.parametrize(
        ("factor", "plus", "changes"),
        [(0.0, 1e308, {}), (1e200, 0.0, {"scale_rewards": "none"}), (1.0, 0.0, {"omega": 1e308})],
    )
    def test_rewards_that_overflow(self, tmp_path, factor, plus, changes):
        def rollout(prompts: list[Any], trainer: Any) -> Any:
            output = scripted(prompts, trainer)
            output["steps"] = [
                [replace(step, reward=factor * step.reward + plus) for step in steps]
                for steps in output["steps"]
            ]
            return output

        with pytest.raises(EpisodeError, match=r"advantages of a batch of episodes are not finite"):
            scripted_batch(tmp_path, rollout, **changes)

    def test_a_plain_config(self, tmp_path):
        with pytest.raises(EpisodeError, match="args is a GRPOConfig, expected a GiGPOConfig"):
            make(
                tiny("llama", 2),
                tmp_path,
                trainer=GiGPOTrainer,
                arguments={"rollout_func": ROLLOUT()},
            )

    def test_what_trl_takes_for_cut_off(self, tmp_path):
        with pytest.raises(EpisodeError, match="an episode may end with any"):
            gigpo(tmp_path, mask_truncated_completions=True)

    def test_columns_that_trl_would_write_over(self, tmp_path):
        data = TASKS.add_column("finished", [0] * len(TASKS))
        with pytest.raises(EpisodeError, match=r"has the columns \['finished'\], and so does"):
            gigpo(tmp_path, arguments={"train_dataset": data}).train()

    def test_a_reward_model_beside_the_episodes_own(self, tmp_path):
        judge = AutoModelForSequenceClassification.from_config(
            tiny_config("llama", 1, num_labels=1)
        )
        judge.config.pad_token_id = 0
        arguments = {"reward_funcs": judge, "reward_processing_classes": tokenizer()}
        trainer = gigpo(tmp_path, arguments=arguments, max_steps=1)
        trainer.train()
        assert len(trainer.reward_funcs) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tools": [max]}, "tools cannot be given with it"),
            ({"rollout_func": None}, "which is None; a function was expected"),
        ],
    )
    def test_other_sources_of_episodes(self, tmp_path, arguments, message):
        with pytest.raises(EpisodeError, match=message):
            gigpo(tmp_path, arguments=arguments)
