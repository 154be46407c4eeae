"""Digests of JSON values and files, which are stored and compared with later ones."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def json_digest(*values: Any, sort_keys: bool = True) -> str:
    """The SHA-256 of JSON values.

    Args:
        *values: The values; what JSON does not know counts as its text.
        sort_keys: Whether the order of keys makes no difference.

    Returns:
        64 hexadecimal digits.
    """
    hashed = hashlib.sha256()
    for value in values:
        hashed.update(json.dumps(value, sort_keys=sort_keys, default=str).encode())
    return hashed.hexdigest()


def file_digest(file: Path) -> str:
    """The SHA-256 of a file.

    Args:
        file: The file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: If it cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
