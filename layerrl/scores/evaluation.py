"""A model's score on each prompt of a fixed set, by the trainer's own generation and rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerrl.errors import ProbeError
from layerrl.randomness import random_state, set_random_state
from layerrl.replacing import replaced

if TYPE_CHECKING:
    from datasets import Dataset

_ROW = "layerrl_row"


def prompt_scores(trainer: Any, dataset: Dataset, *, greedy: bool) -> list[float]:
    """Return the mean reward of each prompt's completions, of a TRL trainer that generates.

    Rewards are summed as the trainer weighs them; there are `num_generations_eval` completions
    where they are sampled, one where decoding is greedy. Random state is as it was afterwards, and
    so is the trainer: an evaluation in the middle of a training changes nothing in it.

    Raises:
        ProbeError: If a prompt was not scored, or not with a finite number.
    """
    found: dict[int, list[float]] = {row: [] for row in range(len(dataset))}

    def note(inputs: Any, rewards: list[float]) -> None:
        for example, reward in zip(inputs, rewards, strict=True):
            found[int(example[_ROW])].append(reward)  # a tensor, if rows are formatted so

    rows = dataset.add_column(_ROW, list(range(len(dataset))))  # pyright: ignore[reportCallIssue]
    training = [module for module in trainer.model.modules() if module.training]
    try:
        trainer.model.eval()
        with random_state_kept(), _evaluating(trainer, greedy), watched_rewards(trainer, note):
            for batch in trainer.get_eval_dataloader(rows):
                trainer._prepare_inputs(batch)
    finally:
        for module in training:
            module.training = True
    for row, rewards in found.items():
        if not rewards or not all(map(math.isfinite, rewards)):
            raise ProbeError(
                f"prompt {row} of the evaluation set got the rewards {rewards}, expected finite "
                f"numbers: {dataset[row]['prompt']!r:.200}. Rewards: "
                f"{', '.join(trainer.reward_func_names)}"
            )
    return [sum(rewards) / len(rewards) for rewards in found.values()]


@contextmanager
def watched_rewards(trainer: Any, look: Callable[[Any, list[float]], None]) -> Iterator[None]:
    """Show somebody what is rewarded.

    `look` is called with the rows of each rewarded batch, and rewards as the trainer weighs them,
    NaN where no function gave one: in several processes with this one's rows and the rewards of
    all, in the order of their ranks.
    """

    def watch(calculate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            rewards_BF = calculate(inputs, *args, **kwargs)
            weighted_B = (rewards_BF * trainer.reward_weights.to(rewards_BF.device)).nansum(dim=1)
            weighted_B[rewards_BF.isnan().all(dim=1)] = torch.nan
            look(inputs, weighted_B.tolist())
            return rewards_BF

        return watched

    with replaced_rewards(trainer, watch):
        yield


@contextmanager
def all_rewarded(trainer: Any) -> Iterator[None]:
    """Refuse completions without any reward; TRL would train on 0 for them.

    One function of several may give None where it does not apply, as long as another gives a
    number.
    """

    def look(inputs: Any, rewards: list[float]) -> None:
        without = [number for number, reward in enumerate(rewards) if math.isnan(reward)]
        if without:
            # Each process has the rewards of all, and its own rows.
            first, shown = without[0] - trainer.accelerator.process_index * len(inputs), ""
            if 0 <= first < len(inputs):
                shown = f", the first of them for the prompt {inputs[first].get('prompt')!r:.200}"
            raise ProbeError(
                f"{len(without)} of {len(rewards)} completions got no reward{shown}: "
                f"{', '.join(trainer.reward_func_names)} returned None, each saying that it does "
                "not apply. Give every prompt a reward that does."
            )

    with watched_rewards(trainer, look):
        yield


def rewarded_differently(rewards: Sequence[float], num_generations: int) -> list[bool]:
    """For each prompt, whether its completions got different rewards; NaN is none."""
    groups = (rewards[i : i + num_generations] for i in range(0, len(rewards), num_generations))
    return [len({r for r in group if not math.isnan(r)}) > 1 for group in groups]


def replaced_rewards(
    trainer: Any, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
) -> AbstractContextManager[None]:
    """Wrap what takes a batch and gives each function's rewards, shape (B, F)."""
    return replaced(trainer, _calculate_rewards=wrap(trainer._calculate_rewards))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give Python's, numpy's and torch's global generators back as they were."""
    before = random_state()
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    # All of them by number: without numbers torch warns of hosts with several.
    numbers = range(torch.accelerator.device_count())
    try:
        with torch.random.fork_rng(numbers, device_type=kind):
            yield
    finally:
        set_random_state(before)


@contextmanager
def _evaluating(trainer: Any, greedy: bool) -> Iterator[None]:
    vllm = getattr(trainer, "vllm_generation", None)
    with ExitStack() as stack:
        stack.enter_context(replaced(trainer.args, dataloader_drop_last=False))
        if greedy:
            stack.enter_context(replaced(trainer, num_generations_eval=1))  # all would be alike
        if greedy and vllm is not None:
            stack.enter_context(replaced(vllm, temperature=0.0))
        elif greedy:
            # transformers warns of what is set for sampling
            unused = dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
            settings = replaced(trainer.generation_config, do_sample=False, **unused)
            stack.enter_context(settings)
        yield
