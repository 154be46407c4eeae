"""`method="gradient"`: what a step in each layer alone would gain on other prompts.

Legend: P prompts, L layers.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, set_seed

from layerrl.checks import shown, whole_number
from layerrl.errors import ProbeError
from layerrl.report import ContributionReport, Cost, Score
from layerrl.scores.evaluation import all_rewarded, random_state_kept
from layerrl.scores.gains import held_out_gains
from layerrl.scores.method import ROLLOUTS, Method
from layerrl.scores.restoring import as_found
from layerrl.scores.rollouts import Rollouts
from layerrl.scores.runs import Runs, made, only_training
from layerrl.trained import TrainedLayers

if TYPE_CHECKING:
    from torch import Tensor

    from layerrl.scores.method import Request
    from layerrl.selection import LayerSelection

FEWEST_PROMPTS = 8
_UNSCORED = 1 / 4
"""Share of the prompts that come first and are not scored: the steps before them know too few."""


def gradient_report(
    rollouts: Rollouts,
    selection: LayerSelection,
    args: Any,
    settings: dict[str, Any],
    started: float,
) -> ContributionReport:
    """Score layers by what a step in each alone would gain on prompts that had no part in it.

    Args:
        rollouts: Prompts, to be answered by the trainer's model as it is. The gradients of its
            parameters must be None, and are None afterwards.
        selection: Layers to score; what they hold of the model requires gradients.
        args: Arguments of the run that the scores are for.
        settings: What to keep in the report.
        started: When the work for it began, as `time.perf_counter` has it.

    Returns:
        The report. A score of 1 is that of the average layer.

    Raises:
        ProbeError: If there is nothing to score.
    """
    trainer = rollouts.trainer
    check_trainer(trainer, "method='gradient'")
    gains_PL = held_out_gains(
        TrainedLayers(trainer.model, selection).by_layer,
        (
            [partial(trainer.compute_loss, trainer.model, part) for part in parts]
            for parts in rollouts
        ),
        epsilon=args.adam_epsilon,
    )
    check_signal(rollouts)
    rows = _against_average(gains_PL[int(len(gains_PL) * _UNSCORED) :])
    size = trainer.num_generations
    units = len(rollouts.with_signal) * size, sum(rollouts.with_signal) * size
    scores = dict(zip(selection.layers, rows, strict=True))
    return ContributionReport(
        method="gradient",
        layers=tuple(
            Score(scores=(tuple(scores[layer]),)) if layer in scores else Score(status="missing")
            for layer in range(selection.num_layers)
        ),
        settings={
            **settings,
            "budget": len(rollouts.with_signal),
            "prompts_with_signal": sum(rollouts.with_signal),
            "reward_noise": rollouts.reward_noise,
        },
        cost=Cost(
            seconds=time.perf_counter() - started,
            tokens=rollouts.num_tokens,
            forwards=units[1],
            backwards=units[1],
            fraction=(units[0] + units[1] * units_of_a_pass(args)) / run_units(args, trainer),
        ),
    )


def _against_average(gains_PL: Tensor) -> list[list[float]]:
    """For each layer its gain on each prompt, in units of the average layer's gain."""
    average = gains_PL.mean().item()
    if average <= 0:
        raise ProbeError(
            f"over {len(gains_PL)} prompts, a step that other prompts ask for gains nothing in "
            "the average layer: their gradients have nothing in common that could be told from "
            "noise. Raise the budget or num_generations."
        )
    return (gains_PL.T / average).tolist()


def units_of_a_pass(args: Any) -> int:
    """Forward passes that a training pass over a completion is worth.

    Args:
        args: The trainer's.

    Returns:
        One for the forward and two for the backward; one more where activations are recomputed.
    """
    return 4 if args.gradient_checkpointing else 3


