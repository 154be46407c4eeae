"""Completions of prompts with their advantages, as a trainer's own loss takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from itertools import islice
from typing import Any

from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from trl.trainer.utils import (
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from layerrl.blocks import replaced_forwards, unwrap
from layerrl.compatibility import windows_of_tokens
from layerrl.replacing import replaced
from layerrl.scores.evaluation import replaced_rewards, rewarded_differently, watched_rewards
from layerrl.warning import warn


@dataclass
class Rollouts:
    """Prompts of a trainer's data set, answered by its model as it is and rewarded.

    Args:
        trainer: A TRL trainer that generates and rewards (GRPO, RLOO), before its first step. Its
            arguments should ask for no pass that a first step does not need.
        num_prompts: How many to take; fewer where the data set has fewer. In several processes
            whole generation batches are taken. After a raise, another iteration goes over what
            there is where batches are kept (`old`), and on.
    """

    trainer: Any
    num_prompts: int
    old: bool = False
    """Whether batches after the first hold log-probabilities of the model as it is now, to train on
    when it will have moved. All batches are kept then."""
    twice: bool = True
    """Ask for the rewards of the first batch a second time, to see whether they are the same."""
    num_tokens: int = field(default=0, init=False)
    """Completion tokens generated so far."""
    with_signal: list[bool] = field(default_factory=list, init=False)
    """For each prompt so far, whether its completions were rewarded differently."""
    reward_noise: float | None = field(default=None, init=False)
    """Mean absolute difference between two rewards of the same completion."""
    _loader: Iterator[list[Any]] | None = field(default=None, init=False)
    _kept: list[tuple[dict[str, Any], list[bool]]] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """For each prompt the micro-batches of its completions, none where nothing is learned.

        A prompt's losses add up to its share of the loss of its generation batch. In several
        processes they do over all of them, each of which has the micro-batches of its own rows.

        Yields:
            What the trainer's `compute_loss` takes, `per_device_train_batch_size` rows or fewer.
        """
        self.trainer.model.train()
        with in_its_precision(self.trainer):
            for batch, signals in self._kept:
                yield from self._prompts(batch, signals)
            while len(self.with_signal) < self.num_prompts:
                generated = self._generate()
                if generated is None:
                    break
                if self.old:
                    self._kept.append(generated)
                yield from self._prompts(*generated)

    def _prompts(
        self, batch: dict[str, Any], signals: list[bool]
    ) -> Iterator[list[dict[str, Any]]]:
        trainer, size = self.trainer, self.trainer.num_generations
        num_rows = len(batch["advantages"])
        # Of equal length, or their means would not add up to the prompt's, and of one prompt each,
        # whose other rows may lie in another process.
        common = math.gcd(num_rows, size)
        most = min(common, trainer.args.per_device_train_batch_size)
        length = next(rows for rows in range(most, 0, -1) if common % rows == 0)
        first = trainer.accelerator.process_index * num_rows
        trainer.current_gradient_accumulation_steps = size // length
        if batch.get("num_items_in_batch") is not None:
            # TRL's loss takes for granted that gradients are averaged over processes.
            scale = windows_of_tokens(trainer) * trainer.accelerator.num_processes / len(signals)
            batch = {**batch, "num_items_in_batch": batch["num_items_in_batch"] * scale}
        split: Callable[..., list[dict[str, Any]]] = split_tensor_dict
        parts = split(split_pixel_values_by_grid(batch), num_rows // length)
        for prompt, signal in enumerate(signals):
            start, end = (
                min(max(row - first, 0), num_rows) // length
                for row in (prompt * size, (prompt + 1) * size)
            )
            yield [unsplit_pixel_values_by_grid(part) for part in parts[start:end] if signal]

    def _generate(self) -> tuple[dict[str, Any], list[bool]] | None:
        """The next batch, and which of its prompts have signal; None where there is no other."""
        trainer, num_before = self.trainer, len(self.with_signal)
        if self._loader is None:
            repeats = trainer.num_iterations * trainer.args.steps_per_generation
            self._loader = islice(iter(trainer.get_train_dataloader()), 0, None, repeats)
        rows = next(self._loader, None)
        if rows is None:
            return None
        if trainer.accelerator.num_processes == 1:
            rows = rows[: (self.num_prompts - num_before) * trainer.num_generations]
        first = not num_before
        can_again = getattr(trainer, "environment_factories", None) is None
        with (
            replaced_rewards(trainer, self._again)
            if first and self.twice and can_again
            else nullcontext(),
            _scored_by_the_base(trainer) if self.old and not first else nullcontext(),
            watched_rewards(trainer, self._note),
        ):
            batch = trainer._generate_and_score_completions(rows)
        num_tokens = int(trainer.accelerator.gather(batch["completion_mask"].sum()).sum())
        self.num_tokens += num_tokens
        if not num_tokens:  # all cut off, and mask_truncated_completions leaves them out
            num_prompts = len(self.with_signal) - num_before
            self.with_signal[num_before:] = [False] * num_prompts
        return batch, self.with_signal[num_before:]

    def _note(self, _: Any, rewards: list[float]) -> None:
        self.with_signal += rewarded_differently(rewards, self.trainer.num_generations)

    def _again(self, calculate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Rewards that are looked at a second time, and warned of where they are others then."""

        def twice(*args: Any, **kwargs: Any) -> Tensor:
            rewards_BF, again_BF = (calculate(*args, **kwargs) for _ in range(2))
            difference_B = (rewards_BF - again_BF).nan_to_num().abs().sum(dim=1)
            self.reward_noise = difference_B.mean().item()
            if num_differ := int((difference_B > 0).sum()):
                warn(
                    f"rewards of {num_differ} of {len(difference_B)} completions were others when "
                    f"asked for again, by {self.reward_noise:.3g} on average: part of what layers "
                    "would learn from is noise, and their scores need more prompts for it"
                )
            return rewards_BF

        return twice


@contextmanager
def in_its_precision(trainer: Any) -> Iterator[None]:
    """Run the model as its training does: in mixed precision, where the arguments ask for it."""
    model, accelerator = unwrap(trainer.model), trainer.accelerator

    def prepared(_: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with accelerator.autocast():
                return forward(*args, **kwargs)

        return convert_outputs_to_fp32(run)

    if accelerator.native_amp and not hasattr(model, "_original_forward"):  # accelerate's mark
        with replaced_forwards([model], prepared):
            yield
    else:
        yield


def _scored_by_the_base(trainer: Any) -> AbstractContextManager[None]:
    """Have log-probabilities kept with a batch, as TRL does where the policy will have moved."""
    return replaced(trainer, num_iterations=1 + trainer.args.gradient_accumulation_steps)
