"""The trained layers' weights on disk: save them, load them; `merging` makes whole models of them.

A delta is a slice of a checkpoint. Its tensors carry the names and shapes that `save_pretrained`
gives them (experts apart, prefixes as on disk), so that merging needs no model in memory, and each
remembers the base tensor it replaces, so that it fits that base and no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from layerrl.blocks import unwrap
from layerrl.delta.card import write_card
from layerrl.errors import DeltaError, SelectionError
from layerrl.masking import fingerprints
from layerrl.selection import LayerSelection
from layerrl.shards import shape, sharded_like, whole, write

FORMAT_VERSION = 1
_TENSORS, _META = "delta.safetensors", "delta.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaBase:
    """What a delta has to know of the model it will be applied to, taken before training."""

    name: str | None
    """Hub id or folder that the base came from, where its config says so."""
    revision: str | None
    """Commit of that hub id."""
    model_type: str | None
    """The config's architecture, `"llama"`."""
    dtypes: dict[str, str]
    """Checkpoint name to dtype of each tensor that the delta replaces."""
    shapes: dict[str, list[int]]
    """Checkpoint name to shape of each tensor that the delta replaces."""
    fingerprints: dict[str, str]
    """Checkpoint name to fingerprint of each tensor that the delta replaces."""

    @classmethod
    def of(cls, model: nn.Module, selection: LayerSelection) -> DeltaBase:
        """Record a model as it is now: call it before training.

        Args:
            model: The model that will be trained. Not changed. Every process has to call this where
                it is sharded.
            selection: What will train.

        Returns:
            The record that `save_delta` takes as `base`.
        """
        config = getattr(unwrap(model), "config", None)
        tensors = checkpoint_form(model, _whole(selection.parameters(model)))
        return cls(
            name=getattr(config, "_name_or_path", None) or None,
            revision=getattr(config, "_commit_hash", None),
            model_type=_model_type(model),
            dtypes={name: _dtype_name(tensor) for name, tensor in tensors.items()},
            shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
            fingerprints=fingerprints(tensors),
        )


def save_delta(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    selection: LayerSelection,
    base: DeltaBase | nn.Module,
    is_main_process: bool = True,
) -> Path:
    """Write the selected tensors of a trained model, and what they replace, to a new folder.

    Args:
        model: The trained model. Not changed.
        path: Folder to make. It is written under another name and renamed when complete.
        selection: What was trained.
        base: The model before training: `DeltaBase.of(model, selection)` taken then, or another
            instance that still is what `model` was.
        is_main_process: Whether this process writes. Where the model is sharded, every process has
            to call this, and one of them writes.

    Returns:
        The folder, with `delta.safetensors` (the tensors, in the model's dtype) and `delta.json`.

    Raises:
        DeltaError: If the folder exists or cannot be written, or `base` is a different model.
        SelectionError: If the selection does not fit the model.
    """
    if not isinstance(selection, LayerSelection):
        raise DeltaError(f"selection is {selection!r}, expected what select_layers returns")
    if base is model or not isinstance(base, DeltaBase | nn.Module):
        given = "the trained model itself" if base is model else repr(base)
        raise DeltaError(
            f"base is {given}, expected the model before training: DeltaBase.of(model, selection) "
            "taken then, or another instance that was not trained"
        )
    tensors = checkpoint_form(model, _whole(selection.parameters(model)))
    if any(tensor.is_meta for tensor in tensors.values()):
        raise DeltaError("the model is on the meta device: it has no weights to save")
    if isinstance(base, nn.Module):
        base = DeltaBase.of(base, selection)
    if not is_main_process:
        return Path(path)
    if set(tensors) != set(base.fingerprints):
        raise DeltaError(
            f"the base has other tensors than the model to save: "
            f"{_difference(tensors, base.fingerprints)}. Take DeltaBase.of(model, selection) from "
            "this model, with this selection, before training."
        )
    for name, tensor in tensors.items():
        if list(tensor.shape) != base.shapes[name]:
            raise DeltaError(
                f"the base's {name!r} has shape {base.shapes[name]}, the model's "
                f"{list(tensor.shape)}: another model"
            )
    if base.model_type != _model_type(model):
        raise DeltaError(
            f"the base is of type {base.model_type!r}, the model to save of {_model_type(model)!r}"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    now = fingerprints(tensors)
    meta = {
        "format_version": FORMAT_VERSION,
        "base_model": base.name,
        "base_revision": base.revision,
        "model_type": base.model_type,
        "selection": json.loads(selection.to_json()),
        "tensors": {
            name: {
                "dtype": _dtype_name(tensor),
                "shape": list(tensor.shape),
                "fingerprint": now[name],
                "base_dtype": base.dtypes[name],
                "base_fingerprint": base.fingerprints[name],
            }
            for name, tensor in tensors.items()
        },
    }
    with new_folder(path) as folder:
        save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})
        text = json.dumps({**meta, "sha256": _digest(meta)}, indent=1)
        (folder / _META).write_text(text + "\n")
        write_card(folder, meta)
    return Path(path)


