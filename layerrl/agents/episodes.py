"""What a rollout function says about the steps of its episodes, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerrl.checks import is_finite, whole_number
from layerrl.errors import EpisodeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn of an episode: what was seen, and what the response to it brought."""

    observation: Hashable
    """The state that the response was given in, before it. Steps of a task with equal ones are
    compared with each other; whatever tells states apart will do."""
    reward: float
    """What the environment gave for the response."""
    num_tokens: int
    """Response tokens, the end-of-sequence token included."""
    valid: bool = True
    """Whether the response was an action that the environment knows."""


def check_episodes(output: Mapping[str, Any], num_episodes: int) -> list[list[int]]:
    """Refuse episodes without usable steps; return each one's mask, 1 on response tokens."""
    found = sorted(output) if isinstance(output, dict) else type(output).__name__
    for name in ("completion_ids", "steps"):
        if not isinstance(output, dict) or not isinstance(output.get(name), list):
            raise EpisodeError(
                f"rollout_func returned {found} and no list {name!r}: GiGPO needs, for each "
                "completion, a list of layerrl.trainer.Step in 'steps'. TextRollout makes such a "
                "function of an environment."
            )
    completions = output["completion_ids"]
    masks = output.get("env_mask")
    masks = [[1] * len(ids) for ids in completions] if masks is None else [[*m] for m in masks]
    of = {"steps": output["steps"], "completion_ids": completions, "env_mask": masks}
    for name, rows in of.items():
        if len(rows) != num_episodes:
            raise EpisodeError(
                f"rollout_func returned {name} of {len(rows)} episodes, expected {num_episodes}, "
                "one for each prompt it was given (num_generations of them are the same)"
            )
    for row, (steps, ids, mask) in enumerate(zip(output["steps"], completions, masks, strict=True)):
        _check(row, steps, len(ids), mask)
    return masks


def _check(row: int, steps: Sequence[Step], num_ids: int, mask: Sequence[int]) -> None:
    if not steps:
        raise EpisodeError(f"episode {row} has no steps, expected at least one")
    if not num_ids:
        raise EpisodeError(f"the completion of episode {row} has no tokens, expected at least one")
    if len(mask) != num_ids or not {*mask} <= {0, 1}:
        raise EpisodeError(
            f"env_mask of episode {row} has {len(mask)} values, {sorted({*mask})} among them, for "
            f"{num_ids} completion tokens: expected 1 for each of a response and 0 for others"
        )
    for turn, step in enumerate(steps):
        if not isinstance(step, Step):
            raise EpisodeError(
                f"step {turn} of episode {row} is a {type(step).__name__}, expected a "
                "layerrl.trainer.Step"
            )
        _check_step(step, f"step {turn} of episode {row}")
    num_tokens = sum(step.num_tokens for step in steps)
    if num_tokens != sum(mask):
        raise EpisodeError(
            f"the {len(steps)} steps of episode {row} have {num_tokens} response tokens, its "
            f"completion has {sum(mask)} where env_mask is 1"
        )


def _check_step(step: Step, where: str) -> None:
    if not is_finite(step.reward):
        raise EpisodeError(f"the reward of {where} is {step.reward!r}, expected a finite number")
    if whole_number(step.num_tokens, least=0) is None:
        raise EpisodeError(
            f"num_tokens of {where} is {step.num_tokens!r}, expected an int from 0 up"
        )
    observation = step.observation
    if not _is_comparable(observation):
        raise EpisodeError(
            f"the observation of {where} is a {type(observation).__name__} that cannot be compared "
            f"with others by value ({observation!r:.80}), expected text, a number or a tuple of "
            "those"
        )


def _is_comparable(value: Any) -> bool:
    if isinstance(value, tuple):  # which takes an item that is the same object for an equal one
        return all(map(_is_comparable, value))
    if isinstance(value, torch.Tensor):  # whose hash is that of the object
        return False
    by_value = value is None or type(value).__eq__ is not object.__eq__
    try:
        hash(value)
        return by_value and bool(value == value)  # NaN is not
    except (TypeError, ValueError):
        return False
