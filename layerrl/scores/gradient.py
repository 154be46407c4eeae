"""`method="gradient"`: what a step in each layer alone would gain on other prompts.

Legend: P prompts, L layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PrinterCallback, set_seed

from layerrl.checks import shown, whole_number
from layerrl.errors import ProbeError
from layerrl.report import ContributionReport, Cost, Score
from layerrl.scores.evaluation import all_rewarded, random_state_kept
from layerrl.scores.gains import held_out_gains
from layerrl.scores.method import ROLLOUTS, Method, Request
from layerrl.scores.processes import add_up, loss_alone, refuse_sharded, whole_model
from layerrl.scores.restoring import as_found
from layerrl.scores.rollouts import Rollouts
from layerrl.scores.runs import Runs, made, only_training
from layerrl.selection import LayerSelection
from layerrl.trained import TrainedLayers
from layerrl.warning import warn

FEWEST_PROMPTS = 8
_UNSCORED = 1 / 4
"""Share of the prompts that come first and are not scored: the steps before them know too few."""
_TOLD_FROM_NOISE = 2.0
"""Standard errors that the average layer's gain lies above zero where the order of layers says
something: a probe at 0.4 has printed the order of noise."""


_MOST_TIMES = 100.0
"""Times as many standard errors as there are: a number of prompts for more of them, which grows
with its square, is no advice."""


class TooLittleSignalError(ProbeError):
    """Prompts that say too little of the layers; more of them may say enough."""


class Gains(NamedTuple):
    """What a step in each layer alone gains on prompts without part in it."""

    gains_PL: Tensor
    """By prompt that is scored and layer, float64. In several processes, of all their prompts."""
    more_passes: float = 0.0
    """Forward passes of a completion beside those of its gradient, a mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How a method computes what a step in each layer alone gains on prompts without part in it."""

    method: str
    of_prompts: Callable[[Rollouts, LayerSelection, Any], Gains]
    """Takes the rollouts, the layers and the arguments of the run."""
    error_times: float = 1.0
    """Standard error of a mean gain, over that of as many independent prompts."""
    hint: str = ""
    """Further advice in the error that is raised if the average layer gains nothing."""


def _first_order(rollouts: Rollouts, selection: LayerSelection, args: Any) -> Gains:
    """The held-out gains of the prompts whose step knows enough of the others."""
    trainer = rollouts.trainer
    gains_PL = held_out_gains(
        TrainedLayers(trainer.model, selection).by_layer,
        (
            [partial(loss_alone, trainer, micro_batch) for micro_batch in prompt]
            for prompt in rollouts
        ),
        epsilon=args.adam_epsilon,
        add_up=add_up if trainer.accelerator.num_processes > 1 else None,
    )
    return Gains(gains_PL[int(len(gains_PL) * _UNSCORED) :])


FIRST_ORDER = Gain(method="gradient", of_prompts=_first_order)


def gradient_report(
    rollouts: Rollouts,
    selection: LayerSelection,
    args: Any,
    settings: dict[str, Any],
    started: float,
    gain: Gain = FIRST_ORDER,
) -> ContributionReport:
    """Score layers by what a step in each alone would gain on prompts that had no part in it.

    Args:
        rollouts: Prompts, to be answered by the trainer's model as it is. The gradients of its
            parameters must be None, and are None afterwards.
        selection: Layers to score; what they hold of the model requires gradients.
        args: Arguments of the run that the scores are for.
        settings: What to keep in the report.
        started: `time.perf_counter()` when the work for it began.
        gain: How to compute it.

    Returns:
        The report. A score of 1 is that of the average layer.

    Raises:
        ProbeError: If the trainer cannot be probed, or a gradient is not finite; as a
            `TooLittleSignalError` if there is nothing to score.
    """
    trainer = rollouts.trainer
    check_trainer(trainer, f"method={gain.method!r}")
    with whole_model(trainer):
        gains_PL, more = gain.of_prompts(rollouts, selection, args)
    if trainer.accelerator.num_processes > 1:
        # Or the last bit of a sum could make them choose differently.
        [gains_PL] = broadcast_object_list([gains_PL])
    check_signal(rollouts)
    rows = _against_average(gains_PL, rollouts, gain)
    warn_of_noise(gains_PL, rollouts, gain.error_times)
    size = trainer.num_generations
    units = len(rollouts.with_signal) * size, sum(rollouts.with_signal) * size
    scores = dict(zip(selection.layers, rows, strict=True))
    return ContributionReport(
        method=gain.method,
        layers=tuple(
            Score(scores=(tuple(scores[layer]),)) if layer in scores else Score(status="missing")
            for layer in range(selection.num_layers)
        ),
        settings={**settings, **_measured(rollouts, gain)},
        cost=Cost(
            seconds=time.perf_counter() - started,
            tokens=rollouts.num_tokens,
            forwards=math.ceil(units[1] * (1 + more)),
            backwards=units[1],
            fraction=(units[0] + units[1] * (units_of_a_pass(args) + more))
            / run_units(args, trainer),
        ),
    )


def _measured(rollouts: Rollouts, gain: Gain) -> dict[str, Any]:
    """Settings for a report: numbers of prompts, noise of rewards, how far scores are widened."""
    times = {} if gain.error_times == 1 else {"error_times": gain.error_times}
    return {
        "budget": len(rollouts.with_signal),
        "prompts_with_signal": sum(rollouts.with_signal),
        "reward_noise": rollouts.reward_noise,
        **times,
    }


def _against_average(gains_PL: Tensor, rollouts: Rollouts, gain: Gain) -> list[list[float]]:
    """For each layer its gain on each prompt, in units of the average layer's gain."""
    average = gains_PL.mean()
    if average <= 0:
        raise TooLittleSignalError(
            f"{_tried(rollouts)}: on {len(gains_PL)} of them, a step that others ask for gains "
            "nothing in the average layer, so that their gradients cannot be told from noise. "
            f"{_advice(rollouts)}{gain.hint}"
        )
    return widened(gains_PL / average, gain.error_times).T.tolist()


