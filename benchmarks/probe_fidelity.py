"""Do scores of layers predict what the layers contribute? Every probe on every suite.

    python benchmarks/probe_fidelity.py --ground addition-llama  # the exact sweep of one suite
    python benchmarks/probe_fidelity.py                          # every probe against the truths
    python benchmarks/probe_fidelity.py --picture docs/probe_fidelity.png

Truths are kept in `benchmarks/ground_truth`, probes' reports in `runs/suites`; what is there is
not made again. The targets are a layer's score at the end of its run and its mean along the run.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import baselines
import torch
from fidelity import (
    Fidelity,
    at_random,
    ceiling,
    fidelity,
    of_seeds,
    without_trend,
)
from suites import FOLDER, SUITES

from layerrl import ContributionReport, contribution_probe
from layerrl.report import Score
from layerrl.scores.position import position_scores
from layerrl.statistics import spearman
from layerrl.sweep.harness import weights_digest

TRUTHS = Path(__file__).parent / "ground_truth"
NUM_PROMPTS = 128
"""Of probes that generate."""
SEPARATES = 0.6
"""Noise ceiling below which a suite says nothing."""


def scored(suite: Any, method: str, budget: int, seed: int = 0) -> ContributionReport:
    """The library's own."""
    return contribution_probe(
        suite.model(),
        method=method,
        reward_funcs=suite.reward,
        train_dataset=suite.data[0],
        processing_class=suite.tokenizer,
        args=suite.args(),
        layers=suite.layers,
        budget=budget,
        seeds=[seed],
    )


PROBES: dict[str, Callable[[Any], ContributionReport]] = {
    "position": lambda suite: contribution_probe(suite.model(), method="position"),
    "position:0.37": lambda suite: contribution_probe(suite.model(), method="position:0.37"),
    "published": lambda suite: contribution_probe(suite.model(), method="published"),
    "gradient": lambda suite: scored(suite, "gradient", NUM_PROMPTS),
    "step": lambda suite: scored(suite, "step", NUM_PROMPTS),
    "gradient norm": lambda suite: baselines.gradient_norm(suite, NUM_PROMPTS),
    "spectrum": baselines.spectrum,
    "bypass": lambda suite: baselines.bypass(suite, NUM_PROMPTS),
    "weight change": baselines.weight_change,
}


def main() -> None:
    """Make a truth, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ground", choices=sorted(SUITES), help="make the truth of this suite")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of its runs")
    parser.add_argument("--suites", nargs="+", default=sorted(SUITES), choices=sorted(SUITES))
    parser.add_argument("--probes", nargs="+", default=list(PROBES), choices=list(PROBES))
    parser.add_argument("--picture", type=Path, help="fidelity to the end against cost")
    options = parser.parse_args()
    if options.ground:
        ground(SUITES[options.ground], options.seeds)
        return
    paths = {name: TRUTHS / f"{name}.json" for name in options.suites}
    reports = {
        name: ContributionReport.from_json(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }
    for name, report in reports.items():
        found, measured = base_of(name), report.settings["base"]
        if found != measured:
            raise SystemExit(
                f"{paths[name]} was measured on the base {measured}, and the one here is {found}: "
                f"scores of one say nothing of the other. Make the truth anew: --ground {name}"
            )
    truths = {name: targets(report) for name, report in reports.items()}
    for target in next(iter(truths.values())):
        found = {name: found[target] for name, found in truths.items()}
        summary = compare(target, found, options.probes)
        if options.picture and target == "end":
            picture(summary, options.picture)


def ground(suite: Any, seeds: list[int]) -> None:
    """Keep and print the exact sweep."""
    report = sweep(suite, seeds, FOLDER / suite.name / "sweep")
    TRUTHS.mkdir(exist_ok=True)
    (TRUTHS / f"{suite.name}.json").write_text(report.to_json() + "\n", encoding="utf-8")
    print(report)
    for target, truth in targets(report).items():
        print(f"Noise ceiling of {target}: {ceiling(truth):.2f}")


def sweep(suite: Any, seeds: list[int], folder: Path) -> ContributionReport:
    """The exact sweep: every layer alone, all seeds."""
    train, held_out = suite.data
    return contribution_probe(
        suite.model(),
        method="train",
        reward_funcs=suite.reward,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=suite.tokenizer,
        args=suite.args(),
        full_args=suite.args(full=True),
        layers=suite.layers,
        seeds=seeds,
        greedy=suite.greedy,
        output_dir=folder,
    )


def targets(report: ContributionReport) -> dict[str, ContributionReport]:
    """Scores at the end, and the mean along the run."""
    return {"end": report, "mean along the run": along(report)}


def along(report: ContributionReport) -> ContributionReport:
    """The report with each run's mean over its curve and its end in place of its score."""

    def mean(entry: Score) -> Score:
        rows = [*(scores for _, scores in entry.curve), entry.scores]
        if entry.scores is None or any(row is None for row in rows):
            return entry
        return replace(
            entry,
            scores=tuple(
                tuple(math.fsum(values) / len(values) for values in zip(*seed, strict=True))
                for seed in zip(*rows, strict=True)
            ),
        )

    return replace(report, layers=tuple(map(mean, report.layers)), full=mean(report.full))


