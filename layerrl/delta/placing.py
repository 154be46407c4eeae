"""Values put into a model in memory, in the form of a checkpoint or by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from layerrl.adapters import merged_weights, without_wrappers
from layerrl.blocks import unwrap
from layerrl.delta.record import checkpoint_form, checkpoint_groups, stand_ins
from layerrl.errors import DeltaError
from layerrl.shards import is_sharded, parts, shape, sharded_like, write


def put_tensors(
    model: nn.Module, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Overwrite parameters with tensors that have the names and shapes of `checkpoint_form`."""
    values = memory_form(model, trained, tensors)
    write(model, ((trained[name], sharded_like(value, trained[name])) for name, value in values))


def memory_form(
    model: nn.Module, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The opposite of `checkpoint_form`, a few tensors at a time, for `put_tensors`."""
    form = checkpoint_form(model, stand_ins(trained))
    num_elements = sum(shape(parameter).numel() for parameter in trained.values())
    if sum(tensor.numel() for tensor in form.values()) != num_elements:
        raise DeltaError(
            f"{type(unwrap(model)).__name__} drops or repeats elements of its layers when it is "
            "saved: a delta cannot be loaded into it. Use merge_delta and load the merged model."
        )
    return (
        (name, value)
        for names, renamed in checkpoint_groups(model, trained)
        for name, value in (
            _in_memory(model, {name: trained[name] for name in names}, tensors).items()
            if renamed is None
            else [(names[0], tensors[renamed])]
        )
    )


def _in_memory(
    model: nn.Module, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values that parameters have in a checkpoint, by their names and shapes in the model."""
    # `checkpoint_form` only moves elements: follow each one's position through it.
    sizes = [shape(parameter).numel() for parameter in trained.values()]
    positions = torch.arange(sum(sizes), device="cpu").split(sizes)
    form = checkpoint_form(
        model,
        {
            name: position.view(shape(parameter))
            for (name, parameter), position in zip(trained.items(), positions, strict=True)
        },
    )
    widest = reduce(torch.promote_types, (tensors[name].dtype for name in form))
    flat = torch.empty(sum(sizes), dtype=widest, device="cpu")
    for name, position in form.items():
        flat[position.reshape(-1)] = tensors[name].reshape(-1).to(flat.dtype)
    return {
        name: values.view(shape(parameter))
        for (name, parameter), values in zip(trained.items(), flat.split(sizes), strict=True)
    }


def copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of parameters' values; of sharded ones, of this process's part."""
    return {name: parts(p).detach().clone() for name, p in parameters.items()}


def like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A value as the parameter keeps it, so that to write it is only to copy it."""
    return sharded_like(value.to(parts(parameter).device, parameter.dtype), parameter)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by plain name; those that PEFT has adapted, by the name that they had before."""
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {without_wrappers(name): p for name, p in named}


def surroundings(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of a row of a few parameters, to tell whether a model is another one later.

    Returns:
        Name to row. Norms, which many models have in common, are not looked at, nor is what is
        sharded or packed.
    """
    named = named_parameters(model)
    out = {id(named[name]) for name in names if name in named}
    matrices = {
        name: p
        for name, p in named.items()
        if id(p) not in out and p.dim() > 1 and p.numel() and type(p) is nn.Parameter
        if not (is_sharded(p) or p.is_meta)
    }
    few = [*matrices][:: max(1, len(matrices) // 8)]
    # The second: tokens are appended, and the first one is often the padding.
    return {name: matrices[name].detach()[:2][-1].clone() for name in few}


def all_differ(now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> bool:
    """Whether there are rows, and none is what it was or what a cast made of it."""
    pairs = [(row, then[name].to(row.device)) for name, row in now.items() if name in then]
    return bool(pairs) and not any(
        torch.equal(row, before.to(dtype).to(row.dtype))
        for row, before in pairs
        for dtype in (before.dtype, torch.bfloat16, torch.float16)
    )


def present(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of these names, which must be there to write to, and hold nothing else."""
    named, merged = named_parameters(model), merged_weights(model)
    for name in names:
        if name in merged:
            raise DeltaError(
                f"the deltas of this {type(unwrap(model)).__name__} cannot be switched: adapters "
                f"are merged into {name!r}, and PEFT would later take them out of other values. "
                "Unmerge them first: model.unmerge_adapter()"
            )
        if name not in named or named[name].is_meta:
            why = "is not in it any more" if name not in named else "is on the meta device"
            raise DeltaError(
                f"the deltas of this {type(unwrap(model)).__name__} cannot be switched: {name!r} "
                f"{why}. Keep the model whole and in memory as it was when they were loaded."
            )
    return {name: named[name] for name in names}


def put_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into a model in place.

    Args:
        model: The model, wrapped or not.
        values: Name in the model to a value as `copies` or `like` gave it. They follow the model to
            another device or dtype, once.

    Raises:
        DeltaError: If a parameter is gone or has another shape. The model is then as it was.
    """
    parameters = present(model, values)
    for name, value in values.items():
        there = parts(parameters[name])
        if value.shape not in (there.shape, shape(parameters[name])):
            raise DeltaError(
                f"the deltas of this {type(unwrap(model)).__name__} cannot be switched: {name!r} "
                f"has shape {list(there.shape)}, when they were loaded it had {list(value.shape)}"
            )
        if (value.device, value.dtype) != (there.device, there.dtype):
            value.data = value.data.to(there.device, there.dtype)
    torch.clear_autocast_cache()  # inside a caller's autocast, casts of the values before
    write(model, ((p, sharded_like(values[n], p)) for n, p in parameters.items()))
