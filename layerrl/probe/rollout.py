"""Scores from a few real steps of each layer on answers that all layers share."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, set_seed

from layerrl.errors import ProbeError
from layerrl.masking import as_found
from layerrl.report import Cost
from layerrl.selection import LayerSelection
from layerrl.trainer.arguments import only_training
from layerrl.trainer.probing import check_signal, check_trainer, report_of, run_units
from layerrl.trainer.rollouts import Rollouts, in_its_precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from layerrl.report import ContributionReport

NUM_STEPS = 16


def rollout_probe(
    models: Sequence[nn.Module],
    make_trainer: Callable[..., Any],
    selection: LayerSelection,
    *,
    args: Any,  # noqa: ANN401
    num_prompts: int,
    seed: int,
    settings: dict[str, Any],
) -> ContributionReport:
    r"""Train each layer on the base's answers to half of the prompts, and weigh those to the rest.

    A held-out prompt's gain is $\sum_i w_i A_i$ over its completions, with their advantages $A_i$
    and weights $w_i \propto \pi_k(y_i) / \pi(y_i)$ under the policy that training layer $k$ has
    made of the base: how much better it would have answered, as far as these answers tell.

    Args:
        models: The base, and models that reward. As they were afterwards.
        make_trainer: Makes a masked trainer from `model`, `args` and `selection`.
        selection: Layers to score.
        args: The trainer's arguments. Steps are taken with their learning rate, from the first on.
        num_prompts: Prompts to generate for, at least two generation batches of them.
        seed: Of the order of the prompts, and of their completions.
        settings: What to keep in the report.

    Returns:
        The report. Scores are gains in advantage, in standard deviations of a group's rewards.

    Raises:
        ProbeError: If there is nothing to score.
    """
    if not hasattr(args, "num_generations"):
        raise ProbeError(
            "method='rollout' needs a trainer that generates and rewards, such as GRPO's; args is "
            f"a {type(args).__name__}"
        )
    per_batch = args.generation_batch_size // args.num_generations
    whole = isinstance(num_prompts, int) and not isinstance(num_prompts, bool)
    if not whole or num_prompts < 2 * per_batch or num_prompts % (2 * per_batch):
        raise ProbeError(
            f"budget is {num_prompts!r} prompts; method='rollout' trains on half of its generation "
            f"batches and weighs the others: expected a multiple of {2 * per_batch}, twice "
            f"generation_batch_size={args.generation_batch_size} by "
            f"num_generations={args.num_generations}"
        )
    started, model = time.perf_counter(), models[0]
    with as_found(*models):
        set_seed(seed)
        trainer = make_trainer(model=model, args=_arguments(args, seed), selection=selection)
        trainer.remove_callback(PrinterCallback)
        check_trainer(trainer, "method='rollout'")
        batches, prompts = [], []
        rollouts = Rollouts(trainer, num_prompts, old="all")
        with _noted(trainer, "_generate_and_score_completions", batches.append):
            prompts += rollouts
        check_signal(rollouts)
        _check_halves(rollouts, num_prompts)
        if batches[0]["advantages"].ndim != 1:
            raise ProbeError(
                f"method='rollout' weighs whole answers, and {type(trainer).__name__} gives every "
                "token an advantage of its own. Take method='gradient'."
            )
        held_out = [parts for parts in prompts[len(prompts) // 2 :] if parts]
        with in_its_precision(trainer):
            before = [_scores(trainer, parts) for parts in held_out]
        run = run_units(args, trainer)
        trainer.accelerator.free_memory()
        rollouts.trainer = trainer = None
    trained_on = batches[: len(batches) // 2]
    gains: dict[int, list[float]] = {}
    for layer in selection.layers:
        with as_found(*models):
            set_seed(seed)
            one = LayerSelection(
                num_layers=selection.num_layers, layers=(layer,), modules=selection.modules
            )
            own = _arguments(args, seed)
            own.use_vllm = False  # nothing is generated
            trainer = make_trainer(model=model, args=own, selection=one)
            trainer.remove_callback(PrinterCallback)
            with _weights_kept(one.parameters(model).values()):
                given = cycle(trained_on)
                trainer._generate_and_score_completions = lambda _, given=given: dict(next(given))
                trainer.train()
                after = (_scores(trainer, parts) for parts in held_out)
                gains[layer] = [
                    _gain(parts, *scores)
                    for parts, *scores in zip(held_out, before, after, strict=True)
                ]
            if not all(map(math.isfinite, gains[layer])):
                raise ProbeError(
                    f"after {NUM_STEPS} steps of layer {layer}, answers have no finite likelihood: "
                    f"learning_rate={args.learning_rate} diverges. Lower it."
                )
            trainer.accelerator.free_memory()
            trainer = None
    rows = sum(len(part["advantages"]) for parts in held_out for part in parts)
    steps = NUM_STEPS * args.per_device_train_batch_size * args.gradient_accumulation_steps
    number = len(selection.layers)
    held = (number + 1) * rows  # scored by the base, too
    # A layer's backward ends there: one pass for what is above, and one for its own weights.
    backwards = sum(1 - layer / selection.num_layers for layer in selection.layers)
    generated = len(batches) * len(batches[0]["advantages"])
    return report_of(
        "rollout",
        gains,
        rollouts,
        num_layers=selection.num_layers,
        settings={**settings, "seed": seed, "steps": NUM_STEPS},
        cost=Cost(
            seconds=time.perf_counter() - started,
            tokens=rollouts.num_tokens,
            forwards=2 * generated + number * steps + held,
            backwards=number * steps,
            fraction=(2 * generated + held + (number + backwards + 1) * steps) / run,
        ),
    )


def _check_halves(rollouts: Rollouts, num_prompts: int) -> None:
    found = rollouts.with_signal
    if len(found) < num_prompts:
        raise ProbeError(
            f"budget is {num_prompts} prompts, and train_dataset gives {len(found)} in whole "
            "generation batches. Lower the budget."
        )
    halves = [sum(found[: len(found) // 2]), sum(found[len(found) // 2 :])]
    if 0 in halves:
        raise ProbeError(
            f"prompts with completions that were rewarded differently: {halves[0]} of the half "
            f"that is trained on, {halves[1]} of the other half. Raise the budget."
        )


def _arguments(args: Any, seed: int) -> Any:  # noqa: ANN401
    args = only_training(args)
    args.max_steps, args.seed = NUM_STEPS, seed
    args.lr_scheduler_type, args.warmup_steps = "constant", 0
    args.logging_strategy, args.report_to, args.log_completions = "no", [], False
    args.num_iterations = 1
    return args


@torch.no_grad()
def _scores(trainer: Any, parts: Sequence[dict[str, Any]]) -> list[Tensor]:  # noqa: ANN401
    """Log-probabilities of each micro-batch's completions, without dropout."""
    found: list[Any] = []
    trainer.model.eval()
    with _noted(trainer, "_get_per_token_logps_and_entropies", found.append):
        for part in parts:
            trainer.compute_loss(trainer.model, part)
    trainer.model.train()
    return [logps for logps, *_ in found]


