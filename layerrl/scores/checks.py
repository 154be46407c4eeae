"""Checks of what a probe is given: rewards, prompts, seeds, the arguments of runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, cast

from datasets import Dataset
from torch import nn

from layerrl.checks import check_path, is_finite, shown, whole_number
from layerrl.errors import ProbeError
from layerrl.scores.canonical import stored_rows
from layerrl.scores.identity import name_of

_NOT_IN_ORDER = str, bytes, Mapping, set, frozenset


def checked(function: Any) -> Any:
    """A reward function whose faults name it and a prompt. Models and coroutines stay as given."""
    waits = iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)
    if waits or not callable(function) or isinstance(function, nn.Module):
        return function
    name, call = name_of(function), cast("Callable[..., Any]", function)

    @wraps(call)
    def call_and_check(*, prompts: list[Any], **others: Any) -> list[Any]:
        try:
            returned = call(prompts=prompts, **others)
        except Exception as error:
            error.add_note(
                f"raised by the reward {name} on {len(prompts)} completions, the first of them "
                f"for the prompt {prompts[0]!r:.200}"
            )
            raise
        if not isinstance(returned, Iterable) or isinstance(returned, _NOT_IN_ORDER):
            raise ProbeError(
                f"the reward {name} returned {shown(returned)}, expected a list with a finite "
                "number for each completion, or None where it does not apply"
            )
        rewards = list(returned)
        if len(rewards) != len(prompts):
            raise ProbeError(
                f"the reward {name} returned {len(rewards)} rewards for {len(prompts)} "
                f"completions, expected one for each; the first prompt is {prompts[0]!r:.200}"
            )
        for prompt, reward in zip(prompts, rewards, strict=True):
            # None, to TRL: this function does not apply to this prompt.
            if reward is not None and not is_finite(reward):
                raise ProbeError(
                    f"the reward {name} returned {shown(reward)} for a completion of the prompt "
                    f"{prompt!r:.200}, expected a finite number, or None where it does not apply"
                )
        return rewards

    call_and_check.__name__ = name
    return call_and_check


def check_prompts(name: str, dataset: Any) -> Dataset:
    """A data set that has prompts and a length, of rows that are stored as they are read."""
    if not isinstance(dataset, Dataset):
        raise ProbeError(
            f"{name} is a {type(dataset).__name__}, expected a datasets.Dataset, whose rows can be "
            "counted and told apart: Dataset.from_list(list(rows)) makes one"
        )
    form = dataset.format
    if form["type"] == "custom":
        raise ProbeError(
            f"{name} has a transform (with_transform or set_transform), which makes other rows "
            "than are stored, so that they could not be told apart: give what map() makes with it"
        )
    if "prompt" not in form["columns"]:
        raise ProbeError(f'{name} has the columns {form["columns"]}, expected a "prompt"')
    if len(dataset) == 0:
        raise ProbeError(f"{name} has no rows, expected prompts")
    messages = not isinstance(dataset.with_format(None)[0]["prompt"], str)
    # A row would be a table, or its messages an array.
    if form["type"] in ("arrow", "pandas", "polars") or (form["type"] == "numpy" and messages):
        return dataset.with_format(None, columns=form["columns"])
    return dataset


def check_held_out(eval_dataset: Any, train_dataset: Dataset) -> Dataset:
    """An evaluation set that says something, and something new."""
    eval_dataset = check_prompts("eval_dataset", eval_dataset)
    evaluated, trained = _prompts(eval_dataset, train_dataset)
    num_different = len({*evaluated})
    if num_different < 2:
        raise ProbeError(
            f"eval_dataset has {num_different} different prompts, expected at least 2: there "
            "is nothing to resample, so nothing could be said about how sure a score is"
        )
    if num_different < len(evaluated):
        raise ProbeError(
            f"eval_dataset has {len(evaluated)} rows but {num_different} different prompts. "
            "Intervals count every row as another prompt: keep one row of each, or they would be "
            "too narrow."
        )
    shared = {*evaluated} & {*trained}
    if shared:
        first = json.loads(min(shared))["prompt"]
        raise ProbeError(
            f"{len(shared)} of {num_different} evaluation prompts are trained on, "
            f"{first!r:.100} among them. Hold them out of train_dataset."
        )
    return eval_dataset


def _prompts(*datasets: Dataset) -> list[list[str]]:
    """Each row's prompt as a text: with its images, and with all of it where prompts are alike."""
    shared = set.intersection(*({*dataset.column_names} for dataset in datasets))
    texts = {str(prompt) for prompt in datasets[0].with_format(None)["prompt"]}
    columns = sorted(shared if len(texts) == 1 else shared & {"prompt", "image", "images"})
    found = []
    for dataset in datasets:
        rows = stored_rows(dataset.select_columns(columns))
        found.append([json.dumps(row, sort_keys=True, default=str) for row in rows])
    return found


