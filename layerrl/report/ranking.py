"""The order of a report's layers: at which depth, how sure, and how it agrees with another.

Legend: D bootstrap draws, K layers, G correlations.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerrl.errors import ReportError
from layerrl.report.entries import Score
from layerrl.statistics import Interval, bootstrap, interval_of, over_average, spearman

OVER_AVERAGE = frozenset({"gradient", "step"})
"""Methods whose scores are gains in units of the average layer's."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The values that a model's layers are ranked by."""

    num_layers: int
    """Decoder layers of the model."""
    values: Mapping[int, float]
    """Of each layer that has one."""
    draws: Mapping[str, Tensor]
    """Resampled scores, shape (D,), by the number of the layer; may hold other runs."""

    def at(self, depth: float) -> float | None:
        """The value at a relative depth, as `ContributionReport.at_depth` documents it."""
        mix = self._mix_at(depth)
        if any(layer not in self.values for layer, _ in mix):
            return None
        return sum(weight * self.values[layer] for layer, weight in mix)

    def doubt(self, better: int, worse: int) -> str | None:
        """Say why two layers are not resolved from each other; None where they are."""
        if str(better) not in self.draws or str(worse) not in self.draws:
            return "this report has no intervals"
        difference = interval_of(self.draws[str(better)] - self.draws[str(worse)])
        if 0 not in difference:
            return None
        return f"95 % interval of the difference in score: {difference:.3f}"

    def correlation(self, other: Ranking) -> tuple[float, Interval | None]:
        """Rank correlation with another ranking, as `ContributionReport.spearman` documents it."""
        few, many = sorted((self, other), key=lambda ranking: ranking.num_layers)
        aligned = {k: many._mix_at(k / max(few.num_layers - 1, 1)) for k in few.values}
        shared = [k for k, mix in aligned.items() if all(n in many.values for n, _ in mix)]
        if len(shared) < 3:
            raise ReportError(
                f"{len(shared)} layers have a value in both reports, expected at least 3"
            )
        first = [few.values[k] for k in shared]
        second = [sum(w * many.values[n] for n, w in aligned[k]) for k in shared]
        correlation = spearman(first, second).item()
        if not (few.draws or many.draws) or math.isnan(correlation):
            return correlation, None
        few_DK = _stacked([few._draws_of(k) for k in shared])
        nothing = torch.zeros((), device="cpu")
        many_DK = _stacked(
            [sum((w * many._draws_of(n) for n, w in aligned[k]), nothing) for k in shared]
        )
        values_2K = torch.tensor([first, second], dtype=torch.double, device="cpu")
        draws_D2K = torch.stack(torch.broadcast_tensors(few_DK, many_DK), dim=1)
        true_D2K = _without_noise(values_2K, draws_D2K)
        return correlation, interval_of(spearman(*true_D2K.unbind(dim=1)), correlation)

    def _draws_of(self, layer: int) -> Tensor:
        draws_D = self.draws.get(str(layer))
        if draws_D is not None:
            return draws_D
        return torch.full((1,), self.values[layer], dtype=torch.double, device="cpu")

    def _mix_at(self, depth: float) -> list[tuple[int, float]]:
        """Layers, and their weights, whose mix lies at a relative depth."""
        position = round(depth * (self.num_layers - 1), 9)  # 15 / 29 * 29 is not 15
        below = min(int(position), self.num_layers - 1)
        above = position - below
        mix = [(below, 1 - above), (min(below + 1, self.num_layers - 1), above)]
        return [(layer, weight) for layer, weight in mix if weight > 0]


def resampled(
    runs: Mapping[str, Score], method: str, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return means of resampled scores, shape (D,), of the runs that have scores prompt by prompt.

    Reports on the same prompts see the same ones in the same draw. Gains of `OVER_AVERAGE` stay in
    units of the average layer's.
    """
    scores = {name: run.scores for name, run in runs.items() if run.scores is not None}
    if not scores:
        return {}
    prompts = settings.get("eval_dataset", scores)
    draws = bootstrap(scores, seedless=("base",), seed=zlib.crc32(str(prompts).encode()))
    return over_average(draws) if method in OVER_AVERAGE else draws


