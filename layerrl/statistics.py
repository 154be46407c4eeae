"""Arithmetic on scores: contributions, and how sure they are.

Legend: R runs, S seeds, P evaluation prompts, D bootstrap draws.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_DRAWS = 4000
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return not (value < self.low or value > self.high)  # NaN excludes nothing

    def __format__(self, spec: str) -> str:
        return f"[{self.low:{spec}}, {self.high:{spec}}]"


def interval_of(draws_D: Tensor, estimate: float | None = None) -> Interval:
    """Return the central 95 % of draws, stretched to hold the `estimate` that they are around.

    NaN, such as a difference of infinite draws, lies on either side.
    """
    tail = (1 - _CONFIDENCE) / 2
    draws_D, found = draws_D.double(), []
    for share, far in ((tail, -math.inf), (1 - tail, math.inf)):
        known_D = draws_D.nan_to_num(far, math.inf, -math.inf)
        end = known_D.quantile(draws_D.new_tensor(share)).item()
        found.append(far if math.isnan(end) else end)  # between two that are infinite
    low, high = found
    if estimate is not None:
        low, high = min(low, estimate), max(high, estimate)
    return Interval(low, high)


def bootstrap(
    runs: Mapping[str, Sequence[Sequence[float]]],
    *,
    seedless: Collection[str] = (),
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Means of resampled scores, paired: every run sees the same prompts in the same draw.

    The Bayesian bootstrap (Rubin, 1981): prompts get exponential weights. Scores of two values,
    right and wrong, get half a prompt of each beside them (Jeffreys' prior), and so do others of
    which a run has only one, which would leave no doubt. The rest spreads as Student's t says.
    Where some runs have several seeds, the variance between seeds, less what single prompts make
    of it, is pooled over those runs, and moves every draw of every run (with Student's t, for it is
    estimated). With one seed everywhere nothing is known of it, and nothing is added.

    Args:
        runs: Name to scores, shape (S, P); S may differ between runs, P may not.
        seedless: Runs that no seed changes, such as the evaluation of the base.
        num_draws: Number of resamples.
        seed: Seed of the resampling of prompts: the same for scores on the same prompts.

    Returns:
        Name to the mean score in each draw, shape (D,).

    Raises:
        ValueError: If the runs were not scored on the same number of prompts.
    """
    sizes = {len(scores) for seeds in runs.values() for scores in seeds}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"scores of {sorted(sizes)} prompts, expected one number above 0 for all")
    [num_prompts] = sizes
    # On the CPU whatever torch's default device is: the same draws everywhere.
    scores_SP = {
        name: torch.tensor([[*row] for row in rows], dtype=torch.double, device="cpu")
        for name, rows in runs.items()
    }
    draw = torch.Generator().manual_seed(seed)
    weight_DP = torch.empty(num_draws, num_prompts, dtype=torch.double, device="cpu")
    weight_DP.exponential_(generator=draw)
    # A chi-square variable of one degree of freedom is a gamma variable of one half, doubled.
    prior_D2 = torch.randn(num_draws, 2, generator=draw, device="cpu").double().square() / 2
    values = torch.cat([scores.flatten() for scores in scores_SP.values()]).unique()
    binary, freedom, spread = len(values) == 2, num_prompts - 1, 1.0
    if freedom and not binary:  # the weights' variance, and the 0.975 quantiles of t and normal
        spread = ((num_prompts + 1) / freedom) ** 0.5 * (1 + 1.2 / freedom)
    seeded = [scores for name, scores in scores_SP.items() if name not in seedless]
    deviation_D, found = _deviation_of_seeds(seeded, num_draws), {}
    for name, scores in scores_SP.items():
        own, mean = _generator(name, scores), scores.mean()
        # Which half of the prior is right differs from run to run.
        turned_D1 = torch.randint(2, (num_draws, 1), generator=own, device="cpu").bool()
        half_D2 = torch.where(turned_D1, prior_D2.flip(1), prior_D2)
        half_D2 *= binary or len(scores.unique()) == 1
        moved_D = weight_DP @ (scores.mean(dim=0) - mean) + half_D2 @ (values[[0, -1]] - mean)
        found[name] = mean + spread * moved_D / (weight_DP.sum(dim=1) + half_D2.sum(dim=1))
        if name not in seedless:
            normal_D = torch.randn(num_draws, generator=own, device="cpu")
            found[name] += deviation_D * normal_D / len(scores) ** 0.5
    return found


def _deviation_of_seeds(scores: Sequence[Tensor], num_draws: int) -> Tensor:
    """Standard deviation between seeds minus the prompts' part, shape (D,); 0 without two seeds."""
    freedom = sum(len(run) - 1 for run in scores)
    if not freedom:
        return torch.zeros(num_draws, dtype=torch.double, device="cpu")
    squares = sum((run.mean(dim=1) - run.mean()).square().sum() for run in scores)
    # What a seed does to single prompts is in what resampled prompts vary.
    left = [run - run.mean(dim=0) - run.mean(dim=1, keepdim=True) + run.mean() for run in scores]
    num_prompts = scores[0].shape[1]
    of_prompts = sum(run.square().sum() for run in left) / (freedom * max(num_prompts - 1, 1))
    # Not from prompts' generator: what two reports' seeds did has nothing in common.
    pooled = _generator("variance", *scores)
    normal_FD = torch.randn(freedom, num_draws, generator=pooled, device="cpu")
    chi2_D = normal_FD.double().square().sum(dim=0)
    return (squares / chi2_D - of_prompts / num_prompts).clamp(min=0).sqrt()


def _generator(what_for: str, *scores: Tensor) -> torch.Generator:
    """Random numbers that only the same scores get again, for the same use."""
    content = b"".join([what_for.encode(), *(tensor.numpy().tobytes() for tensor in scores)])
    return torch.Generator().manual_seed(zlib.crc32(content))


def contribution(score: float, base: float, full: float) -> float:
    """The share of the full-parameter gain that one layer reaches (arXiv:2607.01232, eq. 4)."""
    return (score - base) / (full - base)


def contribution_draws(score_D: Tensor, base_D: Tensor, full_D: Tensor) -> Tensor:
    """Return the same of bootstrap draws.

    Infinite in draws in which the full run gained nothing and the layer did not score as the base.
    Where the gain is resolved those are so few that quantiles hold, as in Fieller's interval for a
    ratio.
    """
    gain_D, above_D = full_D - base_D, score_D - base_D
    return torch.where(above_D == 0, 0.0, above_D / gain_D.clamp(min=0))


def over_average(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return gains of layers in units of the average layer's in the same draw.

    Very large in draws in which the average layer gained nothing.
    """
    average_D = torch.stack([*draws.values()]).mean(dim=0)
    return {name: gain_D / average_D.clamp(min=1e-3) for name, gain_D in draws.items()}


def ranks(values: Sequence[float] | Tensor) -> Tensor:
    """Ranks from 0 up along the last dimension; equal values share the mean of theirs."""
    device = values.device if isinstance(values, Tensor) else "cpu"
    values = torch.as_tensor(values, dtype=torch.double, device=device)
    below = (values[..., None, :] < values[..., :, None]).sum(dim=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(dim=-1)
    return below + (equal - 1) / 2


def spearman(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> Tensor:
    """Rank correlation along the last dimension; NaN where one side has no order."""
    a, b = (rank - rank.mean(dim=-1, keepdim=True) for rank in (ranks(first), ranks(second)))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
