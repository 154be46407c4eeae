"""Does a short race between the probe's best layers choose better than the probe alone?

    python benchmarks/race.py              # the tables, from stored files, in seconds
    python benchmarks/race.py --docs docs  # the same, written into results.md

The probe's order of layers gives the candidates. They are trained alone, all with one seed of the
sweep. Each time they are evaluated, those that are behind the leader are dropped: the 95 % interval
of the difference over prompts excludes zero. The leader wins, and is judged by the sweep's other
seeds. Every probe seed meets every run seed, and each suite counts once.

Legend: P evaluation prompts.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from layerrl import ContributionReport
from layerrl.report import Score

HERE = Path(__file__).parent
STORES = [HERE / "planted_scores.jsonl", HERE / "probe_seeds.jsonl"]
LATE = [
    "drift-llama",
    "late-llama",
    "late-mixtral",
    "middle-gpt_neox",
    "middle-llama",
    "middle-llama-dropout",
    "silent-gpt_neox",
    "turned-gpt_neox",
    "turned-llama",
    "middle-llama-24",
]
EARLY = [
    "addition-llama",
    "sorting-gpt_neox",
    "sorting-llama",
    "early-llama",
    "switch-llama",
    "turned-mixtral",
]
GAP = ("<!-- race: written by benchmarks/race.py -->", "<!-- race: end -->")
"""Where the tables are in `results.md`."""
ALL = 1000
"""More candidates than a suite has layers."""
KEPT = "; the probe's first wins unless it is dropped"
QUANTILES = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14]
"""Of Student's t, 97.5 %, from one degree of freedom on."""

Runs = Mapping[int, Mapping[int, Tensor]]
"""One seed of each layer: scores of shape (P,) by step."""


@dataclass(frozen=True)
class Suite:
    """An exact sweep and the probes of the same base."""

    name: str
    truth: ContributionReport
    orders: Sequence[Sequence[int]]
    """The sweep's layers by each probe seed, best first."""

    @cached_property
    def runs(self) -> list[Runs]:
        """By seed."""
        entries = {k: self.truth.layers[k] for k in self.truth.scores}
        seeds = range(min(len(entry.scores) for entry in entries.values()))
        return [{k: curve(entry, seed) for k, entry in entries.items()} for seed in seeds]

    @cached_property
    def steps(self) -> list[int]:
        """At which runs were evaluated; the last is the end."""
        return sorted(next(iter(self.runs[0].values())))

    def by_others(self, seed: int) -> dict[int, float]:
        """Share of the best layer's gain that each layer lacks, by the other seeds' ends."""
        others = [run for n, run in enumerate(self.runs) if n != seed]
        ends = {k: fmean(run[k][self.steps[-1]].mean().item() for run in others) for k in others[0]}
        best = max(ends.values())
        return {k: (best - end) / (best - self.truth.base.score) for k, end in ends.items()}


@dataclass(frozen=True)
class Choice:
    """What one way to choose came to on one suite: means over probe and run seeds."""

    regret: float
    """Share of the best layer's gain that the chosen one lacks."""
    least: float
    """The same of the best candidate."""
    cost: float
    """Steps trained, in whole runs per candidate."""


def main() -> None:
    """Print the tables, put them into the docs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--late", nargs="+", default=LATE, help="suites, best layer not early")
    parser.add_argument("--early", nargs="+", default=EARLY, help="suites, best layer early")
    parser.add_argument("--docs", type=Path, help="folder whose results.md gets the tables too")
    options = parser.parse_args()
    late, early = ([suite(name) for name in names] for names in (options.late, options.early))
    text = f"{by_race(late, early)}\n\n{by_suite([*late, *early])}"
    print(text)
    if options.docs:
        page = options.docs / "results.md"
        before, rest = page.read_text(encoding="utf-8").split(GAP[0])
        _, after = rest.split(GAP[1])
        page.write_text(f"{before}{GAP[0]}\n\n{text}\n\n{GAP[1]}{after}", encoding="utf-8")


def suite(name: str) -> Suite:
    """Read one suite's sweep and its gradient probes."""
    path = HERE / "ground_truth" / f"{name}.json"
    truth = ContributionReport.from_json(path.read_text(encoding="utf-8"))
    rows = [json.loads(line) for store in STORES for line in store.open(encoding="utf-8")]
    orders = []
    for row in rows:
        if row["suite"] == name and row.get("method", "gradient") == "gradient":
            if row["base"] != truth.settings["base"]:
                raise SystemExit(f"{name}: a probe is of another base than the sweep")
            orders.append(sorted(truth.scores, key=lambda k: -row["scores"][str(k)]))
    if not orders:
        raise SystemExit(f"{name}: no gradient probe in {', '.join(s.name for s in STORES)}")
    return Suite(name, truth, orders)


