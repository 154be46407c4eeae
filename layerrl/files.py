"""Files that appear whole or not at all."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file that others find either as it was or as it is to be.

    Args:
        path: The file, which may exist. One process at a time may write it.

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