def _gain(
    parts: Sequence[dict[str, Any]], before: Sequence[Tensor], after: Sequence[Tensor]
) -> float:
    """Of one prompt, whose completions are in these micro-batches."""
    logratios, advantages = [], []
    for part, old, new in zip(parts, before, after, strict=True):
        mask = part["completion_mask"] * part.get("tool_mask", 1)
        counts = mask.any(dim=1)  # what was cut off may be masked as a whole
        logratios.append(((new - old) * mask).sum(dim=1)[counts])
        advantages.append(part["advantages"][counts])
    advantages_N = torch.cat(advantages).double()
    weights_N = torch.cat(logratios).double().softmax(dim=0)
    return (weights_N * advantages_N).sum().item() - advantages_N.mean().item()


@contextmanager
def _noted(trainer: Any, name: str, note: Callable[[Any], None]) -> Iterator[None]:  # noqa: ANN401
    """Have somebody note all that a method of a trainer returns."""
    method = getattr(trainer, name)

    def noting(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = method(*args, **kwargs)
        note(result)
        return result

    setattr(trainer, name, noting)
    try:
        yield
    finally:
        delattr(trainer, name)


@contextmanager
def _weights_kept(parameters: Any) -> Iterator[None]:  # noqa: ANN401
    """Give parameters their values back, bit for bit."""
    parameters = list(parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
