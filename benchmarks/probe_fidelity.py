"""Do scores of layers predict what the layers contribute? Every probe on every suite.

    python benchmarks/probe_fidelity.py --ground addition-llama  # the exact sweep of one suite
    python benchmarks/probe_fidelity.py                          # every probe against the truths

Truths are kept in `benchmarks/ground_truth`, probes' reports in `runs/suites`; what is there is
not made again. The targets are a layer's score at the end of its run and its mean along the run.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import baselines
from fidelity import Fidelity, ceiling, fidelity
from suites import FOLDER, SUITES

from layerrl import ContributionReport, contribution_probe
from layerrl.report import Score

TRUTHS = Path(__file__).parent / "ground_truth"
NUM_PROMPTS = 128
SEPARATES = 0.6
"""Noise ceiling below which a suite says nothing."""


def gradient(suite: Any) -> ContributionReport:
    """The library's own."""
    return contribution_probe(
        suite.model(),
        method="gradient",
        reward_funcs=suite.reward,
        train_dataset=suite.data[0],
        processing_class=suite.tokenizer,
        args=suite.args(),
        budget=NUM_PROMPTS,
    )


PROBES: dict[str, Callable[[Any], ContributionReport]] = {
    "position": lambda suite: contribution_probe(suite.model(), method="position"),
    "position:0.37": lambda suite: contribution_probe(suite.model(), method="position:0.37"),
    "published": lambda suite: contribution_probe(suite.model(), method="published"),
    "gradient": gradient,
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
    options = parser.parse_args()
    if options.ground:
        ground(SUITES[options.ground], options.seeds)
        return
    for name in options.suites:
        path = TRUTHS / f"{name}.json"
        if path.exists():
            compare(name, ContributionReport.from_json(path.read_text()), options.probes)


def ground(suite: Any, seeds: list[int]) -> None:
    """The exact sweep: every layer alone, all seeds."""
    train, held_out = suite.data
    report = contribution_probe(
        suite.model(),
        reward_funcs=suite.reward,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=suite.tokenizer,
        args=suite.args(),
        full_args=suite.args(full=True),
        seeds=seeds,
        output_dir=FOLDER / suite.name / "sweep",
    )
    print(report)
    for target, truth in targets(report).items():
        print(f"Noise ceiling of {target}: {ceiling(truth):.2f}")
    TRUTHS.mkdir(exist_ok=True)
    (TRUTHS / f"{suite.name}.json").write_text(report.to_json() + "\n")


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


def compare(name: str, truth: ContributionReport, probes: list[str]) -> None:
    """One suite's table."""
    reports = {probe: kept(name, probe) for probe in probes}
    for target, report in targets(truth).items():
        top = ceiling(report)
        print(f"\n{name}, {target}: noise ceiling {top:.2f}")
        if top < SEPARATES:
            print("  does not separate its layers: counts for nothing")
        print(f"  {'':16} Spearman               Kendall                regret  top 3  avoided")
        for probe, found in reports.items():
            print(f"  {probe:16} {row(fidelity(report, found))}")


def row(found: Fidelity) -> str:
    """One line."""
    return (
        f"{found.spearman:5.2f} {found.spearman_interval:5.2f}  "
        f"{found.kendall:5.2f} {found.kendall_interval:5.2f}  "
        f"{found.regret:6.2f}  {found.top3:5.2f}  {found.avoided:7.2f}"
    )


def kept(name: str, probe: str) -> ContributionReport:
    """A probe's report, made when it is asked for the first time."""
    path = FOLDER / f"{name}.probes" / f"{probe}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PROBES[probe](SUITES[name]).to_json())
    return ContributionReport.from_json(path.read_text())


if __name__ == "__main__":
    main()
