"""A delta in its base: a whole model on disk, without one in memory."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerrl.delta import check_base, check_model_type, new_folder, read_meta, read_tensor
from layerrl.errors import DeltaError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"}


def merge_delta(
    base: str | os.PathLike[str], path: str | os.PathLike[str], out: str | os.PathLike[str]
) -> Path:
    """Write the base with a delta in it: a whole model that plain transformers loads.

    Shards are copied as files and only the bytes of the delta's tensors are replaced, so memory
    holds one tensor at a time and everything else stays bit for bit what it was.

    Args:
        base: Folder of the base's safetensors checkpoint, or its hub id.
        path: A delta's folder.
        out: Folder to make. It is written under another name and renamed when complete.

    Returns:
        The folder: weights in the base's dtypes, with its config and tokenizer files.

    Raises:
        DeltaError: If either input is missing or damaged, the base is not the one the delta was
            made from or is quantised, or `out` exists or cannot be written. Nothing is left
            half-written.
    """
    meta = read_meta(Path(path))
    made_from = os.fspath(base) == meta["base_model"]
    folder = _checkpoint_folder(base, meta["base_revision"] if made_from else None)
    config = _json_object(folder / "config.json")
    check_model_type(meta["model_type"], config.get("model_type"), path)
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise DeltaError(
            f"the base {base} is quantised ({method}), expected the full-precision model that it "
            "was made from: merge into that one, and quantise the result if you need to."
        )
    shard_of = _shard_of(folder)
    if absent := sorted(set(meta["tensors"]) - set(shard_of)):
        raise DeltaError(
            f"the base {base} has no tensor {absent[0]!r}, which the delta at {path} replaces "
            f"({len(absent)} of {len(meta['tensors'])} are missing). Is it the model it was made "
            "from?"
        )
    lost = trained = 0
    for name in meta["tensors"]:
        tensor = read_tensor(Path(path), name, meta)
        trained += tensor.numel()
        with _readable(folder / shard_of[name]) as shard:
            replaced = shard.get_tensor(name)
        check_base(name, replaced, meta, path)
        if tensor.dtype != replaced.dtype:
            lost += int(((tensor.to(replaced.dtype) == replaced) & (tensor != replaced)).sum())
    if lost:
        warnings.warn(
            f"{lost / trained:.1%} of the trained elements changed by less than the base's dtype "
            f"can hold: in {out} they are as before training. Merge onto a float32 copy of the "
            "base to keep them.",
            stacklevel=2,
        )
    kept = {*shard_of.values()}
    if _SINGLE not in kept:
        kept.add(_INDEX)
    with new_folder(out) as made:
        for file in sorted(folder.iterdir()):
            weights = file.suffix in _OTHER_WEIGHTS or ".safetensors" in file.name
            if file.is_file() and (file.name in kept or not weights):
                shutil.copyfile(file, made / file.name)
        if (folder / "additional_chat_templates").is_dir():
            shutil.copytree(
                folder / "additional_chat_templates", made / "additional_chat_templates"
            )
        for name in meta["tensors"]:
            tensor = read_tensor(Path(path), name, meta)
            _replace_bytes(made / shard_of[name], name, tensor)
    return Path(out)


def _checkpoint_folder(base: str | os.PathLike[str], revision: str | None) -> Path:
    folder = Path(base)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", _INDEX, "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
        return Path(snapshot_download(os.fspath(base), revision=revision, allow_patterns=patterns))
    except Exception as error:  # whatever the hub client raises, the sentence is the same
        raise DeltaError(
            f"base {os.fspath(base)!r} is no folder here and no model the hub gives: {error}"
        ) from error


def _json_object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DeltaError(f"no transformers model at {file.parent}: {file.name}: {error}") from error
    if not isinstance(data, dict):
        raise DeltaError(f"{file} is damaged: expected a JSON object, got {data!r:.80}")
    return data


def _shard_of(folder: Path) -> dict[str, str]:
    """Tensor name to the file of a checkpoint that holds it; the single file first, as upstream."""
    if (folder / _SINGLE).is_file():
        with _readable(folder / _SINGLE) as shard:
            return dict.fromkeys(shard.keys(), _SINGLE)
    if not (folder / _INDEX).is_file():
        raise DeltaError(
            f"no safetensors checkpoint at {folder}: neither {_INDEX} nor {_SINGLE}. Write one "
            "with model.save_pretrained(...); pickled and GGUF weights are not read."
        )
    shard_of = _json_object(folder / _INDEX).get("weight_map")
    if not isinstance(shard_of, dict):
        raise DeltaError(f"{folder / _INDEX} is damaged: it has no weight_map")
    for file in sorted(set(shard_of.values())):
        with _readable(folder / file):
            pass
    return shard_of


@contextmanager
def _readable(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise DeltaError(f"the base's {file} is missing or damaged: {error}") from error


def _replace_bytes(file: Path, name: str, tensor: Tensor) -> None:
    """Overwrite one tensor in a safetensors file, in the dtype it has there."""
    with safe_open(file, framework="pt") as shard:
        dtype = shard.get_tensor(name).dtype
    with file.open("r+b") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        begin, end = json.loads(stream.read(header_size))[name]["data_offsets"]
        data = tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if len(data) != end - begin:
            raise DeltaError(
                f"{name!r} takes {len(data)} bytes, {file.name} has {end - begin} for it"
            )
        stream.seek(8 + header_size + begin)
        stream.write(data)
