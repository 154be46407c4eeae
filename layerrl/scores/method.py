"""The interface of a scoring method: `Method`, and the `Request` that it answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerrl.report import ContributionReport, Score
from layerrl.selection import LayerSelection

ROLLOUTS = ("reward_funcs", "train_dataset", "args")
"""What every method needs that generates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of `contribution_probe`, as it documents them; a method reads what it needs."""

    model: nn.Module
    variant: str
    """What follows the colon of `method`; empty: none."""
    reward_funcs: Any
    train_dataset: Any
    processing_class: Any
    args: Any
    budget: int
    seeds: Sequence[int]
    trainer_class: type
    # Of methods that train:
    eval_dataset: Any
    full_args: Any
    greedy: bool
    halving: bool
    output_dir: str | os.PathLike[str] | None
    executor: str
    resources: Mapping[str, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to score layers: the `METHOD` of its module."""

    score: Callable[[LayerSelection, Request], ContributionReport]
    """Scores the layers of a selection. Layers outside it are `"missing"` in the report."""
    needs: tuple[str, ...] = ()
    """Arguments of `contribution_probe` that must be given; checked before `score` is called."""
    reads_weights: bool = True
    """Whether a model on `meta`, of which only the shape is known, is refused."""
    has_variants: bool = False
    """Whether it can be asked for as `"NAME:VARIANT"`."""


def without_interval(
    selection: LayerSelection, values: Sequence[float | None]
) -> tuple[Score, ...]:
    """A score for each layer of the model: `"missing"` where it is None or not selected."""
    return tuple(
        Score(score=value)
        if value is not None and layer in selection.layers
        else Score(status="missing")
        for layer, value in enumerate(values)
    )
