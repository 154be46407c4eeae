"""First-order gains of a step in each layer alone, computed from gradients.

Legend: P prompts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from layerrl.errors import ProbeError


# Over 60 lines: half are the formula and its edges; the loop shares its sums with the hook inside.
def held_out_gains(
    layers: Mapping[int, Sequence[nn.Parameter]],
    prompts: Iterable[Sequence[Callable[[], Tensor]]],
    *,
    epsilon: float = 1e-8,
    add_up: Callable[[Tensor], None] | None = None,
) -> Tensor:
    r"""For each prompt and layer, the first-order gain of a step that the prompts before ask for.

    With $g_1, g_2, \dots$ the gradients of the prompts' losses in one layer, prompt $p$ scores
    $\langle g_p, u(\sum_{q<p} g_q / (p - 1)) \rangle$ with $u(g) = g / (|g| + \epsilon)$, Adam's
    first step: how much less its loss would be, per unit of learning rate, after a step in this
    layer alone in which it had no part. Noise in a gradient, however large, gains nothing on
    average.

    One backward serves all layers; gradients are used and freed as they arrive, and one sum of them
    is kept.

    Args:
        layers: Parameters of each layer, all of which require gradients. Their `grad` must be None
            and is None afterwards.
        prompts: For each prompt, what computes its loss: one call for each micro-batch, whose
            losses add up. No calls: a prompt whose gradient is zero.
        epsilon: Adam's.
        add_up: Adds a prompt's gradient up over all ranks, in place, where each has a part of its
            rows. Collective: called once for each prompt, so every rank needs as many prompts;
            gradients are used when all are whole, in the same order on each. None: in one process.

    Returns:
        Shape (P, L), float64, layers in order. The first prompts' steps know few prompts.

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
    gained = {p.device: torch.zeros(len(layers), dtype=torch.double, device=p.device) for p in sums}

    def take(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        earlier, prompt = sums[parameter], len(gains)
        step = adam_step(earlier, prompt, epsilon)
        of_layers = gained[parameter.device]
        of_layers[column_of[parameter]] += (parameter.grad * step).sum(dtype=torch.double)
        earlier += parameter.grad
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
        gains.append(torch.zeros(len(layers), dtype=torch.double))
        for of_layers in gained.values():
            gains[-1] += of_layers.cpu()
        if not gains[-1].isfinite().all():
            odd = [k for k, gain in zip(layers, gains[-1], strict=True) if not gain.isfinite()]
            raise ProbeError(
                f"the gradient of prompt {len(gains) - 1} is not finite in the layers {odd}. Is "
                "its loss? Half precision overflows where float32 and bfloat16 do not."
            )
    return torch.stack(gains) if gains else torch.zeros(0, len(layers), dtype=torch.double)


def adam_step(total: Tensor, num_prompts: int, epsilon: float) -> Tensor:
    """Adam's first step, for a learning rate of one, by the mean of some prompts' gradients.

    Args:
        total: The sum of the gradients.
        num_prompts: Their number. Of none the sum is zero, and so is the step.
        epsilon: Adam's.

    Returns:
        The step, shaped like the gradients: mostly their signs.
    """
    size = total.abs() + epsilon * max(num_prompts, 1)
    return total / size.clamp(min=torch.finfo(size.dtype).tiny)


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
