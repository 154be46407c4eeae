"""How well scores of layers predict what the layers turn out to contribute.

Legend: D draws, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerrl.scoring import Interval, bootstrap, interval_of, spearman

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layerrl import ContributionReport


@dataclass(frozen=True)
class Fidelity:
    """Agreement of one probe with the truth of one suite; draws hold the noise of both."""

    spearman: float
    spearman_D: Tensor
    kendall: float
    kendall_D: Tensor
    regret: float
    """C of the best layer minus C of the one that the probe would choose."""
    top3: float
    """Share of the probe's best three that are among the best three."""
    avoided: float
    """Share of the worst third that is not in the probe's best third."""


def kendall(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation tau-b along the last dimension; NaN where one side has no order."""
    a, b = ((v[..., :, None] - v[..., None, :]).sign() for v in (first.double(), second.double()))
    pairs = (a.abs().sum((-1, -2)) * b.abs().sum((-1, -2))).sqrt()
    return (a * b).sum((-1, -2)) / pairs


def fidelity(truth: ContributionReport, probe: ContributionReport) -> Fidelity:
    """Compare on the layers that both scored."""
    shared = sorted({*truth.scores} & {*probe.scores})
    true_DL, found_DL = draws(truth, shared), draws(probe, shared)
    true_DL, found_DL = torch.broadcast_tensors(true_DL, found_DL)
    true_L, found_L = (
        torch.tensor([report.scores[k] for k in shared], dtype=torch.double)
        for report in (truth, probe)
    )
    base, full = truth.base.score, truth.full.score
    third = max(len(shared) // 3, 1)
    best, chosen = (values.argsort(descending=True).tolist() for values in (true_L, found_L))
    return Fidelity(
        spearman=spearman(true_L, found_L).item(),
        spearman_D=spearman(true_DL, found_DL),
        kendall=kendall(true_L, found_L).item(),
        kendall_D=kendall(true_DL, found_DL),
        regret=(true_L[best[0]] - true_L[chosen[0]]).item() / (full - base),
        top3=len({*best[:3]} & {*chosen[:3]}) / 3,
        avoided=1 - len({*best[-third:]} & {*chosen[:third]}) / third,
    )


def at_random(truth: ContributionReport) -> Fidelity:
    """What a choice by lot may expect."""
    true_L = torch.tensor([*truth.scores.values()], dtype=torch.double)
    gain = truth.full.score - truth.base.score
    third = max(len(true_L) // 3, 1) / len(true_L)
    none_1 = torch.zeros(1, dtype=torch.double)
    regret = (true_L.max() - true_L.mean()).item() / gain
    return Fidelity(0.0, none_1, 0.0, none_1, regret, 3 / len(true_L), 1 - third)


def ceiling(truth: ContributionReport) -> float:
    """Rank correlation of each seed's scores with the mean of the others', averaged over seeds.

    Of the layers that have several seeds; NaN where fewer than three have.
    """
    rows = [torch.tensor(entry.scores).mean(1) for entry in truth.layers if entry.scores]
    rows = [row for row in rows if len(row) > 1]
    if len(rows) < 3:
        return float("nan")
    num_seeds = min(map(len, rows))
    scores_SL = torch.stack([row[:num_seeds] for row in rows], dim=1)
    others_SL = (scores_SL.sum(0) - scores_SL) / (num_seeds - 1)
    return spearman(scores_SL, others_SL).mean().item()


def draws(report: ContributionReport, layers: Sequence[int]) -> Tensor:
    """Resampled scores, shape (D, L); one row where nothing can be resampled."""
    runs = {str(k): report.layers[k].scores for k in layers if report.layers[k].scores is not None}
    if len(runs) < len(layers):
        return torch.tensor([[report.scores[k] for k in layers]], dtype=torch.double)
    found = bootstrap(runs)
    return torch.stack([found[str(k)] for k in layers], dim=-1)


def interval(draws_D: Tensor) -> Interval:
    """95 % of the draws that are defined."""
    known = draws_D[~draws_D.isnan()]
    return interval_of(known) if len(known) else Interval(float("nan"), float("nan"))
