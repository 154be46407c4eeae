"""`also="new_tokens"`: rows of the embedding and the head that train without the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from torch import nn

from layerrl.blocks import embedding_of, head_of, plain_name, unwrap
from layerrl.checks import shown
from layerrl.errors import SelectionError
from layerrl.selection.parsing import ranges
from layerrl.shards import shape
from layerrl.vocabulary import added_rows, name_of

if TYPE_CHECKING:
    from layerrl.selection import LayerSelection

NEW_TOKENS = "new_tokens"
_ROWS = re.compile(r"\d{1,18}(-\d{1,18})?(,\d{1,18}(-\d{1,18})?)*", re.ASCII)
_MOST_ROWS = 1 << 24
"""More than any vocabulary has: a typing error is found before so many numbers are listed."""


def names_rows(part: str) -> bool:
    """Whether a part is `"new_tokens"`, with rows or without."""
    return part == NEW_TOKENS or part.startswith(f"{NEW_TOKENS}:")


def rows_of(part: str) -> tuple[int, ...]:
    """The rows that a part names, ascending; none yet of `"new_tokens"` alone."""
    text = part.partition(":")[2].replace(" ", "")
    if part == NEW_TOKENS:
        return ()
    pairs = [run.partition("-") for run in text.split(",") if _ROWS.fullmatch(text)]
    runs = [range(int(first), int(last or first) + 1) for first, _, last in pairs]
    if not runs or not all(runs):
        raise SelectionError(
            f"also={shown(part)} does not name rows of the embedding: expected ids and ranges of "
            f'ids, as "{NEW_TOKENS}:49152-49153,49160", or "{NEW_TOKENS}" for those that were added'
        )
    if (number := sum(map(len, runs))) > _MOST_ROWS:
        raise SelectionError(
            f"also={shown(part)} names {number} rows of the embedding, expected at most "
            f"{_MOST_ROWS}"
        )
    rows = sorted(chain.from_iterable(runs))
    if twice := sorted({row for row, after in pairwise(rows) if row == after}):
        raise SelectionError(f"also={shown(part)} names rows {twice[:5]} twice. Give each once.")
    return tuple(rows)


def part_of(rows: Iterable[int]) -> str:
    """The part that names these rows: `"new_tokens:49152-49153,49160"`."""
    return f"{NEW_TOKENS}:{ranges(tuple(sorted(rows)))}".replace(" ", "")


def with_named_rows(also: tuple[str, ...]) -> tuple[str, ...]:
    """Parts with new tokens named in one way, ascending, for equal selections to be equal."""
    by_rows = [part for part in also if names_rows(part)]
    if len(by_rows) > 1:
        raise SelectionError(
            f"also names new tokens {len(by_rows)} times, {by_rows}: name all rows in one, "
            f'as "{NEW_TOKENS}:49152-49153,49160"'
        )
    if by_rows and "embeddings" in also:
        raise SelectionError(
            f'also={list(also)}: "embeddings" trains all rows of the embedding, '
            f"{by_rows[0]!r} some of them alone. Take one of them."
        )
    named = {part: part_of(rows_of(part)) for part in by_rows if part != NEW_TOKENS}
    return tuple(named.get(part, part) for part in also)


def resolved(
    selection: LayerSelection, model: nn.Module, added: Iterable[int] = ()
) -> LayerSelection:
    """A selection whose `"new_tokens"` are named rows: `added` ones, or beyond the saved size."""
    if not selection.awaits_rows:
        return selection
    rows = {*added} | added_rows(model, {})
    if not rows:
        name = name_of(model)
        since = f"what {name} was saved with" if name else "what it was made with"
        raise SelectionError(
            f'also="{NEW_TOKENS}": no row was added to the embedding of '
            f"{type(unwrap(model)).__name__} beyond {since}. Add the tokens and resize the "
            f'embedding first, or name their rows: also="{NEW_TOKENS}:49152-49153". Of tokens that '
            "a trainer's tokenizer has, or adds itself, the trainer finds the rows: give it "
            f'select_layers(model.config, ..., also="{NEW_TOKENS}").'
        )
    named = part_of(rows)
    return replace(
        selection, also=tuple(named if part == NEW_TOKENS else part for part in selection.also)
    )


def token_tensors(base: nn.Module) -> set[str]:
    """Plain names of the tensors with a row for each token: embedding and head, tied ones too."""
    ends = [end for end in (embedding_of(base), head_of(base)) if end is not None]
    return {
        plain_name(f"{path}.{name}")
        for path, module in base.named_modules(remove_duplicate=False)
        if any(module is end for end in ends)
        for name, _ in module.named_parameters(recurse=False)
    }


def check_rows(selection: LayerSelection, base: nn.Module, parts: Mapping[str, set[str]]) -> None:
    """Refuse rows that the embedding does not have, or trains anyway."""
    tensors = by_rows(selection, base, parts)
    embedding = embedding_of(base).weight
    if all(parameter is not embedding for parameter in tensors.values()):
        others = [part for part in selection.also if not names_rows(part)]
        raise SelectionError(
            f"also={list(selection.also)}: {', '.join(map(repr, others))} trains the whole "
            f"embedding already, of which {NEW_TOKENS} trains some rows alone (a tied head is the "
            "embedding). Take one of them."
        )
    for name, parameter in tensors.items():
        size = shape(parameter)[0]
        beyond = [row for row in selection.token_rows if row >= size]
        if beyond:
            raise SelectionError(
                f"also names the rows {ranges(tuple(beyond))}, and {name!r} of "
                f"{type(base).__name__} has {size} (0 to {size - 1}): add the tokens and resize "
                "the embedding first (model.resize_token_embeddings)"
            )


def by_rows(
    selection: LayerSelection, base: nn.Module, parts: Mapping[str, set[str]]
) -> dict[str, nn.Parameter]:
    """Tensors by plain name of which rows alone train, as no other part has them; tied once."""
    named = [(plain_name(n), p) for n, p in base.named_parameters(remove_duplicate=False)]
    names = {rows: part for rows, part in parts.items() if names_rows(rows)}
    whole = set().union(*(part for other, part in parts.items() if other not in names))
    taken = {id(parameter) for name, parameter in named if name in whole}
    chosen = set().union(*names.values())
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named:
        if name in chosen and id(parameter) not in taken:
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def frozen_rows(
    selection: LayerSelection, base: nn.Module, parts: Mapping[str, set[str]]
) -> dict[str, list[slice]]:
    """Runs of the rows that do not train, by plain name of their tensor; a tied one once."""
    if selection.awaits_rows:
        raise SelectionError(
            f'also="{NEW_TOKENS}" was chosen without a model and names no rows yet: '
            "select_layers(model, selection) finds them"
        )
    found: dict[str, list[slice]] = {}
    for name, parameter in by_rows(selection, base, parts).items():
        starts = [0, *(row + 1 for row in selection.token_rows)]
        stops = [*selection.token_rows, shape(parameter)[0]]
        runs = zip(starts, stops, strict=True)
        found[name] = [slice(start, stop) for start, stop in runs if start < stop]
    return found
