"""What left the frozen prefix in the calls over one batch.

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerrl.replay.arguments import Arguments, as_integers
from layerrl.replay.entering import Entry

Extras = tuple[None, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What left the prefix in one call of the model."""

    hidden_BTH: Tensor
    """The hidden states that enter the first trained layer."""
    arguments: tuple[Arguments, ...]
    """Of each layer of the prefix."""
    extras: tuple[Extras, ...]
    """What stands for the rest of each layer's output; None: it is the hidden states alone."""
    modes: bytes
    """Which modules of the prefix were in training mode."""
    storages: tuple[Any, ...]
    """Of the prefix's tensors. Held, or others could be given their addresses."""


Place = tuple[Recording, int]
"""A recording, and a row of it."""


class Recordings:
    """The recordings of one batch, row by row.

    Unless a part of the batch is of use (`partly`), nothing of one is kept that does not fit.
    """

    def __init__(self, max_bytes: int, *, partly: bool) -> None:
        self._max_bytes, self._partly = max_bytes, partly
        self._full = False
        self._rows: dict[tuple[Any, ...], dict[tuple[int, int], Place]] = {}
        self.num_bytes = 0
        """Memory that they take."""
        self.used = False
        """Whether a call was looked at: the same in all processes, whatever fitted."""

    def fits(self, num_bytes: int) -> bool:
        """Whether there is room for more; if not, forget a batch of which no part is of use."""
        if not self._full and self.num_bytes + num_bytes <= self._max_bytes:
            return True
        if not self._partly:  # rows come back shuffled: hardly a call would be over these alone
            self._rows.clear()
            self.num_bytes, self._full = 0, True
        return False

    def add(self, entry: Entry, recording: Recording) -> None:
        """Keep a recording that fits, whose hidden states others must not write to."""
        self.num_bytes += recording.hidden_BTH.nbytes
        rows = self._rows.setdefault(entry.circumstances, {})
        rows.update({key: (recording, index) for index, key in enumerate(entry.rows)})

    def places(self, entry: Entry) -> list[Place]:
        """Where the rows of a call are; empty unless all of them are known."""
        rows = self._rows.get(entry.circumstances, {})
        places = [rows[key] for key in entry.rows if key in rows]
        return places if len(places) == len(entry.rows) else []


def gathered(places: Sequence[Place]) -> Tensor:
    """The hidden states of some rows, in memory of their own."""
    recording, first = places[0]
    in_a_row = [(recording, first + offset) for offset in range(len(places))]
    if list(places) == in_a_row:
        return recording.hidden_BTH[first : first + len(places)].clone()
    rows = [as_integers(recording.hidden_BTH[row]) for recording, row in places]
    return torch.stack(rows).view(recording.hidden_BTH.dtype)


def whole_call(places: Sequence[Place]) -> bool:
    """Whether the rows are those of one call, in its order."""
    recording, _ = places[0]
    return list(places) == [(recording, row) for row in range(len(recording.hidden_BTH))]
