"""`method="step"`: what a step in each layer alone gains on other prompts, measured after it.

Legend: P prompts, L layers, B rows, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerrl.blocks import is_accelerates, unwrap
from layerrl.errors import ProbeError
from layerrl.quantisation import is_quantised
from layerrl.replacing import replaced
from layerrl.scores.base_pass import ShortPasses
from layerrl.scores.gains import adam_step
from layerrl.scores.gradient import (
    FEWEST_PROMPTS,
    Gain,
    Gains,
    TooLittleSignalError,
    check_signal,
    probed,
)
from layerrl.scores.method import ROLLOUTS, Method
from layerrl.scores.processes import add_up, first_problem, loss_alone
from layerrl.scores.rollouts import Rollouts
from layerrl.selection import LayerSelection
from layerrl.trained import TrainedLayers
from layerrl.warning import warn

LENGTH = 3.0
"""Learning rates that a step is long. Chosen on seven suites (docs/results.md)."""
ERROR_TIMES = 1.5
"""Standard error of a gain over that of independent prompts. Each half is measured by steps from
the other: a pair of prompts counts twice, and what is random in a step shows on no prompt. Chosen
by simulation (`benchmarks/coverage.py`)."""
FEWEST_IN_HALF = FEWEST_PROMPTS // 4
_HALF = {torch.bfloat16, torch.float16}
Moves = Mapping[int, Callable[[], AbstractContextManager[None]]]
"""By the number of a layer, what moves its parameters by their step inside."""


class OwnLossError(ProbeError):
    """A loss that asks its trainer for no log-probabilities."""


class _Part(NamedTuple):
    """A micro-batch of one prompt's completions, with its loss to first order.

    Not the loss itself, whose ratios of probabilities grow without bound: after a step of some
    length it ranks layers worse (docs/results.md).
    """

    logps: Callable[[], Tensor]
    """Computes the log-probabilities of the completions, shape (B, T)."""
    weights_BT: Tensor
    """How much the trainer's loss falls, at the base, by each of them that rises."""
    asked: tuple[str, ...]
    """Names of what they are computed from: images, or none."""

    def objective(self) -> Tensor:
        """Minus the trainer's loss, but linear in log-probabilities, up to a constant."""
        return (self.weights_BT * self.logps()).sum(dtype=torch.double)


def _gains(rollouts: Rollouts, selection: LayerSelection, args: Any) -> Gains:
    """Gains of all prompts: steps from half of them are measured on the other half.

    Returns:
        Those of shape (P, L); in several processes on the prompts of all.

    Raises:
        OwnLossError: If the trainer's loss is not one of log-probabilities; in all processes.
        ProbeError: If there is no step.
    """
    trainer = rollouts.trainer
    _check(trainer, args)
    together = trainer.accelerator.num_processes > 1
    prompts = _parts_of_all(rollouts, together=together)
    layers = TrainedLayers(trainer.model, selection)
    gains_PL = torch.zeros(
        len(prompts), len(layers.by_layer), dtype=torch.double, device=trainer.accelerator.device
    )
    check_signal(rollouts)
    _check_halves(rollouts)
    passes = ShortPasses(trainer.model, selection.blocks(trainer.model).modules)
    with _in_float32(trainer):
        for half in (0, 1):
            seen, others = (range(first, len(prompts), 2) for first in (half, 1 - half))
            trainer.model.train()
            for part in (part for number in seen for part in prompts[number]):
                (-part.objective()).backward()
            by_layer = layers.by_layer
            after = {  # a parameter may be of several layers
                p: _after_step(p, len(seen), args, together)
                for p in dict.fromkeys(p for parameters in by_layer.values() for p in parameters)
            }
            moves: Moves = {
                layer: partial(_moved, parameters, [after[p] for p in parameters])
                for layer, parameters in by_layer.items()
            }
            with _evaluating(trainer.model):
                for number in others:
                    gains_PL[number] = _gain(prompts[number], moves, passes)
            del moves, after  # before the gradients of the other half
    rows = sum(len(part.weights_BT) for prompt in prompts for part in prompt)
    counted_2 = gains_PL.new_tensor([passes.passes, rows])
    if together:
        add_up(gains_PL)
        add_up(counted_2)
    if not gains_PL.isfinite().all():
        finite_L = gains_PL.isfinite().all(dim=0).tolist()
        odd = [k for k, finite in zip(layers.by_layer, finite_L, strict=True) if not finite]
        raise ProbeError(
            f"what a step of {LENGTH:g} times the learning rate {args.learning_rate:g} gains in "
            f"each of the layers {odd} is not finite. Expected the learning rate of the run, and a "
            "base without NaN."
        )
    passed, rows = counted_2.tolist()
    return Gains(gains_PL.cpu(), more_passes=1 + passed / rows)  # one at the base, in `_parts`


