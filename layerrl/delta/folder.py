"""A delta's folder: what is in it, checked against itself; a folder that appears when complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from layerrl.checks import whole_number
from layerrl.delta.processing import refuse_file_name
from layerrl.delta.record import DeltaBase, dtype_name
from layerrl.digests import json_digest
from layerrl.errors import DeltaError, SelectionError
from layerrl.frozen import fingerprints
from layerrl.selection import LayerSelection

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

FORMAT_VERSION = 2
"""Version 1 knew of the base only the tensors that the delta replaces."""
TENSORS, META = "delta.safetensors", "delta.json"
_FINGERPRINT, _SHA256 = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A delta on disk."""

    path: Path
    """Its folder."""
    version: int
    """Of the format."""
    selection: LayerSelection
    """What was trained."""
    base: DeltaBase
    """What it was made from; in version 1 without frozen tensors, vocabulary and config."""
    dtypes: dict[str, str]
    """Name to dtype of each trained tensor."""
    fingerprints: dict[str, str]
    """Name to fingerprint of each trained tensor."""
    base_digest: str | None
    """`DeltaBase.digest` of the base."""
    result_digest: str | None
    """The same of what training made of it: the base of a delta on top of this one."""
    files: dict[str, str]
    """Tokenizer, processor and generation settings in the folder: name to SHA-256."""

    def tensor(self, name: str) -> Tensor:
        """One of the trained tensors, checked against the description.

        Args:
            name: Its name in a checkpoint.

        Returns:
            The tensor, as it was written.

        Raises:
            DeltaError: If it is not the one that was written.
        """
        try:
            with safe_open(self.path / TENSORS, framework="pt") as stored:
                tensor = stored.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DeltaError(f"{self.path / TENSORS} is damaged: {error}") from error
        checks = {
            "dtype": (dtype_name(tensor), self.dtypes[name]),
            "shape": (list(tensor.shape), self.base.shapes[name]),
            "fingerprint": (fingerprints({name: tensor})[name], self.fingerprints[name]),
        }
        for what, (found, written) in checks.items():
            if found != written:
                raise DeltaError(
                    f"{self.path / TENSORS} is damaged: {what} of {name!r} is {found}, written was "
                    f"{written}"
                )
        return tensor

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Delta:
        """A delta's description, checked against itself and against the tensors' names.

        Args:
            path: Its folder.

        Returns:
            The delta, no tensor of which is read.

        Raises:
            DeltaError: If a file is missing or damaged, or of a newer format.
        """
        path = Path(path)
        for file in (path / META, path / TENSORS):
            if not file.is_file():
                raise DeltaError(
                    f"no delta at {path}: {file.name} is missing (expected {META} and {TENSORS})"
                )
        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
            version = meta["format_version"]
            if version > FORMAT_VERSION:
                raise DeltaError(
                    f"the delta at {path} has format version {version}; this layerrl reads up to "
                    f"{FORMAT_VERSION}. Upgrade layerrl."
                )
            if meta.pop("sha256") != json_digest(meta):
                raise DeltaError(
                    f"{path / META} was changed after it was written: checksum differs"
                )
            delta = cls._described(path, meta)
            with safe_open(path / TENSORS, framework="pt") as stored:
                names = dict.fromkeys(stored.keys())
        except DeltaError:
            raise
        except (OSError, SafetensorError) as error:
            raise DeltaError(f"{path / TENSORS} is damaged: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise DeltaError(
                f"{path / META} is damaged: {type(error).__name__}: {error}"
            ) from error
        if set(names) != set(delta.fingerprints):
            raise DeltaError(
                f"{path / TENSORS} is damaged: {difference(names, delta.fingerprints)}"
            )
        return delta

    @classmethod
    def _described(cls, path: Path, meta: dict[str, Any]) -> Delta:
        version = _count(meta["format_version"], "format_version")
        tensors = _kind(meta["tensors"], dict, "tensors")
        if version < 1 or not tensors:
            raise ValueError(f"version {version} with {len(tensors)} tensors")
        rest = _kind(meta["base"], dict, "base") if version > 1 else {}
        frozen = _kind(rest.get("frozen", {}), dict, "frozen")
        described = {
            name: (value["base_dtype"], value["shape"], value["base_fingerprint"])
            for name, value in tensors.items()
        } | {
            name: (value["dtype"], value["shape"], value["fingerprint"])
            for name, value in frozen.items()
        }
        if len(described) != len(tensors) + len(frozen):
            raise ValueError("a tensor is both trained and frozen")
        given = {name: (v["dtype"], v["shape"], v["fingerprint"]) for name, v in tensors.items()}
        for name, (dtype, shape, mark) in (*described.items(), *given.items()):
            _tensor(name, dtype, shape, mark)
        tied = _kind(rest.get("tied", {}), dict, "tied")
        quantised = _kind(rest.get("quantised", []), list, "quantised")
        for name in (*tied.values(), *quantised):
            if name not in described:
                raise ValueError(f"{name!r} is no recorded tensor")
        rows = rest.get("vocabulary")
        files = _kind(meta["files"], dict, "files") if version > 1 else {}
        for name, mark in files.items():
            refuse_file_name(name)
            _match(_SHA256, mark, f"SHA-256 of {name!r}")
        try:
            selection = LayerSelection.from_json(json.dumps(meta["selection"]))
        except SelectionError as error:
            raise ValueError(f"selection: {error}") from error
        base = DeltaBase(
            name=_kind(meta["base_model"], str | None, "base_model"),
            revision=_kind(meta["base_revision"], str | None, "base_revision"),
            model_type=_kind(meta["model_type"], str | None, "model_type"),
            trained=tuple(tensors),
            dtypes={name: dtype for name, (dtype, _, _) in described.items()},
            shapes={name: shape for name, (_, shape, _) in described.items()},
            fingerprints={name: mark for name, (_, _, mark) in described.items()},
            tied=tied,
            quantised=tuple(quantised),
            vocabulary=None if rows is None else _count(rows, "vocabulary"),
            config=_kind(rest.get("config"), dict | None, "config"),
        )
        if version > 1 and base.digest != _match(_SHA256, rest["digest"], "digest"):
            raise ValueError("the base's digest is not that of its tensors")
        result = _match(_SHA256, meta["result"], "result") if version > 1 else None
        return cls(
            path=path,
            version=version,
            selection=selection,
            base=base,
            dtypes={name: dtype for name, (dtype, _, _) in given.items()},
            fingerprints={name: mark for name, (_, _, mark) in given.items()},
            base_digest=base.digest if version > 1 else None,
            result_digest=result,
            files=files,
        )