@dataclass(frozen=True)
class Overall:
    """One probe over suites."""

    spearman: float
    share: float | None
    """Of a full run."""


def compare(
    target: str, truths: dict[str, ContributionReport], probes: list[str]
) -> dict[str, Overall]:
    """A table for each suite, and one over those that separate their layers."""
    counted: dict[str, list[tuple[Fidelity, float | None]]] = {}
    for name, truth in truths.items():
        top = ceiling(truth)
        print(f"\n### {name}, {target}: noise ceiling {top:.2f}\n")
        counts = top >= SEPARATES
        if not counts:
            print("Does not separate its layers: counts for nothing.\n")
        print("| probe | Spearman | Kendall | beyond depth | regret | top 3 | avoided | cost |")
        print("|---|---|---|---|---|---|---|---|")
        for probe, found, share in fidelities(name, truths, probes):
            cells = [f"{value:.2f}" for value in astuple(found)]
            if probe in probes and (interval := truth.spearman(kept(name, probe))[1]):
                cells[0] += f" {interval:.2f}"
            print(f"| {probe} | {' | '.join((*cells, percent(share)))} |")
            if counts:
                counted.setdefault(probe, []).append((found, share))
        if {"gradient", "published"} <= {*probes}:
            print(f'\n"gradient" and "published": {agreement(name, *truth.scores)}')
    if not counted:
        return {}
    number, overall = len(counted["random"]), {}
    print(f"\n### All {number} suites that separate their layers, {target}\n")
    print("| probe | median Spearman | regret | top 3 | worst third avoided | median cost |")
    print("|---|---|---|---|---|---|")
    for probe, results in counted.items():
        if len(results) < number:
            continue  # a median over other suites
        found = [fidelity for fidelity, _ in results]
        shares = [share for _, share in results if share is not None]
        middle = statistics.median(one.spearman for one in found)
        means = [
            f"{statistics.fmean(getattr(one, name) for one in found):.2f}"
            for name in ("regret", "top3", "avoided")
        ]
        share = statistics.median(shares) if shares else None
        overall[probe] = Overall(middle, share)
        print(f"| {probe} | {middle:.2f} | {' | '.join(means)} | {percent(share)} |")
    if len(ours := counted.get("gradient", ())) == number:
        print("\nMean Spearman of gradient, less that of")
        for probe, results in counted.items():
            if probe not in ("gradient", "random") and len(results) == number:
                pairs = [(one, other) for (one, _), (other, _) in zip(ours, results, strict=True)]
                mean = statistics.fmean(a.spearman - b.spearman for a, b in pairs)
                print(f"- {probe}: {mean:+.2f}")
    return overall


