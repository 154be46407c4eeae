"""Do 95 % intervals hold the truth 95 times in 100? Simulated scores whose truth is known.

    python benchmarks/coverage.py              # minutes
    python benchmarks/coverage.py --docs docs  # and the table into results.md

Scores are drawn as those of the docs look: as many prompts, seeds and layers, rewards of 0 and 1
or graded ones, prompts that every layer finds hard, gradients with heavy tails.

Legend: P prompts, L layers, S seeds, N parameters of a layer.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from layerrl import ContributionReport
from layerrl.errors import ReportError
from layerrl.replacing import replaced
from layerrl.report import Score, ranking
from layerrl.scores.gains import adam_step
from layerrl.scores.gradient import widened
from layerrl.scores.step import ERROR_TIMES
from layerrl.statistics import bootstrap, contribution, interval_of, spearman

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from chain_sum import interval_of_share

GAP = ("<!-- coverage: written by benchmarks/coverage.py -->", "<!-- coverage: end -->")
"""Where the table is in `results.md`."""
BASE, FULL = 0.12, 0.7
RNG = torch.Generator()


def main() -> None:
    """Print the table, put it into the docs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--docs", type=Path, help="folder whose results.md gets the table too")
    options = parser.parse_args()
    lines = [
        "| 95 % interval of | simulated scores | contains the true value, ± standard error |",
        "|---|---|---|",
    ]
    for name in options.kinds:
        started = time.perf_counter()
        with replaced(ranking, bootstrap=partial(bootstrap, num_draws=1000)):  # a quarter: faster
            share, error = coverage(name, options.trials)
        what, simulated = KINDS[name][:2]
        lines.append(f"| {what} | {simulated} | {100 * share:.1f} % ± {100 * error:.1f} |")
        print(f"{name}: {lines[-1]} {time.perf_counter() - started:.0f} s", flush=True)
    print("\n".join(lines))
    if options.docs:
        page = options.docs / "results.md"
        before, rest = page.read_text(encoding="utf-8").split(GAP[0])
        after = rest.split(GAP[1])[1]
        text = "\n".join([before + GAP[0], "", *lines, "", GAP[1]])
        page.write_text(text + after, encoding="utf-8")


def coverage(name: str, trials: int) -> tuple[float, float]:
    """Share of a kind's intervals that hold the truth, and its standard error over trials."""
    RNG.manual_seed(0)
    held = [found for _ in range(trials) if (found := KINDS[name][2]())]
    share_T = torch.tensor([sum(found) / len(found) for found in held], dtype=torch.double)
    return share_T.mean().item(), (share_T.std() / len(share_T) ** 0.5).item()


def right(levels: Sequence[float], num_prompts: int, num_seeds: int, sd: float) -> list[Score]:
    """Scores of 0 and 1 of runs whose mean is known; `sd` is what a seed adds to it.

    A prompt is right where its difficulty is below the run's level: seven times in ten the
    difficulty is the prompt's, the same in every run, otherwise this answer's own.
    """
    shape = len(levels), num_seeds, num_prompts
    prompt_P, answer_LSP, kind_LSP = (
        torch.rand(size, generator=RNG) for size in (num_prompts, shape, shape)
    )
    level_LS1 = torch.tensor(levels)[:, None, None] + sd * torch.randn(
        len(levels), num_seeds, 1, generator=RNG
    )
    right_LSP = torch.where(kind_LSP < 0.7, prompt_P, answer_LSP) < level_LS1
    return [Score(scores=rows) for rows in right_LSP.double().tolist()]


def graded(levels: Sequence[float], num_prompts: int, num_seeds: int, sd: float) -> list[Score]:
    """The same with graded rewards, whose noise is the prompt's and the answer's own."""
    shape = len(levels), num_seeds, num_prompts
    noise_LSP = torch.randn(num_prompts, generator=RNG) + torch.randn(shape, generator=RNG)
    seed_LS1 = torch.randn(*shape[:2], 1, generator=RNG)
    scores_LSP = torch.tensor(levels)[:, None, None] + 0.1 * noise_LSP + sd * seed_LS1
    return [Score(scores=rows) for rows in scores_LSP.double().tolist()]


