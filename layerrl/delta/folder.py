"""A delta's folder: what is in it, checked against itself; a folder that appears when complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerrl.checks import check_path
from layerrl.delta.description import Version2, read
from layerrl.delta.record import DeltaBase, dtype_name
from layerrl.errors import DeltaError
from layerrl.files import made_whole, why_unwritten
from layerrl.frozen import fingerprints
from layerrl.selection import LayerSelection
from layerrl.stored import refused_as, tensors_in

TENSORS, META = "delta.safetensors", "delta.json"


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
    by_rows: frozenset[str]
    """Those of the trained tensors whose rows of new tokens alone are in the folder."""
    files: dict[str, str]
    """Tokenizer, processor and generation settings in the folder: name to SHA-256."""

    def tensor(self, name: str, below: Callable[[str], Tensor]) -> Tensor:
        """Return one of the trained tensors, whole, checked against the description.

        `below` gives by name the tensor that it replaces, of which are the rows that did not train.

        Raises:
            DeltaError: If it is not the one that was written.
        """
        said = f"{self.path / TENSORS} is damaged"
        with refused_as(DeltaError, said), tensors_in(self.path / TENSORS) as stored:
            tensor = stored.get_tensor(name)
        candidates = iter([tensor])
        if name in self.by_rows:
            candidates = self._with_other_rows(name, tensor, below(name))
        mark = ""
        for tensor in candidates:
            mark = fingerprints({name: tensor})[name]
            if mark == self.fingerprints[name]:
                break
        checks = {
            "dtype": (dtype_name(tensor), self.dtypes[name]),
            "shape": (list(tensor.shape), self.base.shapes[name]),
            "fingerprint": (mark, self.fingerprints[name]),
        }
        for what, (found, written) in checks.items():
            if found != written:
                raise DeltaError(
                    f"{self.path / TENSORS} is damaged: {what} of {name!r} is {found}, written was "
                    f"{written}"
                )
        return tensor

    def _with_other_rows(self, name: str, rows: Tensor, below: Tensor) -> Iterator[Tensor]:
        """A tensor of which the folder has some rows, the others being the base's.

        Yields:
            It, with the others as they are; then as they may have been rounded: of a stage below
            that was merged into half precision, or a base that is here in more bits than it was.

        Raises:
            DeltaError: If the base has the tensor packed.
        """
        if list(below.shape) != self.base.shapes[name]:  # not compared: it is packed
            raise DeltaError(
                f"the delta at {self.path} holds the new tokens' rows of {name!r}, and this base "
                f"has it packed in shape {list(below.shape)}, expected {self.base.shapes[name]}: "
                "load the base with its embedding and head in full precision"
            )
        recorded = getattr(torch, self.base.dtypes[name])
        for dtype in dict.fromkeys((below.dtype, recorded, torch.bfloat16, torch.float16)):
            tensor = below.detach().to(dtype).to(rows.dtype, copy=True)
            tensor[list(self.selection.token_rows)] = rows.to(tensor.device)
            yield tensor

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Delta:
        """Read a delta's description, checked against itself and the names of its tensors."""
        path = check_path("path", path, DeltaError)
        for file in (path / META, path / TENSORS):
            if not os.path.isfile(file):
                raise DeltaError(
                    f"no delta at {path}: {file.name} is missing (expected {META} and {TENSORS})"
                )
        found, selection, _ = read(path / META)
        said = f"{path / TENSORS} is damaged"
        with refused_as(DeltaError, said), tensors_in(path / TENSORS) as stored:
            names = dict.fromkeys(stored.keys())
        if {*names} != {*found.tensors}:
            raise DeltaError(f"{said}: {difference(names, found.tensors)}")
        rest = found.base if isinstance(found, Version2) else None
        frozen = {} if rest is None else rest.frozen
        base = DeltaBase(
            name=found.base_model,
            revision=found.base_revision,
            model_type=found.model_type,
            trained=tuple(found.tensors),
            dtypes={name: each.base_dtype for name, each in found.tensors.items()}
            | {name: each.dtype for name, each in frozen.items()},
            shapes={name: each.shape for name, each in (found.tensors | frozen).items()},
            fingerprints={name: each.base_fingerprint for name, each in found.tensors.items()}
            | {name: each.fingerprint for name, each in frozen.items()},
            tied={} if rest is None else rest.tied,
            quantised=() if rest is None else tuple(rest.quantised),
            vocabulary=None if rest is None else rest.vocabulary,
            config=None if rest is None else rest.config,
        )
        return cls(
            path=path,
            version=found.format_version,
            selection=selection,
            base=base,
            dtypes={name: each.dtype for name, each in found.tensors.items()},
            fingerprints={name: each.fingerprint for name, each in found.tensors.items()},
            base_digest=None if rest is None else rest.digest,
            result_digest=found.result if isinstance(found, Version2) else None,
            by_rows=frozenset(n for n, each in found.tensors.items() if each.rows is not None),
            files=found.files if isinstance(found, Version2) else {},
        )


def difference(given: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Which names are missing, and which are too many."""
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    return (
        f"missing tensors {missing[:3]} ({len(missing)}), extra tensors {extra[:3]} ({len(extra)})"
    )


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """A folder to make must not be there yet."""
    if os.path.lexists(check_path("path", path, DeltaError)):
        raise DeltaError(f"{path} exists already: choose another folder or remove it")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears under its name only when the block ended well."""
    refuse_existing(path)
    path = Path(path).absolute()
    try:
        with made_whole(path) as folder:
            yield folder
    except Exception as error:
        if isinstance(error, DeltaError) or not why_unwritten(error):
            raise
        if os.path.lexists(path):
            raise DeltaError(
                f"{path} exists already: another process has made it since. Let one write it "
                "(save_delta has is_main_process for that), or give each a folder of its own"
            ) from error
        why = why_unwritten(error) if isinstance(error, UnicodeError) else error
        raise DeltaError(f"cannot write {path}: {why}") from error
