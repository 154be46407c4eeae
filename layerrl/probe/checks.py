"""What can be wrong with rewards and prompts, said in a sentence."""

from __future__ import annotations

import math
from functools import partial, wraps
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from layerrl.errors import ProbeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset


def checked(function: Any) -> Any:  # noqa: ANN401
    """A reward function whose faults name it and a prompt. Models and coroutines stay as given."""
    waits = iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)
    if waits or not callable(function) or isinstance(function, nn.Module):
        return function
    name, call = name_of(function), cast("Callable[..., Any]", function)

    @wraps(call)
    def call_and_check(*, prompts: list[Any], **others: Any) -> list[Any]:
        try:
            rewards = list(call(prompts=prompts, **others))
        except Exception as error:
            error.add_note(
                f"raised by the reward {name} on {len(prompts)} completions, the first of them "
                f"for the prompt {prompts[0]!r:.200}"
            )
            raise
        if len(rewards) != len(prompts):
            raise ProbeError(
                f"the reward {name} returned {len(rewards)} rewards for {len(prompts)} "
                f"completions, expected one for each; the first prompt is {prompts[0]!r:.200}"
            )
        for prompt, reward in zip(prompts, rewards, strict=True):
            if reward is None:  # TRL: this function does not apply to this prompt
                continue
            try:
                finite = not isinstance(reward, str) and math.isfinite(reward)
            except (TypeError, ValueError):
                finite = False
            if not finite:
                raise ProbeError(
                    f"the reward {name} returned {reward!r:.100} for a completion of the prompt "
                    f"{prompt!r:.200}, expected a finite number, or None where it does not apply"
                )
        return rewards

    call_and_check.__name__ = name
    return call_and_check


def name_of(function: Any) -> str:  # noqa: ANN401
    """What a function, a class, or the id of a reward model is called."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, str):
        return function
    return getattr(function, "__name__", type(function).__name__)


def check_prompts(name: str, dataset: Dataset) -> Dataset:
    """A data set that has prompts."""
    if "prompt" not in (dataset.column_names or ()):
        raise ProbeError(f'{name} has the columns {dataset.column_names}, expected a "prompt"')
    return dataset


def check_held_out(eval_dataset: Dataset, train_dataset: Dataset) -> None:
    """Refuse an evaluation that would say nothing, or nothing new."""
    check_prompts("eval_dataset", eval_dataset)
    evaluated = [str(prompt) for prompt in eval_dataset["prompt"]]
    if len({*evaluated}) < 2:
        raise ProbeError(
            f"eval_dataset has {len({*evaluated})} different prompts, expected at least 2: there "
            "is nothing to resample, so nothing could be said about how sure a score is"
        )
    shared = {*evaluated} & {str(prompt) for prompt in train_dataset["prompt"]}
    if shared:
        raise ProbeError(
            f"{len(shared)} of {len({*evaluated})} evaluation prompts are trained on, "
            f"{sorted(shared)[0]!r:.100} among them. Hold them out of train_dataset."
        )
