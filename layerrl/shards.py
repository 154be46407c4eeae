"""Tensors of which each process holds a part, as FSDP2 keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Every process has to ask where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds: all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part."""
    return isinstance(tensor, DTensor)


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value, in parts where a parameter is: those of the first process's value.

    Args:
        value: Of the parameter's shape; on every process, sharded already or not.
        parameter: Says how to shard.

    Returns:
        `value` itself where the parameter is not sharded, or both are.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    on_device = value.detach().to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements)


def forget_gathered(model: nn.Module) -> None:
    """Let the next pass gather sharded tensors anew, after their parts were written to.

    Args:
        model: The model. FSDP2 keeps some tensors gathered until a backward that need not come.
    """
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard) and hasattr(module, "unshard"):
            reshard()


def whole_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict without shards: the one that it would have in one process.

    Args:
        state_dict: What the optimizer gives. Every process has to ask.

    Returns:
        The same, with whole tensors on the CPU in place of sharded ones.
    """
    return {
        **state_dict,
        "state": {
            index: {
                key: whole(value).cpu() if isinstance(value, DTensor) else value
                for key, value in state.items()
            }
            for index, state in state_dict["state"].items()
        },
    }


def sharded_state(state_dict: dict[str, Any], parameters: Mapping[int, Tensor]) -> dict[str, Any]:
    """The opposite of `whole_state`.

    Args:
        state_dict: Without shards.
        parameters: The optimizer's parameters by the index that they have in it.

    Returns:
        The same, with whatever has a parameter's shape sharded as that is.
    """
    return {
        **state_dict,
        "state": {
            index: {
                key: sharded_like(value, parameters[index])
                if isinstance(value, Tensor) and value.shape == parameters[index].shape
                else value
                for key, value in state.items()
            }
            for index, state in state_dict["state"].items()
        },
    }