def load_delta(model: nn.Module, path: str | os.PathLike[str]) -> LayerSelection:
    """Put a delta's weights into the model it was made from.

    Args:
        model: The base, in any floating-point dtype that holds what the delta was made from. Its
            selected tensors are overwritten (converted to its dtype), after every check passed.
        path: A delta's folder.

    Returns:
        The selection the delta was trained with.

    Raises:
        DeltaError: If the folder is missing, damaged, or of a newer format; if the model has
            another architecture, other tensors or shapes; or if one of the tensors to replace is
            not the one the delta was made from. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise DeltaError(
            f"expected a model to load the delta into, got {model!r:.80}. To write a merged "
            "checkpoint from folders, use merge_delta(base, path, out)."
        )
    meta = read_meta(Path(path))
    tensors = {name: read_tensor(Path(path), name, meta) for name in meta["tensors"]}
    selection = LayerSelection.from_json(json.dumps(meta["selection"]))
    check_model_type(meta["model_type"], _model_type(model), path)
    try:
        trained = selection.parameters(model)
    except SelectionError as error:
        raise DeltaError(f"the delta at {path} does not fit the model: {error}") from error
    current = checkpoint_form(model, _whole(trained))
    if set(current) != set(tensors):
        raise DeltaError(
            f"the delta at {path} does not fit {type(unwrap(model)).__name__}: "
            f"{_difference(tensors, current)}"
        )
    for name, tensor in current.items():
        if tensor.is_meta:
            raise DeltaError(f"{name!r} is on the meta device: load the model's weights first")
        check_base(name, tensor, meta, path)
    put_tensors(model, trained, tensors)
    return selection


def restore_delta(
    model: nn.Module, path: str | os.PathLike[str], *, selection: LayerSelection, base: DeltaBase
) -> None:
    """Put a delta back into the run it came from, whatever its model holds now.

    Args:
        model: A model that was `base` and trained `selection` since. Overwritten after the checks.
        path: A delta's folder.
        selection: What the run trains; the delta must have trained the same.
        base: The model before training.

    Raises:
        DeltaError: If the folder is missing or damaged, or the delta has another selection or base.
    """
    meta = read_meta(Path(path))
    tensors = {name: read_tensor(Path(path), name, meta) for name in meta["tensors"]}
    trained_before = LayerSelection.from_json(json.dumps(meta["selection"]))
    if trained_before != selection:
        raise DeltaError(f"{path} trained {trained_before}; this run trains {selection}")
    for name, described in meta["tensors"].items():
        found = base.fingerprints.get(name)
        if found != described["base_fingerprint"]:
            raise DeltaError(
                f"{path} was made from another base than this run's: the fingerprint of {name!r} "
                f"is {found}, expected {described['base_fingerprint']}"
            )
    put_tensors(model, selection.parameters(model), tensors)


def checkpoint_form(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names, and in the shapes, that `model.save_pretrained` would give them.

    Args:
        model: The model they belong to.
        tensors: Name in the model to tensor.

    Returns:
        Name in a checkpoint to tensor. The same tensors for most models; mixtures of experts are
        split into one tensor per expert.
    """
    base = unwrap(model)
    if not hasattr(base, "save_pretrained"):
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        return dict(revert_weight_conversion(base, dict(tensors)))  # pyright: ignore[reportArgumentType]


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor).detach() for name, tensor in tensors.items()}


