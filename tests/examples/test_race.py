"""The race between a probe's best layers: the benchmark's arithmetic, its tables in the docs."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from layerrl.report import ContributionReport, Score

ROOT = Path(__file__).parents[2]


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("race")


def layer(*by_step: tuple[float, float]) -> Score:
    """Two seeds and four prompts, evaluated every 5 of 20 steps; a pair is the seeds' means."""
    rows = [tuple((mean - 0.1, mean + 0.1) * 2 for mean in means) for means in by_step]
    curve = tuple(zip((5, 10, 15), rows, strict=False))
    return Score(scores=rows[-1], curve=curve, steps=40)


def suite(races: Any, *orders: list[int]) -> Any:
    layers = (
        layer((0.1, 0.1), (0.2, 0.2), (0.3, 0.3), (0.4, 0.4)),
        layer((0.5, 0.0), (0.5, 0.3), (0.5, 0.5), (0.5, 0.6)),
        layer((0.2, 0.2), (0.6, 0.4), (0.7, 0.7), (0.8, 0.8)),
    )
    ends: dict[str, Any] = {"base": Score(score=0.0), "full": Score(score=1.0)}
    return races.Suite("x", ContributionReport(method="train", layers=layers, **ends), orders)


def test_a_layer_that_is_resolved_behind_trains_no_further(races: Any) -> None:
    runs, *_ = suite(races).runs
    # The same difference on every prompt is resolved: at step 5 layer 1 leads alone.
    assert races.race(runs, [0, 1, 2], [5, 10]) == ([1], 15)
    # Layer 2 wins where nobody looks before step 10, and the order of candidates decides nothing.
    assert races.race(runs, [2, 1], [10]) == ([2], 20)
    # Noise between prompts leaves both in until the steps are used up.
    noisy = {k: {s: row + (k == 2) * row.new_tensor([3, -3, 3, -2.9]) for s, row in c.items()}
             for k, c in runs.items()}  # fmt: skip
    assert races.race(noisy, [1, 2], [5, 10]) == ([2, 1], 20)


def test_the_winner_is_judged_by_the_other_seeds(races: Any) -> None:
    one = suite(races, [1, 0, 2])
    # By seed 1 the ends are 0.4, 0.6 and 0.8, by seed 0 0.4, 0.5 and 0.8.
    assert one.by_others(0) == pytest.approx({0: 0.5, 1: 0.25, 2: 0.0})
    assert one.by_others(1) == pytest.approx({0: 0.5, 1: 0.375, 2: 0.0})
    alone = races.choice(one, 1, ())
    assert (alone.regret, alone.cost) == pytest.approx(((0.25 + 0.375) / 2, 0.0))
    # Seed 0 chooses layer 1 at step 5, seed 1 layer 2: 15 of 60 steps each.
    raced = races.choice(one, 3, (1, 2))
    assert (raced.regret, raced.least) == pytest.approx((0.25 / 2, 0.0))
    assert raced.cost == pytest.approx(0.25)
    # Two candidates: layer 0 is all that seed 1 finds.
    assert races.choice(one, 2, (1,)).regret == pytest.approx((0.25 + 0.5) / 2)
    assert races.choice(one, 2, (1,)).least == pytest.approx((0.25 + 0.375) / 2)


def test_suites_count_once(races: Any) -> None:
    def choices(*regrets: float) -> list[Any]:
        return [races.Choice(regret, 0.0, 0.0) for regret in regrets]

    shown = races.compared(choices(0.0, 0.1), choices(0.2, 0.1))
    # Differences -0.2 and 0: their mean -0.1, standard error 0.1, times 12.71.
    assert shown == ("0.050", "-0.100 [-1.371, +1.171]", "1, 0")
    assert races.compared(choices(0.1, 0.1), choices(0.1, 0.1))[1] == "+0.000"


def test_the_docs_say_what_is_stored(races: Any) -> None:
    late, early = ([races.suite(name) for name in names] for names in (races.LATE, races.EARLY))
    text = f"{races.by_race(late, early)}\n\n{races.by_suite([*late, *early])}"
    page = (ROOT / "docs" / "results.md").read_text()
    before, after = (page.index(mark) for mark in races.GAP)
    written = page[before + len(races.GAP[0]) : after].strip()
    assert written == text, "run benchmarks/race.py --docs docs, and correct the texts"
