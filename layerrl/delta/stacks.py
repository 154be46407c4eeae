"""Several deltas at once: on top of each other, or side by side on one base."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from layerrl.checks import is_unordered, listed, shown
from layerrl.delta.fitting import STAGES
from layerrl.delta.folder import Delta
from layerrl.delta.hub import delta_folder
from layerrl.errors import DeltaError


def read_deltas(
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    revision: str | Sequence[str | None] | None = None,
    token: str | bool | None = None,
) -> list[Delta]:
    """The descriptions of deltas, in the order given; a `DeltaError` if one cannot be read."""
    paths = listed(path)
    if is_unordered(path) or not all(isinstance(each, str | os.PathLike) for each in paths):
        raise DeltaError(
            f"path is {shown(path)}, expected a delta's folder or 'user/name' on the hub, or a "
            "list of several, the lowest first"
        )
    if not paths:
        raise DeltaError("path is empty, no delta was given: expected a folder or several")
    if revision is None or isinstance(revision, str):
        revision = [revision] * len(paths)
    revisions: Sequence[str | None] = listed(revision)
    if is_unordered(revision) or not all(r is None or isinstance(r, str) for r in revisions):
        raise DeltaError(
            f"revision is {shown(revision)}, expected a branch, tag or commit, or a list of them"
        )
    if len(revisions) != len(paths):
        raise DeltaError(
            f"revision is {revision!r:.80} for {len(paths)} deltas: expected one for each (None "
            "for a folder), or one string"
        )
    return [
        Delta.read(delta_folder(one, revision=its, token=token))
        for one, its in zip(paths, revisions, strict=True)
    ]


def refuse_overlap(delta: Delta, names: Iterable[str], above: Mapping[str, Delta]) -> None:
    """Refuse a union whose delta replaces tensors that one of `above`, by name, replaces."""
    if twice := sorted({*names} & {*above}):
        raise DeltaError(
            f"{twice[0]!r} is replaced by both {above[twice[0]].path} and {delta.path} "
            f"({len(twice)} tensors): a union takes deltas of different layers. If one was trained "
            "on top of the other, give them in that order without union=True; to compare them, "
            'switch between them: Deltas(model, {"a": ..., "b": ...}).'
        )


def hint(
    deltas: Sequence[Delta],
    index: int,
    *,
    union: bool,
    others: Sequence[Delta] = (),
    there: Sequence[Delta] = (),
) -> str:
    """Return advice on a delta that was not made from what is below it, with a space in front.

    `others` are further deltas that the caller gave, but not to go below this one; `there`, those
    that the caller loaded before.
    """
    delta = deltas[index]
    if delta.base_digest is None:
        return STAGES
    for other in (*deltas, *others):
        if other is not delta and other.result_digest == delta.base_digest:
            return f" The delta at {delta.path} was made on top of the one at {other.path}: " + (
                "give them in that order, without union=True." if union else "give that first."
            )
    if not union and any(other.base_digest == delta.base_digest for other in deltas[:index]):
        return (
            " The deltas were made side by side, from the same base: union=True takes those of "
            "different layers."
        )
    for other in there:
        if other.base_digest == delta.base_digest:
            return (
                f" The delta at {other.path} is in this model, and was made from the same base: "
                "unload_delta(model) first. Deltas of different layers load together with "
                "union=True; Deltas switches between any."
            )
    if index:
        return f" A stage between {deltas[index - 1].path} and {delta.path} is missing." + STAGES
    return STAGES
