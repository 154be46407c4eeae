"""Values in the form of a checkpoint, put into a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from layerrl.blocks import unwrap
from layerrl.delta.record import checkpoint_form, checkpoint_groups, stand_ins
from layerrl.errors import DeltaError
from layerrl.shards import shape, sharded_like, write


def put_tensors(
    model: nn.Module, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Overwrite parameters with tensors that have the names and shapes of `checkpoint_form`.

    Args:
        model: Theirs.
        trained: Name in the model to parameter.
        tensors: What `checkpoint_form` would make of them, with other values.

    Raises:
        DeltaError: If the model drops or repeats elements when it is saved. It is then as it was.
    """
    values = memory_form(model, trained, tensors)
    write(model, ((trained[name], sharded_like(value, trained[name])) for name, value in values))


def memory_form(
    model: nn.Module, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The opposite of `checkpoint_form`, a few tensors at a time.

    Args:
        model: As `put_tensors` takes it.
        trained: As `put_tensors` takes it.
        tensors: As `put_tensors` takes it.

    Returns:
        Names of `trained` and their full values.

    Raises:
        DeltaError: As `put_tensors`, when it is called.
    """
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
