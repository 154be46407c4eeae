"""How well scores of layers predict what the layers turn out to contribute.

Legend: L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerrl.report import Score
from layerrl.statistics import spearman

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layerrl import ContributionReport


@dataclass(frozen=True)
class Fidelity:
    """Agreement of one probe with the truth of one suite."""

    spearman: float
    kendall: float
    beyond_depth: float
    """Spearman of what a parabola over depth leaves of both; NaN where it leaves nothing. To be
    compared with that of position priors, which are no parabolas and so not 0."""
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
    true_L, found_L = (
        torch.tensor([report.scores[k] for k in shared], dtype=torch.double)
        for report in (truth, probe)
    )
    gain = truth.full.score - truth.base.score
    third = max(len(shared) // 3, 1)
    best, chosen = (values.argsort(descending=True).tolist() for values in (true_L, found_L))
    return Fidelity(
        spearman=spearman(true_L, found_L).item(),
        kendall=kendall(true_L, found_L).item(),
        beyond_depth=spearman(*(without_trend(v, shared) for v in (true_L, found_L))).item(),
        regret=(true_L[best[0]] - true_L[chosen[0]]).item() / gain if gain > 0 else float("nan"),
        top3=len({*best[:3]} & {*chosen[:3]}) / 3,
        avoided=1 - len({*best[-third:]} & {*chosen[:third]}) / third,
    )


def without_trend(values: Tensor, layers: Sequence[int]) -> Tensor:
    """What the parabola over depth that fits best leaves, along the last dimension."""
    depth_L = torch.tensor(layers, dtype=torch.double) / max(layers)
    basis_L3 = torch.linalg.qr(torch.stack([depth_L**0, depth_L, depth_L**2], dim=1)).Q
    left = values - values @ basis_L3 @ basis_L3.T
    # Rounding leaves an order where there is none.
    return left.masked_fill(left.abs() < 1e-9 * values.abs().amax(dim=-1, keepdim=True), 0.0)


def at_random(truth: ContributionReport) -> Fidelity:
    """What a random choice may expect."""
    true_L = torch.tensor([*truth.scores.values()], dtype=torch.double)
    gain = truth.full.score - truth.base.score
    third = max(len(true_L) // 3, 1) / len(true_L)
    regret = (true_L.max() - true_L.mean()).item() / gain
    return Fidelity(0.0, 0.0, 0.0, regret, 3 / len(true_L), 1 - third)


def of_seeds(truth: ContributionReport, *, early: bool = False) -> Fidelity | None:
    """What another sweep would be worth: each seed against the mean of the others, averaged.

    Of the layers that have several seeds; None where fewer than three have.

    Args:
        truth: The sweep.
        early: Take the scores that the one seed had when its runs were first evaluated.
    """
    counts = [len(entry.scores or ()) for entry in truth.layers]
    if sum(count > 1 for count in counts) < 3:
        return None
    seeds = range(min(count for count in counts if count > 1))

    def only(chosen: list[int], early: bool = False) -> ContributionReport:
        def entry_of(entry: Score) -> Score:
            if entry.scores is None or len(entry.scores) < 2:
                return Score(status="missing")
            rows = entry.curve[0][1] if early else entry.scores
            return Score(scores=tuple(rows[seed] for seed in chosen))

        return replace(truth, layers=tuple(map(entry_of, truth.layers)))

    found = [fidelity(only([*{*seeds} - {seed}]), only([seed], early)) for seed in seeds]
    names = [field.name for field in fields(Fidelity)]
    return Fidelity(**{n: sum(getattr(one, n) for one in found) / len(found) for n in names})


def ceiling(truth: ContributionReport) -> float:
    """The noise ceiling: rank correlation of one seed with the mean of the others."""
    found = of_seeds(truth)
    return float("nan") if found is None else found.spearman
