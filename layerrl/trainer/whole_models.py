"""Checkpoints that hold a whole model, taken by a run that trains a part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from layerrl.blocks import plain_name, unwrap
from layerrl.delta import checkpoint_form
from layerrl.errors import DeltaError, FrozenTensorError
from layerrl.frozen import fingerprints, frozen_rows, frozen_tensors
from layerrl.schema import fitted
from layerrl.selection import LayerSelection
from layerrl.stored import bytes_of, decoded, refuse_unusual, refused_as, tensors_in


class CheckpointError(DeltaError, FrozenTensorError):
    """A whole model's checkpoint of another run: with it, frozen tensors would have changed."""


def trained_tensors(model: nn.Module, folder: Path, selection: LayerSelection) -> dict[str, Tensor]:
    """The trained tensors of a whole model by name, if all else in it is as in this one."""
    frozen = checkpoint_form(model, frozen_tensors(model, selection))
    wanted = checkpoint_form(model, selection.parameters(model))
    other_names = _other_names(model)
    with ExitStack() as files, _readable(folder):
        stored = _stored(folder, files)
        differ = [
            name
            for name, tensor in frozen.items()
            if not _is_stored(tensor, [name, *other_names.get(name, [])], stored)
        ]
        _refuse(differ, len(frozen), folder, selection)
        tensors: dict[str, Tensor] = {}
        for name, tensor in wanted.items():
            if name not in stored:
                raise DeltaError(
                    f"the checkpoint {folder} has no {name!r}, which {selection} trains"
                )
            tensors[name] = stored[name]()
            if tensors[name].shape != tensor.shape:
                raise DeltaError(
                    f"{name!r} has shape {list(tensors[name].shape)} in the checkpoint {folder}, "
                    f"and {list(tensor.shape)} in the model"
                )
            if tensors[name].is_floating_point() != tensor.is_floating_point():
                raise DeltaError(
                    f"{name!r} is {tensors[name].dtype} in the checkpoint {folder}, and "
                    f"{tensor.dtype} in the model"
                )
        differ = []
        for name, run, own in frozen_rows(model, selection):
            [value] = [tensors[n][run] for n in checkpoint_form(model, {name: own})]
            if len({*fingerprints({"stored": value.to(own.dtype), "own": own}).values()}) > 1:
                differ.append(f"{name}[{run.start}:{run.stop}]")
        _refuse(differ, len(differ), folder, selection)
        return tensors


def _refuse(differ: list[str], num_frozen: int, folder: Path, selection: LayerSelection) -> None:
    if differ:
        shown = ", ".join(differ[:5]) + (", ..." if len(differ) > 5 else "")
        raise CheckpointError(
            f"{len(differ)} of {num_frozen} frozen tensors are not this run's in the checkpoint "
            f"{folder}: {shown}. It is another base's checkpoint, or of a run that trained more "
            f"than {selection}. Nothing was loaded. Resume it with the base and the selection that "
            "wrote it, or start a new run from its weights: pass the folder as the model."
        )


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DeltaError(
            f"the weights in the checkpoint {folder} cannot be read: {error}"
        ) from error


def _is_stored(tensor: Tensor, names: list[str], stored: dict[str, Callable[[], Tensor]]) -> bool:
    found = next((name for name in names if name in stored), None)
    if found is None:
        return False
    value = stored[found]()
    if value.shape != tensor.shape:
        return False
    values = {"stored": value.to(tensor.dtype), "own": tensor.detach()}
    return len({*fingerprints(values).values()}) == 1


def _other_names(model: nn.Module) -> dict[str, list[str]]:
    """Of tied tensors, which a checkpoint holds once, all names that they have."""
    names: dict[int, list[str]] = {}
    for name, parameter in unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return {name: tied for tied in names.values() for name in tied}


def _stored(folder: Path, files: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """Each tensor's name and what reads it; the first of the files that transformers looks for."""
    try:
        for single, index in (
            (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
            (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
        ):
            if (folder / single).is_file():
                return _tensors(folder / single, files)
            if (folder / index).is_file():
                with refused_as(DeltaError, f"{folder / index} is damaged"):
                    data = fitted(dict[str, Any], decoded(bytes_of(folder / index)))
                    weight_map = fitted(dict[str, str], data.get("weight_map"), "weight_map")
                found: dict[str, Callable[[], Tensor]] = {}
                for shard in sorted({*weight_map.values()}):
                    found |= _tensors(folder / shard, files)
                return found
    except DeltaError:
        raise
    except (
        *(AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
        UnpicklingError,
    ) as error:
        raise DeltaError(
            f"the weights in the checkpoint {folder} are damaged: {type(error).__name__}: {error}"
        ) from error
    raise DeltaError(
        f"there is no valid checkpoint at {folder}: it has neither a delta (delta.safetensors, "
        f"delta.json) nor a whole model's weights ({SAFE_WEIGHTS_NAME})"
    )


def _tensors(file: Path, files: ExitStack) -> dict[str, Callable[[], Tensor]]:
    refuse_unusual(file)
    if file.suffix == ".bin":
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{name!r} in {file.name} is {value!r:.80}, expected a tensor")
        return {name: lambda value=value: value for name, value in values.items()}
    opened: Any = files.enter_context(tensors_in(file))
    return {name: lambda name=name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
