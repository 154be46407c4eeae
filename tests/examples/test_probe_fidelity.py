"""What judges probes: its arithmetic by hand, and every probe and baseline on a tiny model."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from layerrl.report import ContributionReport, Score
from tests.grpo import PROMPTS, config, tokenizer
from tests.models import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def report(*scores: float, **changes: Any) -> ContributionReport:
    layers = tuple(Score(scores=((score, score),)) for score in scores)
    ends = {"layers": layers, "base": Score(score=0.0), "full": Score(score=0.5)}
    return ContributionReport(method="train", **{**ends, **changes})


def test_kendall_by_hand(load: Any) -> None:
    kendall = load("fidelity").kendall
    # Of six pairs one is turned: (5 - 1) / 6.
    found = kendall(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0]))
    assert found.item() == pytest.approx(4 / 6)
    assert kendall(torch.ones(3), torch.arange(3.0)).isnan()


def test_fidelity_by_hand(load: Any) -> None:
    truth = report(0.1, 0.5, 0.4, 0.3, 0.2, 0.0)
    probe = report(0.0, 0.4, 0.5, 0.3, 0.1, 0.2)
    found = load("fidelity").fidelity(truth, probe)
    assert found.regret == pytest.approx((0.5 - 0.4) / 0.5)
    assert found.top3 == 1
    assert found.avoided == 1
    # Ranks 1 5 4 3 2 0 and 0 4 5 3 1 2.
    assert found.spearman == pytest.approx(1 - 6 * (1 + 1 + 1 + 0 + 1 + 4) / (6 * 35))
    worst = load("fidelity").fidelity(truth, report(*(-s for s in truth.scores.values())))
    assert worst.spearman == pytest.approx(-1)
    assert worst.avoided == 0
    assert worst.top3 == 0


def test_the_ceiling_is_the_agreement_of_seeds(load: Any) -> None:
    ceiling = load("fidelity").ceiling
    same = report(layers=tuple(Score(scores=((s,), (s + 0.01,))) for s in (0.1, 0.2, 0.3)))
    turned = report(layers=tuple(Score(scores=((s,), (1 - s,))) for s in (0.1, 0.2, 0.3)))
    assert ceiling(same) == pytest.approx(1)
    assert ceiling(turned) == pytest.approx(-1)


def test_the_median_of_two_suites_lies_between_them(load: Any) -> None:
    found = load("probe_fidelity").median_draws([torch.tensor([0.0, 0.4]), torch.tensor([1.0])])
    assert found.tolist() == pytest.approx([0.5, 0.7])


def test_the_mean_along_a_run(load: Any) -> None:
    entry = Score(scores=((1.0, 0.0),), curve=((2, ((0.0, 0.0),)), (4, ((0.5, 0.0),))))
    [found] = load("probe_fidelity").along(report(layers=(entry,))).layers
    assert found.scores == ((0.5, 0.0),)


def test_every_probe_scores_every_layer(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    module = load("probe_fidelity")
    monkeypatch.setattr(module, "NUM_PROMPTS", 64)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(letter < "P" for letter in text)) for text in completions]

    suite = SimpleNamespace(
        model=lambda: tiny("llama", 4),
        tokenizer=tokenizer(),
        data=(Dataset.from_dict({"prompt": PROMPTS * 32}), None),
        reward=reward,
        args=lambda full=False: config(tmp_path, max_steps=2, seed=0),
        layers="all",
        rollout_prompts=64,
    )
    for name, probe in module.PROBES.items():
        found = probe(suite)
        assert set(found.scores) == {0, 1, 2, 3}, name
        assert len({*found.scores.values()}) > 1, name
    changed = module.PROBES["weight change"](suite)
    assert all(score > 0 for score in changed.scores.values())
    same = replace(changed, base=Score(score=0.0), full=Score(score=1.0))
    assert load("fidelity").fidelity(same, changed).spearman == 1


def test_a_picture_of_what_costs_and_what_does_not(load: Any, tmp_path: Path) -> None:
    module = load("probe_fidelity")
    some = module.Overall(0.5, module.interval(torch.tensor([0.2, 0.8])), 0.1)
    overall = {"gradient": some, "by lot": replace(some, share=0.0), "?": replace(some, share=None)}
    module.picture(overall, tmp_path / "probes.png")
    assert (tmp_path / "probes.png").stat().st_size > 10_000
