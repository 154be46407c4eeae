"""Digests of JSON values, which are stored and compared with later ones."""

from __future__ import annotations

import hashlib
import json
from typing import Any


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
