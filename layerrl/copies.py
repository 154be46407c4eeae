"""Copies of optimizers whose methods were replaced: by `copy.deepcopy`, or in a pickle.

Torch copies an optimizer's state and groups, and no method that was replaced on the instance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from layerrl.errors import SelectionError

_REDUCE = "__reduce_ex__"


def copied_by(optimizer: Any, rebuild: Callable[..., Any]) -> None:
    """Let copies of an optimizer be made by a function, which may be pickled by its name.

    Args:
        optimizer: Its `__reduce_ex__` is replaced on the instance, unless copies are refused.
        rebuild: Is given what makes an instance of the class, its arguments and the state.
    """
    if _REDUCE not in vars(optimizer):
        setattr(optimizer, _REDUCE, partial(_reduced, optimizer, rebuild))


def refuse_copies(optimizer: Any, why: str) -> None:
    """Refuse to copy an optimizer, or to pickle it.

    Args:
        optimizer: Its `__reduce_ex__` is replaced on the instance.
        why: What the copy would lack, a clause.
    """

    def refuse(_: int) -> Any:
        raise SelectionError(
            f"a copy of this {type(optimizer).__name__}, or a pickle of it, {why}. Copy its "
            "state_dict(), and load it into an optimizer that a masked trainer has made."
        )

    setattr(optimizer, _REDUCE, refuse)


def _reduced(optimizer: Any, rebuild: Callable[..., Any], protocol: int) -> tuple[Any, ...]:
    kind: Any = type(optimizer)
    make, args, state = kind.__reduce_ex__(optimizer, protocol)[:3]
    if isinstance(state, dict):  # classes that take all of their attributes
        state = {name: value for name, value in state.items() if not _is_replaced(name, value)}
    return rebuild, (make, args, state)


def _is_replaced(name: str, value: object) -> bool:
    return isinstance(value, MethodType) or name == _REDUCE or name.startswith("layerrl_")
