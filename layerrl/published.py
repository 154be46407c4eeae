"""The paper's numbers, as data."""

from __future__ import annotations

import json
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from layerrl.errors import ReportError

CITATION = (
    'Zhang et al., "Is One Layer Enough? Training A Single Transformer Layer Can Match '
    'Full-Parameter RL Training", arXiv:2607.01232 (2026)'
)


def published_table(name: str) -> dict[str, Any]:
    """What the paper gives for one model.

    Args:
        name: The paper's name of the model, in any case, such as `"Qwen3-1.7B-Base"`.

    Returns:
        The model's entry in `data/published_contributions.json`, with its exact `name`.

    Raises:
        ReportError: If there is no such model.
    """
    text = (files("layerrl") / "data" / "published_contributions.json").read_text()
    models = json.loads(text)["models"]
    by_lower = {known.lower(): known for known in models}
    wanted = str(name).rpartition("/")[2].lower()
    if wanted not in by_lower:
        close = [by_lower[match] for match in get_close_matches(wanted, by_lower, n=3, cutoff=0.5)]
        hint = f"Close: {', '.join(close)}. " if close else ""
        raise ReportError(
            f"no contributions were published for {name!r}. {hint}Known: {', '.join(models)}"
        )
    return {"name": by_lower[wanted], **models[by_lower[wanted]]}
