"""Reports keep what is known apart from what is not."""

import functools
import json
import math
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch

from layerrl import select_layers
from layerrl.errors import ReportError
from layerrl.report import ContributionReport, Cost, Score
from layerrl.scores.published import published_contributions
from layerrl.statistics import spearman
from tests.models import tiny_config

mpl.use("Agg")
NUM_PROMPTS = 40


def right(share: float, seeds: int = 1, shift: int = 0) -> tuple[tuple[float, ...], ...]:
    """Scores of 1 on that share of the prompts, the same ones for a larger share."""
    row = [float((i * 7 + shift) % NUM_PROMPTS < share * NUM_PROMPTS) for i in range(NUM_PROMPTS)]
    return (tuple(row),) * seeds


def report(*shares: float, base: float = 0.1, full: float = 0.6, **changes) -> ContributionReport:
    layers = tuple(Score(scores=right(share), steps=5, seconds=2.5) for share in shares)
    values = {"base": Score(scores=right(base)), "full": Score(scores=right(full), steps=5)}
    return ContributionReport(**{"method": "train", "layers": layers, **values, **changes})


def test_torchs_default_device_changes_nothing():
    """A notebook may have set a GPU; what is made on `meta` by mistake has no values."""

    def everything() -> tuple[object, ...]:
        made, other = report(0.1, 0.35, 0.6), report(0.3, 0.2, 0.5, 0.4)
        seeds = replace(made, layers=tuple(replace(s, scores=right(0.3, 3)) for s in made.layers))
        return str(made), str(seeds), made.top(1), made.compare(other), *made.spearman(other)

    expected = everything()
    with torch.device("meta"):
        assert everything() == expected


class TestNumbers:
    def test_contributions_are_shares_of_the_gain(self):
        found = report(0.1, 0.35, 0.6, 0.85).contributions
        assert found == pytest.approx({0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5})

    def test_intervals_hold_the_value(self):
        made = report(0.1, 0.35, 0.6)
        for layer, value in made.contributions.items():
            assert value in made.contribution_interval(layer)
            assert made.scores[layer] in made.interval(layer)

    def test_a_layer_that_scores_as_the_base_has_an_interval(self):
        """In a few draws of a gain that is barely resolved, nothing was gained."""
        row = [0.0] * 8
        made = ContributionReport(
            method="train",
            layers=(Score(scores=(row,)),),
            base=Score(scores=(row,)),
            full=Score(scores=(([1.0] * 4 + [0.0] * 4),)),
        )
        assert made.contributions == {0: 0.0}
        interval = made.contribution_interval(0)
        assert interval.low < 0 < interval.high

    def test_a_gain_that_is_not_resolved_leaves_contributions_undefined(self):
        made = report(0.1, 0.3, full=0.125)
        with pytest.raises(
            ReportError, match=r"from 0.100 to 0.125, a gain of \+0.025 \[.*not res"
        ):
            _ = made.contributions
        assert made.scores == pytest.approx({0: 0.1, 1: 0.3})
        assert "undefined" in str(made)

    def test_a_full_run_that_made_it_worse_leaves_contributions_undefined(self):
        with pytest.raises(ReportError, match=r"a gain of -0\.350 \[.*not resolved above zero"):
            _ = report(0.6, 0.2, base=0.45, full=0.1).contributions

    def test_a_gain_that_is_sometimes_none_leaves_the_limits_open(self):
        """The full run gained on four prompts: one resample in fifty has none of them."""
        made = report(0.1, 0.1, 0.1, full=0.1, base=0.0)
        assert made.contributions[0] == pytest.approx(1)
        assert 1 in made.contribution_interval(0)
        assert made.compare(made).resolved == []

    def test_seeds_of_one_run_widen_the_intervals_of_all(self):
        rows = right(0.3)[0], right(0.5)[0]
        two = (Score(scores=rows), Score(scores=right(0.4)))
        alone = (Score(scores=right(0.4)), Score(scores=right(0.4)))
        wide, narrow = (replace(report(), layers=layers) for layers in (two, alone))
        for layer in (0, 1):
            assert wide.interval(layer).high > narrow.interval(layer).high + 0.5

    def test_without_a_full_run_there_are_only_scores(self):
        made = report(0.2, 0.4, full=0.5)
        alone = ContributionReport(method="gradient", layers=made.layers)
        with pytest.raises(ReportError, match="this 'gradient' report has none"):
            _ = alone.contributions
        assert alone.top(1).layers == (1,)

    def test_missing_layers_are_missing(self):
        layers = (Score(scores=right(0.4)), Score(status="missing"))
        made = report(layers=layers)
        assert made.partial
        assert list(made.contributions) == [0]
        assert "Partial: 1 of 4 are missing." in str(made)

    def test_layers_that_nobody_asked_for_are_not(self):
        layers = (Score(scores=right(0.4)), Score(status="missing"))
        assert not report(layers=layers, settings={"layers": [0]}).partial

    def test_fewer_seeds_are_partial(self):
        layers = (Score(scores=right(0.4, seeds=2)), Score(scores=right(0.5)))
        full = Score(scores=right(0.6, seeds=2))
        made = replace(report(settings={"seeds": [0, 1]}), layers=layers, full=full)
        assert "Partial: 1 have fewer than 2 seeds." in str(made)
        assert not replace(made, settings={"seeds": [0]}).partial

    def test_both_learning_rates_are_stated(self):
        rates = {"args": {"learning_rate": 2e-4}, "full_args": {"learning_rate": 3e-5}}
        assert "Learning rate 0.0002 for a layer, 3e-05 for" in str(report(0.5, settings=rates))