def sweep(
    levels: Sequence[float], num_prompts: int, num_seeds: int = 1, sd: float = 0.0
) -> ContributionReport:
    """An exact sweep."""
    *layers, full = right([*levels, FULL], num_prompts, num_seeds, sd)
    [base] = right([BASE], num_prompts, 1, 0.0)
    return ContributionReport(method="train", layers=tuple(layers), base=base, full=full)


def scores(draw: Callable[[], list[Score]], levels: Sequence[float]) -> list[bool]:
    """Of layers' scores."""
    made = ContributionReport(method="train", layers=tuple(draw()))
    return [level in made.interval(k) for k, level in enumerate(levels)]


def shares(levels: Sequence[float], *seeds: float) -> list[bool]:
    """Of contributions; none where the gain is not resolved."""
    made = sweep(levels, 78, *seeds)
    truth = [contribution(level, BASE, FULL) for level in levels]
    try:
        return [c in made.contribution_interval(k) for k, c in enumerate(truth)]
    except ReportError:
        return []


def difference() -> list[bool]:
    """Of two runs on the same problems, as examples and halving compare them."""
    better, worse = right([0.68, 0.62], 78, 1, 0.0)
    draws = bootstrap({"better": better.scores, "worse": worse.scores})
    return [0.06 in interval_of(draws["better"] - draws["worse"])]


def top() -> list[bool]:
    """Of the two layers that `top` compares, best and second of eight that are alike."""
    made = ContributionReport(method="train", layers=tuple(right([0.65] * 8, 78, 1, 0.0)))
    best, second, *_ = sorted(made.scores, key=lambda k: -made.scores[k])
    return [made._ranking.doubt(best, second) is not None]


def compared() -> list[bool]:
    """Of contributions in two sweeps of the same model, other seeds."""
    levels = [0.5, 0.6, 0.65, 0.7]
    try:
        found = sweep(levels, 78, 2, 0.04).compare(sweep(levels, 78, 2, 0.04)).differences
    except ReportError:
        return []
    return [0 in interval for interval in found.values() if interval is not None]


def correlated(correlation: float, num_layers: int, sd: float) -> list[bool]:
    """Of the rank correlation of two reports; values and noise of layers have the deviation 0.1."""
    own_2L = torch.randn(2, num_layers, generator=RNG)
    own_2L[1] = correlation * own_2L[0] + (1 - correlation**2) ** 0.5 * own_2L[1]
    values_2L = 0.6 + 0.1 * own_2L
    here, there = (
        ContributionReport(method="train", layers=tuple(graded(v, 100, 2, sd)))
        for v in values_2L.tolist()
    )
    interval = here.spearman(there)[1]
    return [spearman(*values_2L).item() in interval]


NUM_PARAMETERS, NUM_LAYERS, NUM_PROMPTS = 30, 6, 256
SPREAD = 0.8
"""Of the logarithm of gradients' norms: the largest of 256 is ten times their median."""
STRENGTHS = torch.linspace(0.05, 0.3, NUM_LAYERS)[:, None].expand(-1, NUM_PARAMETERS)