def _parts_of_all(rollouts: Rollouts, *, together: bool) -> list[list[_Part]]:
    """Score the completions of every prompt at the base.

    Returns:
        For each prompt its parts; in several processes (`together`) those of this one.

    Raises:
        OwnLossError: If the trainer's loss is not one of log-probabilities; in all processes.
    """
    prompts: list[list[_Part]] = []
    problem: Exception | None = None
    for micro_batches in rollouts:
        try:
            prompts.append([*_parts(rollouts.trainer, micro_batches)])
        except OwnLossError as of_rank:
            if not together:
                raise
            prompts.append([])  # the others, which may have no rows, generate on
            problem = of_rank
    if together and (problem := first_problem(problem)):
        raise problem
    return prompts


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
    _prepared(trainer.model)
    config: Any = unwrap(trainer.model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    attention = str(getattr(text, "_attn_implementation", None))
    if "flash" in attention:
        raise ProbeError(
            f"method='step' measures in float32, which {attention} does not compute. Load the "
            "model with attn_implementation='sdpa' for the probe, train this one on the layers of "
            "the report (selection=report.top(1)), or take method='gradient' (selection='auto')."
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
    asked: list[tuple[Tensor, Callable[[], Tensor], tuple[str, ...]]] = []

    def at_the_base(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            logps_BT, *others = score(*args, **kwargs)
        logps_BT.requires_grad_()
        names = tuple(sorted(name for name, value in kwargs.items() if value is not None))
        asked.append((logps_BT, lambda: score(*args, **kwargs)[0], names))
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
        slopes = torch.autograd.grad(loss, [logps_BT for logps_BT, *_ in asked])
        for (_, logps, names), slope_BT in zip(asked, slopes, strict=True):
            yield _Part(logps, -slope_BT, names)


def _gain(prompt: Sequence[_Part], moves: Moves, passes: ShortPasses) -> Tensor:
    """What each move gains on a prompt, shape (L,); 0 on one without signal."""
    base, after_L = torch.zeros(2, 1, dtype=torch.double)
    for part in prompt:
        of_part, after_part_L = passes.values(
            part.objective, moves, kind=part.asked, weight=len(part.weights_BT)
        )
        base, after_L = base.to(of_part) + of_part, after_L.to(of_part) + after_part_L
    return after_L - base


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, there is no dropout, which would hide what a step gains, and no gradient."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _after_step(parameter: nn.Parameter, num_prompts: int, args: Any, together: bool) -> Tensor:
    """A parameter's values after Adam's first step by the gradient that it has, which is freed."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:  # of an expert that no token was sent to
        gradient = torch.zeros_like(parameter)
    if together:
        add_up(gradient)
    step = adam_step(gradient, num_prompts, args.adam_epsilon)
    return parameter.data - LENGTH * args.learning_rate * step


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, parameters have other values. Afterwards they are the same bits as before."""
    before = [parameter.data for parameter in parameters]
    try:
        for parameter, moved in zip(parameters, values, strict=True):
            parameter.data = moved
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
            for module in _prepared(trainer.model):
                own: Any = module._original_forward
                plain.enter_context(replaced(module, forward=own))
            yield
    finally:
        for tensor, data in half:
            tensor.data = data


def _prepared(model: nn.Module) -> list[Any]:
    """Find modules whose forward accelerate has put an autocast around, which can be taken off.

    Returns:
        The modules, each with its own forward in `_original_forward`.

    Raises:
        ProbeError: If another forward lies around that: nothing can be taken out of it.
    """
    found = [module for module in model.modules() if "_original_forward" in vars(module)]
    for module in found:
        if not is_accelerates(module.forward):
            function = getattr(module.forward, "__func__", module.forward)
            raise ProbeError(
                f"the forward of {type(module).__name__} was replaced, by {function!r:.80}, after "
                "accelerate had put mixed precision around it, as an evaluation does: "
                "method='step' measures in float32, and cannot take that out of it. Replace the "
                "forward before the trainer evaluates, or take method='gradient' "
                "(selection='auto')."
            )
    return found


GAIN = Gain(
    method="step",
    of_prompts=_gains,
    error_times=ERROR_TIMES,
    hint=f" Or {LENGTH:g} times the learning rate are too long a step.",
)
METHOD = Method(score=partial(probed, gain=GAIN), needs=ROLLOUTS)