def widened(gains_PL: Tensor, error_times: float) -> Tensor:
    """Gains whose intervals hold although their prompts depend on each other.

    A report's intervals take prompts for independent.

    Args:
        gains_PL: Gains by prompt and layer.
        error_times: Standard error of their mean, over that of as many independent prompts.

    Returns:
        Gains as many times as far from the layer's mean, which stays.
    """
    mean_L = gains_PL.mean(dim=0)
    return mean_L + error_times * (gains_PL - mean_L) if error_times != 1 else gains_PL


def warn_of_noise(gains_PL: Tensor, rollouts: Rollouts, error_times: float = 1.0) -> None:
    """Warn where the average layer's gain may be none, and say how many prompts would tell."""
    gains_P, tried = gains_PL.mean(dim=1), len(rollouts.with_signal)
    error = error_times * (gains_P.std() / len(gains_P) ** 0.5).item()
    found = gains_P.mean().item() / error if error else math.inf
    if found < _TOLD_FROM_NOISE:
        times = _TOLD_FROM_NOISE / found if found > 0 else math.inf
        advice = "No number of prompts that could be had would tell"
        if times <= _MOST_TIMES:
            advice = f"About {math.ceil(tried * times**2)} prompts would tell"
        warn(
            f"{_tried(rollouts)}: the average layer's gain is only {found:.1f} standard errors "
            f"above zero, so that the order of layers may be noise. {advice}; method='train' "
            "measures."
        )


def units_of_a_pass(args: Any) -> int:
    """Forward passes that a training pass is worth: 3, or 4 where activations are recomputed."""
    return 4 if args.gradient_checkpointing else 3


def run_units(args: Any, trainer: Any) -> float:
    """Forward passes that a whole run is worth; a generated completion and a reference are one."""
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = args.max_steps * per_step
    if args.max_steps <= 0:
        passes = args.num_train_epochs * args.num_iterations
        rows = passes * trainer.num_generations * len(trainer.train_dataset)
    reference = 1 if getattr(args, "beta", 0) else 0
    return rows / args.num_iterations * (1 + reference) + rows * units_of_a_pass(args)


def check_trainer(trainer: Any, asked: str) -> None:
    """Refuse a trainer whose batches say nothing of its layers, or not here.

    Raises:
        ProbeError: If it generates nothing, has no process with the whole model, or trains in
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
    refuse_sharded(trainer, asked)


def check_signal(rollouts: Rollouts) -> None:
    """Refuse prompts of which too few have completions that were rewarded differently."""
    trainer = rollouts.trainer
    if not rollouts.with_signal:
        size, completions = trainer.args.generation_batch_size, trainer.num_generations
        raise TooLittleSignalError(
            f"train_dataset has fewer prompts than a generation batch, which takes "
            f"{size // completions} (generation_batch_size={size}, {completions} completions "
            "each): nothing can be generated. Take more prompts, or a smaller batch."
        )
    if not rollouts.num_tokens:
        raise TooLittleSignalError(
            f"all {len(rollouts.with_signal) * trainer.num_generations} completions were cut off "
            f"at max_completion_length={trainer.max_completion_length} and "
            "mask_truncated_completions leaves them out: nothing is left to learn from. Allow "
            "longer completions."
        )
    if sum(rollouts.with_signal) < FEWEST_PROMPTS // 2:
        raise TooLittleSignalError(
            f"{_tried(rollouts)}: there is too little to learn from to score layers. "
            f"{_advice(rollouts)}"
        )


def _tried(rollouts: Rollouts) -> str:
    trainer, signals = rollouts.trainer, rollouts.with_signal
    return (
        f"of {len(signals)} prompts tried, {sum(signals)} have completions that were rewarded "
        f"differently ({', '.join(trainer.reward_func_names)}, {trainer.num_generations} "
        "completions each)"
    )


def _advice(rollouts: Rollouts) -> str:
    """The advice of errors. It names the budget only where there is one, not in a trainer."""
    budget = "" if rollouts.old else ", the budget"
    return (
        f"Raise num_generations, the temperature{budget}, or take prompts that the model "
        "sometimes gets right."
    )


def probed(
    selection: LayerSelection, request: Request, gain: Gain = FIRST_ORDER
) -> ContributionReport:
    """The report of a trainer's rollouts, made as the request says.

    Args:
        selection: Layers to score.
        request: The arguments of `contribution_probe`.
        gain: How to compute what a layer gains.

    Returns:
        The report.

    Raises:
        ProbeError: If the arguments make no trainer that can be probed.
    """
    runs = Runs.of(selection, request)
    seed, num_prompts = runs.seeds[0], whole_number(request.budget, least=FEWEST_PROMPTS)
    if num_prompts is None:
        raise ProbeError(
            f"budget is {shown(request.budget)} prompts; method={gain.method!r} needs at "
            f"least {FEWEST_PROMPTS}, as it compares the gradients of different prompts, and 256 "
            "or more to tell layers apart"
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
            return gradient_report(rollouts, selection, request.args, settings, started, gain)


def _of_one_pass(args: Any, seed: int) -> Any:
    """Arguments under which a batch is passed over once: a gradient at the base needs no more."""
    args = only_training(args)
    args.beta, args.num_iterations = 0.0, 1  # the base is the reference and the old policy
    args.gradient_accumulation_steps = args.steps_per_generation
    args.seed = seed
    return args


METHOD = Method(score=probed, needs=ROLLOUTS)
