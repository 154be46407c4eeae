"""How much does the gradient probe's ranking depend on its seed? Five suites by five seeds.

    python benchmarks/probe_seeds.py --docs docs  # measure what is missing, write the table

The seed draws the probe's prompts and their completions; base and truth stay the same. Each
finished probe is a line of `benchmarks/probe_seeds.jsonl`. A stopped call continues there; delete
lines to measure them again.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fidelity import Fidelity, ceiling, fidelity
from probe_fidelity import NUM_PROMPTS, TRUTHS, base_of, fitted_prior, scored
from suites import SUITES

from layerrl import ContributionReport
from layerrl.report import Score

STORE = Path(__file__).with_suffix(".jsonl")
SEEDS = [0, 1, 2, 3, 4]
GAP = ("<!-- probe_seeds: written by benchmarks/probe_seeds.py -->", "<!-- probe_seeds: end -->")
"""Where the table is in `results.md`."""

Row = dict[str, Any]
"""One probe: `suite`, `seed`, `base`, `with_signal` and the `scores` of layers."""


def main() -> None:
    """Measure what is missing, print the table, put it into the docs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--suites", nargs="+", default=sorted(SUITES), choices=sorted(SUITES))
    parser.add_argument("--stored", action="store_true", help="measure nothing")
    parser.add_argument("--docs", type=Path, help="folder whose results.md gets the table too")
    options = parser.parse_args()
    rows = stored()
    for seed in [] if options.stored else options.seeds:
        for suite in options.suites:
            if not any((row["suite"], row["seed"]) == (suite, seed) for row in rows):
                rows.append(measured(suite, seed))
                with STORE.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    text = table(rows, options.suites, options.seeds)
    print(text)
    if options.docs:
        page = options.docs / "results.md"
        before, rest = page.read_text().split(GAP[0])
        _, after = rest.split(GAP[1])
        page.write_text(f"{before}{GAP[0]}\n\n{text}\n\n{GAP[1]}{after}")


def stored() -> list[Row]:
    """Probes measured before. A line that a kill cut off is dropped from the file."""
    text = STORE.read_text() if STORE.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        STORE.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def measured(suite: str, seed: int) -> Row:
    """Probe one suite with one seed."""
    report = scored(SUITES[suite], "gradient", NUM_PROMPTS, seed)
    return {
        "suite": suite,
        "seed": seed,
        "base": base_of(suite),
        "with_signal": report.settings["prompts_with_signal"],
        "scores": report.scores,
    }


def table(rows: list[Row], suites: list[str], seeds: list[int]) -> str:
    """Spearman with C by suite and seed, beside what needs no probe and another seed's sweep."""
    truths = {
        name: ContributionReport.from_json((TRUTHS / f"{name}.json").read_text())
        for name in sorted(SUITES)
    }
    found = {(row["suite"], row["seed"]): fidelity_of(row, truths[row["suite"]]) for row in rows}
    fitted = [fidelity(truths[suite], fitted_prior(suite, truths)) for suite in suites]
    ceilings = [ceiling(truths[suite]) for suite in suites]
    lines = [
        f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | median | fitted position "
        "| another sweep |",
        f"|---|{'---|' * (len(seeds) + 3)}",
    ]
    for suite, prior, top in zip(suites, fitted, ceilings, strict=True):
        probes = [found.get((suite, seed)) for seed in seeds]
        values = [None if one is None else one.spearman for one in probes]
        lines.append(row_of(f"`{suite}`", values, prior.spearman, top))
    for label, of in OVER_SUITES.items():
        columns = [[found.get((suite, seed)) for suite in suites] for seed in seeds]
        values = [None if None in column else of(column) for column in columns]
        top = statistics.median(ceilings) if of is median_spearman else None
        lines.append(row_of(label, values, of(fitted), top))
    return "\n".join(lines)


def median_spearman(suites: Sequence[Fidelity]) -> float:
    """Median of the rank correlations with C."""
    return statistics.median(one.spearman for one in suites)


OVER_SUITES: dict[str, Callable[[Sequence[Any]], float]] = {
    "median over suites": median_spearman,
    "mean regret": lambda suites: statistics.fmean(one.regret for one in suites),
    "best three found": lambda suites: statistics.fmean(one.top3 for one in suites),
    "worst third avoided": lambda suites: statistics.fmean(one.avoided for one in suites),
}


def fidelity_of(row: Row, truth: ContributionReport) -> Fidelity:
    """Agreement of one probe with the truth of its suite, on the same base."""
    if row["base"] != truth.settings["base"]:
        raise SystemExit(
            f"{STORE}: seed {row['seed']} of {row['suite']} was probed on the base {row['base']}, "
            f"its truth on {truth.settings['base']}. Delete the line to probe again."
        )
    scores = {int(layer): score for layer, score in row["scores"].items()}
    layers = tuple(
        Score(score=scores[k]) if k in scores else Score(status="missing")
        for k in range(truth.num_layers)
    )
    return fidelity(truth, ContributionReport(method="gradient", layers=layers))


def row_of(label: str, values: list[float | None], *others: float | None) -> str:
    """One row: seeds, the median of those that are measured, what they are compared with."""
    known = [value for value in values if value is not None]
    middle = statistics.median(known) if known else None
    cells = ("-" if v is None else f"{v:.2f}" for v in (*values, middle, *others))
    return f"| {' | '.join((label, *cells))} |"


if __name__ == "__main__":
    main()
