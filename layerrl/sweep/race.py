"""`method="race"`: half an exact run of each of the few layers that `"gradient"` scores highest."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from layerrl.checks import check_path, check_switch, whole_number
from layerrl.errors import ProbeError, ReportError
from layerrl.journal import Journal, write_beside
from layerrl.report import ContributionReport, Cost, Score
from layerrl.report.ranking import resampled
from layerrl.scores.checks import check_seeds
from layerrl.scores.gradient import METHOD as GRADIENT
from layerrl.scores.identity import digest
from layerrl.scores.method import Method, Request
from layerrl.selection import LayerSelection
from layerrl.statistics import interval_of
from layerrl.stored import bytes_of, refused_as
from layerrl.sweep import Entry
from layerrl.sweep.exact import METHOD as EXACT
from layerrl.sweep.exact import measured
from layerrl.sweep.halving import cycle, rungs
from layerrl.warning import warn

_CANDIDATES = 3
"""More gain nothing that was resolved (docs/results.md)."""
_MOST_PROMPTS = 100
"""Times as many prompts as there are: above that, a number of them is no advice."""


def _score(selection: LayerSelection, request: Request) -> ContributionReport:
    count = _candidates(request.variant, len(selection.layers))
    stop = _half(request)
    probe: ContributionReport | None = None
    ordered: list[int] = []

    def choose(settings: dict[str, Any]) -> list[int]:
        nonlocal probe, ordered
        probe = _probe(selection, request, settings)
        scores = probe.scores
        ordered = sorted(scores, key=lambda layer: (-scores[layer], layer))
        return sorted(ordered[:count])

    raced = measured(selection, request, choose=choose, stop=stop)
    assert probe is not None
    entries = list(raced.layers)
    for rank, layer in enumerate(ordered, 1):
        entry = entries[layer] if rank <= count else Score(status="dropped")
        note = f'rank {rank} of "gradient", {probe.scores[layer]:.2f}'
        entries[layer] = replace(entry, note=note)
    spent = math.fsum(report.cost.seconds for report in (probe, raced) if report.cost is not None)
    report = replace(
        raced,
        layers=tuple(entries),
        cost=Cost(seconds=spent, tokens=None, forwards=None, backwards=None, fraction=None),
        settings={**raced.settings, "stop": stop, "gradient": probe.settings},
    )
    folder = check_path("output_dir", request.output_dir, ProbeError)
    write_beside(folder / "report.json", report.to_json())
    _warn_of_doubt(report, stop)
    return report


def _candidates(variant: str, num_layers: int) -> int:
    """How many layers race: what follows the colon, or three."""
    if num_layers < 2:
        raise ProbeError(
            "method='race' with 1 layer to score: there is nothing to race. Expected 2 layers or "
            "more, or method='train'."
        )
    count = min(_CANDIDATES, num_layers)
    if variant:
        count = int(variant) if variant.isascii() and variant.isdecimal() else 0
    if not 2 <= count <= num_layers:
        raise ProbeError(
            f"method='race{variant and ':' + variant}' with {num_layers} layers to score: expected "
            "a number of candidates from 2 to the number of layers, as in 'race:3'"
        )
    return count


def _half(request: Request) -> int:
    """The step after half a run, where a generation batch ends."""
    args = request.args
    if check_switch("halving", request.halving, ProbeError):
        raise ProbeError(
            "halving=True with method='race': candidates are trained for half a run, and none is "
            "dropped before. Leave halving out, or take method='train'."
        )
    found = rungs(args.max_steps, cycle(args)) if args.max_steps > 0 else ()
    if not found:
        raise ProbeError(
            f"max_steps is {args.max_steps}: a race ends after half of a run, between two "
            f"generation batches, which are {cycle(args)} steps long. Expected more than that."
        )
    return found[-1]


def _probe(
    selection: LayerSelection, request: Request, settings: dict[str, Any]
) -> ContributionReport:
    """The cheap scores, kept beside the journal: a race that goes on has the same candidates."""
    folder = check_path("output_dir", request.output_dir, ProbeError)
    with Journal(folder, settings, Entry):
        pass  # a folder of other runs is refused before anything is generated
    budget = whole_number(request.budget, least=1)
    asked = [[*selection.layers], budget, check_seeds(request.seeds)[0]]
    file = folder / f"gradient-{digest(settings, *asked)}.json"
    if not file.exists():
        write_beside(file, GRADIENT.score(selection, request).to_json())
    advice = "Delete it to probe again."
    with refused_as(ReportError, f"{file} is damaged", advice):
        report = ContributionReport.from_json(bytes_of(file))
    if report.num_layers != selection.num_layers or {*report.scores} != {*selection.layers}:
        raise ReportError(f"{file} has scores of other layers than {selection}. {advice}")
    return report


def _warn_of_doubt(report: ContributionReport, stop: int) -> None:
    """Say which layers the race could not tell apart, and what would."""
    scores = report.scores
    first, second = sorted(scores, key=lambda layer: (-scores[layer], layer))[:2]
    runs = {str(layer): report.layers[layer] for layer in (first, second)}
    draws = resampled(runs, report.method, report.settings)
    difference = interval_of(draws[str(first)] - draws[str(second)])
    if 0 not in difference:
        return
    gap, width = scores[first] - scores[second], (difference.high - difference.low) / 2
    prompts, advice = len((report.layers[first].scores or [[]])[0]), ""
    if gap * math.sqrt(_MOST_PROMPTS) > width:
        advice = f"evaluate on about {math.ceil(prompts * (width / gap) ** 2)} prompts, "
    warn(
        f"after {stop} steps, layers {first} ({scores[first]:.3f}) and {second} "
        f"({scores[second]:.3f}) are not resolved from each other: 95 % interval of the difference "
        f"{difference:.3f}, with {prompts} prompts. Take either, {advice}or go on to the end of "
        f"these runs with method='train', layers=[{first}, {second}] and the same output_dir."
    )


METHOD = Method(score=_score, needs=EXACT.needs, has_variants=True)