class TestCompare:
    def test_of_the_same_scores_differs_nowhere(self):
        made = report(0.1, 0.35, 0.6)
        found = made.compare(made)
        assert found.correlation == pytest.approx(1)
        assert found.quantity == "C"
        assert found.values == {k: (v, v) for k, v in made.contributions.items()}
        assert found.resolved == []
        assert "Sure to differ, each layer for itself: none" in str(found)

    def test_finds_the_layer_that_differs(self):
        found = report(0.1, 0.35, 0.6).compare(report(0.1, 0.35, 0.2))
        assert found.resolved == [2]
        difference = found.differences[2]
        assert difference is not None
        assert difference.high < 0

    def test_of_scores_where_contributions_are_undefined(self):
        made = report(0.1, 0.35, 0.6, full=0.1)
        found = made.compare(report(0.1, 0.35, 0.2, full=0.1))
        assert found.quantity == "score"
        assert found.resolved == [2]

    def test_of_other_methods_compares_the_order_alone(self):
        gains = ContributionReport(method="gradient", layers=report(0.9, 0.1, 0.5).layers)
        found = report(0.1, 0.35, 0.2, full=0.1).compare(gains)
        assert found.correlation == pytest.approx(-1)
        assert found.values == {}

    def test_of_seeds_that_differ_resolves_nothing(self):
        """The same prompts, another pair of seeds each: a difference that seeds could make."""
        rows = [right(share)[0] for share in (0.3, 0.5, 0.4, 0.6)]
        here, there = (
            replace(report(), layers=(Score(scores=pair),) * 3)
            for pair in (tuple(rows[:2]), tuple(rows[2:]))
        )
        assert here.compare(there).resolved == []

    def test_of_other_depths_compares_the_order_alone(self):
        found = report(0.1, 0.5, 0.9).compare(report(0.1, 0.3, 0.5, 0.7, 0.9))
        assert found.correlation == pytest.approx(1)
        assert found.values == {}
        assert "Layers are not compared one by one" in str(found)

    def test_contributions_are_not_compared_with_scores(self):
        layers = tuple(Score(contribution=c) for c in (0.1, 0.9, 0.4))
        published = ContributionReport(method="published", layers=layers)
        measured = ContributionReport(method="gradient", layers=report(0.2, 0.7, 0.5).layers)
        found = published.compare(measured)
        assert found.correlation == pytest.approx(1)
        assert found.values == {}


