"""`method="published"`: the paper's numbers, and layers scored by them."""

from __future__ import annotations

import json
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from layerrl.checks import check_kind, shown
from layerrl.errors import ReportError
from layerrl.report import ContributionReport, Cost, Score
from layerrl.scores.method import Method, Request, without_interval
from layerrl.selection import LayerSelection

_COMPLETE = "Qwen3-1.7B-Base"
"""The only model of which the paper gives every layer."""

_CITATION = (
    'Zhang et al., "Is One Layer Enough? Training A Single Transformer Layer Can Match '
    'Full-Parameter RL Training", arXiv:2607.01232 (2026)'
)


def _table(name: str) -> dict[str, Any]:
    """The model's entry in the paper's numbers, with its exact `name`."""
    text = (files("layerrl") / "data" / "published_contributions.json").read_text(encoding="utf-8")
    models = json.loads(text)["models"]
    by_lower = {known.lower(): known for known in models}
    check_kind("name", name, str, "a model's name, such as 'Qwen3-1.7B-Base'", ReportError)
    wanted = name.rpartition("/")[2].lower()
    if wanted not in by_lower:
        close = [by_lower[match] for match in get_close_matches(wanted, by_lower, n=3, cutoff=0.5)]
        hint = f"Close: {', '.join(close)}. " if close else ""
        raise ReportError(
            f"no contributions were published for {shown(name)}. {hint}Known: {', '.join(models)}"
        )
    return {"name": by_lower[wanted], **models[by_lower[wanted]]}


def published_contributions(name: str) -> ContributionReport:
    """The contributions that the paper gives for a model (arXiv:2607.01232).

    They are single runs without intervals; of most models only some layers are known.

    Args:
        name: The paper's name of the model, in any case, with or without its organisation.

    Returns:
        A report in which missing layers are `"missing"`, with the citation as its `source`.

    Raises:
        ReportError: If nothing was published for it. Known and close names are listed.
    """
    table = _table(name)
    scores, metric = table.get("scores", {}), table["metric"]
    layers = []
    for layer in range(table["num_layers"]):
        value = table["contribution"].get(str(layer))
        layers.append(
            Score(
                score=scores.get(str(layer), {}).get(metric),
                contribution=value,
                status="missing" if value is None else "done",
            )
        )
    return ContributionReport(
        method="published",
        layers=tuple(layers),
        base=Score(score=table["base_score"]),
        full=Score(score=table["full_score"]),
        settings={key: table[key] for key in ("name", "algorithm", "data", "metric")},
        source=_CITATION,
    )


def _score(selection: LayerSelection, request: Request) -> ContributionReport:
    """Layers scored by the contribution that the paper found at their relative depth."""
    table = published_contributions(request.variant or _COMPLETE)
    deepest = max(selection.num_layers - 1, 1)
    values = [table.at_depth(layer / deepest) for layer in range(selection.num_layers)]
    return ContributionReport(
        method="published",
        layers=without_interval(selection, values),
        settings=table.settings,
        source=f"C of {table.settings['name']} at the same relative depth. {table.source}",
        cost=Cost(),
    )


METHOD = Method(score=_score, reads_weights=False, has_variants=True)