def put_tensors(
    model: nn.Module, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Undo `checkpoint_form`: it only moves elements, so follow each one's position through it."""
    sizes = [shape(parameter).numel() for parameter in trained.values()]
    positions = torch.arange(sum(sizes)).split(sizes)
    form = checkpoint_form(
        model,
        {
            name: position.view(shape(parameter))
            for (name, parameter), position in zip(trained.items(), positions, strict=True)
        },
    )
    if sum(position.numel() for position in form.values()) != sum(sizes):
        raise DeltaError(
            f"{type(unwrap(model)).__name__} drops or repeats elements of its layers when it is "
            "saved: a delta cannot be loaded into it. Use merge_delta and load the merged model."
        )
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    flat = torch.empty(sum(sizes), dtype=widest)
    for name, position in form.items():
        flat[position.reshape(-1)] = tensors[name].reshape(-1).to(flat.dtype)
    write(
        model,
        {
            parameter: sharded_like(values.view(shape(parameter)), parameter)
            for parameter, values in zip(trained.values(), flat.split(sizes), strict=True)
        },
    )


def read_meta(path: Path) -> dict[str, Any]:
    """A delta's description, checked against itself and against the tensors' names."""
    for file in (path / _META, path / _TENSORS):
        if not file.is_file():
            raise DeltaError(
                f"no delta at {path}: {file.name} is missing (expected {_META} and {_TENSORS})"
            )
    try:
        meta = json.loads((path / _META).read_text())
        version = meta["format_version"]
        if version > FORMAT_VERSION:
            raise DeltaError(
                f"the delta at {path} has format version {version}; this layerrl reads up to "
                f"{FORMAT_VERSION}. Upgrade layerrl."
            )
        if meta.pop("sha256") != _digest(meta):
            raise DeltaError(f"{path / _META} was changed after it was written: checksum differs")
        with safe_open(path / _TENSORS, framework="pt") as stored:
            names = dict.fromkeys(stored.keys())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DeltaError):
            raise
        raise DeltaError(f"{path / _META} is damaged: {type(error).__name__}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise DeltaError(f"{path / _TENSORS} is damaged: {error}") from error
    if set(names) != set(meta["tensors"]):
        difference = _difference(names, meta["tensors"])
        raise DeltaError(f"{path / _TENSORS} is damaged: {difference}")
    return meta


def read_tensor(path: Path, name: str, meta: Mapping[str, Any]) -> Tensor:
    """One of a delta's tensors, checked against the delta's description."""
    try:
        with safe_open(path / _TENSORS, framework="pt") as stored:
            tensor = stored.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise DeltaError(f"{path / _TENSORS} is damaged: {error}") from error
    expected = meta["tensors"][name]
    found = {
        "dtype": _dtype_name(tensor),
        "shape": list(tensor.shape),
        "fingerprint": fingerprints({name: tensor})[name],
    }
    for key, value in found.items():
        if value != expected[key]:
            raise DeltaError(
                f"{path / _TENSORS} is damaged: {key} of {name!r} is {value}, written was "
                f"{expected[key]}"
            )
    return tensor


def check_base(name: str, tensor: Tensor, meta: Mapping[str, Any], path: object) -> None:
    """`tensor` must be what the delta's `name` replaces, in a dtype at least as wide."""
    expected = meta["tensors"][name]
    if list(tensor.shape) != expected["shape"]:
        raise DeltaError(
            f"{name!r} has shape {list(tensor.shape)}, in the delta at {path} it is "
            f"{expected['shape']}: another base"
        )
    as_recorded = tensor.detach().to(getattr(torch, expected["base_dtype"]))
    found = fingerprints({name: as_recorded})[name]
    if found == expected["base_fingerprint"]:
        return
    if fingerprints({name: tensor.detach()})[name] == expected["fingerprint"]:
        raise DeltaError(f"the delta at {path} is already in this model ({name!r} holds it)")
    revision = f" at {meta['base_revision']}" if meta["base_revision"] else ""
    raise DeltaError(
        f"{name!r} is not the tensor that the delta at {path} was made from: fingerprint {found}, "
        f"expected {expected['base_fingerprint']}. Its base is "
        f"{meta['base_model'] or 'an unnamed model'}{revision}, in {expected['base_dtype']}; other "
        "weights, or the same rounded to fewer bits, are refused."
    )


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(unwrap(model), "config", None), "model_type", None)


def check_model_type(expected: str | None, found: str | None, path: object) -> None:
    """The architecture must be the one that the delta was made from."""
    if found != expected:
        raise DeltaError(
            f"the delta at {path} was made from a model of type {expected!r}, this one is {found!r}"
        )


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears under its name only when the block ended well."""
    given, path = path, Path(path).absolute()
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        if path.exists() or path.is_symlink():
            raise DeltaError(f"{given} exists already: choose another folder or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise DeltaError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _difference(given: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    return (
        f"missing tensors {missing[:3]} ({len(missing)}), extra tensors {extra[:3]} ({len(extra)})"
    )