class TestTop:
    def test_is_a_selection_that_fits_the_model(self):
        config = tiny_config("llama", 4)
        selection = report(0.1, 0.9, 0.2, 0.8).top(2)
        assert select_layers(config, selection) == select_layers(config, [1, 3])

    def test_warns_where_the_next_one_is_not_resolved(self):
        message = "layer 1 is in and layer 0 is out, which is not"
        with pytest.warns(UserWarning, match=message) as warned:
            report(0.5, 0.525, 0.1).top(1)
        assert [warning.filename for warning in warned] == [__file__]

    def test_warns_where_nothing_says_how_sure_it_is(self):
        with pytest.warns(UserWarning, match="no intervals"):
            published_contributions("Qwen3-1.7B-Base").top(1)

    @pytest.mark.filterwarnings("error")
    def test_is_silent_where_it_is_resolved(self):
        assert report(0.1, 0.9, 0.2).top(1).layers == (1,)
        assert report(0.1, 0.9).top(2).layers == (0, 1)

    def test_keeps_the_parts_that_were_measured(self):
        made = report(0.1, 0.9, settings={"modules": ["mlp.*"]})
        assert made.top(1).modules == ("mlp.*",)

    def test_takes_any_whole_number(self):
        assert report(0.1, 0.9, 0.2).top(np.int64(1)).layers == (1,)

    def test_of_a_report_without_scores_is_refused(self):
        empty = ContributionReport(method="train", layers=(Score(status="missing"),) * 3)
        with pytest.raises(ReportError, match=r"top\(1\): none of 3 layers has a score yet"):
            empty.top(1)
        none = ContributionReport(method="train", layers=())
        with pytest.raises(ReportError, match="layer is 0, and this report has no layers"):
            none.interval(0)

    @pytest.mark.parametrize("k", [0, 4, -1, True, 1.0, "1"])
    def test_of_more_layers_than_there_are_is_refused(self, k):
        with pytest.raises(ReportError, match="expected a number from 1 to 3"):
            report(0.1, 0.9, 0.2).top(k)


class TestSpearman:
    def test_with_itself_is_one(self):
        made = report(0.1, 0.5, 0.3, 0.9)
        correlation, interval = made.spearman(made)
        assert correlation == pytest.approx(1)
        assert interval is not None

    def test_aligns_depths(self):
        deep = report(0.1, 0.3, 0.5, 0.7, 0.9)
        shallow = report(0.1, 0.5, 0.9)
        assert shallow.spearman(deep)[0] == pytest.approx(1)
        assert deep.spearman(report(0.9, 0.5, 0.1))[0] == pytest.approx(-1)

    def test_finds_each_layer_of_its_own_depth(self):
        scores = [Score(scores=right(0.1 * (k % 7))) for k in range(30)]
        asked = [Score(status="missing")] * 30
        for layer in (5, 10, 15):
            asked[layer] = scores[layer]
        made = replace(report(), layers=tuple(asked))
        assert made.spearman(made)[0] == pytest.approx(1)

    def test_of_layers_that_are_all_alike_is_nothing(self):
        correlation, interval = report(0.4, 0.4, 0.4).spearman(report(0.4, 0.4, 0.4))
        assert math.isnan(correlation)
        assert interval is None

    def test_its_interval_holds_the_correlation_without_noise(self):
        """Of close orders: what is resampled once more is below the truth in most trials."""
        generator, held = torch.Generator().manual_seed(0), 0
        for _ in range(30):
            true_2K = torch.randn(2, 12, generator=generator).double()
            true_2K[1] = 0.95 * true_2K[0] + (1 - 0.95**2) ** 0.5 * true_2K[1]
            noise_2KP = torch.randn(2, 12, 60, generator=generator).double()
            here, there = (
                ContributionReport(method="train", layers=tuple(Score(scores=(row,)) for row in of))
                for of in (true_2K[..., None] + 3 * noise_2KP).tolist()
            )
            correlation, interval = here.spearman(there)
            assert correlation in interval
            held += spearman(*true_2K).item() in interval
        assert held >= 26, held

    @pytest.mark.parametrize("unit", [1e-5, 1e-12, 1e8])
    def test_its_interval_does_not_depend_on_the_unit_of_the_scores(self, unit):
        generator = torch.Generator().manual_seed(0)
        noise_2KP = 0.3 * torch.randn(2, 12, 200, generator=generator).double()
        first, second = torch.arange(12)[:, None] / 10 + noise_2KP

        def of(rows: torch.Tensor) -> ContributionReport:
            layers = tuple(Score(scores=(tuple(row),)) for row in rows.tolist())
            return ContributionReport(method="train", layers=layers, settings={"eval_dataset": ""})

        correlation, interval = of(first).spearman(of(second))
        found, moved = of(first).spearman(of(second * unit))
        assert found == correlation
        assert (moved.low, moved.high) == pytest.approx((interval.low, interval.high), abs=0.02)
        assert interval.low > 0.9

    def test_of_published_numbers_has_no_interval(self):
        made = published_contributions("Qwen3-1.7B-Base")
        assert made.spearman(made) == (pytest.approx(1), None)

    def test_of_too_few_layers_is_refused(self):
        with pytest.raises(ReportError, match="2 layers have a value in both"):
            report(0.1, 0.2).spearman(report(0.1, 0.2))


