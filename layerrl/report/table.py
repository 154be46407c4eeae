"""The cells of a report's table, and the remarks below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from layerrl.checks import finite_number
from layerrl.errors import ReportError
from layerrl.report.entries import Score
from layerrl.statistics import Interval

if TYPE_CHECKING:
    from layerrl.report import ContributionReport

_HEAD = ("layer", "score", "95 %", "C", "95 %", "steps", "seconds", "status")


def cells(
    runs: Mapping[str, Score],
    intervals: Mapping[str, Interval],
    shares: Mapping[str, tuple[float, Interval | None]],
) -> list[tuple[str, ...]]:
    """Rows of cells, without the columns in which nothing is known: head, base and full, layers."""

    def row(name: str, run: Score) -> Iterator[str]:
        share, around = shares.get(name, (None, None))
        yield name
        yield "-" if run.score is None else f"{run.score:.3f}"
        yield f"{intervals[name]:.3f}" if name in intervals else "-"
        yield "-" if share is None else f"{share:.2f}"
        yield "-" if around is None else f"{around:.2f}"
        yield str(run.steps or "-")
        yield f"{run.seconds:.0f}" if run.seconds else "-"
        yield run.status + (f": {run.note}" if run.note else "")

    ordered = sorted(runs.items(), key=lambda named: named[0].isdigit())
    rows = [_HEAD, *(tuple(row(name, run)) for name, run in ordered)]
    columns = zip(*rows, strict=True)
    return list(zip(*(c for c in columns if {*c[1:]} != {"-"}), strict=True))


def remarks(report: ContributionReport, runs: Mapping[str, Score], missing: str) -> list[str]:
    """Sentences below the table. `missing`: a clause that names missing runs, or empty."""
    found = [f"Partial: {missing}."] if missing else []
    try:
        _ = report.contributions
    except ReportError as error:
        measured = report.base is not None or report.full is not None
        ranks = "Scores rank the layers; they are no contributions."
        found.append(f"C: {error}" if measured else ranks)
    counts = {len(run.scores) for run in runs.values() if run.scores is not None}
    if counts == {1}:
        seeds = "One seed a run" if report.method in ("train", "race") else "One seed"
        found.append(f"{seeds}: the intervals say nothing about another seed.")
    rates = [
        rate
        for name in ("args", "full_args")
        if isinstance(args := report.settings.get(name), dict)
        and isinstance(rate := args.get("learning_rate"), int | float)
    ]
    if len({*rates}) > 1:
        found.append(f"Learning rate {rates[0]:g} for a layer, {rates[1]:g} for all of it.")
    times = finite_number(report.settings.get("error_times"))
    if times is not None and times != 1:
        found.append(
            f"Prompts depend on each other: their scores are written {times:g} times as far from "
            "their mean as measured, for the intervals to hold."
        )
    if not counts:
        found.append("No intervals: only means are known.")
    if report.cost is not None and report.cost.seconds:
        found.append(f"Cost: {report.cost}.")
    return found + ([report.source] if report.source else [])
