"""What is known about each layer's contribution, and how well."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from layerrl.checks import check_kind, check_number, shown, whole_number
from layerrl.comparison import Comparison
from layerrl.errors import ReportError
from layerrl.plotting import plot_layers
from layerrl.report.entries import Cost, Score, check_layer, check_report, still_missing
from layerrl.report.ranking import OVER_AVERAGE, Ranking, resampled
from layerrl.report.stored import as_json, report_in
from layerrl.report.table import cells, remarks
from layerrl.selection import LayerSelection
from layerrl.statistics import Interval, contribution, contribution_draws, interval_of
from layerrl.tables import as_html, as_text
from layerrl.warning import warn

__all__ = ["ContributionReport", "Cost", "Score"]


@dataclass(frozen=True, kw_only=True, repr=False)
class ContributionReport:
    """Every layer's score and contribution, with 95 % intervals where they can be had.

    Intervals are over prompts (Bayesian bootstrap), paired between layers, base and full. Where
    runs have several seeds they hold what seeds vary, taken as the same for every run.
    """

    method: str
    """How the layers were scored, as given to `contribution_probe`."""
    layers: tuple[Score, ...]
    """One entry per decoder layer, 0 nearest the embedding."""
    base: Score | None = None
    """The model before training; None for methods that do not measure it."""
    full: Score | None = None
    """The full-parameter run."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was run: whatever is needed to run it again. JSON values."""
    source: str = ""
    """Whose numbers these are, if not measured here."""
    cost: Cost | None = None
    """What it took; None where nobody knows."""

    def __post_init__(self) -> None:
        check_report(self)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.layers)

    @property
    def partial(self) -> bool:
        """Whether something that was asked for is still missing: a layer, or one of its seeds."""
        return bool(self._missing)

    @property
    def _missing(self) -> str:
        return still_missing(self._runs, self.settings)

    @cached_property
    def _runs(self) -> dict[str, Score]:
        runs = {str(layer): entry for layer, entry in enumerate(self.layers)}
        return runs | {n: s for n, s in (("base", self.base), ("full", self.full)) if s is not None}

    @cached_property
    def _draws(self) -> dict[str, Tensor]:
        """Resampled means, shape (D,), of all that was scored prompt by prompt."""
        return resampled(self._runs, self.method, self.settings)

    @property
    def scores(self) -> dict[int, float]:
        """Score of each layer that has one."""
        return {k: s.score for k, s in enumerate(self.layers) if s.score is not None}

    @property
    def contributions(self) -> dict[int, float]:
        """C of each layer that has one: its share of the full-parameter gain.

        Raises:
            ReportError: If base or full were not measured, or the gain between them is not
                resolved from zero: a share of it would mean nothing.
        """
        if self._published:
            return self._published
        base, full = self._resolved_gain()
        return {k: contribution(score, base, full) for k, score in self.scores.items()}

    def _resolved_gain(self) -> tuple[float, float]:
        """Scores of base and full, where the gain between them is not nothing."""
        base, full = (None if end is None else end.score for end in (self.base, self.full))
        if base is None or full is None:
            raise ReportError(
                f"contributions need a score of the base and of a full-parameter run; this "
                f"{self.method!r} report has none. Its `scores` rank the layers."
            )
        draws, gain, shown = self._draws, full - base, ""
        resolved = gain > 0
        if {"base", "full"} <= set(draws):
            interval = interval_of(draws["full"] - draws["base"])
            resolved, shown = interval.low > 0, f" {interval:.3f}"
        if not resolved:
            raise ReportError(
                f"full training went from {base:.3f} to {full:.3f}, a gain of {gain:+.3f}{shown}, "
                "which is not resolved above zero: a layer's share of it is undefined. Train "
                "longer, tune the full run's learning rate, or evaluate on more prompts."
            )
        return base, full

    def interval(self, layer: int) -> Interval | None:
        """95 % interval of a layer's score.

        Args:
            layer: Its number.

        Returns:
            The interval; None where only the mean is known.

        Raises:
            ReportError: If there is no such layer.
        """
        draws_D = self._draws_at(layer, shares=False)
        return None if draws_D is None else interval_of(draws_D, self.scores[layer])

    def contribution_interval(self, layer: int) -> Interval | None:
        """95 % interval of a layer's contribution.

        Args:
            layer: Its number.

        Returns:
            The interval; None where there is nothing to resample.

        Raises:
            ReportError: If contributions are undefined, or there is no such layer.
        """
        draws_D = self._draws_at(layer, shares=True)
        if draws_D is None:
            return None
        self._resolved_gain()
        return interval_of(draws_D)

    @property
    def _published(self) -> dict[int, float]:
        return {k: s.contribution for k, s in enumerate(self.layers) if s.contribution is not None}

    @property
    def _ranking(self) -> Ranking:
        return Ranking(self.num_layers, self._values(), self._draws)

    def _values(self) -> dict[int, float]:
        """What layers are ranked by."""
        return self._published or self.scores

    def top(self, k: int) -> LayerSelection:
        """The k best layers, as a selection for any model with as many layers.

        Warns when the k-th and the next one are not resolved from each other, or when nothing says
        whether they are.

        Args:
            k: How many.

        Returns:
            The selection.

        Raises:
            ReportError: If fewer layers have a score, or none has.
        """
        values = self._values()
        number = whole_number(k, least=1)
        if not values:
            raise ReportError(f"top({shown(k)}): none of {self.num_layers} layers has a score yet")
        if number is None or number > len(values):
            raise ReportError(
                f"top({shown(k)}): expected a number from 1 to {len(values)}, the layers with a "
                "score"
            )
        ordered = sorted(values, key=lambda layer: (-values[layer], layer))
        if number < len(ordered):
            last, following = ordered[number - 1 : number + 1]
            if why := self._ranking.doubt(last, following):
                warn(
                    f"layer {last} is in and layer {following} is out, which is not resolved: {why}"
                )
        modules = self.settings.get("modules")
        return LayerSelection(
            num_layers=self.num_layers,
            layers=tuple(sorted(ordered[:number])),
            modules=None if modules is None else tuple(modules),
        )

    def spearman(self, other: ContributionReport) -> tuple[float, Interval | None]:
        """Rank correlation with another report, over the layers that both have.

        Models of different depth are aligned by relative depth, with the shallower one's layers
        compared to interpolated values of the deeper one.

        Args:
            other: The other report.

        Returns:
            The correlation, and the 95 % interval of that of the values without their noise
            (`Comparison.interval`); None where there is nothing to resample.

        Raises:
            ReportError: If it is no report, or fewer than three layers can be compared.
        """
        check_kind("other", other, ContributionReport, "a ContributionReport", ReportError)
        return self._ranking.correlation(other._ranking)

    def compare(self, other: ContributionReport) -> Comparison:
        """How another report agrees with this one: on the order of the layers, and on each.

        Args:
            other: The other report, such as that of another task or other seeds.

        Returns:
            The comparison, which prints as a table.

        Raises:
            ReportError: As `spearman`.
        """
        correlation, interval = self.spearman(other)
        both = self._defined(), other._defined()
        shares = all(both)
        here, there = both if shares else (self.scores, other.scores)
        values, differences = {}, {}
        if self.num_layers == other.num_layers and (shares or self.method == other.method):
            values = {layer: (here[layer], there[layer]) for layer in here if layer in there}
        for layer in values:
            found = [report._draws_at(layer, shares) for report in (self, other)]
            known = [draws for draws in found if draws is not None]
            differences[layer] = interval_of(known[1] - known[0]) if len(known) == 2 else None
        return Comparison(correlation, interval, "C" if shares else "score", values, differences)

    def _draws_at(self, layer: int, shares: bool) -> Tensor | None:
        """Resampled values of a layer: contributions, or scores."""
        draws, layer = self._draws, check_layer(layer, self.num_layers)
        if str(layer) not in draws or not shares:
            return draws.get(str(layer))
        if not {"base", "full"} <= set(draws):
            return None
        return contribution_draws(draws[str(layer)], draws["base"], draws["full"])

    def at_depth(self, depth: float) -> float | None:
        """What layers are ranked by at a relative depth, interpolated between two layers.

        Args:
            depth: 0 is the first layer, 1 the last.

        Returns:
            The value; None where one of the two has none.

        Raises:
            ReportError: If the depth is not from 0 to 1.
        """
        depth = check_number("depth", depth, ReportError, least=0, most=1)
        return Ranking(self.num_layers, self._values(), {}).at(depth)

    def to_json(self) -> str:
        """A text that `from_json` makes an equal report of.

        Returns:
            The text, JSON.

        Raises:
            ReportError: If its settings are no JSON values, or something in it (a NUL, a number of
                more than 64 bits) could not be read again.
        """
        return as_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> ContributionReport:
        """The report that `to_json` wrote.

        Args:
            text: What `to_json` returned, or that in UTF-8.

        Returns:
            An equal report.

        Raises:
            ReportError: If it is no report, or one of a version that this layerrl does not know.
        """
        return report_in(cls, text)

    def _defined(self) -> dict[int, float]:
        try:
            return self.contributions
        except ReportError:
            return {}

    def _rows(self) -> list[tuple[str, ...]]:
        shares = {k: (c, self.contribution_interval(k)) for k, c in self._defined().items()}
        return cells(
            self._runs,
            {n: interval_of(draws_D, self._runs[n].score) for n, draws_D in self._draws.items()},
            {str(layer): share for layer, share in shares.items()},
        )

    def _remarks(self) -> list[str]:
        return remarks(self, self._runs, self._missing)

    def __repr__(self) -> str:
        return f"<{self.method!r} report on {self.num_layers} layers: print it for its table>"

    def __str__(self) -> str:
        head = f"Contribution of each layer, method {self.method!r}"
        return "\n".join([head, as_text(self._rows()), *self._remarks()])

    def _repr_html_(self) -> str:
        return as_html(self._rows(), self._remarks())

    def plot(self, ax: Any = None) -> Any:  # matplotlib's Axes
        """Contribution against depth, or the score where there is no contribution.

        Filled: the interval excludes the base, or no gain. Open: it does not, or there is none.

        Args:
            ax: Matplotlib axes; None makes a figure.

        Returns:
            The axes.

        Raises:
            ReportError: If matplotlib is missing, or `ax` is none of its axes.
        """
        shares = self._defined()
        values = shares or self.scores
        find = self.contribution_interval if shares else self.interval
        lines = {0.0: "base", 1.0: "full"} if shares else {}
        if not shares and self.base is not None and self.base.score is not None:
            lines = {self.base.score: "base"}
        if self.method in OVER_AVERAGE:
            lines = {0.0: "no gain", 1.0: "average layer"}
        return plot_layers(
            values,
            {layer: find(layer) for layer in values},
            num_layers=self.num_layers,
            quantity="contribution C" if shares else "score",
            lines=lines,
            ax=ax,
        )