def _stacked(draws: Sequence[Tensor]) -> Tensor:
    """Draws of layers side by side, shape (D, K); of one that has only a mean, always that."""
    return torch.stack(torch.broadcast_tensors(*draws), dim=-1)


def _without_noise(values_2K: Tensor, draws_D2K: Tensor) -> Tensor:
    """Two reports' values as they may be without noise, by Bayes' rule.

    Resampled values have more noise than those of the reports, which have it themselves: their
    correlation is too low. Here true values are jointly normal over layers, with a correlation r
    of prior density proportional to 1 / sqrt(1 - r^2), variances that add up with those of the
    noise to the observed ones, and normal noise with the draws' covariance.

    Args:
        values_2K: Of both reports.
        draws_D2K: The same, resampled.

    Returns:
        Draws from the posterior, shape (D, 2, K), around their mean over layers, each report's in a
        unit of its own.
    """
    num_draws, num_layers = len(draws_D2K), values_2K.shape[1]
    seen_2K = values_2K - values_2K.mean(dim=1, keepdim=True)
    # Each report in a unit of its own: one may be of losses, and the other of shares.
    unit_21 = seen_2K.norm(dim=1, keepdim=True)
    seen = (seen_2K / unit_21).flatten()
    noise_DN = ((draws_D2K - draws_D2K.mean(dim=2, keepdim=True)) / unit_21).flatten(1)
    tails_2 = noise_DN.new_tensor([0.025, 0.975])
    # Student's t of few seeds has no variance: cut off, as much as takes 8.7 % from a normal one.
    noise_DN = noise_DN.clamp(*noise_DN.quantile(tails_2, dim=0)) - noise_DN.mean(dim=0)
    noise_NN = noise_DN.T @ noise_DN / num_draws / 0.913
    true_2 = 1 - noise_NN.diagonal().view(2, -1).sum(dim=1)
    scale_2 = (true_2.clamp(min=1 / 20) / (num_layers - 1)).sqrt()
    angle_G = torch.linspace(-3.8, 3.8, 39, dtype=torch.double, device="cpu")
    r_G11 = angle_G.tanh()[:, None, None]
    eye_22, eye_KK = (torch.eye(n, dtype=torch.double, device="cpu") for n in (2, num_layers))
    between_G22 = (eye_22 + (1 - eye_22) * r_G11) * scale_2 * scale_2[:, None]
    true_GNN = torch.stack([torch.kron(one, eye_KK - 1 / num_layers) for one in between_G22])
    # Without this the mean over layers, which is 0, would have no variance.
    floor = 1e-9 * torch.eye(2 * num_layers, dtype=torch.double, device="cpu")
    factor_GNN = torch.linalg.cholesky(true_GNN + noise_NN + floor)
    left_GN = torch.linalg.solve_triangular(factor_GNN, seen[:, None], upper=False)[..., 0]
    log_G = -left_GN.square().sum(dim=1) / 2 - factor_GNN.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    log_G += (1 - r_G11.flatten().square()).log() / 2  # the prior, per step of the angle
    draw = torch.Generator().manual_seed(0)
    picked_D = log_G.softmax(dim=0).multinomial(num_draws, replacement=True, generator=draw)
    normal_D2N = torch.randn(num_draws, 2, len(seen), generator=draw, device="cpu").double()
    found = []
    for one in picked_D.unique():
        ours_D2N = normal_D2N[picked_D == one]
        # Matheron's rule: a draw of the prior, corrected by how far it would be from what was seen.
        true_DN = ours_D2N[:, 0] @ _root(true_GNN[one]).T
        off_DN = seen - true_DN - ours_D2N[:, 1] @ _root(noise_NN).T
        gain_NN = torch.cholesky_solve(true_GNN[one], factor_GNN[one])
        found.append(true_DN + off_DN @ gain_NN)
    return torch.cat(found).view(-1, 2, num_layers)


def _root(covariance: Tensor) -> Tensor:
    """A matrix whose product with its transpose is this one, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()
