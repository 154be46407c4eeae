"""The fields of `delta.json`, in each version of the format, and their checks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from layerrl.delta.processing import is_refused
from layerrl.digests import json_digest
from layerrl.errors import DeltaError, SelectionError
from layerrl.schema import Count, Misfit, Rule, fitted
from layerrl.selection import LayerSelection
from layerrl.selection.fields import selection_in
from layerrl.stored import bytes_of, parsed, refused_as, version_of

FORMAT_VERSION = 3
"""Version 1 knew of the base only the tensors that the delta replaces, version 2 held every trained
tensor whole. A delta is written in the oldest version that can hold it, not below 2."""
_DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}

Fingerprint = Annotated[str, Rule("16 hexadecimal digits", re.compile(r"[0-9a-f]{16}").fullmatch)]
Sha256 = Annotated[str, Rule("a SHA-256", re.compile(r"[0-9a-f]{64}").fullmatch)]
_Dtype = Annotated[str, Rule("a torch dtype's name", lambda name: f"torch.{name}" in _DTYPES)]
_File = Annotated[str, Rule("a file of a tokenizer, processor or generation config",
                             lambda name: not is_refused(name))]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A tensor of the base that stays as it is."""

    dtype: _Dtype
    shape: list[Count]
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced(Described):
    """A trained tensor, and the one of the base that it replaces."""

    base_dtype: _Dtype
    base_fingerprint: Fingerprint
    rows: Count | None = None
    """How many rows the file has of it, those of the new tokens alone; None: all. Version 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """What a delta knows of its base beside the tensors that it replaces."""

    digest: Sha256
    vocabulary: Count | None = None
    config: dict[str, Any] | None = None
    tied: dict[str, str]
    quantised: list[str]
    frozen: dict[str, Described]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version1:
    """A `delta.json` of format version 1, without its checksum."""

    format_version: int
    base_model: str | None
    base_revision: str | None
    model_type: str | None
    selection: dict[str, Any]
    tensors: Annotated[dict[str, Replaced], Rule("at least one tensor", len)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version2(Version1):
    """The same of format version 2."""

    base: Rest
    result: Sha256
    files: dict[_File, Sha256]


def read(file: Path) -> tuple[Version1 | Version2, LayerSelection, dict[str, Any]]:
    """A description that makes sense in itself, its selection, and its JSON minus the checksum."""
    with refused_as(DeltaError, f"{file} is damaged"):
        meta = parsed(bytes_of(file))
        said = f"the delta at {file.parent}"
        version = version_of(meta, "format_version", FORMAT_VERSION, DeltaError, said)
        checksum = fitted(Sha256, meta.pop("sha256", None), "sha256")
        found = fitted(Version2 if version > 1 else Version1, meta)
        selection = _selection_in(found.selection)
        if checksum != json_digest(meta):
            raise DeltaError(f"{file} was changed after it was written: checksum differs")
        _check_sense(found, selection)
    return found, selection, meta


def _selection_in(data: dict[str, Any]) -> LayerSelection:
    try:
        return selection_in(LayerSelection, data)
    except (Misfit, SelectionError) as error:
        raise Misfit(f": {error}", "selection") from error


def _check_sense(found: Version1 | Version2, selection: LayerSelection) -> None:
    if not isinstance(found, Version2):
        return
    base, tensors = found.base, found.tensors
    for name, each in tensors.items():
        there = sum(row < (*each.shape, 0)[0] for row in selection.token_rows)
        if each.rows is not None and not each.rows == there == len(selection.token_rows) > 0:
            raise Misfit(f" are {each.rows}, and {selection} trains others", f"rows of {name!r}")
    if both := {*base.frozen} & {*tensors}:
        raise Misfit(f": {min(both)!r} is both trained and frozen")
    marks = {name: each.base_fingerprint for name, each in tensors.items()}
    marks |= {name: each.fingerprint for name, each in base.frozen.items()}
    for name in (*base.tied.values(), *base.quantised):
        if name not in marks:
            raise Misfit(f": {name!r} is tied or quantised, and no recorded tensor")
    for what, digest in (("base.digest", base.digest), ("result", found.result)):
        if json_digest(marks) != digest:
            raise Misfit(" is not the digest of its tensors' fingerprints", what)
        marks |= {name: each.fingerprint for name, each in tensors.items()}
