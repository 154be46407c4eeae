"""`method="step"`: what a step in each layer alone gains on other prompts, measured after it.

Legend: P prompts, L layers, B rows, T completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerrl.blocks import unwrap
from layerrl.errors import ProbeError
from layerrl.quantisation import is_quantised
from layerrl.replacing import replaced
from layerrl.scores.gains import adam_step
from layerrl.scores.gradient import (
    FEWEST_PROMPTS,
    Gain,
    TooLittleSignalError,
    check_signal,
    probed,
)
from layerrl.scores.method import ROLLOUTS, Method
from layerrl.scores.processes import add_up, loss_alone
from layerrl.scores.rollouts import Rollouts
from layerrl.selection import LayerSelection
from layerrl.trained import TrainedLayers
from layerrl.warning import warn

LENGTH = 3.0
"""Learning rates that a step is long. Chosen on seven suites (docs/results.md)."""
FEWEST_IN_HALF = FEWEST_PROMPTS // 4
_HALF = {torch.bfloat16, torch.float16}


class OwnLossError(ProbeError):
    """A loss that asks its trainer for no log-probabilities; only ranks that have rows know it."""


class _Part(NamedTuple):
    """A micro-batch of one prompt's completions, with its loss to first order.

    Not the loss itself, whose ratios of probabilities grow without bound: after a step of some
    length it ranks layers worse (docs/results.md).
    """

    logps: Callable[[], Tensor]
    """Computes the log-probabilities of the completions, shape (B, T)."""
    weights_BT: Tensor
    """How much the trainer's loss falls, at the base, by each of them that rises."""

    def objective(self) -> Tensor:
        """Minus the trainer's loss, but linear in log-probabilities, up to a constant."""
        return (self.weights_BT * self.logps()).sum(dtype=torch.double)


def _gains(rollouts: Rollouts, selection: LayerSelection, args: Any) -> Tensor:
    """Gains of all prompts: steps from half of them are measured on the other half.

    Returns:
        Shape (P, L), float64; in several processes the gains on the prompts of all.

    Raises:
        ProbeError: If there is no step, or the trainer's loss is not one of log-probabilities.
    """
    trainer = rollouts.trainer
    _check(trainer, args)
    prompts = [[*_parts(trainer, micro_batches)] for micro_batches in rollouts]
    layers = TrainedLayers(trainer.model, selection)
    together = trainer.accelerator.num_processes > 1
    gains_PL = torch.zeros(
        len(prompts), len(layers.by_layer), dtype=torch.double, device=trainer.accelerator.device
    )
    check_signal(rollouts)
    _check_halves(rollouts)
    measure = partial(_objectives, trainer.model)
    with _in_float32(trainer):
        base_P = measure(prompts)
        for half in (0, 1):
            seen, others = slice(half, None, 2), slice(1 - half, None, 2)
            trainer.model.train()
            for part in (part for prompt in prompts[seen] for part in prompt):
                (-part.objective()).backward()
            for column, parameters in enumerate(layers.by_layer.values()):
                steps = [
                    _step(p, len(prompts[seen]), args.adam_epsilon, together) for p in parameters
                ]
                with _moved(parameters, steps, LENGTH * args.learning_rate):
                    gains_PL[others, column] = measure(prompts[others]) - base_P[others]
    if together:
        add_up(gains_PL)
    if not gains_PL.isfinite().all():
        finite_L = gains_PL.isfinite().all(dim=0).tolist()
        odd = [k for k, finite in zip(layers.by_layer, finite_L, strict=True) if not finite]
        raise ProbeError(
            f"what a step of {LENGTH:g} times the learning rate {args.learning_rate:g} gains in "
            f"each of the layers {odd} is not finite. Expected the learning rate of the run, and a "
            "base without NaN."
        )
    return gains_PL.cpu()


