"""The section of a model card about the run that made it: metrics and their curve, versions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Columns of the table, in this order, of those that a run logged. The first one is drawn.
_METRICS = (
    *("reward", "rewards/margins", "rewards/accuracies", "accuracy", "mean_token_accuracy"),
    *("loss", "reward_std", "kl", "completions/mean_length"),
)
_COLUMNS, _ROWS, _BARS = 5, 10, "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a card says of the run that trained a delta."""

    trainer: str | None = None
    """Name of the trainer's method."""
    tags: tuple[str, ...] = ()
    """The trainer's own tags."""
    dataset: str | None = None
    """The data set's name on the hub."""
    steps: int = 0
    """Steps done."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package to version."""
    history: Sequence[Mapping[str, Any]] = ()
    """What was logged: the entries of the trainer's `log_history`."""

    def section(self) -> str:
        """The run in Markdown, with the curve of its first metric and a table of means."""
        how = f"with {self.trainer}" if self.trainer else "with a trainer of transformers"
        data = f" on [{self.dataset}](https://huggingface.co/datasets/{self.dataset})"
        lines = [
            "## The run",
            "",
            f"Trained {how}{data if self.dataset else ''}: {self.steps} steps. Versions: "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items())
            + ".",
        ]
        for prefix, title in (("", "training"), ("eval_", "evaluation")):
            logged = [(name, self._points(prefix + name)) for name in _METRICS]
            columns = {prefix + name: points for name, points in logged if points}
            lines += _table(dict([*columns.items()][:_COLUMNS]), title)
        return "\n".join(lines)

    def _points(self, name: str) -> list[tuple[int, float]]:
        found = [(entry.get("step"), entry.get(name)) for entry in self.history]
        return [
            (int(step), float(value))
            for step, value in found
            if isinstance(step, int) and isinstance(value, int | float)
        ]


def _table(columns: Mapping[str, Sequence[tuple[int, float]]], title: str) -> list[str]:
    """Means over spans of steps, at most ten of the same length."""
    if not columns:
        return []
    steps = {step for points in columns.values() for step, _ in points}
    last = max(steps)
    span = max(1, math.ceil(last / _ROWS))
    spans = [(0, 0)] if 0 in steps else []  # before training, as with eval_on_start
    spans += [(end - span + 1, min(end, last)) for end in range(span, last + span, span)]
    means = {
        name: [_mean([v for step, v in points if begin <= step <= end]) for begin, end in spans]
        for name, points in columns.items()
    }
    first = next(iter(means))
    rows = [
        f"| {begin if begin == end else f'{begin}-{end}'} | "
        + " | ".join("" if value is None else f"{value:.4g}" for value in values)
        + " |"
        for (begin, end), values in zip(spans, zip(*means.values(), strict=True), strict=True)
        if any(value is not None for value in values)
    ]
    known = [value for value in means[first] if value is not None and math.isfinite(value)]
    bounds = f" from {min(known):.4g} to {max(known):.4g}" if known else ""
    return [
        "",
        f"Means in {title}; `{first}`{bounds}: `{_curve(means[first])}`",
        "",
        f"| steps | {' | '.join(means)} |",
        "|---" * (len(means) + 1) + "|",
        *rows,
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _curve(values: Sequence[float | None]) -> str:
    """A bar for each span, lowest to highest; a blank where nothing finite was logged."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _BARS[round((value - low) * scale)]
        if value is not None and math.isfinite(value)
        else "\N{NO-BREAK SPACE}"
        for value in values
    )
