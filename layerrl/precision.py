"""Update half-precision weights in float32.

A bfloat16 number has 8 significant bits: a step of 1e-6 on a weight of 0.02 is lost in rounding,
every time. The optimizer steps on float32 master values instead; the model's own weights are those,
rounded.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.optim import Optimizer

HALF = (torch.bfloat16, torch.float16)
"""The dtypes too narrow to be updated in."""
MASTER = "master"
"""Name of the master values in an optimizer's state, so that they are saved and resumed with it."""


def step_in_float32(optimizer: Optimizer) -> None:
    """Let an optimizer update its half-precision parameters in float32.

    While it steps, it holds master values in their place, with their gradients in float32, and
    makes its own state in float32 too. Afterwards the parameters are the masters, rounded. Where
    somebody else has written to a parameter since the last step, that value counts.

    Args:
        optimizer: Any torch optimizer that updates in `step`, in accelerate's wrapper or not. Its
            `step` and `load_state_dict` are replaced; twice is once.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if "load_state_dict" in vars(optimizer):
        return
    # Bound methods on the instance, as schedulers expect and make them: whatever they have put
    # around `step` before stays inside of this.
    step, load = optimizer.step, optimizer.load_state_dict

    def step_on_masters(self: Any, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        loss = closure() if closure is not None else None  # it needs the model's own weights
        with _masters(self, stepping=True):
            step()
        return loss

    def load_masters(self: Any, state_dict: dict[str, Any]) -> None:  # noqa: ANN401
        with _masters(self, stepping=False):  # torch casts what it loads to the parameter's dtype
            load(state_dict)

    optimizer.step = MethodType(step_on_masters, optimizer)
    optimizer.load_state_dict = MethodType(load_masters, optimizer)


@contextmanager
def _masters(optimizer: Any, *, stepping: bool) -> Iterator[None]:  # noqa: ANN401
    """Put masters in the place of half-precision parameters, in the groups and the state.

    Parameters never change their dtype: whoever has hooks on their gradients keeps them.
    """
    state, swapped, done = optimizer.state, [], False
    try:
        for group in optimizer.param_groups:
            for index, half in enumerate(group["params"]):
                if half.dtype in HALF and (half.grad is not None or not stepping):
                    held = state.get(half, {})
                    master = nn.Parameter(_master(half.detach(), held.get(MASTER)))
                    if half.grad is not None:
                        master.grad = half.grad.float()
                    # Optimizers take an empty state for a new one, so this must not be in it.
                    others = {key: value for key, value in held.items() if key != MASTER}
                    state.pop(half, None)
                    if others:
                        state[master] = others
                    group["params"][index] = master
                    swapped.append((group["params"], index, half, master, held))
        yield
        done = True
    finally:
        state = optimizer.state  # loading replaces it
        for parameters, index, half, master, held in swapped:
            parameters[index] = half
            now = state.pop(master, {})
            if stepping and (done or now):
                half.data.copy_(master.data)
                now = {**now, MASTER: master.data}
            elif not stepping and not done:
                now = held
            if now:
                state[half] = now


def _master(half: Tensor, master: Tensor | None) -> Tensor:
    if master is None:
        return half.float()
    return torch.where(master.to(half.dtype) == half, master, half.float(), out=master)