def _check(trainer: Any, args: Any) -> None:
    """Refuse what cannot be measured before anything is generated."""
    if not args.learning_rate > 0:
        raise ProbeError(
            f"learning_rate is {args.learning_rate}: method='step' takes steps of {LENGTH:g} times "
            "that. Expected the learning rate of the run, above zero."
        )
    optim = str.lower(args.optim)  # of an enum's member its text
    if "adam" not in optim:
        warn(
            f"method='step' takes Adam's first step, which moves every weight by {LENGTH:g} times "
            f"the learning rate {args.learning_rate:g}; optim={optim!r} may step elsewhere"
        )
    config: Any = unwrap(trainer.model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    attention = str(getattr(text, "_attn_implementation", None))
    if "flash" in attention:
        raise ProbeError(
            f"method='step' measures in float32, which {attention} does not compute. Load the "
            "model with attn_implementation='sdpa', or take method='gradient'."
        )


def _check_halves(rollouts: Rollouts) -> None:
    """Refuse halves of which one has hardly a gradient: each is what the other is measured by."""
    halves = [sum(rollouts.with_signal[half::2]) for half in (0, 1)]
    if min(halves) < FEWEST_IN_HALF:
        raise TooLittleSignalError(
            f"method='step' takes steps from every other prompt, and {halves[0]} of the first and "
            f"{halves[1]} of the second half have completions that were rewarded differently. "
            f"Expected {FEWEST_IN_HALF} or more in each: raise the budget, or num_generations."
        )


def _parts(trainer: Any, micro_batches: Sequence[Any]) -> Iterator[_Part]:
    """The micro-batches of a prompt, with what the trainer's loss makes of log-probabilities."""
    score = trainer._get_per_token_logps_and_entropies
    asked: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def at_the_base(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            logps_BT, *others = score(*args, **kwargs)
        logps_BT.requires_grad_()
        asked.append((logps_BT, lambda: score(*args, **kwargs)[0]))
        return (logps_BT, *others)

    for micro_batch in micro_batches:
        asked.clear()
        with replaced(trainer, _get_per_token_logps_and_entropies=at_the_base):
            loss = loss_alone(trainer, micro_batch)
        if not asked:
            raise OwnLossError(
                f"method='step' needs the log-probabilities that a loss is made of, and that of "
                f"{type(trainer).__name__} asks its trainer for none. Set use_liger_kernel=False, "
                "or take method='gradient'."
            )
        slopes = torch.autograd.grad(loss, [logps_BT for logps_BT, _ in asked])
        for (_, logps), slope_BT in zip(asked, slopes, strict=True):
            yield _Part(logps, -slope_BT)


@torch.no_grad()
def _objectives(model: nn.Module, prompts: Sequence[Sequence[_Part]]) -> Tensor:
    """Of each prompt, without dropout, which would hide what a step gains."""
    training = model.training
    model.eval()
    try:
        values = [sum(part.objective() for part in prompt) for prompt in prompts]
    finally:
        model.train(training)
    return torch.tensor(values, dtype=torch.double)


def _step(parameter: nn.Parameter, num_prompts: int, epsilon: float, together: bool) -> Tensor:
    """Adam's first step by the gradient that a parameter has, which is freed."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:  # of an expert that no token was sent to
        gradient = torch.zeros_like(parameter)
    if together:
        add_up(gradient)
    return adam_step(gradient, num_prompts, epsilon)


@contextmanager
def _moved(
    parameters: Sequence[nn.Parameter], steps: Sequence[Tensor], rate: float
) -> Iterator[None]:
    """Inside, the parameters lie a step downhill. Afterwards they are the same bits as before."""
    before = [parameter.data for parameter in parameters]
    try:
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.data = parameter.data - rate * step
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


@contextmanager
def _in_float32(trainer: Any) -> Iterator[None]:
    """Inside, the model computes in float32: half precision would round a step away.

    But for what is packed: layers of a quantised base compute as they do.
    """
    model = unwrap(trainer.model)
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    half = [
        (tensor, tensor.data)
        for tensor in tensors
        if tensor.dtype in _HALF and not is_quantised(tensor)
    ]
    try:
        for tensor, data in half:
            tensor.data = data.float()
        with ExitStack() as plain:
            # TRL enters it around each pass by itself, for mixed precision, and accelerate around
            # the forward of a model that an evaluation has prepared.
            plain.enter_context(replaced(trainer.accelerator, autocast=nullcontext))
            for module in trainer.model.modules():
                if "_original_forward" in vars(module):
                    own: Any = module._original_forward
                    plain.enter_context(replaced(module, forward=own))
            yield
    finally:
        for tensor, data in half:
            tensor.data = data


GAIN = Gain(
    method="step",
    of_prompts=_gains,
    # At the base twice, and after each layer's steps on half of the prompts, twice.
    more_passes=lambda num_layers: 2 + num_layers,
    # The halves judge each other, so that each pair of prompts counts twice.
    error_times=math.sqrt(2),
    hint=f" Or {LENGTH:g} times the learning rate are too long a step.",
)
METHOD = Method(score=partial(probed, gain=GAIN), needs=ROLLOUTS)
