"""The exact measurement: which runs are still to do, and what the finished ones say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tqdm.auto import tqdm

from layerrl.errors import JournalError
from layerrl.journal import Journal, write_beside
from layerrl.report import ContributionReport, Cost, Score
from layerrl.report.entries import Scores
from layerrl.schema import Amount, Count, Rule
from layerrl.sweep.executors import executor
from layerrl.sweep.halving import below_the_cut, cycle, rungs
from layerrl.sweep.harness import Run

if TYPE_CHECKING:
    from layerrl.sweep.harness import Harness

_NAMES = re.compile("base|full|0|[1-9][0-9]*")
_BAR = "{l_bar}{bar}| {n:.2f}/{total:.0f} runs, {elapsed} so far, {remaining} left{postfix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A finished run, or one that stopped on its way, as the journal has it."""

    name: Annotated[str, Rule('"base", "full" or a layer', _NAMES.fullmatch)]
    """As that of a `Run`."""
    seed: int | None
    """The same."""
    stop: Count | None
    """The same."""
    scores: Scores
    """Of each evaluation prompt."""
    curve: tuple[tuple[Count, Scores], ...]
    """The same on the way, by step."""
    steps: Count
    """Optimizer steps that it took."""
    seconds: Amount
    """Time that it took."""
    harness_seconds: float = 0.0
    """Of these, what went neither into training nor evaluation."""


class Sweep:
    """Runs over some layers of one model, and their report.

    `report.json` in its folder is up to date after every run, also for other processes. The `args`
    are those of the single layers' runs; `settings`, for the journal, what all runs have in common.
    With a step to `stop` the layers' runs at, there is no full run.
    """

    def __init__(
        self,
        harness: Harness,
        *,
        num_layers: int,
        layers: Sequence[int],
        seeds: Sequence[int],
        args: Any,
        settings: dict[str, Any],
        halving: bool,
        stop: int | None = None,
        folder: Path,
    ) -> None:
        self._harness, self._folder, self._settings = harness, folder, settings
        self._num_layers, self._layers, self._seeds = num_layers, layers, seeds
        self._steps = args.max_steps
        self._rungs = rungs(args.max_steps, cycle(args)) if halving else ()
        self._stop = stop

    def run(self, where: str, resources: Mapping[str, float]) -> ContributionReport:
        """Do what the journal does not hold yet, and report."""
        with Journal(self._folder, self._settings, Entry) as journal, ExitStack() as stack:
            self._check_prompts(journal)
            self._check_runs(journal)
            measure_all = None
            bar = self._bar(journal.entries)
            stack.callback(bar.close)
            self._update(bar, None, journal.entries)
            for stop in (*self._rungs, self._stop):
                missing = list(self._missing(_Records(journal.entries), stop))
                if not missing:
                    continue
                if measure_all is None:
                    measure_all = stack.enter_context(executor(where, self._harness, resources))
                with closing(measure_all(missing)) as measured:
                    for run, found in measured:
                        journal.append({**run._asdict(), **found})
                        if run.stop is None:
                            self._harness.discard(run)
                        self._update(bar, run, journal.entries)
            return self._update(bar, None, journal.entries)

    def _check_prompts(self, journal: Journal) -> None:
        rows = [row for e in journal.entries for row in (e.scores, *(row for _, row in e.curve))]
        if len(sizes := {len(row) for row in rows}) > 1:
            raise JournalError(
                f"{journal.path} has scores of {sorted(sizes)} prompts, expected the same prompts "
                "for every run: it was edited or damaged. Delete the wrong lines to run them again."
            )

    def _check_runs(self, journal: Journal) -> None:
        """Refuse a run with two results, as two journals put together have of base and full."""
        lines: dict[Run, tuple[int, Entry]] = {}
        for line, entry in enumerate(journal.entries, 2):
            run = Run(entry.name, entry.seed, entry.stop)
            before, first = lines.setdefault(run, (line, entry))
            if entry.scores != first.scores:
                raise JournalError(
                    f"lines {before} and {line} of {journal.path} have different scores of "
                    f"{run.name!r}, seed {run.seed}: it was edited, or put together from two. "
                    "Delete one of them."
                )

    def report(self, entries: Sequence[Entry]) -> ContributionReport:
        """The report of a journal's entries; what is missing in them is `"missing"`."""
        records = _Records(entries)
        _, dropped = self._standing(records)
        known = {entry.seed for entry in entries if entry.seed is not None}
        seeds = (*self._seeds, *sorted(known - {*self._seeds}))
        full = records.score("full", seeds) if self._stop is None else None
        seconds = math.fsum(entry.seconds for entry in entries)
        of_one = full.seconds / len(full.scores) if full and full.scores else 0.0
        return ContributionReport(
            method="train" if self._stop is None else "race",
            layers=tuple(
                records.dropped(str(layer), seeds, dropped[layer])
                if layer in dropped
                else records.score(str(layer), seeds, self._stop)
                for layer in range(self._num_layers)
            ),
            base=records.score("base", (None,)),
            full=full,
            cost=Cost(
                seconds=seconds,
                tokens=None,
                forwards=None,
                backwards=None,
                fraction=seconds / of_one if of_one else None,
            ),
            settings={
                **self._settings,
                "layers": list(self._layers),
                "seeds": list(self._seeds),
                "rungs": list(self._rungs),
            },
        )

    def _missing(self, records: _Records, stop: int | None) -> Iterator[tuple[Run, int]]:
        """What to do before anything can be dropped at a rung, or at the end."""
        alive, _ = self._standing(records)
        wanted = [Run(str(layer), seed, stop) for seed in self._seeds for layer in alive]
        if stop == (*self._rungs, self._stop)[0]:
            full = self._seeds if self._stop is None else ()
            whole = [Run("base"), *(Run("full", seed) for seed in full)]
            wanted = sorted([*whole, *wanted], key=lambda run: (run.seed is not None, run.seed))
        for run in wanted:
            # Who went on to the end is not dropped any more, wherever else it was looked at.
            passed = stop != self._stop and records.at(run._replace(stop=None)) is not None
            if records.at(run) is None and not passed:
                yield run, records.brought_to(run)

    def _standing(self, records: _Records) -> tuple[list[int], dict[int, str]]:
        """Layers that are trained on, as far as is known by now, and why others are not."""
        alive, dropped = list(self._layers), {}
        base, full = records.score("base", (None,)), records.score("full", self._seeds)
        for stop in self._rungs:
            scores = {layer: records.all_at(str(layer), self._seeds, stop) for layer in alive}
            known = {layer: rows for layer, rows in scores.items() if rows is not None}
            ended = [k for k in alive if any(records.at(Run(str(k), s)) for s in self._seeds)]
            if {*alive} - {*known} - {*ended} or base.score is None or full.score is None:
                break
            if not known:
                continue
            behind = below_the_cut(known, base=base.score, full=full.score)
            for layer, why in behind.items():
                if layer not in ended:
                    dropped[layer] = f"at step {stop}: {why}"
                    alive.remove(layer)
        return alive, dropped

    def _bar(self, entries: Sequence[Entry]) -> tqdm:
        done, total = self._progress(entries)
        return tqdm(
            desc="contribution", total=total, initial=done, bar_format=_BAR, disable=done >= total
        )

    def _progress(self, entries: Sequence[Entry]) -> tuple[float, float]:
        """Whole runs done, and how many there will be if nothing more is dropped."""
        alive, dropped = self._standing(_Records(entries))
        whole = 1 if self._stop is None else self._stop / self._steps
        full = ["full"] if self._stop is None else []
        come: dict[tuple[str, int | None], float] = {
            (n, s): 0.0 for n in (*full, *map(str, (*alive, *dropped))) for s in self._seeds
        }
        for entry in entries:
            if (run := (entry.name, entry.seed)) in come:
                share = 1 if entry.stop is None else entry.stop / self._steps
                come[run] = min(whole, max(come[run], share))
        gone = sum(share for (name, _), share in come.items() if name in map(str, dropped))
        return sum(come.values()), len(self._seeds) * (len(full) + len(alive)) * whole + gone

    def _update(self, bar: tqdm, run: Run | None, entries: Sequence[Entry]) -> ContributionReport:
        report = self.report(entries)
        write_beside(self._folder / "report.json", report.to_json())
        if run is not None:
            mean = math.fsum(entries[-1].scores) / len(entries[-1].scores)
            shown = run.name if run.name in ("base", "full") else f"layer {run.name}"
            bar.set_postfix_str(f"{shown}: {mean:.3f}", refresh=False)
            done, bar.total = self._progress(entries)
            bar.update(done - bar.n)
        return report