class TestJson:
    def test_round_trip(self):
        made = report(0.1, 0.35, settings={"steps": 5})
        curve = ((2, right(0.2)), (4, right(0.3)))
        made = replace(made, layers=(*made.layers, Score(scores=right(0.4), curve=curve)))
        assert ContributionReport.from_json(made.to_json()) == made

    @pytest.mark.parametrize("layers", [list, tuple])
    @pytest.mark.parametrize(
        "settings", [{"a": (1, (2,))}, {3: 4, None: True}, {"a": [{5: range(2)}]}, {"layers": (0,)}]
    )
    def test_round_trip_of_what_json_has_otherwise(self, settings, layers):
        made = ContributionReport(
            method="x", layers=layers([Score(score=1.0)] * 2), settings=settings
        )
        assert ContributionReport.from_json(made.to_json()) == made

    @pytest.mark.parametrize(
        "change",
        [
            {"method": "a\0b"},
            {"source": "a\0b"},
            {"layers": (Score(score=1.0, note="a\0b"),)},
            {"layers": (Score(score=1.0, steps=2**63),)},
            {"full": Score(scores=((1.0,),), curve=((2**63, ((1.0,),)),))},
            {"cost": Cost(tokens=2**63)},
            {"settings": {"a": functools.reduce(lambda inner, _: [inner], range(70), 1)}},
            {"settings": {"a": 10**50}},
            {"settings": {1: 1, "1": 2}},
            {"settings": {"a": {None: 1, "null": 2}}},
        ],
        ids=str,
    )
    def test_what_could_not_be_read_is_not_written(self, change):
        made = ContributionReport(**({"method": "x", "layers": (Score(score=1.0),)} | change))
        with pytest.raises(ReportError, match=r"this report could not be read again: not the JSON"):
            made.to_json()

    @pytest.mark.parametrize("scores", [{(1.0,), (2.0,)}, [{1.0, 2.0}], frozenset({(1.0,)})])
    def test_scores_without_an_order_are_refused(self, scores):
        with pytest.raises(ReportError, match="expected a list for every seed"):
            Score(scores=scores)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 99}, "version 99; this layerrl reads up to 1. Upgrade"),
            ({"version": None}, "version is None, expected a whole number"),
            ({"other": 1}, r"has the fields .*'other'.*, expected \['base'"),
            ({"layers": [{"other": 1}]}, "not the JSON of a ContributionReport"),
        ],
    )
    def test_anything_else_is_refused(self, change, message):
        data = json.loads(report(0.1, 0.2).to_json())
        with pytest.raises(ReportError, match=message):
            ContributionReport.from_json(json.dumps(data | change))
        with pytest.raises(ReportError, match="not the JSON"):
            ContributionReport.from_json("no")

    @pytest.mark.parametrize("scores", [((),), ((1.0,), (1.0, 2.0)), ((math.nan,),)])
    def test_scores_that_are_no_scores_are_refused(self, scores):
        with pytest.raises(ReportError, match="one finite number for each of the same prompts"):
            Score(scores=scores)

    @pytest.mark.parametrize("name", ["score", "contribution"])
    def test_a_mean_that_is_too_large_to_compute_with_is_refused(self, name):
        with pytest.raises(ReportError, match=rf"{name} of a run is -1e\+200, .* below 1e\+150"):
            Score(**{name: -1e200})