def _kind(value: Any, kind: Any, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r:.80}")
    return value


def _count(value: Any, what: str) -> int:
    number = whole_number(value)
    if number is None:
        raise ValueError(f"{what} is {value!r:.80}")
    return number


def _match(pattern: re.Pattern[str], value: object, what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{what} is {value!r:.80}")
    return value


def _tensor(name: str, dtype: object, shape: object, mark: object) -> None:
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype of {name!r} is {dtype!r:.80}")
    sizes = shape if isinstance(shape, list) else [None]
    if any(whole_number(size, least=0) is None for size in sizes):
        raise ValueError(f"shape of {name!r} is {shape!r:.80}")
    _match(_FINGERPRINT, mark, f"fingerprint of {name!r}")


def difference(given: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Which names are missing, and which are too many."""
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    return (
        f"missing tensors {missing[:3]} ({len(missing)}), extra tensors {extra[:3]} ({len(extra)})"
    )


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """A folder to make must not be there yet."""
    if "\0" in os.fspath(path):
        raise DeltaError(f"{os.fspath(path)!r:.80} is no path: it holds a NUL")
    if os.path.lexists(Path(path)):
        raise DeltaError(f"{path} exists already: choose another folder or remove it")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears under its name only when the block ended well."""
    refuse_existing(path)
    path = Path(path).absolute()
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise DeltaError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
