"""`method="step"`: what a step in each layer alone gains on other prompts, measured after it.

Legend: P prompts, L layers, B rows, T completion tokens.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from layerrl.blocks import unwrap
from layerrl.replacing import replaced
from layerrl.scores.gradient import probed
from layerrl.scores.method import ROLLOUTS, Method
from layerrl.scores.processes import add_up, loss_alone, whole_model
from layerrl.scores.rollouts import in_its_precision
from layerrl.trained import TrainedLayers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from layerrl.scores.rollouts import Rollouts
    from layerrl.selection import LayerSelection

TIMES = 3.0
"""Learning rates that the step is long."""


class Part(NamedTuple):
    """A micro-batch of one prompt."""

    logps: Callable[[], Tensor]
    """Computes the log-probabilities of its completions, shape (B, T)."""
    weights_BT: Tensor
    """What the loss falls by for each log-probability that rises by one, at the base."""


def parts_of(rollouts: Rollouts) -> list[list[Part]]:
    """Micro-batches of each prompt, with the loss as weights on their log-probabilities."""
    trainer = rollouts.trainer
    found: list[list[Part]] = []
    name = "_get_per_token_logps_and_entropies"
    compute = getattr(trainer, name)
    parts: list[Part] = []
    asked: list[Any] = []

    def at_the_base(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            logps_BT, *others = compute(*args, **kwargs)
        logps_BT = logps_BT.detach().requires_grad_()
        asked.append((logps_BT, lambda: compute(*args, **kwargs)[0]))
        return (logps_BT, *others)

    for prompt in rollouts:
        parts = []
        for micro_batch in prompt:
            asked.clear()
            with replaced(trainer, **{name: at_the_base}):
                loss = loss_alone(trainer, micro_batch)
            [(logps_BT, again)] = asked
            [slopes_BT] = torch.autograd.grad(loss, [logps_BT])
            parts.append(Part(again, -slopes_BT))
        found.append(parts)
    return found


def step_gains(
    layers: dict[int, Sequence[nn.Parameter]],
    prompts: Sequence[Sequence[Part]],
    *,
    rate: float,
    epsilon: float,
    add_up: Callable[[Tensor], None] | None = None,
) -> Tensor:
    with torch.no_grad():
        base_P = torch.stack([_value(parts) for parts in prompts])
    gains_PL = torch.zeros(len(prompts), len(layers), dtype=torch.double)
    for half in (0, 1):
        for parts in prompts[half::2]:
            for part in parts:
                (-(part.weights_BT * part.logps()).sum()).backward()
        for column, parameters in enumerate(layers.values()):
            with _moved(parameters, rate, epsilon, add_up), torch.no_grad():
                for index in range(1 - half, len(prompts), 2):
                    gains_PL[index, column] = _value(prompts[index]) - base_P[index]
    if add_up is not None:
        add_up(gains_PL)
    return gains_PL


def _value(parts: Sequence[Part]) -> Tensor:
    total = torch.zeros((), dtype=torch.double)
    for part in parts:
        total += (part.weights_BT.double() * part.logps()).sum().cpu()
    return total


from contextlib import contextmanager


@contextmanager
def _moved(parameters, rate, epsilon, add_up):
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                gradient = parameter.grad
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                if add_up is not None:
                    add_up(gradient)
                size = gradient.abs() + epsilon
                parameter -= rate * gradient / size.clamp(min=torch.finfo(size.dtype).tiny)
                parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def gains(rollouts: Rollouts, selection: LayerSelection, args: Any) -> Tensor:
    trainer = rollouts.trainer
    model = unwrap(trainer.model)
    together = trainer.accelerator.num_processes > 1
    with whole_model(trainer):
        prompts = parts_of(rollouts)
        model.eval()
        with in_its_precision(trainer):
            return step_gains(
                TrainedLayers(trainer.model, selection).by_layer,
                prompts,
                rate=TIMES * args.learning_rate,
                epsilon=args.adam_epsilon,
                add_up=add_up if together else None,
            )


METHOD = Method(score=partial(probed, gains_of=gains), needs=ROLLOUTS)
