"""`method="position"`: how near a layer is to the middle, or to another relative depth."""

from __future__ import annotations

from layerrl.errors import ProbeError
from layerrl.report import ContributionReport, Cost
from layerrl.scores.method import Method, Request, without_interval
from layerrl.selection import LayerSelection

MIDDLE = 0.5


def position_scores(num_layers: int, centre: float) -> list[float]:
    """Minus the distance of each layer from a relative depth: 0 is the first layer, 1 the last."""
    return [0.0 - abs(layer / max(num_layers - 1, 1) - centre) for layer in range(num_layers)]


def _score(selection: LayerSelection, request: Request) -> ContributionReport:
    centre = request.variant
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
        layers=without_interval(selection, position_scores(selection.num_layers, depth)),
        settings={"centre": depth},
        source="Minus the distance in relative depth; the middle is the Mid-k of arXiv:2607.01232.",
        cost=Cost(),
    )


METHOD = Method(score=_score, reads_weights=False, has_variants=True)
