"""What a report holds: scores, and what they took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from layerrl.checks import finite_number, shown
from layerrl.errors import ReportError
from layerrl.schema import Rule, fitted
from layerrl.stored import refused_as

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Status = Literal["done", "dropped", "missing"]
_LARGEST = 1e150
"""Of a score: squares of larger ones are infinite."""
Scores = Annotated[
    tuple[float, ...],
    Rule("one or more scores below 1e150", lambda row: row and max(map(abs, row)) < _LARGEST),
]
_READ: dict[str, Any] = {
    **dict.fromkeys(("seeds", "layers", "chosen"), list[int]),
    "modules": list[str] | None,
}
"""Settings of a report that are read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one run, or one layer in a method without runs, scored."""

    score: float | None = None
    """Mean over prompts and seeds; None where it is missing."""
    scores: tuple[tuple[float, ...], ...] | None = None
    """Each seed's score on each prompt; None where only the mean is known."""
    curve: tuple[tuple[int, tuple[tuple[float, ...], ...]], ...] = ()
    """The same at steps on the way: pairs of a step and `scores`."""
    contribution: float | None = None
    """C as somebody published it; None: it follows from the scores."""
    seconds: float = 0.0
    """What it took, all seeds together."""
    steps: int = 0
    """Optimizer steps, all seeds together."""
    status: Status = "done"
    """`"dropped"`: stopped early; `"missing"`: not measured, or not yet."""
    note: str = ""
    """Why it was dropped, or what else there is to know."""

    def __post_init__(self) -> None:
        for name in ("score", "contribution", "seconds", "steps"):
            least = 0 if name in ("seconds", "steps") else None
            value = getattr(self, name)
            if finite_number(value, least=least) is None and (least == 0 or value is not None):
                raise ReportError(
                    f"{name} of a run is {shown(value)}, expected a finite number"
                    f"{'' if least is None else ' from 0 up'}"
                )
        if self.status not in get_args(Status):
            raise ReportError(
                f"status of a run is {shown(self.status)}, expected one of {get_args(Status)}"
            )
        curve = tuple((step, _rows(scores)) for step, scores in self.curve)
        object.__setattr__(self, "curve", curve)
        if self.scores is None:
            return
        rows = _rows(self.scores)
        object.__setattr__(self, "scores", rows)
        object.__setattr__(self, "score", sum(map(sum, rows)) / (len(rows) * len(rows[0])))


def check_together(
    layers: Sequence[Score], ends: Sequence[Score | None], settings: Mapping[str, Any]
) -> None:
    """Refuse runs and settings that no report can be of.

    Args:
        layers: A run for each layer.
        ends: The base and the full run.
        settings: Of the runs.

    Raises:
        ReportError: If runs were scored on different numbers of prompts, or a setting that a
            report reads is no such setting.
    """
    runs = [run for run in (*layers, *ends) if run is not None]
    sizes = {len(row) for run in runs for row in run.scores or ()}
    if len(sizes) > 1:
        raise ReportError(
            f"the runs have scores of {sorted(sizes)} prompts, expected the same prompts for all"
        )
    # What was made in memory has tuples where JSON has lists.
    known = {n: [*v] if isinstance(v, tuple | range) else v for n, v in settings.items()}
    for name, kind in _READ.items():
        if name in known:
            with refused_as(ReportError, "settings of a report"):
                fitted(kind, known[name], name)


def _rows(scores: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    rows = tuple(tuple(map(float, row)) for row in scores)
    sizes = {len(row) for row in rows}
    if len(sizes) != 1 or 0 in sizes or not all(abs(v) < _LARGEST for row in rows for v in row):
        raise ReportError(
            f"scores of {sorted(sizes)} prompts: expected, for every seed, one finite number "
            "for each of the same prompts"
        )
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a report took."""

    seconds: float = 0.0
    """All of it, one run after the other."""
    tokens: int | None = 0
    """Completion tokens generated; None where nobody counted."""
    forwards: int | None = 0
    """Forward passes over a completion, through the whole model."""
    backwards: int | None = 0
    """Backward passes over a completion."""
    fraction: float | None = 0.0
    """Share of a full-parameter run. Of runs: of the seconds that it took. Of methods without runs:
    of the passes in the run that the arguments describe, where generating a completion counts as
    much as a forward pass, and a backward as two, or three where activations are recomputed."""

    def __str__(self) -> str:
        parts = [f"{self.seconds:.0f} s"]
        if self.tokens is not None:
            parts.append(f"{self.tokens} tokens generated")
        if self.forwards is not None:
            parts.append(f"{self.forwards} forward and {self.backwards} backward passes")
        if self.fraction is not None:
            shown = (
                f"{100 * self.fraction:.2g} % of a"
                if self.fraction < 1
                else f"{self.fraction:.3g} times one"
            )
            parts.append(f"{shown} full-parameter run")
        return ", ".join(parts)
