"""How two reports on layers agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerrl.statistics import Interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """Agreement of two reports, as `ContributionReport.compare` finds it. Prints as a table."""

    correlation: float
    """Rank correlation (Spearman) over the layers that both have."""
    interval: Interval | None
    """Its 95 % interval; None where neither report has anything to resample."""
    quantity: str
    """What differs: `"C"`, or `"score"` where contributions are undefined."""
    values: dict[int, tuple[float, float]]
    """Of each layer that both have, here and there. Empty for models of different depth, and where
    one has contributions without scores and the other scores without contributions."""
    differences: dict[int, Interval | None]
    """95 % interval of there minus here."""

    @property
    def resolved(self) -> list[int]:
        """Layers whose values are sure to differ, each taken for itself."""
        return [k for k, found in self.differences.items() if found is not None and 0 not in found]

    def __str__(self) -> str:
        shown = "" if self.interval is None else f" {self.interval:.2f}"
        lines = [f"Rank correlation (Spearman) {self.correlation:.2f}{shown}"]
        if not self.values:
            return (
                f"{lines[0]}. Layers are not compared one by one: other depth, or other quantity."
            )
        lines.append(f"layer  {self.quantity:>6}  {self.quantity:>6}  difference")
        for layer, (here, there) in self.values.items():
            interval = self.differences[layer]
            width = "" if interval is None else f"  {interval:.2f}"
            lines.append(f"{layer:5}  {here:6.2f}  {there:6.2f}  {there - here:+10.2f}{width}")
        intervals = [found for found in self.differences.values() if found is not None]
        if intervals:
            lines.append(
                f"Sure to differ, each layer for itself: {self.resolved or 'none'}. By chance "
                f"alone, about 1 in 20 of {len(intervals)} would be."
            )
        return "\n".join(lines)
