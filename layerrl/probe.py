"""The one door to every way of scoring layers."""

from __future__ import annotations

import math
from functools import partial, wraps
from inspect import iscoroutinefunction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from layerrl.errors import ProbeError
from layerrl.selection import select_layers
from layerrl.sweep import Sweep, digest, settings_of
from layerrl.sweep.executors import EXECUTORS
from layerrl.sweep.harness import Harness
from layerrl.trainer import LayerMaskedGRPOTrainer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from datasets import Dataset

    from layerrl.report import ContributionReport


def contribution_probe(
    model: nn.Module,
    *,
    reward_funcs: Any,  # noqa: ANN401 - what the trainer takes
    train_dataset: Dataset,
    eval_dataset: Dataset,
    processing_class: Any = None,  # noqa: ANN401
    args: Any,  # noqa: ANN401
    full_args: Any = None,  # noqa: ANN401
    method: str = "train",
    layers: int | Iterable[int] | slice | str = "all",
    modules: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    greedy: bool = True,
    halving: bool = False,
    output_dir: str | os.PathLike[str],
    trainer_class: type = LayerMaskedGRPOTrainer,
    executor: str = "serial",
    resources: Mapping[str, float] | None = None,
) -> ContributionReport:
    """Measure each layer's contribution C(k): its share of the full-parameter gain.

    One isolated run per layer and seed from the same base, on the same data in the same order, one
    full-parameter run per seed, and one evaluation of the base (arXiv:2607.01232, eq. 4). Finished
    runs are kept in `output_dir`: the same call continues after a kill, and more layers or seeds
    add to what is there. `report.json` in it is up to date after each run, for
    `ContributionReport.from_json`.

    Args:
        model: The base; as it was found when this returns or raises.
        reward_funcs: As the trainer takes them; the evaluation uses them too.
        train_dataset: Prompts to train on.
        eval_dataset: Other prompts, to score every run on.
        processing_class: As the trainer takes it.
        args: The trainer's arguments for every run. With `eval_strategy="steps"`, scores along the
            way are kept every `eval_steps`. `seed` and folders are set for each run.
        full_args: Other arguments for the full-parameter run, whose best learning rate is smaller
            than a single layer's. None: `args`.
        method: `"train"`.
        layers: Layers to measure, as `select_layers` takes them.
        modules: Globs inside the block: measure only this part of each layer.
        seeds: Seeds of the runs.
        greedy: Evaluate greedily, one completion a prompt, instead of sampling as in training.
        halving: After an eighth, a quarter and a half of `args.max_steps`, drop the layers that are
            worse than the last one of the better half, where the 95 % interval of the difference
            is below zero. The others go on from where they were, as if nothing had happened.
            Dropped layers have no contribution. Being behind early is no proof of being behind at
            the end.
        output_dir: Folder of the journal, the report and the checkpoints of unfinished runs. With
            Ray on several machines, one that they share.
        trainer_class: A masked trainer class, or a factory with its arguments.
        executor: `"serial"`, or `"ray"` for a Ray cluster: the one that `ray.init` connected to,
            or else this machine. The results are the same.
        resources: What one run takes of a Ray cluster, as `num_cpus`, `num_gpus` and `memory`.
            None: one GPU where the trainer would use one, otherwise one CPU.

    Returns:
        The report.

    Raises:
        ProbeError: If something cannot be measured as it was given.
        JournalError: If `output_dir` holds other runs, or cannot be written.
        SelectionError: If the layers do not fit the model.
    """
    if method != "train":
        raise ProbeError(f'method is {method!r}, expected "train"')
    if executor not in EXECUTORS:
        raise ProbeError(f"executor is {executor!r}, expected one of {', '.join(EXECUTORS)}")
    if halving and args.max_steps <= 0:
        raise ProbeError(
            f"halving needs to know how long a run is: max_steps is {args.max_steps}, expected a "
            "number above 0"
        )
    chosen = select_layers(model, layers, modules=modules)
    seeds = tuple(seeds)
    if not seeds or len({*seeds}) != len(seeds) or not all(type(seed) is int for seed in seeds):
        raise ProbeError(f"seeds is {seeds!r}, expected different ints, at least one")
    _check_prompts(train_dataset, eval_dataset)
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    full_args = args if full_args is None else full_args
    folder = Path(output_dir)
    settings = {
        "args": settings_of(args),
        "full_args": settings_of(full_args),
        "modules": None if modules is None else list(modules),
        "greedy": greedy,
        "train_dataset": digest(train_dataset),
        "eval_dataset": digest(eval_dataset),
        "rewards": [_name(function) for function in functions],
        "trainer": _name(trainer_class),
    }
    harness = Harness(
        model,
        partial(
            trainer_class,
            reward_funcs=[_checked(function) for function in functions],
            train_dataset=train_dataset,
            processing_class=processing_class,
        ),
        args=args,
        full_args=full_args,
        eval_dataset=eval_dataset,
        greedy=greedy,
        modules=modules,
        # Checkpoints of other settings may lie where a journal cannot see them: on other machines.
        folder=folder / "runs" / digest([settings]).split()[-1],
    )
    sweep = Sweep(
        harness,
        num_layers=chosen.num_layers,
        layers=chosen.layers,
        seeds=seeds,
        args=args,
        settings={"base": harness.base, **settings},
        halving=halving,
        folder=folder,
    )
    one = {"num_gpus": 1} if args.device.type == "cuda" else {"num_cpus": 1}
    return sweep.run(executor, one if resources is None else resources)


def _checked(function: Any) -> Any:  # noqa: ANN401
    """A reward function whose faults name it and a prompt. Models and coroutines stay as given."""
    waits = iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)
    if waits or not callable(function) or isinstance(function, nn.Module):
        return function
    name, call = _name(function), cast("Callable[..., Any]", function)

    @wraps(call)
    def checked(*, prompts: list[Any], **others: Any) -> list[Any]:
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

    checked.__name__ = name
    return checked


def _name(function: Any) -> str:  # noqa: ANN401
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, str):
        return function
    return getattr(function, "__name__", type(function).__name__)


def _check_prompts(train_dataset: Dataset, eval_dataset: Dataset) -> None:
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        if "prompt" not in (dataset.column_names or ()):
            raise ProbeError(f'{name} has the columns {dataset.column_names}, expected a "prompt"')
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
