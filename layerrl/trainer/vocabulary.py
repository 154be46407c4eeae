"""Rows of the embedding that nothing trains: tokens that came after the base was loaded."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoConfig, AutoTokenizer

from layerrl.blocks import unwrap
from layerrl.errors import SelectionError
from layerrl.shards import shape

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection

_TRAIN_FIRST = (
    'resize the embedding, train the rows with selection="full" or by the plain trainer, save that '
    "model with its tokenizer, and pass it as the base"
)


class Vocabulary:
    """What a trainer is given to read and write tokens with, before it is made.

    Args:
        model: The model, or its path.
        config: The model's config, where it is known before weights are loaded.
        processing_class: Tokenizer or processor; None: the trainer will load the model's own.
    """

    def __init__(self, model: object, config: object, processing_class: object) -> None:
        given = isinstance(model, nn.Module)
        self._size = _size(getattr(unwrap(model), "config", None) if given else config)
        self._tokens = _tokens(processing_class) if processing_class is not None else None

    def check(self, model: nn.Module, processing_class: object, selection: LayerSelection) -> None:
        """Refuse tokens whose rows would stay random, and warn of those that only this base has.

        More rows than tokens are usual: embeddings are padded.

        Args:
            model: The model of the trainer that was made.
            processing_class: The trainer's.
            selection: What trains. `"full"` trains the rows, too.

        Raises:
            SelectionError: If making the trainer changed the vocabulary, or the tokenizer has ids
                beyond the embedding.
        """
        size = _size(getattr(unwrap(model), "config", None))
        if selection.full or size is None:
            return
        tokens = _tokens(processing_class)
        name = getattr(unwrap(model), "name_or_path", None)
        # Some models are published with a token too many (Gemma 3's images, in its text models).
        known = _saved(os.fspath(name))[1] if name else frozenset()
        self._refuse_change(size, tokens, selection, known if self._tokens is None else frozenset())
        _refuse_beyond(model, tokens, known)
        _warn_of_change(model, size, tokens, selection)

    def _refuse_change(
        self,
        size: int,
        tokens: dict[str, int],
        selection: LayerSelection,
        known: frozenset[str],
    ) -> None:
        before = self._size if self._size is not None else size
        if self._tokens is None:  # what the trainer loaded had no more tokens than rows
            new = {
                token: index
                for token, index in tokens.items()
                if index >= before and token not in known
            }
        else:
            new = {token: index for token, index in tokens.items() if token not in self._tokens}
        if not new and size == before:
            return
        what = f"added {_named(new)} to the vocabulary" if new else "changed the vocabulary"
        raise SelectionError(
            f"making the trainer {what} (as chat_template_path does), whose embedding had {before} "
            f"rows and has {size}. {selection} trains none of them: new ones would stay random, "
            "and the delta would fit no saved base. "
            + (
                f"Add the tokens first: {_TRAIN_FIRST}."
                if new
                else "Pass the template as a .jinja file, which changes no vocabulary."
            )
        )


def _refuse_beyond(model: nn.Module, tokens: dict[str, int], known: frozenset[str]) -> None:
    embedding = _embedding(model)
    if type(embedding) is not nn.Embedding:  # others may have rows elsewhere
        return
    rows = shape(embedding.weight)[0]
    beyond = {t: index for t, index in tokens.items() if index >= rows and t not in known}
    if beyond:
        raise SelectionError(
            f"the tokenizer has {_named(beyond)} with ids up to {max(beyond.values())}, and the "
            f"embedding of {type(unwrap(model)).__name__} has {rows} rows (0 to {rows - 1}). Pass "
            "the model's own tokenizer, or, if tokens were added to it and not to the model, add "
            f"them to both: {_TRAIN_FIRST}."
        )


def _warn_of_change(
    model: nn.Module, size: int, tokens: dict[str, int], selection: LayerSelection
) -> None:
    """The user may have added tokens to a model after loading it, with good rows or random ones."""
    name = getattr(unwrap(model), "name_or_path", None)
    if not name:
        return
    saved, known = _saved(os.fspath(name))
    resized = saved is not None and saved != size
    new = {
        token: index
        for token, index in tokens.items()
        if (resized and saved is not None and index >= saved) or (known and token not in known)
    }
    if not (resized or new):
        return
    found = [f"the tokenizer has {_named(new)} that came after {name} was saved"] if new else []
    if resized:
        found.append(f"the embedding has {size} rows, and {name} was saved with {saved}")
    needs = (
        " The delta fits this model only: save it (model.save_pretrained) before training, as the "
        "base to load or merge the delta into."
    )
    warnings.warn(
        f"{', and '.join(found)}. {selection} trains no row of the embedding: random ones stay so."
        f"{needs if resized else ''} To have them trained, {_TRAIN_FIRST}.",
        stacklevel=5,
    )


def _saved(name: str) -> tuple[int | None, frozenset[str]]:
    """Vocabulary size and tokens that a model was saved with, never asked for over the network."""
    files = (file.stat() for file in sorted(Path(name).glob("*.json")))
    return _read(name, tuple((stat.st_mtime_ns, stat.st_size) for stat in files))


@lru_cache(maxsize=4)
def _read(name: str, written: tuple[tuple[int, int], ...]) -> tuple[int | None, frozenset[str]]:
    """As `_saved`, once while the folder's files are those of that time and size."""
    options = {"local_files_only": True, "trust_remote_code": False}
    found: list[Any] = []
    for auto in (AutoConfig, AutoTokenizer):
        try:
            found.append(auto.from_pretrained(name, **options))
        except Exception:
            found.append(None)
    return _size(found[0]), frozenset(_tokens(found[1]))


def _tokens(processing_class: object) -> dict[str, int]:
    """Token to id, of a tokenizer or a processor's; none of anything else."""
    found: Any = getattr(processing_class, "tokenizer", processing_class)
    return dict(found.get_vocab()) if callable(getattr(found, "get_vocab", None)) else {}


def _embedding(model: nn.Module) -> Any:
    try:
        return unwrap(model).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        return None


def _size(config: Any) -> int | None:
    if not callable(getattr(config, "get_text_config", None)):
        return None
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _named(tokens: dict[str, int]) -> str:
    shown = ", ".join(map(repr, sorted(tokens, key=tokens.__getitem__)[:5]))
    more = ", ..." if len(tokens) > 5 else ""
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({shown}{more})"