class _Records:
    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries: dict[Run, Entry] = {}
        for entry in entries:
            self._entries[Run(entry.name, entry.seed, entry.stop)] = entry

    def at(self, run: Run) -> tuple[float, ...] | None:
        """The prompts' scores when a run was where this one stops; None where nobody knows."""
        if run in self._entries:
            return self._entries[run].scores
        along: dict[int | None, tuple[float, ...]] = {
            step: scores for e in self._of(run) for step, scores in e.curve
        }
        return along.get(run.stop)

    def all_at(
        self, name: str, seeds: Sequence[int | None], stop: int | None
    ) -> list[tuple[float, ...]] | None:
        """The same of several seeds, shape (S, P)."""
        found = [self.at(Run(name, seed, stop)) for seed in seeds]
        known = [scores for scores in found if scores is not None]
        return known if len(known) == len(found) else None

    def brought_to(self, run: Run) -> int:
        """The step at which a run stopped last, 0 if it never ran."""
        return max((e.stop for e in self._of(run) if e.stop is not None), default=0)

    def score(self, name: str, seeds: Sequence[int | None], stop: int | None = None) -> Score:
        """The score of a layer, base or full at a step (None: the end), over the finished seeds."""
        found = [self.at(Run(name, seed, stop)) for seed in seeds]
        scores = tuple(tuple(row) for row in found if row is not None)
        if not scores:
            return Score(status="missing", **self._spent(name, seeds))
        return Score(scores=scores, **self._spent(name, seeds))

    def dropped(self, name: str, seeds: Sequence[int], why: str) -> Score:
        """A layer that was not trained to the end."""
        return Score(status="dropped", note=why, **self._spent(name, seeds))

    def _of(self, run: Run) -> list[Entry]:
        return [e for key, e in self._entries.items() if key[:2] == run[:2]]

    def _spent(self, name: str, seeds: Sequence[int | None]) -> dict[str, Any]:
        started = [seed for seed in seeds if self._of(Run(name, seed))]
        entries = [e for seed in started for e in self._of(Run(name, seed))]
        stops = {e.stop for e in entries if e.stop is not None}
        on_the_way = stops | {step for e in entries for step, _ in e.curve}
        curve = [
            (step, tuple(map(tuple, scores)))
            for step in sorted(on_the_way)
            if (scores := self.all_at(name, started, step)) is not None
        ]
        return {
            "seconds": sum(e.seconds for e in entries),
            "steps": sum(e.steps for e in entries),
            "curve": tuple(curve),
        }
