"""Whether a replayed call gives the plain one's logits (so log-probabilities) and gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

Observed = tuple[list[Any], dict[int, Tensor | None]]

# Mean difference allowed, relative to the size of the plain values; the largest may be _LARGEST
# times that, a trained tensor's gradient differ by _GRADIENT times. In float32 on a CPU there is no
# difference; other kernels round differently for other batch shapes.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_TOLERANCE_16_BIT = 2e-2
_LARGEST, _GRADIENT = 16, 4
_NEGLIGIBLE = 1e-2  # a gradient that much smaller than all together may be nothing but rounding


def flat(output: Any) -> list[Any]:
    """What a model returned, one by one, out of all containers."""
    if is_dataclass(output) and not isinstance(output, Mapping | type):
        output = vars(output)
    if isinstance(output, Mapping):
        return [part for value in output.values() for part in flat(value)]
    if isinstance(output, tuple | list):
        return [part for value in output for part in flat(value)]
    return [output]


def gradients(outputs: Sequence[Any], trained: Sequence[nn.Parameter]) -> dict[int, Tensor | None]:
    """Gradients by index in `trained` of a fixed weighted mean of all outputs; frees the graph."""
    graphs = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
    wanted = {index: p for index, p in enumerate(trained) if p.requires_grad}
    if not graphs or not wanted:
        return {}
    total = torch.stack([_weighted_mean(value).cpu() for value in graphs]).sum()
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def _weighted_mean(value: Tensor) -> Tensor:
    """Weighted along the last dimension, or softmax's outputs would have a constant sum."""
    if value.dim():
        size = value.shape[-1]
        weights = torch.arange(size, device=value.device).remainder(7).sub(3).to(value.dtype)
        value = value @ weights / max(1, size)
    return value.to(torch.promote_types(value.dtype, torch.float32)).mean()


def difference(plain: Observed, replayed: Observed, *, exact: torch.dtype) -> str | None:
    """Describe how a replayed call differs from the plain one; both computed in `exact`."""
    tolerance = _TOLERANCE.get(exact, _TOLERANCE_16_BIT)
    (outputs, grads), (others, other_grads) = plain, replayed
    if len(outputs) != len(others) or {*grads} != {*other_grads}:
        return f"the model returns {len(others)} values in place of {len(outputs)}"
    if not any(isinstance(value, Tensor) and value.is_floating_point() for value in outputs):
        return "the model returns no floating-point tensor that could be compared"
    for value, other in zip(outputs, others, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.shape != other.shape:
            return f"a result has shape {tuple(other.shape)} in place of {tuple(value.shape)}"
        mean, largest = _relative(value, other)
        if not (mean <= tolerance and largest <= _LARGEST * tolerance):
            return (
                f"results differ by {mean:.2g} of their size on average and {largest:.2g} at most "
                f"(allowed: {tolerance:.0e} and {_LARGEST * tolerance:.0e})"
            )
    norms = {index: _norm(grad) for index, grad in grads.items()}
    total = math.hypot(*norms.values())
    for index, grad in grads.items():
        gap = _norm(grad, other_grads[index])
        if not gap <= _GRADIENT * tolerance * max(norms[index], _NEGLIGIBLE * total):
            return (
                f"a trained tensor's gradient differs by {gap:.2g}, its norm is {norms[index]:.2g}"
            )
    return None


def _relative(value: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean and largest absolute difference, over the root mean square of the first."""
    if not value.numel():
        return 0.0, 0.0
    value, other = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (value, other))
    alike = (value == other) | (value.isnan() & other.isnan())
    gaps = torch.where(alike, 0, (value - other).abs())
    finite = value[value.isfinite()]
    size = finite.pow(2).mean().sqrt() if finite.numel() else gaps.new_ones(())
    size = size.clamp_min(torch.finfo(size.dtype).tiny)
    return (gaps.mean() / size).item(), (gaps.max() / size).item()


def _norm(grad: Tensor | None, other: Tensor | None = None) -> float:
    """Norm of a gradient, or of the difference between two; one that is None is zero."""
    parts = [
        g.detach().to(torch.promote_types(g.dtype, torch.float32))
        for g in (grad, other)
        if g is not None
    ]
    if not parts:
        return 0.0
    gap = parts[0] if len(parts) == 1 else parts[0] - parts[1]
    return torch.linalg.vector_norm(gap).item()
