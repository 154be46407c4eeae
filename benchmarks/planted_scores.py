"""What do cheap scores know of layers? Every method by five seeds on every suite.

    python benchmarks/planted_scores.py                       # measure what is missing
    python benchmarks/planted_scores.py --suites smollm2-products  # of SmolLM2: hours
    python benchmarks/planted_scores.py --held-out            # also the suites kept apart
    python benchmarks/planted_scores.py --auto --held-out     # with the prompts of selection="auto"
    python benchmarks/planted_scores.py --stored --docs docs  # write the tables

Each finished score is a line of `benchmarks/planted_scores.jsonl`, of `--auto` one of
`planted_auto.jsonl`; a stopped call continues there, delete lines to measure them again. The
gradient probes of the suites that were not planted are those of `probe_seeds.py`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import baselines
import probe_seeds
import torch
from fidelity import ceiling
from planted import HELD_OUT, PLANTED
from probe_fidelity import NUM_PROMPTS, SEPARATES, TRUTHS, scored
from suites import SMALL
from suites import SUITES as NOT_PLANTED

from layerrl import ContributionReport, published_contributions
from layerrl.errors import ProbeError
from layerrl.scores.gradient import TooLittleSignalError
from layerrl.scores.position import position_scores
from layerrl.statistics import spearman
from layerrl.sweep.harness import weights_digest
from layerrl.trainer.auto import MOST_PROMPTS as MOST_OF_AUTO
from layerrl.trainer.auto import NUM_PROMPTS as NUM_OF_AUTO

STORE = Path(__file__).with_suffix(".jsonl")
AUTO_STORE = STORE.with_stem("planted_auto")
GAP, REAL_GAP, AUTO_GAP = (
    (f"<!-- {name}: written by benchmarks/planted_scores.py -->", f"<!-- {name}: end -->")
    for name in ("planted_scores", "real_scores", "planted_auto")
)
"""Where the tables are in `results.md`."""
AUTO_METHODS = ["gradient", "step"]
SUITES: dict[str, Any] = NOT_PLANTED | PLANTED
REAL = [name for name, suite in NOT_PLANTED.items() if suite not in SMALL]
"""Of SmolLM2, in tables of their own: most of its layers end alike, and few have two seeds."""
METHODS: dict[str, Callable[[Any, int], ContributionReport]] = {
    "gradient": lambda suite, seed: scored(suite, "gradient", num_prompts(suite), seed),
    "step": lambda suite, seed: scored(
        suite, "step", num_prompts(suite) if suite in SMALL else NUM_PROMPTS, seed
    ),
    "gradient norm": lambda suite, seed: baselines.gradient_norm(suite, NUM_PROMPTS, seed),
    "bypass": lambda suite, seed: baselines.bypass(suite, NUM_PROMPTS, seed),
    "weight change": lambda suite, seed: baselines.weight_change(suite, seed),
    "spectrum": lambda suite, _: baselines.spectrum(suite),
}
UNSEEDED = ["spectrum"]
POSITIONS = {"first": 0.0, "middle": 0.5, "last": 1.0}
HEADS = {
    "gradient": '`"gradient"`',
    "step": '`"step"`',
    "gradient norm": "gradient norm of the layer",
    "bypass": "bypass: drop in likelihood without the layer",
    "weight change": "weight change in a full run",
    "spectrum": "spectrum of the layer's weights",
    "first": "first layer, no probe",
    "middle": "middle layer, no probe",
    "last": "last layer, no probe",
    "published": "depth published for Qwen3-1.7B",
    "random": "random layer",
    "another sweep": "another seed of the exact sweep",
}
"""What the tables call the scores."""
Row = dict[str, Any]
"""One score: `suite`, `method`, `seed`, `base`, `scores` of layers, and why it was `refused`."""
Scores = dict[int, float]
"""By layer."""


def main() -> None:
    """Measure what is missing, print the tables, put them into the docs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=probe_seeds.SEEDS)
    counted = [name for name in SUITES if name not in REAL]
    parser.add_argument("--suites", nargs="+", default=counted, choices=list(SUITES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--held-out", action="store_true", help="also the suites kept apart")
    parser.add_argument(
        "--auto", action="store_true", help='"gradient", "step" with the prompts of "auto"'
    )
    parser.add_argument("--stored", action="store_true", help="measure nothing")
    parser.add_argument("--docs", type=Path, help="folder whose results.md gets the tables too")
    options = parser.parse_args()
    store, measure, methods = STORE, measured, options.methods
    if options.auto:
        store, measure, methods = AUTO_STORE, measured_as_auto, AUTO_METHODS
    rows = probe_seeds.stored(AUTO_STORE) if options.auto else all_rows()
    kept = {(row["suite"], row["method"], row["seed"]) for row in rows}
    for suite in [] if options.stored else options.suites:
        if (suite in HELD_OUT and not options.held_out) or not separates(suite):
            continue
        for method in methods:
            for seed in [0] if method in UNSEEDED else options.seeds:
                if (suite, method, seed) not in kept:
                    rows.append(measure(suite, method, seed))
                    with store.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    texts = {AUTO_GAP: auto_table(rows)} if options.auto else in_parts(rows)
    for gap, text in texts.items():
        print(text)
        if options.docs:
            probe_seeds.put_into(options.docs / "results.md", gap, text)


def in_parts(rows: list[Row]) -> dict[tuple[str, str], str]:
    """The tables of the suites that are counted, and of the others, by where they belong."""
    real, counted = ([r for r in rows if (r["suite"] in REAL) is side] for side in (True, False))
    return {gap: tables(part) for gap, part in ((GAP, counted), (REAL_GAP, real)) if part}


def num_prompts(suite: Any) -> int:
    """Of the gradient probe."""
    return NUM_PROMPTS if suite.name in PLANTED else probe_seeds.NUM_PROMPTS


def all_rows() -> list[Row]:
    """What was measured, with the gradient probes of the suites that were not planted."""
    probes = [{**row, "method": "gradient"} for row in probe_seeds.stored()]
    return [*(row for row in probes if row["suite"] in SUITES), *probe_seeds.stored(STORE)]


def measured(suite: str, method: str, seed: int) -> Row:
    """Score one suite. What a probe refuses counts as the middle, which is to train then."""
    base = weights_digest(SUITES[suite].model())
    row = {"suite": suite, "method": method, "seed": seed, "base": base}
    try:
        return row | {"scores": METHODS[method](SUITES[suite], seed).scores}
    except ProbeError as refusal:
        middle = position_scores(truth_of(suite).num_layers, POSITIONS["middle"])
        return row | {"scores": dict(enumerate(middle)), "refused": str(refusal)}


def measured_as_auto(suite: str, method: str, seed: int) -> Row:
    """Score one suite with more and more prompts, as `selection="auto"`; the middle in the end."""
    row, budget = {"suite": suite, "method": method, "seed": seed}, NUM_OF_AUTO
    row |= {"base": weights_digest(SUITES[suite].model()), "refused": []}
    while True:
        try:
            scores = scored(SUITES[suite], method, budget, seed).scores
            return row | {"scores": scores, "prompts": budget}
        except TooLittleSignalError as refusal:
            row["refused"].append(str(refusal))
        if budget >= MOST_OF_AUTO:
            middle = position_scores(truth_of(suite).num_layers, POSITIONS["middle"])
            return row | {"scores": dict(enumerate(middle)), "prompts": 0}
        budget *= 2


@dataclass(frozen=True)
class Verdict:
    """What one score of a suite's layers is worth."""

    found: float
    """1 where the layer that it puts first is the best."""
    regret: float
    """What that layer gains less than the best, as a share of what the best gains over the base:
    full training gains less than one layer in some suites."""
    avoided: float
    """Share of the worst third that is not in the score's best third."""
    spearman: float
    """With what the layers gain."""


def verdict(true: Scores, base: float, scores: Scores) -> Verdict:
    """Compare on the layers of the sweep."""
    by_truth, by_score = (sorted(true, key=values.__getitem__) for values in (true, scores))
    best, chosen, third = by_truth[-1], max(true, key=scores.__getitem__), len(true) // 3
    pair = (torch.tensor([values[k] for k in true]).double() for values in (true, scores))
    return Verdict(
        found=float(true[chosen] == true[best]),
        regret=(true[best] - true[chosen]) / (true[best] - base),
        avoided=1 - len({*by_truth[:third]} & {*by_score[-third:]}) / third,
        spearman=spearman(*pair).item(),
    )


def verdicts(suite: str, rows: list[Row]) -> dict[str, list[Verdict]]:
    """Of each method, one for each seed."""
    truth = truth_of(suite)
    true, base, number = truth.scores, truth.base.score, truth.num_layers
    by_method: dict[str, list[Verdict]] = {method: [] for method in METHODS}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["base"] != truth.settings["base"]:
            raise SystemExit(
                f"{STORE}: {suite} was scored on the base {row['base']}, its truth is of "
                f"{truth.settings['base']}. Delete the line to score again."
            )
        scores = {int(layer): score for layer, score in row["scores"].items()}
        by_method[row["method"]].append(verdict(true, base, scores))
    paper = published_contributions("Qwen3-1.7B-Base")
    priors = {name: position_scores(number, centre) for name, centre in POSITIONS.items()}
    priors["published"] = [paper.at_depth(layer / (number - 1)) for layer in range(number)]
    for name, values in priors.items():
        by_method[name] = [verdict(true, base, dict(enumerate(values)))]
    best, third = max(true.values()), len(true) // 3
    regret = (best - fmean(true.values())) / (best - base)
    found = [*true.values()].count(best) / len(true)
    by_method["random"] = [Verdict(found, regret, 1 - third / len(true), 0.0)]
    by_method["another sweep"] = sweeps(truth)
    return by_method


def sweeps(truth: ContributionReport) -> list[Verdict]:
    """What each seed of the sweep says of the mean of the others, of the layers that have all."""
    by_layer = {k: [*map(fmean, truth.layers[k].scores)] for k in truth.scores}
    number = max(map(len, by_layer.values()))
    by_seed = [
        {k: scores[seed] for k, scores in by_layer.items() if len(scores) == number}
        for seed in range(number)
    ]
    found = []
    for seed, scores in enumerate(by_seed):
        others = by_seed[:seed] + by_seed[seed + 1 :]
        true = {layer: fmean(other[layer] for other in others) for layer in scores}
        found.append(verdict(true, truth.base.score, scores))
    return found


def separates(suite: str) -> bool:
    """Whether there is a truth, kept before anything is scored, whose seeds agree."""
    return (TRUTHS / f"{suite}.json").exists() and ceiling(truth_of(suite)) >= SEPARATES


def truth_of(suite: str) -> ContributionReport:
    """Its exact sweep."""
    return ContributionReport.from_json((TRUTHS / f"{suite}.json").read_text(encoding="utf-8"))


def tables(rows: list[Row]) -> str:
    """One for each claim, below a sentence that says how to read it.

    Suites by methods, over seeds; the last rows are over all suites.
    """
    by_suite: dict[str, dict[str, list[Verdict]]] = {}
    labels = []
    for suite in (name for name in SUITES if any(row["suite"] == name for row in rows)):
        by_suite[suite] = verdicts(suite, [row for row in rows if row["suite"] == suite])
        truth = truth_of(suite)
        top = max(truth.scores.values())
        best = " and ".join(str(layer) for layer, score in truth.scores.items() if score == top)
        labels.append(f"`{suite}` | {best} of 0 to {truth.num_layers - 1}")
    columns = {m: [found[m] for found in by_suite.values()] for m in next(iter(by_suite.values()))}
    columns = {method: column for method, column in columns.items() if any(column)}
    parts = []
    heads = " | ".join(("suite", "best layer", *map(HEADS.__getitem__, columns)))
    for claim, name, over in (
        (
            "**Regret**: what the layer that a score puts first gains less than the best layer, as "
            "a share of the best layer's gain. 0 is the best layer, above 1 one that does harm.",
            "regret",
            "mean",
        ),
        (
            "**Worst third avoided**: share of the worst third of the layers that a score does not "
            "put into its best third. 1 is the best value.",
            "avoided",
            "mean",
        ),
        (
            "**Rank correlation** (Spearman) of a score with what the layers gain. 1 is the same "
            "order, 0 no relation, -1 the opposite order.",
            "spearman",
            "median",
        ),
    ):
        lines = [f"| {heads} |", f"|---|---|{'---|' * len(columns)}"]
        values = [[[getattr(v, name) for v in c] for c in column] for column in columns.values()]
        lines += map(row_of, labels, zip(*values, strict=True))
        average = median if over == "median" else fmean
        whole = [[*map(average, zip(*column, strict=False))] for column in values]
        lines.append(row_of(f"{over} of the {len(labels)} suites | ", whole))
        if name == "regret":
            found = [[v.found for c in column for v in c] for column in columns.values()]
            cells = (f"{sum(every):.3g} of {len(every)}" for every in found)
            lines.append(f"| best layer found |  | {' | '.join(cells)} |")
        parts += [claim, "\n".join(lines)]
    return "\n\n".join(parts)


def auto_table(rows: list[Row]) -> str:
    """Regret of the choice by suite, with few prompts and, by the same seeds, with more."""
    lines = [
        f"| regret | {' | '.join(f'{m}, as auto | {m}, more' for m in AUTO_METHODS)} |",
        f"|---|{'---|' * 2 * len(AUTO_METHODS)}",
    ]
    keys = {(row["suite"], row["method"], row["seed"]) for row in rows}
    more = [row for row in all_rows() if (row["suite"], row["method"], row["seed"]) in keys]
    columns: list[list[list[Verdict]]] = [[] for _ in lines for _ in AUTO_METHODS]
    for suite in (name for name in SUITES if any(name == key[0] for key in keys)):
        few, many = (verdicts(suite, [r for r in of if r["suite"] == suite]) for of in (rows, more))
        found = [verdicts_of[method] for method in AUTO_METHODS for verdicts_of in (few, many)]
        lines.append(row_of(f"`{suite}`", [[v.regret for v in every] for every in found]))
        for column, every in zip(columns, found, strict=True):
            column.append(every)
    by_seed = [
        [fmean(v.regret for v in of_seed) for of_seed in zip(*c, strict=False)] for c in columns
    ]
    lines.append(row_of(f"mean of the {len(columns[0])} suites", by_seed))
    whole = [[v for every in column for v in every] for column in columns]
    cells = (f"{sum(v.found for v in every):.0f} of {len(every)}" for every in whole)
    lines.append(f"| best layer found | {' | '.join(cells)} |")
    cells = (f"{fmean(v.avoided for v in every):.2f}" for every in whole)
    lines.append(f"| worst third avoided | {' | '.join(cells)} |")
    return "\n".join(lines)


def row_of(label: str, by_method: Sequence[Sequence[float]]) -> str:
    """Median [lowest, highest] of each method's seeds; a dash where nothing was measured."""
    cells = []
    for values in by_method:
        if not values:
            cells.append("-")
            continue
        spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
        cells.append(f"{median(values):.2f}{spread}")
    return f"| {label} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