def curve(entry: Score, seed: int) -> dict[int, Tensor]:
    """One run's scores by step."""
    rows = [*entry.curve, (entry.steps // len(entry.scores), entry.scores)]
    return {step: torch.tensor(scores[seed], dtype=torch.double) for step, scores in rows}


def race(runs: Runs, candidates: Sequence[int], steps: Sequence[int]) -> tuple[list[int], int]:
    """Train candidates until the best is resolved or the steps are used up.

    Args:
        runs: Scores of shape (P,) of each layer by step.
        candidates: The layers, the probe's best first; it decides ties.
        steps: At which they are evaluated.

    Returns:
        The layers that are left, the leader first, and the steps trained, all layers together.
    """
    left, trained, before = [*candidates], 0, 0
    for step in steps:
        trained += (step - before) * len(left)
        before = step
        left.sort(key=lambda k: -runs[k][step].mean().item())
        leader_P = runs[left[0]][step]
        left = [left[0], *(k for k in left[1:] if not behind(runs[k][step], leader_P))]
        if len(left) == 1:
            break
    return left, trained


def behind(scores_P: Tensor, leader_P: Tensor) -> bool:
    """Whether the 95 % interval of the mean difference over prompts excludes zero."""
    difference_P = leader_P - scores_P
    error = difference_P.std() / math.sqrt(len(difference_P))
    return bool(difference_P.mean() > 1.96 * error)


def choice(one: Suite, top: int, quarters: Sequence[int], *, keep: bool = False) -> Choice:
    """Race the probe's best on one suite.

    Args:
        one: Sweep and probes.
        top: Candidates; 1 is the probe alone.
        quarters: Of the run, after which candidates are evaluated.
        keep: Choose the probe's first unless it was dropped, instead of the leader.
    """
    found = []
    for order in one.orders:
        for seed, runs in enumerate(one.runs):
            lacks, candidates = one.by_others(seed), order[:top]
            steps = [one.steps[quarter - 1] for quarter in quarters]
            left, trained = race(runs, candidates, steps if top > 1 else [])
            chosen = order[0] if keep and order[0] in left else left[0]
            least = min(lacks[k] for k in candidates)
            cost = trained / one.steps[-1] / len(candidates)
            found.append((lacks[chosen], least, cost))
    return Choice(*map(fmean, zip(*found, strict=True)))


def by_race(late: Sequence[Suite], early: Sequence[Suite]) -> str:
    """Regret of every race beside the probe's alone: of late and of early suites."""
    alone = [[choice(one, 1, ()) for one in group] for group in (late, early)]
    means = [f"{fmean(one.regret for one in group):.3f}" for group in alone]
    lines = [
        "| candidates, the probe's best | evaluated after this share of a run "
        "| steps trained, in runs per candidate | regret, best layer middle or late "
        "| the same minus the probe's alone | suites where the race is better, worse "
        "| regret of the best candidate | regret, best layer early "
        "| the same minus the probe's alone |",
        f"|{'---|' * 9}",
        f"| 1: the probe alone, no race | - | 0 | {means[0]} | - | - | - | {means[1]} | - |",
    ]
    looks = [(1,), (2,), (3,), (1, 2), (1, 2, 3)]
    races = [(top, quarters, False) for top in (2, 3, 4, 5) for quarters in looks]
    for top, quarters, keep in [*races, (5, (2,), True), (ALL, (2,), False), (ALL, (4,), False)]:
        raced = [[choice(one, top, quarters, keep=keep) for one in g] for g in (late, early)]
        (regret, minus, counts), (regret_early, minus_early, _) = map(compared, raced, alone)
        least, cost = (fmean(getattr(one, name) for one in raced[0]) for name in ("least", "cost"))
        cells = (
            ("all" if top == ALL else f"{top}") + (KEPT if keep else ""),
            ", ".join(f"{quarter}/4" for quarter in quarters),
            f"{cost:.2f}",
            *(regret, minus, counts, f"{least:.3f}"),
            *(regret_early, minus_early),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(raced: Sequence[Choice], alone: Sequence[Choice]) -> tuple[str, str, str]:
    """Mean regret, its difference to the probe's with an interval, suites better and worse."""
    differences = [a.regret - b.regret for a, b in zip(raced, alone, strict=True)]
    mean, count = fmean(differences), len(differences)
    shown = f"{mean:+.3f}"
    if any(differences) and count > 1:
        half = QUANTILES[count - 2] * stdev(differences) / math.sqrt(count)
        shown += f" [{mean - half:+.3f}, {mean + half:+.3f}]"
    better, worse = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return f"{fmean(one.regret for one in raced):.3f}", shown, f"{better}, {worse}"


def by_suite(suites: Sequence[Suite]) -> str:
    """Regret of some races on each suite."""
    races = {
        "the probe alone": (1, ()),
        "2 candidates, after half a run": (2, (2,)),
        "3 candidates, after half a run": (3, (2,)),
        "5 candidates, after half a run": (5, (2,)),
        "5 candidates, after a quarter and half a run": (5, (1, 2)),
        "all layers, after a whole run": (ALL, (4,)),
    }
    lines = [f"| regret on | {' | '.join(races)} |", f"|{'---|' * (len(races) + 1)}"]
    for one in suites:
        cells = [f"{choice(one, *given).regret:.3f}" for given in races.values()]
        lines.append(f"| `{one.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