_EVALUATED_WITH = (
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("num_generations", "num_generations_eval", "generation_kwargs", "reward_weights"),
    *("chat_template_kwargs", "cast_lm_head_to_fp32", "max_tool_calling_iterations"),
)
"""Arguments that say how a run is evaluated, and not only how it is trained."""


def check_rewards(reward_funcs: Any) -> list[Any]:
    """One reward or several, as a list: functions, models, or ids of models."""
    functions = [*reward_funcs] if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    for each in functions:
        if isinstance(each, str):
            check_path("reward_funcs", each, ProbeError)
        elif not callable(each) or isinstance(each, type):
            raise ProbeError(
                f"reward_funcs has {shown(each)}, expected a function, a model or the id of one"
            )
    if not functions:
        raise ProbeError("reward_funcs is empty, expected a function, a model or the id of one")
    return functions


def check_seeds(seeds: Any) -> list[int]:
    """Different seeds of all random number generators, in order, as Python's own ints."""
    numbers: list[int | None] = []
    if not isinstance(seeds, _NOT_IN_ORDER):
        with suppress(TypeError):  # one number, or none
            numbers = [whole_number(seed, least=0) for seed in seeds]
    found = [number for number in numbers if number is not None and number < 2**32]
    if not found or len({*found}) < len(numbers):
        raise ProbeError(
            f"seeds is {shown(seeds)}, expected different ints from 0 to {2**32 - 1}, at least one"
        )
    return found


def check_length(name: str, args: Any) -> None:
    """Refuse arguments of a run without steps; `name` is what the caller names them."""
    steps, epochs = args.max_steps, args.num_train_epochs
    if steps == 0 or steps >= 2**63 or (steps < 0 and epochs <= 0):
        raise ProbeError(
            f"{name} has max_steps={shown(steps)} and num_train_epochs={epochs}, expected "
            "max_steps above 0 (and below 2**63), or -1 and num_train_epochs above 0"
        )


def check_arguments(args: Any, full_args: Any, *, greedy: bool, halving: bool) -> None:
    """Refuse arguments under which runs could not be evaluated alike, or not at all."""
    check_length("full_args", full_args)
    if args.world_size > 1:
        raise ProbeError(
            f"{args.world_size} processes: methods that train run in one. Start one, or spread the "
            'runs over machines with executor="ray"'
        )
    if halving and args.max_steps <= 0:
        raise ProbeError(
            f"halving needs to know how long a run is: max_steps is {args.max_steps}, expected a "
            "number above 0"
        )
    pairs = {n: (getattr(args, n, None), getattr(full_args, n, None)) for n in _EVALUATED_WITH}
    differing = [f"{n}: {a!r} and {b!r}" for n, (a, b) in pairs.items() if a != b]
    if differing:
        raise ProbeError(
            f"args and full_args differ in {'; '.join(differing)}. Runs are evaluated with these, "
            "so their scores could not be compared: give both the same."
        )
    size = getattr(args, "num_generations_eval", None) or getattr(args, "num_generations", 1)
    if not greedy and args.per_device_eval_batch_size % size:
        raise ProbeError(
            f"greedy=False evaluates {size} completions of each prompt: per_device_eval_batch_size "
            f"is {args.per_device_eval_batch_size}, expected a multiple of {size}"
        )
