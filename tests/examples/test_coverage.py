"""The simulation of intervals runs, and sees an interval that is too short."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerrl.report import ranking
from layerrl.statistics import Interval

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("coverage")


def test_every_kind_has_its_line_in_the_docs(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"before\n\n{module.GAP[0]}\n\nold\n\n{module.GAP[1]}\n\nafter\n")
    # The mean of many probes, the longest part.
    monkeypatch.setattr(module, "gains_of_seeds", lambda: module.gains()[1])
    monkeypatch.setattr("sys.argv", ["coverage.py", "--trials", "2", "--docs", str(tmp_path)])
    module.main()
    text, docs = page.read_text(), (ROOT / "docs" / "results.md").read_text()
    assert text.startswith("before\n\n")
    assert text.endswith(f"{module.GAP[1]}\n\nafter\n")
    for what, simulated, _ in module.KINDS.values():
        assert f"| {what} | {simulated} | " in text
        assert f"| {what} | {simulated} | " in docs


def test_an_interval_that_is_too_short_is_seen(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    share, error = module.coverage("score", 40)
    assert share > 0.9
    assert 0 < error < 0.05
    whole = module.ContributionReport.interval

    def short(report: Any, layer: int) -> Interval:
        found, middle = whole(report, layer), report.scores[layer]
        return Interval((found.low + middle) / 2, (found.high + middle) / 2)

    monkeypatch.setattr(module.ContributionReport, "interval", short)
    assert module.coverage("score", 40)[0] < 0.8
    assert ranking.bootstrap is module.bootstrap  # given back


def test_a_share_of_problems_of_which_some_are_alike(module: Any) -> None:
    interval = module.interval_of_share
    # Equal weights: the quantiles of Beta(9.5, 69.5).
    assert interval(9 / 78, np.ones(78)) == pytest.approx((0.0587, 0.2002), abs=0.002)
    low, high = interval(9 / 78, np.array([1.0] * 39 + [3.0] * 39))
    assert high - low > 0.15  # as 62 of one weight
    assert interval(0.0, np.ones(78))[0] == 0
    assert interval(1.0, np.ones(78))[1] == 1
