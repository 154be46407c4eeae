"""How two reports on layers agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerrl.tables import as_html, as_text

if TYPE_CHECKING:
    from layerrl.statistics import Interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """Agreement of two reports, as `ContributionReport.compare` finds it. Prints as a table."""

    correlation: float
    """Rank correlation (Spearman) over the layers that both have."""
    interval: Interval | None
    """95 % credible interval of the correlation that scores without noise would have; None if
    nothing can be resampled. Noise pulls a correlation towards 0, so that it may reach further
    from 0 than from the correlation itself."""
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

    def _rows(self) -> list[list[str]]:
        rows = [["layer", self.quantity, self.quantity, "difference", "95 %"]]
        for layer, (here, there) in self.values.items():
            interval = self.differences[layer]
            numbers = f"{here:.2f}", f"{there:.2f}", f"{there - here:+.2f}"
            rows.append([str(layer), *numbers, "-" if interval is None else f"{interval:.2f}"])
        return rows

    def _remarks(self) -> list[str]:
        shown = ""
        if self.interval is not None:
            shown = f" {self.interval:.2f}"
        remarks = [f"Rank correlation (Spearman) {self.correlation:.2f}{shown}"]
        intervals = [found for found in self.differences.values() if found is not None]
        if not self.values:
            remarks[0] += ". Layers are not compared one by one: other depth, or other quantity."
        if intervals:
            remarks.append(
                f"Sure to differ, each layer for itself: {self.resolved or 'none'}. By chance "
                f"alone, about 1 in 20 of {len(intervals)} would be."
            )
        return remarks

    def __str__(self) -> str:
        above, *below = self._remarks()
        return "\n".join([above, *([as_text(self._rows())] if self.values else []), *below])

    def _repr_html_(self) -> str:
        return as_html(self._rows() if self.values else [], self._remarks())
