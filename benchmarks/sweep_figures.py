"""What a finished sweep says: of depth, of the harness, and of what halving would have saved.

    python examples/sweep_layers.py --halving && python examples/sweep_layers.py
    python benchmarks/sweep_figures.py runs/sweep --keep smollm2-chain_sum

`--keep` copies the report to `benchmarks/ground_truth` and its picture to `docs`.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl

from layerrl import ContributionReport
from layerrl.errors import ReportError
from layerrl.statistics import bootstrap, interval_of, spearman
from layerrl.sweep.halving import below_the_cut, rungs

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print the figures, keep the report."""
    options = parse()
    report = ContributionReport.from_json(
        (options.folder / "report.json").read_text(encoding="utf-8")
    )
    print(report)
    lines = (options.folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    entries = list(map(json.loads, lines))
    overhead(entries)
    by_depth(report)
    halving(report, entries)
    if options.keep:
        keep(report, options.keep)


def overhead(entries: list[dict]) -> None:
    """Seconds that went neither into training nor evaluation, against those that did."""
    print("\nOverhead over training and evaluation, by the steps of a run or a part of one:")
    by_steps: dict[int, list[float]] = {}
    for entry in entries:
        share = entry["harness_seconds"] / (entry["seconds"] - entry["harness_seconds"])
        by_steps.setdefault(entry["steps"], []).append(share)
    for steps, shares in sorted(by_steps.items()):
        mean = sum(shares) / len(shares)
        print(f"  {steps:3}: {mean:.2%} on average of {len(shares)}, at most {max(shares):.2%}")


def by_depth(report: ContributionReport) -> None:
    """Scores on the way: what they say of the end, and how the thirds of the model do."""
    ends = report.scores
    steps = [report.settings["args"]["max_steps"]]
    at = {steps[0]: ends} | {
        step: {layer: mean(dict(report.layers[layer].curve)[step]) for layer in ends}
        for step, _ in report.layers[next(iter(ends))].curve
    }
    print("\nMean score by third of the depth, and rank correlation with the end:")
    for step, scores in sorted(at.items()):
        parts = [[] for _ in range(3)]
        for layer, score in scores.items():
            parts[3 * layer // report.num_layers].append(score)
        thirds = "  ".join(f"{sum(part) / len(part):.3f}" for part in parts)
        agreement = spearman(list(scores.values()), list(ends.values())).item()
        print(f"  step {step:3}: {thirds}   {agreement:5.2f}")
    try:
        intervals = {layer: report.contribution_interval(layer) for layer in ends}
    except ReportError as error:
        print(f"Resolved below full: none can be, {error}")
        return
    below = [layer for layer, found in intervals.items() if found is not None and found.high < 1]
    print(f"Resolved below full: {below}")


def mean(rows: tuple[tuple[float, ...], ...]) -> float:
    """Over seeds and prompts."""
    return sum(map(sum, rows)) / (len(rows) * len(rows[0]))


def halving(report: ContributionReport, entries: list[dict]) -> None:
    """Repeat the decisions on the scores that the first seed's runs had on the way."""
    seed, steps = report.settings["seeds"][0], report.settings["args"]["max_steps"]
    curves: dict[int, dict[int, list[float]]] = {}
    for entry in entries:
        if entry["seed"] == seed and entry["name"].isdigit():
            along = dict(entry["curve"])
            curves.setdefault(int(entry["name"]), {}).update(
                {**along, entry["stop"]: entry["scores"]}
            )
    if len(curves) < report.num_layers:
        raise SystemExit("no figure for halving: that takes a whole sweep, with every layer")
    full = next(e for e in entries if (e["name"], e["seed"], e["stop"]) == ("full", seed, None))
    alive, spent, before = sorted(curves), 0, 0
    for rung in rungs(steps):
        spent += (rung - before) * len(alive)
        known = {layer: [curves[layer][rung]] for layer in alive if rung in curves[layer]}
        if len(known) < len(alive):
            raise SystemExit(f"no scores at step {rung} of {sorted({*alive} - {*known})}")
        dropped = below_the_cut(known, base=report.base.score, full=mean((full["scores"],)))
        print(f"step {rung:3}: {len(dropped)} of {len(alive)} dropped: {sorted(dropped)}")
        alive, before = [layer for layer in alive if layer not in dropped], rung
    spent += (steps - before) * len(alive)
    ranked = sorted(report.scores, key=report.scores.__getitem__, reverse=True)
    draws = bootstrap({str(k): s.scores for k, s in enumerate(report.layers) if s.scores})
    kept = sorted(alive, key=report.scores.__getitem__, reverse=True)[:3]
    print(
        f"Halving: {spent / (steps * len(curves)):.2f} of the steps. Best of all {ranked[:3]}, of "
        f"those kept {kept}"
    )
    for best, found in zip(ranked, kept, strict=False):
        difference = interval_of(draws[str(best)] - draws[str(found)])
        if best != found:
            print(f"  layer {best} against {found}: {difference:.3f}")


def keep(report: ContributionReport, name: str) -> None:
    """The report as ground truth, and its picture."""
    mpl.use("Agg")
    folder = ROOT / "benchmarks" / "ground_truth"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(report.to_json() + "\n", encoding="utf-8")
    report.plot().figure.savefig(ROOT / "docs" / f"{name}.png", dpi=150)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a sweep")
    parser.add_argument("--keep", metavar="NAME", help="keep the report under this name")
    return parser.parse_args()


if __name__ == "__main__":
    main()
