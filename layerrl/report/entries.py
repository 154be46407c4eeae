"""What a report holds: scores, and what they took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from layerrl.checks import (
    check_choice,
    check_count,
    check_kind,
    check_number,
    check_text,
    finite_number,
    is_unordered,
    shown,
    whole_number,
)
from layerrl.errors import ReportError
from layerrl.schema import Rule, fitted
from layerrl.stored import refused_as

if TYPE_CHECKING:
    from layerrl.report import ContributionReport

Status = Literal["done", "dropped", "missing"]
_LARGEST = 1e150
"""Of a score and a contribution: squares of larger ones are infinite."""
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
        _set_numbers(self, optional=("score", "contribution"), below=_LARGEST)
        _set_numbers(self, needed=("seconds",), counts=("steps",), least=0)
        check_choice("status of a run", self.status, get_args(Status), ReportError)
        check_text("note of a run", self.note, ReportError)
        try:
            curve = tuple((_step(step), _rows(scores, "curve")) for step, scores in self.curve)
        except (TypeError, ValueError) as error:  # of what is no pairs
            if isinstance(error, ReportError):
                raise
            raise ReportError(
                f"curve of a run is {shown(self.curve)}, expected pairs of a step and scores"
            ) from error
        object.__setattr__(self, "curve", curve)
        if self.scores is None:
            return
        rows = _rows(self.scores, "scores")
        object.__setattr__(self, "scores", rows)
        object.__setattr__(self, "score", sum(map(sum, rows)) / (len(rows) * len(rows[0])))


def check_report(report: ContributionReport) -> None:
    """Refuse runs and settings that no report can be of."""
    layers, settings, ends = report.layers, report.settings, (report.base, report.full)
    for name in ("method", "source"):
        check_text(f"{name} of a report", getattr(report, name), ReportError)
    check_kind("layers of a report", layers, (tuple, list), "a tuple of Score", ReportError)
    for layer in layers:
        check_kind("an entry of layers", layer, Score, "a Score", ReportError)
    for name, kind in (("base", Score), ("full", Score), ("cost", Cost)):
        if (value := getattr(report, name)) is not None:
            expected = f"a {kind.__name__} or None"
            check_kind(f"{name} of a report", value, kind, expected, ReportError)
    check_kind("settings of a report", settings, dict, "a dict", ReportError)
    runs = [run for run in (*layers, *ends) if run is not None]
    sizes = {len(row) for run in runs for row in run.scores or ()}
    if len(sizes) > 1:
        raise ReportError(
            f"the runs have scores of {sorted(sizes)} prompts, expected the same prompts for all"
        )
    with suppress(RecursionError):  # a cycle, which no file will take
        settings = _as_in_json(settings)
    object.__setattr__(report, "layers", tuple(layers))
    object.__setattr__(report, "settings", settings)
    for name, kind in _READ.items():
        if name in settings:
            with refused_as(ReportError, "settings of a report"):
                fitted(kind, settings[name], name)


def _as_in_json(value: Any) -> Any:
    """Lists for tuples, and text for keys that are none: what a file will have for them."""
    if isinstance(value, tuple | range | list):
        return [_as_in_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    keys = [json.dumps(k) if isinstance(k, int | float | None) else k for k in value]
    if len({*keys}) < len(keys):  # 1 and "1"
        return value
    return dict(zip(keys, map(_as_in_json, value.values()), strict=True))


def still_missing(runs: Mapping[str, Score], settings: Mapping[str, Any]) -> str:
    """Runs and seeds that were asked for and are not there yet, in a clause; empty if none."""
    seeds, asked = len(settings.get("seeds", ())), settings.get("layers")
    wanted = {
        n: run for n, run in runs.items() if asked is None or not n.isdigit() or int(n) in asked
    }
    missing = [name for name, run in wanted.items() if run.status == "missing"]
    trained = {name: run for name, run in wanted.items() if name != "base"}
    fewer = [n for n, run in trained.items() if run.scores and len(run.scores) < seeds]
    texts = [f"{len(missing)} of {len(wanted)} are missing"] if missing else []
    texts += [f"{len(fewer)} have fewer than {seeds} seeds"] if fewer else []
    return ", ".join(texts)


def check_layer(layer: object, num_layers: int) -> int:
    """The number of a layer that a report is asked for."""
    number = whole_number(layer, least=0)
    if not num_layers:
        raise ReportError(f"layer is {shown(layer)}, and this report has no layers")
    if number is None or number >= num_layers:
        raise ReportError(f"layer is {shown(layer)}, expected an int from 0 to {num_layers - 1}")
    return number


def _rows(scores: Iterable[Iterable[float]], name: str) -> tuple[tuple[float, ...], ...]:
    try:
        if is_unordered(scores):
            raise TypeError(scores)
        rows = tuple(tuple(map(_number, _in_order(row))) for row in scores)
    except (TypeError, ValueError, OverflowError) as error:
        raise ReportError(
            f"{name} of a run is {shown(scores)}, expected a list for every seed, of a finite "
            "number for each prompt"
        ) from error
    sizes = {len(row) for row in rows}
    if len(sizes) != 1 or 0 in sizes or not all(abs(v) < _LARGEST for row in rows for v in row):
        raise ReportError(
            f"{name} of {sorted(sizes)} prompts: expected, for every seed, one finite number "
            f"for each of the same prompts, below {_LARGEST:g}"
        )
    return rows


def _in_order(row: Iterable[float]) -> Iterable[float]:
    if is_unordered(row):
        raise TypeError(row)
    return row


def _number(value: Any) -> float:
    """A score: a report has many, so that most take the shortest way."""
    if type(value) is float:
        return value
    number = finite_number(value)
    if number is None:
        raise TypeError(value)
    return number


def _step(value: object) -> int:
    return check_count("step of a curve", value, ReportError, least=0)


def _set_numbers(
    entry: Score | Cost,
    *,
    needed: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    counts: tuple[str, ...] = (),
    least: float | None = None,
    below: float | None = None,
) -> None:
    """Make fields Python's own numbers, which JSON takes; `optional` ones may be None."""
    for name in (*needed, *optional):
        value = getattr(entry, name)
        if value is not None or name in needed:
            number = check_number(f"{name} of a run", value, ReportError, least=least)
            if below is not None and abs(number) >= below:
                raise ReportError(
                    f"{name} of a run is {number:g}, expected a number below {below:g}: what is "
                    "computed of larger ones is infinite"
                )
            object.__setattr__(entry, name, number)
    for name in counts:
        number = check_count(f"{name} of a run", getattr(entry, name), ReportError, least=0)
        object.__setattr__(entry, name, number)


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

    def __post_init__(self) -> None:
        counts = ("tokens", "forwards", "backwards")
        counted = tuple(name for name in counts if getattr(self, name) is not None)
        _set_numbers(self, needed=("seconds",), optional=("fraction",), counts=counted, least=0)

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
