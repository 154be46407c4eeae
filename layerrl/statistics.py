"""Arithmetic on scores: contributions, and how sure they are.

Legend: R runs, S seeds, P evaluation prompts, D bootstrap draws.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

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


def interval_of(draws_D: Tensor) -> Interval:
    """The central 95 % of bootstrap draws."""
    tail = (1 - _CONFIDENCE) / 2
    draws_D = draws_D.double()
    low, high = draws_D.quantile(draws_D.new_tensor([tail, 1 - tail]))
    return Interval(low.item(), high.item())


def bootstrap(
    runs: Mapping[str, Sequence[Sequence[float]]],
    *,
    seedless: Collection[str] = (),
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Means of resampled scores, paired: every run sees the same prompts in the same draw.

    Another seed would have given other scores too. Where some runs have several, their variance
    between seeds is pooled over those runs, and every draw of every run is moved by what a mean
    over its own seeds varies for it (with Student's t for a variance that is estimated itself).
    With one seed everywhere nothing is known of it, and nothing is added.

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
    draw = torch.Generator().manual_seed(seed)
    shape = (num_draws, num_prompts)
    picked_DP = torch.randint(num_prompts, shape, generator=draw, device="cpu")
    # How often each prompt was drawn, as a share: a product with scores is then a mean.
    share_DP = torch.zeros(shape, dtype=torch.double, device="cpu")
    share_DP.scatter_add_(1, picked_DP, torch.full_like(share_DP, 1 / num_prompts))
    scores_SP = {
        name: torch.tensor([[*row] for row in rows], dtype=torch.double, device="cpu")
        for name, rows in runs.items()
    }
    found = {name: share_DP @ scores.mean(dim=0) for name, scores in scores_SP.items()}
    means_S = {n: scores.mean(dim=1) for n, scores in scores_SP.items() if n not in seedless}
    freedom = sum(len(means) - 1 for means in means_S.values())
    if freedom:
        squares = sum((means - means.mean()).square().sum() for means in means_S.values())
        # Not from `draw`: what two reports' seeds did has nothing in common, as their prompts may.
        pooled = _generator("variance", *scores_SP.values())
        normal_FD = torch.randn(freedom, num_draws, generator=pooled, device="cpu")
        chi2_D = normal_FD.double().square().sum(dim=0)
        deviation_D = (squares / chi2_D).sqrt()
        for name, means in means_S.items():
            own = _generator(name, scores_SP[name])
            normal_D = torch.randn(num_draws, generator=own, device="cpu")
            found[name] = found[name] + deviation_D * normal_D / len(means) ** 0.5
    return found


def _generator(what_for: str, *scores: Tensor) -> torch.Generator:
    """Random numbers that only the same scores get again, for the same use."""
    content = b"".join([what_for.encode(), *(tensor.numpy().tobytes() for tensor in scores)])
    return torch.Generator().manual_seed(zlib.crc32(content))


def contribution(score: float, base: float, full: float) -> float:
    """The share of the full-parameter gain that one layer reaches (arXiv:2607.01232, eq. 4)."""
    return (score - base) / (full - base)


def contribution_draws(score_D: Tensor, base_D: Tensor, full_D: Tensor) -> Tensor:
    """The same of bootstrap draws.

    Args:
        score_D: The layer's.
        base_D: Those of the base.
        full_D: Those of the full-parameter run.

    Returns:
        Shape (D,), infinite in draws in which the full run gained nothing. Where the gain is
        resolved those are so few that quantiles hold, as in Fieller's interval for a ratio.
    """
    gain_D, above_D = full_D - base_D, score_D - base_D
    return torch.where(gain_D > 0, above_D / gain_D, above_D.sign() * torch.inf)


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
