"""Digests of JSON values and files, which are stored and compared with later ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def json_digest(*values: Any, sort_keys: bool = True) -> str:
    """The SHA-256 of JSON values in hexadecimal; what JSON does not know counts as its text."""
    hashed = hashlib.sha256()
    for value in values:
        hashed.update(json.dumps(value, sort_keys=sort_keys, default=str).encode())
    return hashed.hexdigest()


def file_digest(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