def agreement(name: str, *layers: int) -> str:
    """Does the gradient of this model look like the paper's profile of another one?"""
    a_L, b_L = (
        torch.tensor([kept(name, probe).scores[k] for k in layers], dtype=torch.double)
        for probe in ("gradient", "published")
    )
    beyond = spearman(without_trend(a_L, layers), without_trend(b_L, layers))
    return f"Spearman {spearman(a_L, b_L):.2f}, beyond depth {beyond:.2f}"


def picture(overall: dict[str, Overall], path: Path) -> None:
    """Median rank correlation of each probe against what it costs."""
    from matplotlib.figure import Figure

    free = 1e-3  # where probes that cost nothing are drawn
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    known = {name: one for name, one in overall.items() if one.share is not None}
    at: dict[float, int] = {}
    for name, one in known.items():
        share = max(one.share or 0.0, free)
        x = share * 1.6 ** at.setdefault(share, 0)  # side by side
        at[share] += 1
        own = name == "gradient"
        ax.plot(x, one.spearman, "o", color="C0" if own else "0.6")
        ax.text(x, -0.97, name, rotation=90, ha="center", va="bottom", fontsize=8)
    ax.axhline(0, color="0.85", zorder=0)
    ax.set_xscale("log")
    ax.set(
        xlabel="share of a full-parameter run (left: nothing)",
        ylabel="median rank correlation with C",
        xlim=(free / 2, 2 * max(free, *(one.share or free for one in known.values()))),
        ylim=(-1, 1),
    )
    figure.savefig(path, dpi=150)


def fidelities(
    name: str, truths: dict[str, ContributionReport], probes: list[str]
) -> Iterator[tuple[str, Fidelity, float | None]]:
    """Each probe's agreement with one suite's truth, and its share of a full run's cost."""
    truth = truths[name]
    yield "random", at_random(truth), 0.0
    if len(truths) > 1:
        yield "position, fitted elsewhere", fidelity(truth, fitted_prior(name, truths)), 0.0
    for probe in probes:
        report = kept(name, probe)
        yield probe, fidelity(truth, report), None if report.cost is None else report.cost.fraction
    full, *layers = (
        run.seconds / len(run.scores) for run in (truth.full, *truth.layers) if run.scores
    )
    sweep = 1 + math.fsum(layers) / full  # in full runs: one seed of all
    for label, early, share in (
        ("train, first quarter", True, sweep / 4),
        ("another seed's sweep", False, sweep),
    ):
        if (found := of_seeds(truth, early=early)) is not None:
            yield label, found, share


def fitted_prior(name: str, truths: dict[str, ContributionReport]) -> ContributionReport:
    """The position prior of a suite whose centre ranks the layers of the other suites best."""
    others = [other for key, other in truths.items() if key != name]

    def agreement_at(centre: float) -> float:
        return math.fsum(
            spearman([*o.scores.values()], [prior(o, centre).scores[k] for k in o.scores]).item()
            for o in others
        )

    centre = max((number / 20 for number in range(21)), key=agreement_at)
    return prior(truths[name], centre)


def prior(truth: ContributionReport, centre: float) -> ContributionReport:
    """The position prior for as many layers."""
    return baselines.report("position", position_scores(truth.num_layers, centre))


def percent(share: float | None) -> str:
    """Of a full run."""
    if share is None:
        return "-"
    return f"{100 * share:.0f} %" if share > 0.1 else f"{100 * share:.2g} %"


@cache
def base_of(name: str) -> str:
    """What tells a suite's base from others."""
    return weights_digest(SUITES[name].model())


def kept(name: str, probe: str) -> ContributionReport:
    """A probe's report on the base, made when it is asked for the first time."""
    path = FOLDER / f"{name}.probes" / base_of(name) / f"{probe}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PROBES[probe](SUITES[name]).to_json(), encoding="utf-8")
    return ContributionReport.from_json(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
