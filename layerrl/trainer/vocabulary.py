"""Rows of the embedding that nothing trains: tokens that came after the base was loaded."""

from __future__ import annotations

import logging

from torch import nn

from layerrl.blocks import embedding_of, head_of, unwrap
from layerrl.errors import SelectionError
from layerrl.selection import LayerSelection
from layerrl.shards import shape
from layerrl.vocabulary import added_rows, name_of, saved, tokens_of, vocabulary_size
from layerrl.warning import warn

logger = logging.getLogger(__name__)

_TRAIN_ROWS = (
    'train their rows beside the layers (select_layers(model.config, ..., also="new_tokens")), or '
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
        self._size = vocabulary_size(getattr(unwrap(model), "config", None) if given else config)
        self._tokens = tokens_of(processing_class) if processing_class is not None else None

    def added_rows(self, model: nn.Module, processing_class: object) -> set[int]:
        """Rows of tokens that came after the base was saved, or while the trainer was made."""
        size = vocabulary_size(getattr(unwrap(model), "config", None)) or 0
        tokens, known = tokens_of(processing_class), _known(model)
        _refuse_beyond(model, tokens, known)
        made = {*self._made(size, tokens, known).values(), *range(self._size or size, size)}
        return added_rows(model, tokens) | {index for index in made if index < size}

    def check(self, model: nn.Module, processing_class: object, selection: LayerSelection) -> None:
        """Refuse tokens whose rows would stay random, and warn of those that only this base has.

        More rows than tokens are usual: embeddings are padded. Rows that train are as they should.
        """
        size = vocabulary_size(getattr(unwrap(model), "config", None))
        if selection.full or size is None:
            return
        tokens, known = tokens_of(processing_class), _known(model)
        self._refuse_change(size, self._made(size, tokens, known), selection)
        _refuse_beyond(model, tokens, known)
        _warn_of_change(model, size, tokens, selection)
        _say_tied(model, selection)

    def _made(self, size: int, tokens: dict[str, int], known: frozenset[str]) -> dict[str, int]:
        """Tokens that came while the trainer was made, with their ids."""
        if self._tokens is not None:
            return {token: index for token, index in tokens.items() if token not in self._tokens}
        before = self._size if self._size is not None else size
        # What the trainer loaded had no more tokens than rows.
        return {
            token: index
            for token, index in tokens.items()
            if index >= before and token not in known
        }

    def _refuse_change(self, size: int, made: dict[str, int], selection: LayerSelection) -> None:
        before, trained = size if self._size is None else self._size, {*selection.token_rows}
        new = {token: index for token, index in made.items() if index not in trained}
        # Rows of padding may go while new tokens come: the trained rows are what the base lacks.
        rows = range(before, size) if trained else ()
        if not new and (size == before or (trained and {*rows} <= trained)):
            return
        what = f"added {_named(new)} to the vocabulary" if new else "changed the vocabulary"
        raise SelectionError(
            f"making the trainer {what} (as chat_template_path does), whose embedding had {before} "
            f"rows and has {size}. {selection} trains none of them: new ones would stay random, "
            "and the delta would fit no saved base. "
            + (
                f"For the tokens, {_TRAIN_ROWS}."
                if new
                else "Pass the template as a .jinja file, which changes no vocabulary."
            )
        )


def _known(model: nn.Module) -> frozenset[str]:
    """Some models are published with a token too many (Gemma 3's images, in its text models)."""
    name = name_of(model)
    return saved(name)[1] if name else frozenset()


def _refuse_beyond(model: nn.Module, tokens: dict[str, int], known: frozenset[str]) -> None:
    embedding = embedding_of(model)
    if type(embedding) is not nn.Embedding:  # others may have rows elsewhere
        return
    rows = shape(embedding.weight)[0]
    beyond = {t: index for t, index in tokens.items() if index >= rows and t not in known}
    if beyond:
        raise SelectionError(
            f"the tokenizer has {_named(beyond)} with ids up to {max(beyond.values())}, and the "
            f"embedding of {type(unwrap(model)).__name__} has {rows} rows (0 to {rows - 1}). Pass "
            "the model's own tokenizer, or, if tokens were added to it and not to the model, add "
            f"them to both, and {_TRAIN_ROWS}."
        )


def _warn_of_change(
    model: nn.Module, size: int, tokens: dict[str, int], selection: LayerSelection
) -> None:
    """The user may have added tokens to a model after loading it, with good rows or random ones."""
    name, trained = name_of(model), {*selection.token_rows}
    if not name:
        return
    saved_size, known = saved(name)
    saved_size = size if saved_size is None else saved_size
    resized = saved_size != size and not (trained and {*range(saved_size, size)} <= trained)
    new = {
        token: index
        for token, index in tokens.items()
        if index not in trained
        and ((resized and index >= saved_size) or (known and token not in known))
    }
    if not (resized or new):
        return
    found = [f"the tokenizer has {_named(new)} that came after {name} was saved"] if new else []
    if resized:
        found.append(f"the embedding has {size} rows, and {name} was saved with {saved_size}")
    needs = (
        " The delta fits this model only: save it (model.save_pretrained) before training, as the "
        "base to load or merge the delta into."
    )
    trains = "trains none of these rows" if trained else "trains no row of the embedding"
    warn(
        f"{', and '.join(found)}. {selection} {trains}: random ones stay so."
        f"{needs if resized else ''} To have them trained, {_TRAIN_ROWS}."
    )


def _say_tied(model: nn.Module, selection: LayerSelection) -> None:
    head = head_of(model)
    if selection.token_rows and getattr(head, "weight", None) is embedding_of(model).weight:
        logger.warning(
            "%s: the head of %s is tied to its embedding, and these rows train for both.",
            selection,
            type(unwrap(model)).__name__,
        )


def _named(tokens: dict[str, int]) -> str:
    shown = ", ".join(map(repr, sorted(tokens, key=tokens.__getitem__)[:5]))
    more = ", ..." if len(tokens) > 5 else ""
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({shown}{more})"
