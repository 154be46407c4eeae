"""A checkpoint's files as they were written: the SHA-256 of each, compared before one is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from layerrl.delta.card import CARD
from layerrl.delta.description import Sha256
from layerrl.digests import file_digest, json_digest
from layerrl.errors import DeltaError, LayerRLError
from layerrl.files import files_in, written_whole
from layerrl.schema import Misfit, Rule, fitted
from layerrl.stored import bytes_of, parsed, refused_as

CHECKSUMS = "checksums.json"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checksums:
    format_version: Annotated[int, Rule(str(_VERSION), _VERSION.__eq__)]
    files: dict[str, Sha256]
    sha256: Sha256
    """Of `files`."""


def write_checksums(folder: Path) -> None:
    """Record every file of a checkpoint but its README, which is there to be edited."""
    _write(folder, _sums(_files(folder)))


def update_checksums(folder: Path) -> None:
    """Record what a trainer of another class wrote or deleted when its base class had saved."""
    record = folder / CHECKSUMS
    if not record.exists():
        return
    known = fitted(_Checksums, parsed(bytes_of(record))).files
    files, since = _files(folder), record.stat().st_mtime_ns
    later = {n: f for n, f in files.items() if n not in known or _written(f) >= since}
    sums = {n: digest for n, digest in known.items() if n in files} | _sums(later)
    if sums != known:
        _write(folder, sums)


def _write(folder: Path, sums: Mapping[str, str]) -> None:
    record = {"format_version": _VERSION, "files": sums, "sha256": json_digest(sums)}
    with written_whole(folder / CHECKSUMS) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def missing_files(folder: Path) -> list[str]:
    """Files that a checkpoint's record has and its folder does not; none without a good record."""
    try:
        written = fitted(_Checksums, parsed(bytes_of(folder / CHECKSUMS)))
    except (OSError, Misfit):
        return []
    return sorted({*written.files} - {*_files(folder)})


def check_files(folder: Path, *, because: LayerRLError | None = None) -> None:
    """Compare a checkpoint's files with their record; without one, all is taken as it is.

    A file that is missing is for those to judge who would load it: a run can go on without the
    state of its optimizer.

    Raises:
        DeltaError: If a file, or the record, is not what was written.
    """
    record = folder / CHECKSUMS
    if not record.exists():  # written by another tool, or by an older layerrl
        return
    advice = (
        f"Resume from another checkpoint or, if you changed it yourself, delete {record} and "
        "resume from its folder by name."
    )
    with refused_as(DeltaError, f"{record} is damaged", advice):
        written = fitted(_Checksums, parsed(bytes_of(record)))
    if json_digest(written.files) != written.sha256:
        raise DeltaError(f"{record} is damaged: its own checksum differs. {advice}") from because
    with refused_as(DeltaError, f"a file of {folder} cannot be read", advice):
        files = {n: file for n, file in _files(folder).items() if n in written.files}
        changed = [n for n, found in _sums(files).items() if found != written.files[n]]
    if changed:
        file = folder / changed[0]
        raise DeltaError(
            f"{file} is damaged or was changed after it was written: its SHA-256 is another "
            f"({len(changed)} of {len(written.files)} files differ). Nothing was loaded. {advice}"
            f"{f' What it holds: {because}' if because else ''}"
        ) from because


def _files(folder: Path) -> dict[str, Path]:
    # No file of a checkpoint has a name that is no text, which JSON could not hold.
    return {
        name: path
        for name, path in files_in(folder).items()
        if name not in (CARD, CHECKSUMS) and name.isprintable()
    }


def _sums(files: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of files by name, of several at once: a sharded checkpoint has many."""
    with ThreadPoolExecutor() as pool:
        found = zip(files, pool.map(_sum, files.values()), strict=True)
        return {name: digest for name, digest in found if digest is not None}


def _written(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _sum(file: Path) -> str | None:
    try:
        return file_digest(file)
    except FileNotFoundError:  # gone since it was listed: another tool's temporary file
        return None
