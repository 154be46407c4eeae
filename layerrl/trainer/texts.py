"""Whose text a tokenizer has refused, where a trainer generates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from layerrl.checks import half_character, shown
from layerrl.errors import TrainerError

_OF_TOKENIZERS = "TextEncodeInput must be"  # what the package says of any text that it cannot take
_OF_PYTHON = "surrogates not allowed"  # not of an ASCII file that a reward function writes


@contextmanager
def refused_texts(rows: Iterable[Any]) -> Iterator[None]:
    """Inside, the prompts of rows are answered; half of a character in a text gets a sentence.

    Raises:
        TrainerError: If a prompt, or what a tool or an environment answered, has one.
        TypeError: As it is, if it is of something else.
        UnicodeEncodeError: As it is, if it is of another character.
    """
    try:
        yield
    except (TypeError, UnicodeEncodeError) as error:
        if not any(said in str(error) for said in (_OF_TOKENIZERS, _OF_PYTHON)):
            raise
        for number, row in enumerate(rows):
            prompt = row.get("prompt") if isinstance(row, dict) else None
            if half := next(filter(None, map(half_character, _texts(prompt))), ""):
                raise TrainerError(
                    f"the prompt of row {number} of a batch has {half!r:.20}, half of a character, "
                    f"which no tokenizer takes: {shown(prompt)}. Repair the data set: text.encode("
                    "'utf-16', 'surrogatepass').decode('utf-16', 'replace')."
                ) from error
        raise TrainerError(
            "a tokenizer or a file refused a text that is none of the prompts: what a tool, an "
            "environment or a rollout function answered, or what a reward function encodes, is no "
            f"text or has half of a character ({error!s:.100})."
        ) from error


def _texts(prompt: Any) -> Iterator[str]:
    """All texts in a prompt: itself, or those of its messages."""
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, dict):
        yield from _texts([*prompt.values()])
    elif isinstance(prompt, list | tuple):
        for part in prompt:
            yield from _texts(part)
