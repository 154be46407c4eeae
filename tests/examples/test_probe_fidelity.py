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
from layerrl.seams import installed
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


def test_a_quarter_of_another_seed_is_judged_by_the_others_ends(load: Any) -> None:
    of_seeds = load("fidelity").of_seeds
    ends, early = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    rows = [
        Score(scores=((end,), (end,)), curve=((2, ((first,), (first,))),))
        for end, first in zip(ends, early, strict=True)
    ]
    truth = report(layers=(*rows, Score(scores=((9.0,),))))  # one seed says nothing of seeds
    assert of_seeds(truth).spearman == pytest.approx(1)
    assert of_seeds(truth).regret == 0
    assert of_seeds(truth, early=True).spearman == pytest.approx(-1)
    assert of_seeds(truth, early=True).regret == pytest.approx((0.3 - 0.1) / 0.5)
    assert of_seeds(report(layers=tuple(rows[:2]))) is None


def test_beyond_depth_is_what_a_parabola_leaves(load: Any) -> None:
    module, depth = load("fidelity"), torch.arange(6, dtype=torch.double)
    left = module.without_trend(depth**2 - 3 * depth + 1, range(6))
    assert left.tolist() == [0.0] * 6
    bump = torch.tensor([0.0, 1.0, 0.0, 0.0, -1.0, 0.0], dtype=torch.double)
    trends = (depth**2 + bump, -(depth**2) + bump)
    found = module.fidelity(*(report(*trend.tolist()) for trend in trends))
    assert found.spearman < 0
    assert found.beyond_depth == pytest.approx(1)
    assert torch.tensor(module.fidelity(report(*trends[0]), report(*range(6))).beyond_depth).isnan()


def test_a_truth_of_another_base_is_refused(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    module = load("probe_fidelity")
    monkeypatch.setattr(module, "TRUTHS", tmp_path)
    monkeypatch.setattr(module, "SUITES", {"x": SimpleNamespace(model=lambda: tiny("llama", 4))})
    truth = report(0.1, 0.2, settings={"base": "of yesterday"})
    (tmp_path / "x.json").write_text(truth.to_json())
    monkeypatch.setattr("sys.argv", ["probe_fidelity.py", "--suites", "x"])
    with pytest.raises(SystemExit, match="measured on the base of yesterday, and the one here is"):
        module.main()


@pytest.mark.skipif(
    installed("transformers") < (5, 23), reason="older transformers draw other weights"
)
def test_bases_that_are_kept_are_those_of_their_truths(load: Any) -> None:
    module = load("planted_scores")
    names = {path.stem for path in module.TRUTHS.glob("*.json")} & {*module.SUITES}
    assert len(names) > 10
    for name in names:
        found = module.weights_digest(module.SUITES[name].model())
        assert found == module.truth_of(name).settings["base"], name


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
    some = module.Overall(0.5, 0.1)
    overall = {"gradient": some, "random": replace(some, share=0.0), "?": replace(some, share=None)}
    module.picture(overall, tmp_path / "probes.png")
    assert (tmp_path / "probes.png").stat().st_size > 10_000
