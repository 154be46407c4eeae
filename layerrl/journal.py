"""Results that survive a killed process: one line of JSON each, in one file of a folder."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from filelock import lock_descriptor

from layerrl.checks import shown
from layerrl.errors import JournalError
from layerrl.files import written_whole
from layerrl.schema import Misfit, Rule, fitted
from layerrl.stored import MOST_BYTES, parsed, refuse_unusual, refused_as

_VERSION = 1
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class _Head:
    version: Annotated[int, Rule(str(_VERSION), _VERSION.__eq__)]
    settings: dict[str, Any]


class Journal:
    """The finished runs of one sweep, and the settings they share.

    Opened as a context manager by one process at a time. A line that was cut off by a kill or a
    full disk is dropped when the file is opened again.

    Args:
        folder: Where it lies; made if missing.
        settings: What every run in it has in common. JSON values.
        kind: Type of an entry.

    Raises:
        JournalError: If the folder holds a journal of other settings, of a newer layerrl or one
            that was edited, if another process has it open, or if it cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: dict[str, Any],
        kind: Any = dict[str, Any],  # a type, as `schema.fitted` takes it
    ) -> None:
        self.path, self._kind = Path(folder) / "journal.jsonl", kind
        with refused_as(JournalError, "the settings of a journal"):
            self._settings = parsed(json.dumps(settings))
        self.entries: list[Any] = []
        """What was recorded, oldest first."""

    def __enter__(self) -> Self:
        with refused_as(JournalError, f"cannot use {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            refuse_unusual(self.path, most=MOST_BYTES)
            self._file = self.path.open("a+b", buffering=0)
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Record one finished run, on disk when this returns; earlier ones are unharmed."""
        with refused_as(JournalError, "an entry of a journal"):
            made = fitted(self._kind, parsed(json.dumps(entry)))
        self._write(entry)
        self.entries.append(made)

    def _lock(self) -> None:
        # The journal itself is locked, no file beside it: nothing stays behind, and the lock ends
        # with the descriptor, also where the process is killed. Closing it in a forked child leaves
        # the parent's lock as it is, which unlocking would not.
        try:
            locked = lock_descriptor(self._file.fileno(), blocking=False)
        except OSError as error:
            raise JournalError(
                f"cannot lock {self.path}: {error.strerror}. Give a folder on a file system that "
                "locks files, so that no second process writes to it."
            ) from error
        if not locked:
            raise JournalError(
                f"{self.path} is open in another process. Wait for it, or give each its own folder."
            )

    def _read(self) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            # The head alone was cut off, or this is no journal.
            head = json.dumps({"version": _VERSION, "settings": self._settings}).encode()
            if not head.startswith(text):
                self._check(text[:80].decode(errors="replace"))
            self._file.truncate(0)
            self._write({"version": _VERSION, "settings": self._settings})
            return
        for number, line in enumerate(lines, 1):
            with self._repairable(number):
                value = parsed(line)
            if number == 1:
                self._check(value)
                continue
            with self._repairable(number):
                self.entries.append(fitted(self._kind, value))
        self._file.truncate(len(whole))

    def _repairable(self, number: int) -> AbstractContextManager[None]:
        advice = "Repair it, delete it to run it again, or give another folder."
        return refused_as(JournalError, f"line {number} of {self.path} is no line of it", advice)

    def _check(self, head: Any) -> None:
        try:
            found = fitted(_Head, head).settings
        except Misfit as error:
            raise JournalError(
                f"{self.path} starts with {shown(head)}, expected a journal of version {_VERSION}. "
                "It is something else's, or a newer layerrl's: update layerrl, or give another "
                "folder."
            ) from error
        differing = _differences(found, self._settings)
        if differing:
            raise JournalError(
                f"{self.path} holds runs of other settings. {'; '.join(differing)}. Their scores "
                "cannot be compared: give another folder, or the same settings."
            )

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            raise JournalError(
                f"cannot write to {self.path}: {error.strerror}. Finished runs before this one are "
                "kept; the same call continues after them."
            ) from error


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*there, *here}):
        values = [settings.get(name, _ABSENT) for settings in (there, here)]
        if all(isinstance(value, dict) for value in values):
            found += _differences(*values, prefix=f"{prefix}{name}.")
        elif values[0] != values[1]:
            old, new = ("not given" if v is _ABSENT else f"{v!r:.60}" for v in values)
            found.append(f"{prefix}{name}: {old} there, {new} here")
    return found


def write_beside(path: Path, text: str) -> None:
    """Write a file beside a journal, whole or not at all."""
    try:
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise JournalError(
            f"cannot write {path}: {error.strerror}. The journal beside it has all finished runs; "
            "the same call continues after them."
        ) from error
