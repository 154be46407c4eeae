"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor
from safetensors import SafetensorError

# What no class tells: Rust's errors, which tokenizers raises as Exception; torch gives no reason.
_OF_RUST = re.compile(r"\(os error \d+\)")
_OF_TORCH = re.compile(r"PytorchStreamWriter|unexpected pos|write failed|iostream error")
_HEX = "[0-9a-f]" * 32


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file that others find either as it was or as it is to be, one process at a time.

    Yields:
        Where to write it. It takes the file's place when the block has ended well, and is gone
        otherwise.
    """
    # transformers does not push names that begin so. Always the same one: what a killed process
    # left of a large file is written over.
    temporary = path.with_name(f"_{path.name}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Make a folder that others find only when it is complete.

    Several processes may make it at once, of which one succeeds. What one that was killed has left
    beside it is deleted: a living one holds a lock on its own, which ends with the process.

    Args:
        path: The folder, absolute, that is not there yet. Those above it are made if missing.

    Yields:
        Where to write. It gets the folder's name when the block has ended well, and is gone
        otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_HEX}"):
        with _lock(left) as is_ours:
            if is_ours:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.mkdir()
        try:
            # Without a lock nobody can tell that it is left over: it stays.
            with _lock(temporary) as is_ours:
                if is_ours is False or not temporary.exists():  # another has just swept it
                    continue
                yield temporary
                temporary.rename(path)
                return
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def files_in(folder: Path) -> dict[str, Path]:
    """Files in a folder, at any depth, by their names from there, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in files}


def why_unwritten(error: BaseException | None) -> str:
    """Why Python, torch, safetensors or tokenizers could not write; empty of other errors."""
    text = str(error)
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        half = error.object[error.start : error.end]
        return f"a text has {half!r:.20}, half of a character, which no file can hold"
    if isinstance(error, RuntimeError) and _OF_TORCH.search(text):
        return "torch could not write one of its files (is the disk full?)"
    if isinstance(error, OSError | SafetensorError) or _OF_RUST.search(text):
        return (error.strerror if isinstance(error, OSError) else None) or text
    return ""


@contextmanager
def _lock(folder: Path) -> Iterator[bool | None]:
    """Whether this process has it locked now; None where folders cannot be locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    except OSError:  # Windows opens no folders
        yield None
        return
    try:
        try:
            is_ours = lock_descriptor(descriptor, blocking=False)
        except OSError:
            is_ours = None
        yield is_ours
    finally:
        os.close(descriptor)
