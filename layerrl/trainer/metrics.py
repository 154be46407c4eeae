"""What is logged of each layer, and of each part outside the layers that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerrl.precision import MASTER
from layerrl.shards import parts, whole, with_parameter

ByPart = Mapping[str, Sequence[nn.Parameter]]


class Norms(NamedTuple):
    """Norms of gradients that have been clipped."""

    total: Tensor
    by_part: dict[str, Tensor]


def clipped_norms(by_part: ByPart, trained: Iterable[nn.Parameter]) -> Norms:
    """Norms of the present gradients: all, and by part. Collective where they are sharded."""

    def now(parameters: Iterable[nn.Parameter]) -> Tensor:
        return norm(p.grad for p in parameters if p.grad is not None)

    return Norms(now(trained), {part: now(parameters) for part, parameters in by_part.items()})


def before_clipping(total: float, clipped: Norms) -> dict[str, Tensor]:
    """Each part's share of the gradient's norm before clipping, `total` in all."""
    factor = torch.where(clipped.total > 0, clipped.total.new_tensor(total) / clipped.total, 0.0)
    return {part: factor * value for part, value in clipped.by_part.items()}


def relative_updates(
    by_part: ByPart,
    trained: Mapping[str, nn.Parameter],
    initial: Mapping[str, Tensor],
    state: Mapping[nn.Parameter, Mapping[str, Any]],
    trained_rows: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return the norm of each part's change over its norm at the start; none without `initial`.

    `state` is the optimizer's, with master values where it has them; `trained_rows` gives what
    trains of a tensor, by its name and a value.
    """
    if not initial:
        return {}
    names = {id(p): name for name, p in trained.items()}

    def start(p: nn.Parameter) -> Tensor:
        return trained_rows(names[id(p)], with_parameter(initial[names[id(p)]], p))

    def now(p: nn.Parameter) -> Tensor:
        return trained_rows(names[id(p)], parts(state.get(p, {}).get(MASTER, p)))

    return {
        part: norm(now(p) - start(p) for p in parameters) / norm(start(p) for p in parameters)
        for part, parameters in by_part.items()
    }


def named(metric: str, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Values by the name that they are logged under."""
    return {f"layerrl/{metric}/{part}": value.item() for part, value in values.items()}


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over several tensors, in float32 or wider, on the device of the first."""
    norms = [
        torch.linalg.vector_norm(t.detach(), dtype=torch.promote_types(t.dtype, torch.float32))
        for t in tensors
    ]
    if not norms:
        return torch.zeros(())
    # With device_map="auto", layers lie on several devices.
    together = torch.stack([value.to(norms[0].device) for value in norms])
    return whole(torch.linalg.vector_norm(together))