def run_units(args: Any, trainer: Any) -> float:
    """Forward passes that a whole run is worth, a generated completion and a reference one each.

    Args:
        args: The run's arguments.
        trainer: A trainer of such a run.

    Returns:
        Passes of one completion.
    """
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = args.max_steps * per_step
    if args.max_steps <= 0:
        passes = args.num_train_epochs * args.num_iterations
        rows = passes * trainer.num_generations * len(trainer.train_dataset)
    reference = 1 if getattr(args, "beta", 0) else 0
    return rows / args.num_iterations * (1 + reference) + rows * units_of_a_pass(args)


def check_trainer(trainer: Any, asked: str) -> None:
    """Refuse a trainer whose batches say nothing of its layers, or not here.

    Args:
        trainer: A masked trainer.
        asked: What was asked for, to name it.

    Raises:
        ProbeError: If it generates nothing, has several processes or a sharded model, or trains in
            float16: the probe's backward is not scaled, and small gradients would become zero.
    """
    if trainer.args.fp16:
        raise ProbeError(
            f"{asked} with fp16=True: its backward has no gradient scaler, and up to 15 % of the "
            "gradients would be rounded to zero. Probe with bf16=True, or in float32 (bf16=False, "
            "fp16=False), with contribution_probe; the report's selection trains in float16."
        )
    if not hasattr(trainer, "_calculate_rewards"):
        raise ProbeError(
            f"{asked} needs a trainer that generates and rewards, such as GRPO's; "
            f"{type(trainer).__name__} does not"
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ProbeError(
            f"{asked} looks at whole gradients, and this run's model is sharded. Probe "
            "without FSDP or DeepSpeed; the report's selection works with them."
        )
    if trainer.accelerator.num_processes > 1:
        raise ProbeError(
            f"{asked} in {trainer.accelerator.num_processes} processes: the completions of a "
            "prompt may lie on several. Probe in one process; the report's selection works in any "
            "number."
        )


def check_signal(rollouts: Rollouts) -> None:
    """Refuse answers that nothing can be learned from.

    Args:
        rollouts: All of them.

    Raises:
        ProbeError: If too few prompts have completions that were rewarded differently.
    """
    found, tried = sum(rollouts.with_signal), len(rollouts.with_signal)
    trainer = rollouts.trainer
    what = (
        f"of {tried} prompts tried, {found} have completions that were rewarded differently "
        f"({', '.join(trainer.reward_func_names)}, {trainer.num_generations} completions each)"
    )
    if found < FEWEST_PROMPTS // 2:
        raise ProbeError(
            f"{what}: there is too little to learn from to score layers. Take prompts that the "
            "model sometimes gets right, a higher temperature, more num_generations or a larger "
            "budget."
        )


def _score(selection: LayerSelection, request: Request) -> ContributionReport:
    runs = Runs.of(selection, request)
    seed, num_prompts = runs.seeds[0], whole_number(request.budget, least=FEWEST_PROMPTS)
    if num_prompts is None:
        raise ProbeError(
            f"budget is {shown(request.budget)} prompts; method='gradient' needs at least "
            f"{FEWEST_PROMPTS}, as it compares the gradients of different prompts, and 64 or more "
            "to tell layers apart"
        )
    started, model = time.perf_counter(), request.model
    with random_state_kept(), as_found(*runs.models):
        for parameter in model.parameters():
            parameter.grad = None
        set_seed(seed)
        args = _of_one_pass(request.args, seed)
        trainer = made(runs.make_trainer, model=model, args=args, selection=selection)
        trainer.remove_callback(PrinterCallback)
        trainer.masked_run.initial = {}  # what a training's changes are measured against
        rollouts = Rollouts(trainer, num_prompts)
        settings = {**runs.settings, "seed": seed}
        with all_rewarded(trainer):
            return gradient_report(rollouts, selection, request.args, settings, started)


def _of_one_pass(args: Any, seed: int) -> Any:
    """Arguments under which a batch is passed over once: a gradient at the base needs no more."""
    args = only_training(args)
    args.beta, args.num_iterations = 0.0, 1  # the base is the reference and the old policy
    args.gradient_accumulation_steps = args.steps_per_generation
    args.seed = seed
    return args


METHOD = Method(score=_score, needs=ROLLOUTS)
