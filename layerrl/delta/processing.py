"""A run's tokenizer or processor, chat template and generation config, kept with its delta."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from layerrl.blocks import unwrap
from layerrl.checks import shown
from layerrl.delta.record import vocabulary
from layerrl.digests import file_digest
from layerrl.errors import DeltaError
from layerrl.files import files_in

WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".ckpt")
}
_NEVER = {
    *("config.json", "adapter_config.json", "delta.json", "readme.md"),
    "model.safetensors.index.json",
}
_GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"
# What some tokenizer class writes: a base's own goes where a run had another tokenizer.
_TOKENIZER = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", TEMPLATES),
}


def refuse_misfit(processing_class: Any, model: nn.Module) -> None:
    """Refuse a tokenizer with ids beyond the embedding, but those that the model's own has."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    rows, ids = vocabulary(model), getattr(tokenizer, "get_vocab", dict)()
    unknown = sorted(
        (index, token) for token, index in ids.items() if rows is not None and index >= rows
    )
    if unknown:
        usual = _ids_of_base(tokenizer, model)
        unknown = [(index, token) for index, token in unknown if usual.get(token) != index]
    if unknown:
        tokens = ", ".join(f"{token!r} ({index})" for index, token in unknown[:5])
        raise DeltaError(
            f"{len(unknown)} tokens of the {type(tokenizer).__name__} have ids beyond the model's "
            f"vocabulary of {rows} rows: {tokens}{', ...' if len(unknown) > 5 else ''}. Resize the "
            "embeddings before the trainer is made, save that model as the base, or take the "
            "tokenizer that belongs to the model."
        )


def _ids_of_base(tokenizer: Any, model: nn.Module) -> dict[str, int]:
    """Some models are published with a token too many (Gemma 3's images, in its text models)."""
    name = getattr(getattr(unwrap(model), "config", None), "name_or_path", "")
    if not name or getattr(tokenizer, "name_or_path", None) != name:
        return {}
    try:
        return type(tokenizer).from_pretrained(name, local_files_only=True).get_vocab()
    except Exception:  # whatever a tokenizer's own code raises: it is not known
        return {}


def check_processing(processing_class: Any) -> None:
    """Refuse what is no tokenizer or processor, as its class is none."""
    saves = callable(getattr(processing_class, "save_pretrained", None))
    if not saves or isinstance(processing_class, type):
        raise DeltaError(
            f"processing_class is {shown(processing_class)}, expected a tokenizer or processor "
            "with save_pretrained"
        )


def save_processing(processing_class: Any, model: nn.Module, folder: Path) -> None:
    """Write a tokenizer or processor that fits the model, and its generation settings."""
    check_processing(processing_class)
    refuse_misfit(processing_class, model)
    processing_class.save_pretrained(folder)
    settings = getattr(unwrap(model), "generation_config", None)
    if settings is not None:
        settings.to_json_file(folder / _GENERATION)  # save_pretrained refuses what generate takes


def sums_of(folder: Path) -> dict[str, str]:
    """Every file in a folder that is neither a delta's nor a model's, with its SHA-256."""
    files = files_in(folder).items()
    return {name: file_digest(path) for name, path in files if not is_refused(name)}


def is_refused(name: str) -> bool:
    """Whether a name in a description is that of a model's file, or leads out of the folder."""
    path = PurePosixPath(name)
    # A backslash or a drive leads out of the folder on Windows.
    odd = {"\0", "\\", ":"} & {*name} or path.is_absolute() or ".." in path.parts
    weights = any(suffix.lower() in WEIGHTS for suffix in path.suffixes)
    return (
        bool(odd) or not path.parts or str(path) != name or weights or path.name.lower() in _NEVER
    )


def replaced_by(files: Iterable[str]) -> set[str]:
    """What of a base these files stand in for."""
    names = {PurePosixPath(file).parts[0] for file in files}
    return names | (_TOKENIZER if names & _TOKENIZER else set())


def copy_processing(source: Path, files: Mapping[str, str], made: Path) -> None:
    """Copy a delta's files into a merged folder, each compared with its SHA-256."""
    for name, sum_then in files.items():
        if not (source / name).is_file():
            raise DeltaError(f"{source / name} is missing, which was written with the delta")
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, made / name)
        if file_digest(made / name) != sum_then:
            raise DeltaError(
                f"{source / name} was changed after it was written: checksum differs. Change it in "
                "the merged folder instead."
            )
