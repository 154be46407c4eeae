"""Arithmetic on scores, against hand-worked numbers, scipy-free definitions and known truth."""

import math

import pytest
import torch

from layerrl.statistics import (
    Interval,
    bootstrap,
    contribution,
    contribution_draws,
    interval_of,
    over_average,
    ranks,
    spearman,
)


class TestContribution:
    def test_is_the_share_of_the_full_gain(self):
        assert contribution(0.5, 0.2, 0.8) == pytest.approx(0.5)
        assert contribution(0.9, 0.2, 0.8) == pytest.approx(7 / 6)
        assert contribution(0.1, 0.2, 0.8) == pytest.approx(-1 / 6)

    def test_of_draws_is_infinite_where_nothing_was_gained_but_by_the_layer(self):
        base_D = torch.tensor([0.2, 0.2, 0.2, 0.2])
        draws_D = contribution_draws(
            torch.tensor([0.5, 0.5, 0.1, 0.2]), base_D, torch.tensor([0.8, 0.2, 0.1, 0.2])
        )
        # A layer that scores as the base has no share, also of no gain.
        assert draws_D.tolist() == pytest.approx([0.5, math.inf, -math.inf, 0.0])

    def test_draws_that_are_unknown_widen_an_interval_and_leave_it_one(self):
        known_D = torch.linspace(0, 1, 4000)
        some_D = torch.cat([known_D, torch.full((20,), math.nan)])
        low, high = interval_of(some_D).low, interval_of(some_D).high
        assert 0.01 < low < 0.025 < 0.975 < high < 0.99
        for far in (math.nan, math.inf, -math.inf):
            many = interval_of(torch.cat([known_D, torch.full((400,), far)]))
            assert math.isinf(many.low) == (far != math.inf)
            assert math.isinf(many.high) == (far != -math.inf)


class TestRanks:
    def test_by_hand(self):
        assert ranks([10.0, 30.0, 20.0]).tolist() == [0, 2, 1]
        assert ranks([5.0, 1.0, 5.0, 9.0]).tolist() == [1.5, 0, 1.5, 3]

    def test_spearman_by_hand(self):
        # One swap of neighbours among four: 1 - 6 * 2 / (4 * 15).
        assert spearman([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]).item() == pytest.approx(0.8)
        assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]).item() == pytest.approx(-1)

    def test_without_an_order_there_is_no_correlation(self):
        assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).isnan()


