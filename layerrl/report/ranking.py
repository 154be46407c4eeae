"""The order of a report's layers: at which depth, how sure, and how it agrees with another.

Legend: D bootstrap draws, K layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from layerrl.errors import ReportError
from layerrl.statistics import Interval, interval_of, spearman

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


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
        correlation = spearman(
            [few.values[k] for k in shared],
            [sum(w * many.values[n] for n, w in aligned[k]) for k in shared],
        ).item()
        if not few.draws and not many.draws:
            return correlation, None
        few_DK = _stacked([few._draws_of(k) for k in shared])
        nothing = torch.zeros((), device="cpu")
        many_DK = _stacked(
            [sum((w * many._draws_of(n) for n, w in aligned[k]), nothing) for k in shared]
        )
        few_DK, many_DK = torch.broadcast_tensors(few_DK, many_DK)
        draws_D = spearman(few_DK, many_DK)
        ordered_D = draws_D[~draws_D.isnan()]  # a draw in which one side has no order
        return correlation, interval_of(ordered_D) if len(ordered_D) else None

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


def _stacked(draws: Sequence[Tensor]) -> Tensor:
    """Draws of layers side by side, shape (D, K); of one that has only a mean, always that."""
    return torch.stack(torch.broadcast_tensors(*draws), dim=-1)