def gains() -> tuple[Tensor, Tensor]:
    """Held-out gains of a probe, shape (P, L), and what other prompts would gain by its steps."""
    shape = NUM_PROMPTS, NUM_LAYERS, NUM_PARAMETERS
    size_P = (SPREAD * torch.randn(NUM_PROMPTS, 1, 1, generator=RNG)).exp()
    gradient_PLN = size_P * (STRENGTHS + torch.randn(shape, generator=RNG))
    step_PLN = (gradient_PLN.cumsum(dim=0) - gradient_PLN).sign()
    mean_PLN = math.exp(SPREAD**2 / 2) * STRENGTHS.expand(shape)
    scored = slice(NUM_PROMPTS // 4, None)
    gains_PL, others_PL = (
        (g_PLN * step_PLN).sum(dim=-1)[scored].double() for g_PLN in (gradient_PLN, mean_PLN)
    )
    return gains_PL, others_PL.mean(dim=0)


HALVED_PARAMETERS, HALVED_PROMPTS = 300, 128
RELATIVE = torch.linspace(0.3, 1.7, NUM_LAYERS)
DIRECTIONS = torch.randn(NUM_LAYERS, HALVED_PARAMETERS, generator=torch.Generator().manual_seed(1))


@cache
def gains_of_seeds() -> Tensor:
    """The mean over probes, shape (L,)."""
    return torch.stack([gains()[1] for _ in range(300)]).mean(dim=0)


def probe(*, of_seeds: bool) -> list[bool]:
    """Of a gradient probe's scores."""
    gains_PL, truth_L = gains()
    if of_seeds:
        truth_L = gains_of_seeds()
    rows = (gains_PL.T / gains_PL.mean()).tolist()
    layers = tuple(Score(scores=(row,)) for row in rows)
    made = ContributionReport(method="gradient", layers=layers)
    truth = (truth_L / truth_L.mean()).tolist()
    return [score in made.interval(k) for k, score in enumerate(truth)]


def gains_of_halves(strength: float, shared: float = 0.0) -> Tensor:
    """What steps from half of the prompts gain on the other half, shape (P, L).

    Args:
        strength: Mean gradient of a weight in the average layer; its deviation over prompts is one,
            times the size of the prompt's gradient.
        shared: Share of that variance that all weights of all layers have in common.
    """
    shape = HALVED_PROMPTS, NUM_LAYERS, HALVED_PARAMETERS
    size_P = (SPREAD * torch.randn(shape[0], 1, 1, generator=RNG)).exp()
    noise_PLN = (1 - shared) ** 0.5 * torch.randn(shape, generator=RNG)
    noise_PLN += shared**0.5 * torch.randn(shape[0], 1, 1, generator=RNG) * DIRECTIONS
    gradient_PLN = size_P * (strength * RELATIVE[:, None] + noise_PLN)
    gains_PL = torch.empty(shape[:2], dtype=torch.double)
    for half in (0, 1):
        seen_PLN, others_PLN = gradient_PLN[half::2], gradient_PLN[1 - half :: 2]
        step_LN = adam_step(seen_PLN.sum(dim=0), len(seen_PLN), 1e-8)
        gains_PL[1 - half :: 2] = (others_PLN * step_LN).sum(dim=-1)
    return gains_PL


@cache
def gains_of_steps(strength: float, shared: float) -> Tensor:
    """The mean over probes, shape (L,)."""
    return torch.stack([gains_of_halves(strength, shared).mean(dim=0) for _ in range(2000)]).mean(0)


def halves(strength: float, shared: float = 0.0, *, differences: bool) -> list[bool]:
    """Of the scores of a probe by steps, or of differences between two layers' scores."""
    truth_L = gains_of_steps(strength, shared)
    truth = (truth_L / truth_L.mean()).tolist()
    gains_PL = gains_of_halves(strength, shared)
    rows_PL = widened(gains_PL / gains_PL.mean(), ERROR_TIMES)
    layers = tuple(Score(scores=(row,)) for row in rows_PL.T.tolist())
    made = ContributionReport(method="step", layers=layers)
    if not differences:
        return [score in made.interval(k) for k, score in enumerate(truth)]
    draws = [made._draws[str(k)] for k in range(NUM_LAYERS)]
    return [
        truth[k] - truth[j] in interval_of(draws[k] - draws[j])
        for k in range(NUM_LAYERS)
        for j in range(k)
    ]


def accuracy(level: float) -> list[bool]:
    """Of 256 problems of which many are alike."""
    weights = torch.randint(80, (256,), generator=RNG).bincount().double()
    weights = weights[weights > 0]
    right_P = (torch.rand(len(weights), generator=RNG) < level).double()
    low, high = interval_of_share(((right_P @ weights) / weights.sum()).item(), weights.numpy())
    return [low <= level <= high]


LEVELS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
KINDS: dict[str, tuple[str, str, Callable[[], list[bool]]]] = {
    "score": (
        "score of a layer, one seed",
        "78 prompts, right or wrong; 0.02, 0.12 and 0.68 right",
        partial(scores, partial(right, (0.02, 0.12, 0.68), 78, 1, 0.0), (0.02, 0.12, 0.68)),
    ),
    "score, graded": (
        "score of a layer, one seed",
        "50 prompts, graded rewards",
        partial(scores, partial(graded, LEVELS, 50, 1, 0.0), LEVELS),
    ),
    "score, seeds": (
        "score of a layer, two seeds",
        "6 layers, 78 prompts, right or wrong",
        partial(scores, partial(right, LEVELS, 78, 2, 0.04), LEVELS),
    ),
    "score, seeds, graded": (
        "score of a layer, three seeds",
        "6 layers, 200 prompts, graded rewards, seeds that differ less than prompts",
        partial(scores, partial(graded, LEVELS, 200, 3, 0.005), LEVELS),
    ),
    "agents": (
        "success of an agent, three seeds",
        "2 runs, 64 maps, right or wrong",
        partial(scores, partial(right, (0.4, 0.78), 64, 3, 0.05), (0.4, 0.78)),
    ),
    "C": (
        "contribution C(k), one seed",
        "6 layers, 78 prompts, right or wrong",
        partial(shares, LEVELS),
    ),
    "C, seeds": (
        "contribution C(k), two seeds",
        "6 layers, 78 prompts, right or wrong",
        partial(shares, LEVELS, 2, 0.04),
    ),
    "difference": (
        "difference of two runs, as halving takes it",
        "78 prompts, right or wrong; 0.68 and 0.62 right",
        difference,
    ),
    "top": (
        "difference of two layers that `top` compares",
        "best and second of eight equal layers, 78 prompts",
        top,
    ),
    "compare": (
        "difference of C(k) in two sweeps",
        "4 layers, 78 prompts, two seeds each",
        compared,
    ),
    "gradient": (
        'score of `"gradient"`, true for other prompts and the same steps',
        "6 layers, 256 prompts, gradients with heavy tails",
        partial(probe, of_seeds=False),
    ),
    "gradient, seeds": (
        'score of `"gradient"`, true for other prompts and other steps',
        "6 layers, 256 prompts, gradients with heavy tails",
        partial(probe, of_seeds=True),
    ),
    "step": (
        'score of `"step"`: other prompts and steps',
        "128 prompts, heavy tails; mean gains of 3 standard errors",
        partial(halves, 0.05, differences=False),
    ),
    "step, differences": (
        "difference of two layers, the same",
        "the same",
        partial(halves, 0.05, differences=True),
    ),
    "step, shared": (
        'score of `"step"`',
        "a tenth of the noise common to all weights; mean gains of 1 standard error",
        partial(halves, 0.05, 0.1, differences=False),
    ),
    "step, signal": (
        'score of `"step"`',
        "mean gains of 11 standard errors",
        partial(halves, 0.15, differences=False),
    ),
    "step, signal, differences": (
        "difference of two layers, the same",
        "the same",
        partial(halves, 0.15, differences=True),
    ),
    "step, strong": (
        'score of `"step"`',
        "the same, and nine in ten weights step alike in both halves",
        partial(halves, 0.4, differences=False),
    ),
    "Spearman": (
        "rank correlation of two reports",
        "12 layers, two seeds, normal correlation 0.95",
        partial(correlated, 0.95, 12, 0.03),
    ),
    "Spearman, low": (
        "rank correlation of two reports",
        "6 layers, two seeds, normal correlation 0.5",
        partial(correlated, 0.5, 6, 0.05),
    ),
    "accuracy": (
        "accuracy of the quickstart",
        "256 problems, 78 of them distinct; 0.12 right",
        partial(accuracy, 0.12),
    ),
    "accuracy, trained": (
        "accuracy of the quickstart",
        "256 problems, 78 of them distinct; 0.68 right",
        partial(accuracy, 0.68),
    ),
}
"""What is printed, what is drawn, and one trial: whether each of its intervals holds its truth."""


if __name__ == "__main__":
    main()
