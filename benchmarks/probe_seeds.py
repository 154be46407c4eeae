"""How much does the gradient probe's ranking depend on its seed? Five suites by five seeds.

    python benchmarks/probe_seeds.py                       # measure what is missing
    python benchmarks/probe_seeds.py --stored --docs docs  # write the table of what was measured

The seed draws the probe's prompts and their completions; base and truth stay the same. Each
finished probe is a line of `benchmarks/probe_seeds.jsonl`. A stopped call continues there; delete
lines to measure them again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fidelity import Fidelity, ceiling, fidelity
from probe_fidelity import TRUTHS, base_of, fitted_prior, scored
from suites import SUITES

from layerrl import ContributionReport
from layerrl.report import Score

STORE = Path(__file__).with_suffix(".jsonl")
SEEDS = [0, 1, 2, 3, 4]
NUM_PROMPTS = 256
"""The library's default."""
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
                with STORE.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    text = table(rows, options.suites, options.seeds)
    print(text)
    if options.docs:
        put_into(options.docs / "results.md", GAP, text)


def put_into(page: Path, gap: tuple[str, str], text: str) -> None:
    """Replace what is between two marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(gap[0])
    _, after = rest.split(gap[1])
    page.write_text(f"{before}{gap[0]}\n\n{text}\n\n{gap[1]}{after}", encoding="utf-8")


def stored(path: Path | None = None) -> list[Row]:
    """Scores measured before. A line that a kill cut off is dropped from the file."""
    path = path or STORE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
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
    """Spearman with C by suite and seed, beside what needs no probe and another seed's sweep.

    The last rows are of the suites that have all seeds.
    """
    truths = {
        name: ContributionReport.from_json((TRUTHS / f"{name}.json").read_text(encoding="utf-8"))
        for name in sorted(SUITES)
    }
    found = {(row["suite"], row["seed"]): fidelity_of(row, truths[row["suite"]]) for row in rows}
    fitted = {suite: fidelity(truths[suite], fitted_prior(suite, truths)) for suite in suites}
    ceilings = {suite: ceiling(truths[suite]) for suite in suites}
    lines = [
        f"| rank correlation with C on | {' | '.join(f'probe seed {seed}' for seed in seeds)} "
        "| median [range] | no probe: depth fitted on other suites | another seed of the sweep |",
        f"|---|{'---|' * (len(seeds) + 3)}",
    ]
    for suite in suites:
        values = [found[suite, seed].spearman if (suite, seed) in found else None for seed in seeds]
        lines.append(row_of(f"`{suite}`", values, fitted[suite].spearman, ceilings[suite]))
    whole = [suite for suite in suites if all((suite, seed) in found for seed in seeds)]
    if not whole:
        return "\n".join(lines)
    medians = [median(found[suite, seed].spearman for suite in whole) for seed in seeds]
    prior = median(fitted[suite].spearman for suite in whole)
    label = f"median of the {len(whole)} suites with all seeds"
    lines.append(row_of(label, medians, prior, median(ceilings[suite] for suite in whole)))
    for name, label in (
        ("regret", "mean regret"),
        ("top3", "best three found"),
        ("avoided", "worst third avoided"),
    ):
        means = [fmean(getattr(found[suite, seed], name) for suite in whole) for seed in seeds]
        prior = fmean(getattr(fitted[suite], name) for suite in whole)
        lines.append(row_of(f"{label}, on these suites", means, prior, None))
    return "\n".join(lines)


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


def row_of(label: str, by_seed: Sequence[float | None], *others: float | None) -> str:
    """One row of the table."""
    by_seed_cells, cells = (
        ["-" if value is None else f"{value:.2f}" for value in values]
        for values in (by_seed, others)
    )
    known = [value for value in by_seed if value is not None]
    over = f"{median(known):.2f} [{min(known):.2f}, {max(known):.2f}]" if known else "-"
    return f"| {' | '.join((label, *by_seed_cells, over, *cells))} |"


if __name__ == "__main__":
    main()