class TestBootstrap:
    def test_is_paired(self):
        draws = bootstrap({"a": [[0.0, 1.0, 1.0, 0.0]], "b": [[1.0, 2.0, 2.0, 1.0]]})
        assert (draws["b"] - draws["a"]).tolist() == pytest.approx([1.0] * len(draws["a"]))
        assert draws["a"].std() > 0.1

    def test_is_the_same_every_time_and_another_with_another_seed(self):
        runs = {"a": [[0.0, 1.0, 1.0]]}
        assert torch.equal(bootstrap(runs)["a"], bootstrap(runs)["a"])
        assert not torch.equal(bootstrap(runs)["a"], bootstrap(runs, seed=1)["a"])

    def test_seeds_that_differ_widen_it_as_students_t_says(self):
        prompts = 400
        one = bootstrap({"a": [[0.5] * prompts]})["a"]
        two = bootstrap({"a": [[0.4] * prompts, [0.6] * prompts]}, num_draws=40_000)["a"]
        assert one.std() == pytest.approx(0, abs=1e-9)
        # Standard error of a mean of two that differ by 0.2: 0.1. The 0.9 quantile of t(1): 3.078.
        assert two.quantile(0.9).item() - 0.5 == pytest.approx(0.1 * 3.078, rel=0.05)

    def test_seeds_variance_is_pooled_over_runs(self):
        rows = {str(run): [[0.5 - gap] * 9, [0.5 + gap] * 9] for run, gap in enumerate([0.1] * 12)}
        draws = bootstrap({**rows, "one": [[0.5] * 9], "base": [[0.5] * 9]}, seedless=("base",))
        # Deviation of one seed 0.1414 with 12 degrees of freedom: the 0.975 quantile is 2.179.
        assert interval_of(draws["0"]).high == pytest.approx(0.5 + 0.1 * 2.179, rel=0.05)
        assert interval_of(draws["one"]).high == pytest.approx(0.5 + 0.1414 * 2.179, rel=0.05)
        assert draws["base"].std() < draws["one"].std() / 5

    def test_seeds_of_different_scores_have_nothing_in_common(self):
        here = bootstrap({"a": [[0.4] * 9, [0.6] * 9]})["a"]
        there = bootstrap({"a": [[0.5] * 9, [0.7] * 9]})["a"]
        assert 0 in interval_of(there - here)

    @pytest.mark.parametrize(("num_seeds", "num_runs"), [(2, 1), (3, 1), (2, 8)])
    def test_intervals_cover_the_truth_where_seeds_vary(self, num_seeds, num_runs):
        generator, covered, differ, trials = torch.Generator().manual_seed(0), 0, 0, 1000
        for trial in range(trials):
            level_RS1 = 0.1 * torch.randn(num_runs + 1, num_seeds, 1, generator=generator)
            noise_RSP = 0.2 * torch.randn(num_runs + 1, num_seeds, 50, generator=generator)
            scores = (0.5 + level_RS1 + noise_RSP).double().tolist()
            runs = {str(run): rows for run, rows in enumerate(scores[:num_runs])}
            draws = bootstrap(runs, num_draws=500, seed=trial)
            covered += 0.5 in interval_of(draws["0"])
            if num_runs > 1:
                differ += 0 not in interval_of(draws["0"] - draws["1"])
        assert 930 <= covered <= 985, covered
        assert differ <= 70, differ

    def test_what_prompts_vary_is_not_added_once_more_as_seeds(self):
        """Noise of single answers alone: a mean of three seeds and 50 prompts has 150 of them."""
        noise = torch.randn(12, 3, 50, generator=torch.Generator().manual_seed(0)).double()
        draws = bootstrap({str(run): rows for run, rows in enumerate(noise.tolist())})
        deviations = torch.stack([draws_D.std() for draws_D in draws.values()])
        assert deviations.mean().item() == pytest.approx(150**-0.5, rel=0.15)

    def test_few_graded_prompts_are_as_unsure_as_students_t_says(self):
        interval = interval_of(bootstrap({"a": [[-2.0, -1.0, 0.0, 1.0, 2.0]]})["a"])
        # Standard deviation 1.58, the 0.975 quantile of t(4) 2.776.
        assert interval.high == pytest.approx(1.58 / 5**0.5 * 2.776, rel=0.15)

    def test_shares_have_jeffreys_interval(self):
        draws = bootstrap({"a": [[1.0] * 9 + [0.0] * 69]}, num_draws=40_000)["a"]
        # The quantiles of Beta(9.5, 69.5).
        assert interval_of(draws).low == pytest.approx(0.0587, abs=0.002)
        assert interval_of(draws).high == pytest.approx(0.2002, abs=0.003)

    @pytest.mark.parametrize("other", [[0.0, 1.0] * 20, [0.0, 0.125, 0.75, 1.0] * 10])
    def test_prompts_that_are_all_alike_leave_doubt(self, other):
        draws = bootstrap({"none": [[0.0] * 40], "other": [other]})
        interval = interval_of(draws["none"], 0.0)
        assert 0.04 < interval.high < 0.08  # three in forty, the rule says
        assert interval.low == 0

    def test_units_of_the_average_are_resampled_with_it(self):
        hard_P = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
        draws = over_average(bootstrap({str(k): [(k * hard_P).tolist()] for k in (1, 2, 3)}))
        assert interval_of(draws["1"]).low == pytest.approx(0.5)
        assert interval_of(draws["3"]).high == pytest.approx(1.5)

    @pytest.mark.parametrize("scores", [[[]], [[1.0], [1.0, 2.0]]])
    def test_scores_of_other_prompts_are_refused(self, scores):
        with pytest.raises(ValueError, match="prompts, expected one number"):
            bootstrap({"a": scores})

    def test_intervals_cover_the_truth_as_often_as_they_say(self):
        """Known truth: each prompt is right with its own probability; 1000 evaluations of it."""
        generator = torch.Generator().manual_seed(0)
        num_prompts, covered = 100, {"score": 0, "contribution": 0}
        for trial in range(1000):
            hard_P = torch.rand(num_prompts, generator=generator)
            right = {
                name: (
                    torch.rand(num_prompts, generator=generator) < hard_P ** (1 / skill)
                ).double()
                for name, skill in (("base", 0.25), ("layer", 1.5), ("full", 2.0))
            }
            draws = bootstrap(
                {name: [of.tolist()] for name, of in right.items()}, num_draws=500, seed=trial
            )
            # The mean of u ** (1 / s) over u uniform on [0, 1] is s / (s + 1).
            truth = {"base": 0.2, "layer": 0.6, "full": 2 / 3}
            covered["score"] += truth["layer"] in interval_of(draws["layer"])
            share = (draws["layer"] - draws["base"]) / (draws["full"] - draws["base"])
            covered["contribution"] += (0.4 / (2 / 3 - 0.2)) in interval_of(share)
        assert all(930 <= times <= 970 for times in covered.values()), covered


def test_interval_says_what_is_in_it():
    interval = Interval(0.1, 0.25)
    assert 0.1 in interval
    assert 0.26 not in interval
    assert f"{interval:.2f}" == "[0.10, 0.25]"