class TestTextsThatNoFileHolds:
    @pytest.mark.parametrize("field", ["method", "source"])
    def test_of_a_report(self, field):
        message = rf"{field} of a report is 'a.ud83d', expected text of whole characters"
        with pytest.raises(ReportError, match=message):
            report(0.1, **{field: "a\ud83d"})

    def test_of_a_run(self):
        with pytest.raises(ReportError, match=r"note of a run is .* is half of one"):
            Score(note="\ud83d")

    @pytest.mark.parametrize(
        "settings", [{"a": [{"b": "\ud83d"}]}, {"\ud83d": 1}, {"a": object()}, {(1,): 2}]
    )
    def test_in_settings_are_refused_when_it_is_written(self, settings):
        with pytest.raises(ReportError, match="settings of a report are no JSON values"):
            report(0.1, settings=settings).to_json()


class TestShown:
    def test_table_has_a_line_for_each_run(self):
        text = str(report(0.1, 0.35))
        lines = text.splitlines()
        assert lines[1].split()[:4] == ["layer", "score", "95", "%"]
        assert [line.split()[0] for line in lines[2:6]] == ["base", "full", "0", "1"]
        assert "0.50" in lines[5]
        assert "One seed a run" in text

    def test_scores_of_one_probe_say_so(self):
        scored = ContributionReport(method="gradient", layers=report(0.1, 0.2).layers)
        assert "One seed: the intervals say nothing about another seed." in str(scored)
        known = tuple(Score(score=s) for s in (0.1, 0.2))  # no prompts, and so no seed
        assert "seed" not in str(ContributionReport(method="position", layers=known))

    def test_scores_that_were_widened_say_so(self):
        layers, settings = report(0.1, 0.2).layers, {"error_times": 1.5}
        made = ContributionReport(method="step", layers=layers, settings=settings)
        said = "Prompts depend on each other: their scores are written 1.5 times as far from"
        assert said in str(made)
        assert said in str(ContributionReport.from_json(made.to_json()))
        odd = ContributionReport(method="step", layers=layers, settings={"error_times": "x"})
        for other in (odd, ContributionReport(method="step", layers=layers)):
            assert "times as far" not in str(other)

    def test_html_has_the_same_cells(self):
        shown = report(0.1, 0.35)._repr_html_()
        assert shown.count("<tr>") == 5
        assert "<td>0.350</td>" in shown

    def test_plot_draws_every_layer(self):
        axes = report(0.1, 0.35, 0.6).plot()
        assert axes.get_ylabel() == "contribution C"
        assert len([line for line in axes.lines if line.get_marker() == "o"]) == 3
        alone = ContributionReport(method="gradient", layers=report(0.1, 0.2).layers).plot(axes)
        assert alone is axes


class TestPublished:
    def test_agrees_with_its_own_scores(self):
        made = published_contributions("Qwen3-1.7B-Base")
        assert made.num_layers == 28
        assert not made.partial
        given = made.contributions
        for layer, score in made.scores.items():
            recomputed = (score - made.base.score) / (made.full.score - made.base.score)
            assert recomputed == pytest.approx(given[layer], abs=0.02)
        assert len(made.scores) == 28

    def test_what_is_not_known_is_missing(self):
        made = published_contributions("Qwen3-8B-Base")
        assert made.partial
        assert len(made.contributions) == 10
        assert "2607.01232" in str(made)
        assert "No intervals" in str(made)

    @pytest.mark.parametrize("name", ["qwen3-1.7b-base", "Qwen/Qwen3-1.7B-Base"])
    def test_names_are_the_papers_in_any_case(self, name):
        assert published_contributions(name).settings["name"] == "Qwen3-1.7B-Base"

    @pytest.mark.parametrize(
        ("name", "hint"), [("Qwen3-1.7B", "Close: Qwen3-1.7B-Base"), ("GPT-9", "Known: Qwen3")]
    )
    def test_an_unknown_name_lists_those_known(self, name, hint):
        with pytest.raises(ReportError, match=hint):
            published_contributions(name)
