"""Sharded tensors: each rank holds a shard, as FSDP2 and DeepSpeed's ZeRO-3 keep them.

Putting a full tensor together is a collective: `whole` is called on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def parts(tensor: Tensor) -> Tensor:
    """A tensor as torch shards it: as a `DTensor` where ZeRO-3 shards a parameter in its own way.

    Between passes ZeRO-3 leaves a parameter empty and keeps each rank's shard in an attribute:
    the elements in a row, as many on each rank, padded at the end.

    Returns:
        For a parameter of ZeRO-3, its elements in a row, as a `DTensor` over the same memory; the
        tensor itself for any other.
    """
    if not hasattr(tensor, "ds_tensor"):
        return tensor
    parameter: Any = tensor
    part = parameter.ds_tensor.detach()
    mesh = _mesh(parameter.ds_process_group, part.device.type)
    first = mesh.get_local_rank() * part.numel()
    unpadded = part[: max(0, parameter.ds_numel - first)]
    size = torch.Size([parameter.ds_numel])
    return DTensor.from_local(unpadded, mesh, [Shard(0)], run_check=False, shape=size, stride=(1,))


@lru_cache(maxsize=8)
def _mesh(group: Any, device_type: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device_type)


def shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole of a tensor."""
    return getattr(tensor, "ds_shape", tensor.shape)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor. Of a sharded one this is a collective: call it on every rank."""
    held = parts(tensor)
    return held.full_tensor().view(shape(tensor)) if isinstance(held, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard: all of the tensor where it is not sharded."""
    held = parts(tensor)
    return held.to_local() if isinstance(held, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a shard."""
    return isinstance(parts(tensor), DTensor)


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a full value as a parameter is, by rank 0's value.

    Args:
        value: Of the parameter's shape; on every rank, sharded already or not.
        parameter: Says how to shard.

    Returns:
        `value` itself where the parameter is not sharded, or both are; otherwise one like the
        parameter's `parts`.
    """
    like = parts(parameter)
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    on_device = value.detach().to(like.device).reshape(like.shape)
    # On the mesh's device, and the parameter may lie on the CPU: FSDP2 can offload it.
    return distribute_tensor(on_device, like.device_mesh, like.placements).to(like.device)


def with_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a value that is kept beside a parameter, moved to where the parameter is now.

    `bf16_full_eval` has transformers place the model when training starts, after such values were
    taken, and a user may move it at any time.
    """
    device = parts(parameter).device
    if value.device != device:
        value.data = value.data.to(device)
    return value


def reshard(model: nn.Module) -> None:
    """Have FSDP2 give up what it has gathered: after a pass without a backward, its root's tensors.

    Those of other modules, too, with `reshard_after_forward: false`. No collective.
    """
    for module in model.modules():
        give_up = getattr(module, "reshard", None)
        if callable(give_up) and hasattr(module, "unshard"):
            give_up()


@torch.no_grad()
def write(model: nn.Module, values: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Overwrite parameters, so that the next pass gathers sharded ones anew.

    FSDP2 and ZeRO-3 keep some tensors of `model` gathered after a pass. The values are as
    `sharded_like` gives them.
    """
    reshard(model)
    under_way = getattr(model, "ds_inflight_param_registry", {})  # ZeRO-3's, of the pass before
    for handle in under_way.values():
        handle.wait()
    under_way.clear()
    for parameter, value in values:
        let_go = getattr(parameter, "partition", None)
        if callable(let_go):
            let_go()
        parts(parameter).copy_(value)


def whole_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict as in one process: whole tensors, on the CPU. A collective."""
    return _with_state(
        state_dict, lambda _, value: whole(value).cpu() if isinstance(value, DTensor) else value
    )


def sharded_state(state_dict: dict[str, Any], parameters: Mapping[int, Tensor]) -> dict[str, Any]:
    """The opposite of `whole_state`; `parameters` are the optimizer's, by their index in it."""

    def sharded(index: int, value: Any) -> Any:
        is_like = isinstance(value, Tensor) and value.shape == parameters[index].shape
        return sharded_like(value, parameters[index]) if is_like else value

    return _with_state(state_dict, sharded)


def _with_state(state_dict: dict[str, Any], made: Callable[[int, Any], Any]) -> dict[str, Any]:
    """The same, with other values of each parameter's state."""
    states = {
        index: {key: made(index, value) for key, value in state.items()}
        for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}
