"""The gradient's word on each layer, before any training."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, set_seed

from layerrl.errors import ProbeError
from layerrl.masking import as_found, parameters_by_layer
from layerrl.proxies import held_out_gains
from layerrl.report import ContributionReport, Cost, Score
from layerrl.trainer.arguments import only_training
from layerrl.trainer.rollouts import Rollouts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from layerrl.selection import LayerSelection

_FEWEST = 8
_UNSCORED = 1 / 4
"""Share of the prompts that come first and are not scored: the steps before them know too few."""


def gradient_report(
    models: Sequence[nn.Module],
    make_trainer: Callable[..., Any],
    selection: LayerSelection,
    *,
    args: Any,  # noqa: ANN401
    num_prompts: int,
    seed: int,
    settings: dict[str, Any],
) -> ContributionReport:
    """Score layers by what a step in each alone would gain on prompts that had no part in it.

    Args:
        models: The base, and models that reward. As they were afterwards.
        make_trainer: Makes a masked trainer from `model`, `args` and `selection`.
        selection: Layers to score.
        args: The trainer's arguments.
        num_prompts: Prompts to generate for.
        seed: Of the order of the prompts, and of their completions.
        settings: What to keep in the report.

    Returns:
        The report. A score of 1 is that of the average layer.

    Raises:
        ProbeError: If there is nothing to score.
    """
    if isinstance(num_prompts, bool) or not isinstance(num_prompts, int) or num_prompts < _FEWEST:
        raise ProbeError(
            f"budget is {num_prompts!r} prompts; method='gradient' needs at least {_FEWEST}, as it "
            "compares the gradients of different prompts, and 64 or more to tell layers apart"
        )
    started = time.perf_counter()
    model = models[0]
    with as_found(*models):
        for parameter in model.parameters():
            parameter.grad = None
        set_seed(seed)
        trainer = make_trainer(model=model, args=_of_one_pass(args, seed), selection=selection)
        trainer.remove_callback(PrinterCallback)
        _check_trainer(trainer)
        rollouts = Rollouts(trainer, num_prompts)
        gains_PL = held_out_gains(
            parameters_by_layer(model, selection),
            (
                [partial(trainer.compute_loss, trainer.model, part) for part in parts]
                for parts in rollouts
            ),
            epsilon=args.adam_epsilon,
        )
    _check_signal(rollouts)
    scored_PL = gains_PL[int(len(gains_PL) * _UNSCORED) :]
    average = scored_PL.mean().item()
    if average <= 0:
        raise ProbeError(
            f"over {len(scored_PL)} prompts, a step that other prompts ask for gains nothing in "
            "the average layer: their gradients have nothing in common that could be told from "
            "noise. Raise the budget or num_generations."
        )
    rows = (scored_PL.T / average).tolist()
    scores = dict(zip(selection.layers, rows, strict=True))
    size = trainer.num_generations
    units = len(rollouts.with_signal) * size, sum(rollouts.with_signal) * size
    return ContributionReport(
        method="gradient",
        layers=tuple(
            Score(scores=(tuple(scores[layer]),)) if layer in scores else Score(status="missing")
            for layer in range(selection.num_layers)
        ),
        settings={
            **settings,
            "budget": num_prompts,
            "seed": seed,
            "prompts_with_signal": sum(rollouts.with_signal),
            "reward_noise": rollouts.reward_noise,
        },
        cost=Cost(
            seconds=time.perf_counter() - started,
            tokens=rollouts.num_tokens,
            forwards=units[1],
            backwards=units[1],
            fraction=(units[0] + units[1] * _units(args)) / _run_units(args, trainer),
        ),
    )


def _of_one_pass(args: Any, seed: int) -> Any:  # noqa: ANN401
    """Arguments under which a batch is passed over once: a gradient at the base needs no more."""
    args = only_training(args)
    args.beta, args.num_iterations = 0.0, 1  # the base is the reference and the old policy
    args.gradient_accumulation_steps = args.steps_per_generation
    args.seed = seed
    return args


def _units(args: Any) -> int:  # noqa: ANN401
    """Forward passes that a training pass over a completion is worth."""
    return 4 if args.gradient_checkpointing else 3


def _run_units(args: Any, trainer: Any) -> float:  # noqa: ANN401
    """The same for the whole run: generating counts as a forward pass, and so does a reference."""
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = args.max_steps * per_step
    if args.max_steps <= 0:
        passes = args.num_train_epochs * args.num_iterations
        rows = passes * trainer.num_generations * len(trainer.train_dataset)
    reference = 1 if getattr(args, "beta", 0) else 0
    return rows / args.num_iterations * (1 + reference) + rows * _units(args)


def _check_trainer(trainer: Any) -> None:  # noqa: ANN401
    if not hasattr(trainer, "_generate_and_score_completions"):
        raise ProbeError(
            f"method='gradient' needs a trainer that generates and rewards, such as GRPO's; "
            f"{type(trainer).__name__} does not"
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ProbeError(
            "method='gradient' looks at whole gradients, and this run's model is sharded. Probe "
            "without FSDP or DeepSpeed; the report's selection works with them."
        )


def _check_signal(rollouts: Rollouts) -> None:
    found, tried = sum(rollouts.with_signal), len(rollouts.with_signal)
    trainer = rollouts.trainer
    what = (
        f"of {tried} prompts tried, {found} have completions that were rewarded differently "
        f"({', '.join(trainer.reward_func_names)}, {trainer.num_generations} completions each)"
    )
    if found < _FEWEST // 2:
        raise ProbeError(
            f"{what}: there is too little to learn from to score layers. Take prompts that the "
            "model sometimes gets right, a higher temperature, more num_generations or a larger "
            "budget."
        )
