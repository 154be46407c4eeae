"""Plots of scores by layer and depth. Matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from layerrl.checks import check_kind
from layerrl.errors import ReportError

if TYPE_CHECKING:
    from layerrl.statistics import Interval


_SIZE: dict[str, Any] = {"figsize": (6.5, 3.2), "layout": "constrained"}


def axes_of_a_file() -> Any:
    """Axes of a figure that no window shows, whatever backend is chosen for windows."""
    with _matplotlib():
        from matplotlib.figure import Figure
    return Figure(**_SIZE).subplots()


@contextmanager
def _matplotlib() -> Iterator[None]:
    """Inside, an error of matplotlib or of its absence is a `ReportError`."""
    try:
        yield
    except Exception as error:  # of whatever windows are made with
        if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
            text = 'plotting needs matplotlib: pip install "layerrl[plot]"'
        else:
            text = (
                f"matplotlib makes no figure here: {error!s:.200}. Its backend is named by "
                'MPLBACKEND or matplotlib.use(): "agg" works everywhere, or pass axes as ax='
            )
        raise ReportError(text) from error


def plot_layers(
    values: Mapping[int, float],
    intervals: Mapping[int, Interval | None],
    *,
    num_layers: int,
    quantity: str,
    lines: Mapping[float, str],
    ax: Any = None,  # matplotlib's Axes
) -> Any:
    """Draw a value per layer, filled where its interval excludes the first horizontal line."""
    with _matplotlib():
        from matplotlib.axes import Axes
    if ax is not None:
        advice = (
            "matplotlib's Axes or None; ax.figure.savefig(...) of what this returns writes a file"
        )
        check_kind("ax", ax, Axes, advice, ReportError)
    else:
        with _matplotlib():
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(**_SIZE)
    for style, (height, name) in zip(("-", "--", ":"), lines.items(), strict=False):
        ax.axhline(height, color="black", lw=0.8, linestyle=style, label=name)
    reference = next(iter(lines), None)
    for layer, value in values.items():
        interval = intervals.get(layer)
        if interval is not None:
            ax.plot([layer, layer], [interval.low, interval.high], color="tab:blue", lw=1)
        resolved = interval is not None and (reference is None or reference not in interval)
        face = "tab:blue" if resolved else "white"
        ax.plot(layer, value, "o", color="tab:blue", markerfacecolor=face, markersize=5)
    ax.set(xlabel="layer", ylabel=quantity)
    ax.set_xlim(-0.7, num_layers - 0.3)
    if lines:
        ax.legend(fontsize=8)
    return ax
