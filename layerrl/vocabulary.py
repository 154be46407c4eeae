"""The vocabulary of a model: what it was saved with, and what has been added since."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from layerrl.blocks import unwrap
from layerrl.seams import imported


def added_rows(model: nn.Module, tokens: Mapping[str, int]) -> set[int]:
    """Return rows of the embedding for what the model was not saved with, as its name or path says.

    Rows beyond the saved vocabulary, and those of `tokens` that the saved tokenizer had not, which
    may have been padding.
    """
    name, size = name_of(model), vocabulary_size(getattr(unwrap(model), "config", None))
    if not name or size is None:
        return set()
    saved_size, known = saved(name)
    rows = {*range(size if saved_size is None else saved_size, size)}
    new = {index for token, index in tokens.items() if known and token not in known}
    return rows | {index for index in new if index < size}


def name_of(model: nn.Module) -> str | None:
    """Where a model came from; None where nobody knows."""
    name = getattr(unwrap(model), "name_or_path", None)
    return os.fspath(name) if name else None


def saved(name: str) -> tuple[int | None, frozenset[str]]:
    """Vocabulary size and tokens that a model was saved with, never asked for over the network."""
    written = []
    for file in sorted(Path(name).glob("*.json")):
        with suppress(OSError):  # as of a link to nothing, which an editor's lock is
            stat = file.stat()
            written.append((stat.st_mtime_ns, stat.st_size))
    return _read(name, tuple(written))


@lru_cache(maxsize=4)
def _read(name: str, written: tuple[tuple[int, int], ...]) -> tuple[int | None, frozenset[str]]:
    """As `saved`, once while the folder's files are those of that time and size."""
    with imported():
        from transformers import AutoConfig, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    found: list[Any] = []
    for auto in (AutoConfig, AutoTokenizer):
        try:
            found.append(auto.from_pretrained(name, **options))
        except Exception:
            found.append(None)
    return vocabulary_size(found[0]), frozenset(tokens_of(found[1]))


def tokens_of(processing_class: object) -> dict[str, int]:
    """Token to id, of a tokenizer or a processor's; none of anything else."""
    found: Any = getattr(processing_class, "tokenizer", processing_class)
    return dict(found.get_vocab()) if callable(getattr(found, "get_vocab", None)) else {}


def vocabulary_size(config: Any) -> int | None:
    """Rows of the embedding that a config describes; None where it does not say."""
    if not callable(getattr(config, "get_text_config", None)):
        return None
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None
