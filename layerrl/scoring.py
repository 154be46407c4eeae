"""Arithmetic on scores: contributions, and how sure they are.

Legend: R runs, S seeds, P evaluation prompts, D bootstrap draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NUM_DRAWS = 4000
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __format__(self, spec: str) -> str:
        return f"[{self.low:{spec}}, {self.high:{spec}}]"


def interval_of(draws_D: Tensor) -> Interval:
    """The central 95 % of bootstrap draws."""
    tail = (1 - _CONFIDENCE) / 2
    low, high = draws_D.double().quantile(torch.tensor([tail, 1 - tail], dtype=torch.double))
    return Interval(low.item(), high.item())


def bootstrap(
    runs: Mapping[str, Sequence[Sequence[float]]], *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> dict[str, Tensor]:
    """Means of resampled scores, paired: every run sees the same prompts in the same draw.

    Seeds of a run are resampled too, where it has several, each run's for itself. Few seeds vary
    less in a resample than seeds do; their deviations are stretched by sqrt(S / (S - 1)) for it.

    Args:
        runs: Name to scores, shape (S, P); S may differ between runs, P may not.
        num_draws: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        Name to the mean score in each draw, shape (D,).

    Raises:
        ValueError: If the runs were not scored on the same number of prompts.
    """
    sizes = {len(scores) for seeds in runs.values() for scores in seeds}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"scores of {sorted(sizes)} prompts, expected one number above 0 for all")
    [num_prompts] = sizes
    draw = torch.Generator().manual_seed(seed)
    picked_DP = torch.randint(num_prompts, (num_draws, num_prompts), generator=draw)
    # How often each prompt was drawn, as a share: a product with scores is then a mean.
    share_DP = torch.zeros(num_draws, num_prompts, dtype=torch.double)
    share_DP.scatter_add_(1, picked_DP, torch.full_like(share_DP, 1 / num_prompts))
    found = {}
    for name, seeds in runs.items():
        scores_SP = torch.tensor([list(scores) for scores in seeds], dtype=torch.double)
        mean_SD = scores_SP @ share_DP.T
        found[name] = mean_SD.mean(dim=0)
        num_seeds = len(seeds)
        if num_seeds > 1:
            chosen_SD = torch.randint(num_seeds, (num_seeds, num_draws), generator=draw)
            resampled_D = mean_SD.gather(0, chosen_SD).mean(dim=0)
            stretch = (num_seeds / (num_seeds - 1)) ** 0.5
            found[name] = found[name] + stretch * (resampled_D - found[name])
    return found


def contribution(score: float, base: float, full: float) -> float:
    """The share of the full-parameter gain that one layer reaches (arXiv:2607.01232, eq. 4)."""
    return (score - base) / (full - base)


def ranks(values: Sequence[float] | Tensor) -> Tensor:
    """Ranks from 0 up along the last dimension; equal values share the mean of theirs."""
    values = torch.as_tensor(values, dtype=torch.double)
    below = (values[..., None, :] < values[..., :, None]).sum(dim=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(dim=-1)
    return below + (equal - 1) / 2


def spearman(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> Tensor:
    """Rank correlation along the last dimension; NaN where one side has no order."""
    a, b = (rank - rank.mean(dim=-1, keepdim=True) for rank in (ranks(first), ranks(second)))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
