"""Does a cheap score find a layer that was planted? Every method on the suites of `planted.py`.

    python benchmarks/planted_scores.py             # measure what is missing, print the table
    python benchmarks/planted_scores.py --held-out  # the suites kept apart: to be looked at once

Each finished score is a line of `benchmarks/planted_scores.jsonl`; delete lines to measure again.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

import baselines
import torch
from planted import HELD_OUT, PLANTED
from probe_fidelity import NUM_PROMPTS, TRUTHS, scored

from layerrl import ContributionReport
from layerrl.scores.position import position_scores
from layerrl.statistics import spearman
from layerrl.sweep.harness import weights_digest

STORE = Path(__file__).with_suffix(".jsonl")
Row = dict[str, Any]
"""One score: `suite`, `method`, `seed`, `base` and the `scores` of layers."""


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", action="store_true", help="the suites kept apart")
    options = parser.parse_args()
    suites = [
        name
        for name in PLANTED
        if (name in HELD_OUT) == options.held_out and (TRUTHS / f"{name}.json").exists()
    ]
    text = STORE.read_text(encoding="utf-8") if STORE.exists() else ""
    rows: list[Row] = [json.loads(line) for line in text.splitlines()]
    for suite in suites:
        for method, seeds in (("gradient", options.seeds), ("gradient norm", [0]), ("bypass", [0])):
            for seed in seeds:
                key = (suite, method, seed)
                if not any((row["suite"], row["method"], row["seed"]) == key for row in rows):
                    rows.append(measured(*key))
                    with STORE.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows, suites))


def measured(suite: str, method: str, seed: int) -> Row:
    """Score one suite."""
    made = PLANTED[suite]
    if method == "gradient":
        report = scored(made, method, NUM_PROMPTS, seed)
    else:
        report = {"gradient norm": baselines.gradient_norm, "bypass": baselines.bypass}[method](
            made, NUM_PROMPTS
        )
    base = weights_digest(made.model())
    return {"suite": suite, "method": method, "seed": seed, "base": base, "scores": report.scores}


def table(rows: list[Row], suites: list[str]) -> str:
    """Best layer by the sweep, the layer that each method chooses, its regret and Spearman.

    The regret is a share of what the best layer gains over the base: full training gains less here.
    """
    lines = [
        "| suite | method | best layer | chosen, by seed | regret | worst third avoided | Spearman "
        "|",
        "|---|---|---|---|---|---|---|",
    ]
    for suite in suites:
        path = TRUTHS / f"{suite}.json"
        truth = ContributionReport.from_json(path.read_text(encoding="utf-8"))
        true = truth.scores
        found: dict[str, list[dict[int, float]]] = {}
        for row in rows:
            if row["suite"] == suite:
                if row["base"] != truth.settings["base"]:
                    raise SystemExit(
                        f"{STORE}: {suite} was scored on the base {row['base']}, its truth is of "
                        f"{truth.settings['base']}. Delete the line to score again."
                    )
                values = {int(layer): score for layer, score in row["scores"].items()}
                found.setdefault(row["method"], []).append(values)
        for name, centre in (("first layers", 0.0), ("middle", 0.5), ("last layers", 1.0)):
            found[name] = [dict(enumerate(position_scores(truth.num_layers, centre)))]
        best = max(true, key=true.__getitem__)
        for method, scores in found.items():
            chosen = [max(true, key=one.__getitem__) for one in scores]
            regrets = [(true[best] - true[k]) / (true[best] - truth.base.score) for k in chosen]
            agreed = [agreement(true, one) for one in scores]
            avoided = [avoids(true, one) for one in scores]
            figures = (fmean(regrets), fmean(avoided), median(agreed))
            cells = (", ".join(map(str, chosen)), *(f"{figure:.2f}" for figure in figures))
            lines.append(f"| `{suite}` | {method} | {best} | {' | '.join(cells)} |")
    return "\n".join(lines)


def avoids(true: dict[int, float], scores: dict[int, float]) -> float:
    """Share of the worst third that is not in the method's best third."""
    third = len(true) // 3
    worst, best = sorted(true, key=true.__getitem__), sorted(true, key=scores.__getitem__)
    return 1 - len({*worst[:third]} & {*best[-third:]}) / third


def agreement(true: dict[int, float], scores: dict[int, float]) -> float:
    """Spearman over the layers of the sweep."""
    pair = (torch.tensor([values[k] for k in true]).double() for values in (true, scores))
    return spearman(*pair).item()


if __name__ == "__main__":
    main()
