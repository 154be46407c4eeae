"""Scores that need no run: from a layer's position, and from the paper's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerrl.errors import ProbeError
from layerrl.proxies import position_scores
from layerrl.published import published_contributions
from layerrl.report import ContributionReport, Cost, Score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layerrl.selection import LayerSelection

MIDDLE = 0.5
_COMPLETE = "Qwen3-1.7B-Base"
"""The only model of which the paper gives every layer."""


def position_report(selection: LayerSelection, centre: str) -> ContributionReport:
    """Layers scored by how near they are to a relative depth.

    Args:
        selection: Layers to score.
        centre: The depth, 0 to 1; empty: the middle.

    Returns:
        The report, without intervals.

    Raises:
        ProbeError: If the centre is no such number.
    """
    try:
        depth = float(centre or MIDDLE)
    except ValueError:
        depth = -1.0
    if not 0 <= depth <= 1:
        raise ProbeError(
            f"method='position:{centre}': expected a relative depth from 0 (the first layer) to 1 "
            "(the last), as in 'position:0.37', the best centre for the paper's Qwen3-1.7B"
        )
    return ContributionReport(
        method="position",
        layers=_of(selection, position_scores(selection.num_layers, depth)),
        settings={"centre": depth},
        source="Minus the distance in relative depth; the middle is the Mid-k of arXiv:2607.01232.",
        cost=Cost(),
    )


def published_report(selection: LayerSelection, name: str) -> ContributionReport:
    """Layers scored by the contribution that the paper found at their relative depth.

    Args:
        selection: Layers to score.
        name: The paper's model; empty: the one of which every layer is known.

    Returns:
        The report, without intervals; layers whose neighbours are unknown are missing.
    """
    table = published_contributions(name or _COMPLETE)
    deepest = max(selection.num_layers - 1, 1)
    values = [table.at_depth(layer / deepest) for layer in range(selection.num_layers)]
    return ContributionReport(
        method="published",
        layers=_of(selection, values),
        settings=table.settings,
        source=f"C of {table.settings['name']} at the same relative depth. {table.source}",
        cost=Cost(),
    )


def _of(selection: LayerSelection, values: Sequence[float | None]) -> tuple[Score, ...]:
    return tuple(
        Score(score=value)
        if value is not None and layer in selection.layers
        else Score(status="missing")
        for layer, value in enumerate(values)
    )
