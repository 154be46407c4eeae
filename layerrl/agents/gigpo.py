"""GiGPO (arXiv:2505.10978): GRPO over episodes, with an advantage of each step beside theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from trl import GRPOConfig, GRPOTrainer

from layerrl.agents.advantages import (
    anchor_groups,
    discounted_returns,
    on_response_tokens,
    step_advantages,
)
from layerrl.agents.episodes import Step, check_episodes
from layerrl.checks import check_number
from layerrl.errors import EpisodeError
from layerrl.seams import check_class, check_made

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )

    RewardFunc = str | PreTrainedModel | Callable[..., Any]
    Datasets = Dataset | IterableDataset | DatasetDict | IterableDatasetDict
    Tokenizers = PreTrainedTokenizerBase | list[PreTrainedTokenizerBase]


@dataclass
class GiGPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` and what GiGPO adds.

    `scale_rewards` scales step advantages as well: by the standard deviation of the anchor group,
    unless it is `"none"`.
    """

    omega: float = field(
        default=1.0,
        metadata={"help": "Weight of step advantages beside the episode's; 0 is plain GRPO."},
    )
    gamma: float = field(
        default=0.95,
        metadata={"help": "Discount per step in a step's return, 0 to 1; not of the episode's."},
    )
    invalid_action_penalty: float = field(
        default=0.1,
        metadata={
            "help": "Where the action is not valid, taken off the step's return and off the "
            "episode's reward, in their unit."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in {"omega": None, "gamma": 1, "invalid_action_penalty": None}.items():
            value = check_number(name, getattr(self, name), EpisodeError, least=0, most=most)
            setattr(self, name, value)


class GiGPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` on episodes of several steps, each with an advantage of its own.

    The first reward is the episode's: the sum of its steps' rewards, minus `invalid_action_penalty`
    for each action that was not valid. With it, and the `reward_funcs` given, TRL compares the
    episodes of a prompt as it compares completions: `A_E`. In addition, steps of the same prompt's
    episodes that were taken from the same observation are compared by their discounted returns,
    each minus the penalty of its own action: `A_S`, 0 where no other step was. Every response token
    of a step has the advantage `A_E + omega * A_S`.

    All else is GRPO: with `omega=0` bit for bit, on these rewards. In the authors' code only the
    step with the invalid action pays for it in `A_E`, too; here the whole episode does.

    Logged with the trainer's own metrics: `layerrl/episode_turns`, the mean number of steps;
    `layerrl/anchored_steps`, the share of steps that another one was compared with;
    `layerrl/invalid_actions`, the share of steps with one; `layerrl/unfinished_episodes`, the share
    of episodes that were cut off, where the rollout function returns `finished`.

    Args:
        model: As for `GRPOTrainer`.
        reward_funcs: Rewards of whole episodes beside their own. They are given `steps`, and
            whatever else the rollout function returns. `args.reward_weights` has the episode's
            own reward first.
        args: A `GiGPOConfig`; None: its defaults.
        train_dataset: A row per task, with a `prompt` and what the environment's `reset` needs.
        rollout_func: Plays an episode for each prompt it is given, as TRL's `rollout_func` (a
            `TextRollout` does). Beside `prompt_ids`, `completion_ids` and `logprobs` it returns
            `steps`, a list of `Step` for each episode, and `env_mask`, which is 0 on completion
            tokens that are not of a response. All rows are in the trainer's `rollout_rows`.
        eval_dataset: As for `GRPOTrainer`, like all that follows.
        processing_class: Of the model.
        reward_processing_classes: Of reward models, in the order of `reward_funcs`.
        callbacks: More of them.
        optimizers: Optimizer and scheduler, where not those of the args.
        quantization_config: To load the model with.
        peft_config: Of the adapters to train.
        tools: Refused: what is done in an episode is the rollout function's.
        environment_factory: Refused alike.

    Raises:
        EpisodeError: If the rollout function is missing, or the args are no `GiGPOConfig`; while
            training, if its episodes are not what they should be.
        FrameworkError: If the installed TRL lacks what this needs of its trainer.
    """

    _tag_names = ["trl", "gigpo"]  # noqa: RUF012 - TRL's
    _name = "GiGPO"
    _paper = {  # noqa: RUF012 - TRL's
        "title": "Group-in-Group Policy Optimization for LLM Agent Training",
        "id": "2505.10978",
    }

    rollout_rows: list[dict[str, Any]]
    """Rows of the data set behind the prompts that a rollout function is given."""

    if TYPE_CHECKING:
        args: Any
        model: Any
        num_generations: Any
        num_generations_eval: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GiGPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *,
        rollout_func: Callable[[list[Any], Any], dict[str, Any]],
        eval_dataset: Datasets | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: Tokenizers | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: None = None,
        environment_factory: None = None,
    ) -> None:
        check_class(type(self))
        args = GiGPOConfig() if args is None else args
        if not isinstance(args, GiGPOConfig):
            raise EpisodeError(
                f"args is a {type(args).__name__}, expected a GiGPOConfig, which is a GRPOConfig "
                "with omega, gamma and invalid_action_penalty"
            )
        other = {"tools": tools, "environment_factory": environment_factory}
        unused = [name for name, value in other.items() if value]
        if unused or not callable(rollout_func):
            raise EpisodeError(
                f"GiGPO's episodes come from rollout_func, which is {rollout_func!r:.80}; "
                f"{', '.join(unused) or 'a function'} "
                f"{'cannot be given with it' if unused else 'was expected, such as a TextRollout'}"
            )
        self._play = rollout_func
        if args.mask_truncated_completions:
            raise EpisodeError(
                "mask_truncated_completions=True: TRL takes a completion for cut off where its "
                "last token ends no sequence, and an episode may end with any. Leave it off."
            )
        given = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        funcs: list[Any] = [self.episode_reward, *(func for func in given if func is not None)]
        processing: Any = reward_processing_classes
        if processing:
            listed = processing if isinstance(processing, list) else [processing]
            processing = [None, *listed]
        super().__init__(
            model,
            funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            processing,
            callbacks,
            optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            rollout_func=self._rollout,
        )
        check_made(self)

    def episode_reward(self, steps: list[list[Step]], **_: object) -> list[float]:
        """The first of the reward functions: a whole episode's rewards, minus its penalties."""
        return [_total(s.reward - self._penalty(s) for s in episode) for episode in steps]

    def _penalty(self, step: Step) -> float:
        return 0.0 if step.valid else self.args.invalid_action_penalty

    def _returns(self, steps: list[Step]) -> list[float]:
        """What each step led to, less what it costs itself."""
        returns = discounted_returns([step.reward for step in steps], self.args.gamma)
        return [value - self._penalty(step) for value, step in zip(returns, steps, strict=True)]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, whose advantages are of tokens: the episode's and the step's."""
        self.rollout_rows = inputs
        # Copies, for TRL writes what the rollout function returns into the rows.
        batch = super()._generate_and_score_completions([dict(row) for row in inputs])
        if self.args.omega:
            episode_B = batch["advantages"]
            step_BT = on_response_tokens(*self._of_steps, batch["completion_ids"].shape[1])
            steps_BT = self.args.omega * step_BT.to(episode_B.device)
            batch["advantages"] = episode_B[:, None] + steps_BT
        finite: Any = self.accelerator.gather(batch["advantages"].isfinite().all()[None])
        if not finite.all():  # in one process, an error in all
            raise EpisodeError(
                "the advantages of a batch of episodes are not finite: rewards, omega="
                f"{self.args.omega:g} or invalid_action_penalty="
                f"{self.args.invalid_action_penalty:g} are too large for their sums and squares "
                "in float32. The largest reward of a step in this process is "
                f"{self._largest:g}. Scale them down."
            )
        return batch

    def _rollout(self, prompts: list[Any], _: object) -> dict[str, Any]:
        """What the rollout function returns, with its steps' advantages computed on the way."""
        output = self._play(prompts, self)
        masks = check_episodes(output, len(prompts))
        rewards = (step.reward for steps in output["steps"] for step in steps)
        self._largest = max(map(abs, rewards))
        if shared := {*self.rollout_rows[0]} & {"steps", "finished"} & {*output}:
            raise EpisodeError(
                f"the data set has the columns {sorted(shared)}, and so does what the rollout "
                "function returns, which TRL would write over them: rename the data set's"
            )
        episodes: list[list[Step]] = output["steps"]
        num_tokens = [[step.num_tokens for step in steps] for steps in episodes]
        self._of_steps = self._step_advantages(episodes), num_tokens, masks
        steps = list(chain.from_iterable(episodes))
        invalid = sum(not step.valid for step in steps)
        self._log_metric("layerrl/episode_turns", len(steps) / len(episodes))
        self._log_metric("layerrl/invalid_actions", invalid / len(steps))
        if "finished" in output:
            unfinished = sum(not finished for finished in output["finished"])
            self._log_metric("layerrl/unfinished_episodes", unfinished / len(episodes))
        return output

    def _step_advantages(self, episodes: list[list[Step]]) -> list[Tensor]:
        """For each of this process's episodes the advantages of its steps."""
        # A task's episodes may lie on several processes, all of which compute the same.
        everyone = gather_object(episodes)
        size = self.num_generations if self.model.training else self.num_generations_eval
        tasks = [number // size for number in range(len(everyone))]
        for task, steps in zip(tasks, everyone, strict=True):
            first, other = everyone[task * size][0].observation, steps[0].observation
            if first != other:
                raise EpisodeError(
                    f"episodes of the same prompt start from different observations, {first!r:.80} "
                    f"and {other!r:.80}: GiGPO compares episodes from one initial state. An "
                    "environment's reset may depend on nothing but its row; put a seed into it."
                )
        group_S = anchor_groups(
            chain.from_iterable([task] * len(e) for task, e in zip(tasks, everyone, strict=True)),
            (step.observation for steps in everyone for step in steps),
        )
        returns = [self._returns(steps) for steps in everyone]
        advantage_S = step_advantages(
            torch.tensor(list(chain.from_iterable(returns)), dtype=torch.double),
            group_S,
            scale=self.scale_rewards != "none",
        )
        anchored = (group_S.bincount()[group_S] > 1).double().mean().item()
        self._log_metric("layerrl/anchored_steps", anchored)
        of_episodes = advantage_S.split([len(steps) for steps in everyone])
        own = self.accelerator.process_index * len(episodes)
        return list(of_episodes[own : own + len(episodes)])


def _total(rewards: Iterable[float]) -> float:
    """The sum, infinite or NaN where it is too large for a float."""
    rewards = [*rewards]
    try:
        return math.fsum(rewards)
    except OverflowError:
        return sum(rewards)
