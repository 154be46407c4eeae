"""Scores from the gradients of a few answers, on a model that is given back as it was."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, set_seed

from layerrl.errors import ProbeError
from layerrl.sweep.restoring import as_found
from layerrl.trainer.arguments import only_training
from layerrl.trainer.probing import FEWEST_PROMPTS, gradient_report
from layerrl.trainer.rollouts import Rollouts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from layerrl.report import ContributionReport
    from layerrl.selection import LayerSelection


def gradient_probe(
    models: Sequence[nn.Module],
    make_trainer: Callable[..., Any],
    selection: LayerSelection,
    *,
    args: Any,
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
    few = isinstance(num_prompts, bool) or not isinstance(num_prompts, int)
    if few or num_prompts < FEWEST_PROMPTS:
        raise ProbeError(
            f"budget is {num_prompts!r} prompts; method='gradient' needs at least "
            f"{FEWEST_PROMPTS}, as it compares the gradients of different prompts, and 64 or more "
            "to tell layers apart"
        )
    started, model = time.perf_counter(), models[0]
    with as_found(*models):
        for parameter in model.parameters():
            parameter.grad = None
        set_seed(seed)
        trainer = make_trainer(model=model, args=_of_one_pass(args, seed), selection=selection)
        trainer.remove_callback(PrinterCallback)
        trainer.masked_run.initial = {}  # what a training's changes are measured against
        rollouts = Rollouts(trainer, num_prompts)
        return gradient_report(rollouts, selection, args, {**settings, "seed": seed}, started)


def _of_one_pass(args: Any, seed: int) -> Any:
    """Arguments under which a batch is passed over once: a gradient at the base needs no more."""
    args = only_training(args)
    args.beta, args.num_iterations = 0.0, 1  # the base is the reference and the old policy
    args.gradient_accumulation_steps = args.steps_per_generation
    args.seed = seed
    return args
