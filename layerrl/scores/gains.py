"""First-order gains of a step in each layer alone, computed from gradients.

Legend: P prompts, L layers.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerrl.errors import ProbeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


# Over 60 lines: half are the formula and its edges; the loop shares its sums with the hook inside.
def first_step_gains(
    layers: Mapping[int, Sequence[nn.Parameter]],
    prompts: Iterable[Sequence[Callable[[], Tensor]]],
    *,
    epsilon: float = 1e-8,
    add_up: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""For each prompt and layer, the first-order gain of the step that prompts so far ask for.

    With $g_1, g_2, \dots$ the gradients of the prompts' losses in one layer, prompt $p$ gains
    $\langle g_p, u(\sum_{q \le p} g_q / p) \rangle$ with $u(g) = g / (|g| + \epsilon)$, Adam's
    first step: how much less its loss would be, per unit of learning rate, after a step in this
    layer alone. With $q < p$, it gains from a step in which it had no part: noise in a gradient,
    however large, gains nothing there on average. That says whether there is a signal, but a few
    prompts with large gradients decide it; the gain with a prompt's own part varies less.

    One backward serves all layers; gradients are used and freed as they arrive, and one sum of them
    is kept.

    Args:
        layers: Parameters of each layer, all of which require gradients. Their `grad` must be None
            and is None afterwards.
        prompts: For each prompt, what computes its loss: one call for each micro-batch, whose
            losses add up. No calls: a prompt whose gradient is zero.
        epsilon: Adam's.
        add_up: Adds a prompt's gradient up over all processes, in place, where each has a part of
            its rows. Every process has to have as many prompts; gradients are used when all are
            whole, in the same order in each. None: in one process.

    Returns:
        The gains with a prompt's own part, and without. Shapes (P, L), float64, layers in order.
        The first prompts' steps know few prompts.

    Raises:
        ProbeError: If a gradient is not finite.
    """
    sums: dict[Tensor, Tensor] = {
        p: torch.zeros_like(p) for parameters in layers.values() for p in parameters
    }
    column_of: dict[Tensor, int] = {
        p: column for column, layer in enumerate(layers.values()) for p in layer
    }
    gains: list[Tensor] = []
    # Of the present prompt, where its gradients are: reading each one would wait for the device.
    gained = {
        p.device: torch.zeros(2, len(layers), dtype=torch.double, device=p.device) for p in sums
    }

    def take(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        asked, column, of_layers = sums[parameter], column_of[parameter], gained[parameter.device]
        # Before the first prompt there is no step, which gains nothing.
        of_layers[1, column] += _gain(parameter.grad, asked, epsilon * max(len(gains), 1))
        asked += parameter.grad
        of_layers[0, column] += _gain(parameter.grad, asked, epsilon * (len(gains) + 1))
        parameter.grad = None

    for losses in prompts:
        for of_layers in gained.values():
            of_layers.zero_()
        for number, loss in enumerate(losses, 1):
            value = loss()
            whole = number == len(losses) and add_up is None
            with _as_they_arrive(sums, take if whole else None):
                value.backward()
        for parameter in sums:  # of an expert that the last micro-batch sent no token to
            if add_up is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                add_up(parameter.grad)
            take(parameter)
        gains.append(torch.zeros(2, len(layers), dtype=torch.double))
        for of_layers in gained.values():
            gains[-1] += of_layers.cpu()
        if not gains[-1].isfinite().all():
            finite = gains[-1].isfinite().all(dim=0)
            odd = [k for k, is_so in zip(layers, finite, strict=True) if not is_so]
            raise ProbeError(
                f"the gradient of prompt {len(gains) - 1} is not finite in the layers {odd}. Is "
                "its loss? Half precision overflows where float32 and bfloat16 do not."
            )
    found = torch.stack(gains) if gains else torch.zeros(0, 2, len(layers), dtype=torch.double)
    return found[:, 0], found[:, 1]


def _gain(gradient: Tensor, asked: Tensor, epsilon: float) -> Tensor:
    """What a loss would fall by in Adam's first step along a sum of gradients."""
    size = asked.abs() + epsilon
    step = asked / size.clamp(min=torch.finfo(size.dtype).tiny)
    return (gradient * step).sum(dtype=torch.double)


@contextmanager
def _as_they_arrive(
    parameters: Iterable[Tensor], take: Callable[[Tensor], None] | None
) -> Iterator[None]:
    """Have each parameter's gradient taken in the backward, as soon as it is whole."""
    handles = [p.register_post_accumulate_grad_hook(take) for p in parameters if take is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
