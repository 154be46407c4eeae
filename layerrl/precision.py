"""Update half-precision weights in float32.

A bfloat16 number has 8 significant bits: a step of 1e-6 on a weight of 0.02 is lost in rounding,
every time. The optimizer steps on float32 master values instead; the model's own weights are those,
rounded.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer

HALF = (torch.bfloat16, torch.float16)
"""The dtypes too narrow to be updated in."""
_MASTER = "master"  # beside the optimizer's own state, so that it is saved and resumed with it


def step_in_float32(optimizer: Optimizer) -> None:
    """Let an optimizer update its half-precision parameters in float32.

    While it steps, such a parameter holds its master values; state made then is float32 too.
    Afterwards it holds their rounded values again, also after an exception. Master values live in
    the optimizer's state and go through its `state_dict`. Where somebody else has written to a
    parameter since the last step, that value counts.

    Args:
        optimizer: Any torch optimizer that updates in `step`. Its class becomes a subclass.
    """
    cls = type(optimizer)
    if not issubclass(cls, _StepInFloat32):
        optimizer.__class__ = type(cls.__name__, (_StepInFloat32, cls), {})


class _StepInFloat32:
    state: Any
    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        loss = closure() if closure is not None else None  # before the weights change their dtype
        stepped = [p for p in _half(self) if p.grad is not None]
        with _as_float32(stepped, self.state):
            super().step()  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch casts what it loads to the parameter's dtype
        with _as_float32(_half(self)):
            super().load_state_dict(state_dict)  # pyright: ignore[reportAttributeAccessIssue]


def _half(optimizer: Any) -> list[nn.Parameter]:  # noqa: ANN401
    groups = optimizer.param_groups
    return [p for group in groups for p in group["params"] if p.dtype in HALF]


@contextmanager
def _as_float32(parameters: list[nn.Parameter], state: Any = None) -> Iterator[None]:  # noqa: ANN401
    """Make parameters and gradients float32; with `state`, keep what becomes of them."""
    own = [(parameter, parameter.data, parameter.grad) for parameter in parameters]
    try:
        for parameter, half, grad in own:
            parameter.grad = None
            parameter.data = _master(half, state[parameter] if state is not None else {})
            if grad is not None:
                parameter.grad = grad.float()
        yield
    finally:
        for parameter, half, grad in own:
            parameter.grad = None
            master, parameter.data = parameter.data, half
            parameter.grad = grad
            if state is not None and master.dtype == torch.float32:
                half.copy_(master)
                state[parameter][_MASTER] = master


def _master(half: Tensor, state: dict[str, Any]) -> Tensor:
    master = state.get(_MASTER)
    if master is None:
        return half.float()
    return torch.where(master.to(half.dtype) == half, master, half.float())
