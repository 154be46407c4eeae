"""What judges scores on small and planted suites: its arithmetic by hand, and what it measures."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerrl.errors import ProbeError
from layerrl.report import ContributionReport, Score
from layerrl.scores.gradient import TooLittleSignalError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def planted_scores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("planted_scores")
    suites = dict.fromkeys(("x", "y"), None)
    for name, value in {"TRUTHS": tmp_path, "SUITES": suites, "STORE": tmp_path / "rows"}.items():
        monkeypatch.setattr(module, name, value)
    return module


def truth(*by_layer: tuple[float, ...]) -> str:
    layers = tuple(Score(scores=tuple((score,) for score in seeds)) for seeds in by_layer)
    full = Score(scores=((0.5,),) * len(by_layer[0]))
    ends = {"base": Score(score=0.0), "full": full, "settings": {"base": "b"}}
    return ContributionReport(method="train", layers=layers, **ends).to_json()


def row(suite: str, method: str, seed: int, *scores: float, base: str = "b") -> dict[str, Any]:
    by_layer = {str(layer): score for layer, score in enumerate(scores)}
    return {"suite": suite, "method": method, "seed": seed, "base": base, "scores": by_layer}


def test_a_verdict_by_hand(planted_scores: Any) -> None:
    true = dict(enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 0.6)))
    found = planted_scores.verdict(true, 0.0, dict(enumerate((6, 0, 3, 4, 5, 2))))
    assert found.found == 0  # it puts layer 0 first
    assert found.regret == pytest.approx((0.6 - 0.1) / 0.6)
    assert found.avoided == 1 / 2  # of layers 0 and 1, layer 0 is among its first two
    # Ranks 0 to 5, and 5 0 2 3 4 1.
    assert found.spearman == pytest.approx(1 - 6 * (25 + 1 + 16) / (6 * 35))
    itself = planted_scores.verdict(true, 0.0, true)
    assert (itself.found, itself.regret, itself.avoided) == (1, 0, 1)
    tied = planted_scores.verdict({0: 0.1, 1: 0.5, 2: 0.5}, 0.0, {0: 1.0, 1: 3.0, 2: 2.0})
    assert (tied.found, tied.regret) == (1, 0)  # either of the two


def test_a_sweep_is_judged_by_its_other_seeds(planted_scores: Any) -> None:
    report = ContributionReport.from_json(truth((0.1, 0.4), (0.2, 0.1), (0.3, 0.2)))
    one, two = planted_scores.sweeps(report)
    # By seed 1, layer 2 gains 0.2 of 0.4; by seed 0, layer 0 gains 0.1 of 0.3.
    assert (one.regret, two.regret) == pytest.approx((0.5, 2 / 3))
    assert one.spearman == two.spearman == pytest.approx(-0.5)
    # Not on layers that have one seed.
    both = ContributionReport.from_json(truth((0.1, 0.4), (0.2, 0.1), (0.9,), (0.3, 0.2)))
    assert planted_scores.sweeps(both) == [one, two]


def test_suites_of_a_real_model_have_their_own_tables(
    planted_scores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted_scores, "REAL", ["y"])
    monkeypatch.setattr(
        planted_scores, "tables", lambda rows: "".join(row["suite"] for row in rows)
    )
    found = planted_scores.in_parts([{"suite": name} for name in "xyx"])
    assert found == {planted_scores.GAP: "xx", planted_scores.REAL_GAP: "y"}
    assert planted_scores.in_parts([{"suite": "x"}]) == {planted_scores.GAP: "x"}


def test_the_tables_by_hand(planted_scores: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(truth((0.1, 0.1), (0.2, 0.2), (0.4, 0.4)))
    (tmp_path / "y.json").write_text(truth((0.4, 0.4), (0.2, 0.2), (0.1, 0.1)))
    rows = [
        row("x", "gradient", 1, 1.0, 2.0, 3.0),
        row("x", "gradient", 0, 1.0, 3.0, 2.0),
        row("y", "gradient", 0, 3.0, 2.0, 1.0),
        row("y", "gradient", 1, 3.0, 2.0, 1.0),
        row("x", "bypass", 0, 1.0, 2.0, 3.0),
    ]
    parts = planted_scores.tables(rows).split("\n\n")
    claims, parts = parts[::2], parts[1::2]
    assert [claim.split("**")[1] for claim in claims] == [
        *("Regret", "Worst third avoided", "Rank correlation")
    ]
    columns = [cell.strip() for cell in parts[0].splitlines()[0].split("|")]

    def cells(part: int, column: str) -> list[str]:
        lines = parts[part].splitlines()[2:]
        place = columns.index(planted_scores.HEADS.get(column, column))
        return [line.split("|")[place].strip() for line in lines]

    assert cells(0, "suite")[:2] == ["`x`", "`y`"]
    assert cells(0, "best layer") == ["2 of 0 to 2", "0 of 0 to 2", "", ""]
    # Seed 0 loses half of x's best gain.
    assert cells(0, "gradient") == [
        "0.25 [0.00, 0.50]",
        "0.00 [0.00, 0.00]",
        "0.12 [0.00, 0.25]",
        "3 of 4",
    ]
    assert cells(0, "bypass") == ["0.00", "-", "-", "1 of 1"]  # no mean over other suites
    assert cells(0, "last") == ["0.00", "0.75", "0.38", "1 of 2"]
    assert cells(0, "random") == ["0.42", "0.42", "0.42", "0.667 of 2"]
    assert cells(1, "last") == ["1.00", "0.00", "0.50"]
    assert cells(1, "random") == ["0.67", "0.67", "0.67"]
    assert cells(2, "gradient") == ["0.75 [0.50, 1.00]", "1.00 [1.00, 1.00]", "0.88 [0.75, 1.00]"]
    assert cells(2, "another sweep") == ["1.00 [1.00, 1.00]"] * 3
    with pytest.raises(SystemExit, match="y was scored on the base other, its truth is of b"):
        planted_scores.tables([row("y", "bypass", 0, 1.0, 2.0, 3.0, base="other")])


def test_what_is_refused_counts_as_the_middle(
    planted_scores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(suite: Any, seed: int) -> None:
        raise ProbeError("too little")

    monkeypatch.setattr(planted_scores, "METHODS", {"gradient": refuses})
    monkeypatch.setattr(planted_scores, "SUITES", {"x": SimpleNamespace(model=lambda: None)})
    monkeypatch.setattr(planted_scores, "weights_digest", lambda model: "b")
    (tmp_path / "x.json").write_text(truth((0.1, 0.1), (0.2, 0.2), (0.4, 0.4)))
    assert planted_scores.measured("x", "gradient", 3) == {
        **row("x", "gradient", 3),
        "scores": {0: -0.5, 1: 0.0, 2: -0.5},
        "refused": "too little",
    }


def test_the_table_of_auto_by_hand(
    planted_scores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.json").write_text(truth((0.1, 0.1), (0.2, 0.2), (0.4, 0.4)))
    few = [
        row("x", "gradient", 0, 1.0, 3.0, 2.0),
        row("x", "gradient", 1, 1.0, 2.0, 3.0),
        row("x", "step", 0, 1.0, 2.0, 3.0),
    ]
    more = [row("x", method, 0, 3.0, 2.0, 1.0) for method in ("gradient", "step")]
    more.append(row("x", "gradient", 2, 1.0, 2.0, 3.0))  # a seed that the few prompts do not have
    monkeypatch.setattr(planted_scores, "all_rows", lambda: more)
    assert planted_scores.auto_table(few).splitlines() == [
        "| regret | gradient, as auto | gradient, more | step, as auto | step, more |",
        "|---|---|---|---|---|",
        "| `x` | 0.25 [0.00, 0.50] | 0.75 | 0.00 | 0.75 |",
        "| mean of the 1 suites | 0.25 [0.00, 0.50] | 0.75 | 0.00 | 0.75 |",
        "| best layer found | 1 of 2 | 0 of 1 | 1 of 1 | 0 of 1 |",
        "| worst third avoided | 1.00 | 0.00 | 1.00 | 0.00 |",
    ]


@pytest.mark.parametrize(("enough", "prompts"), [(64, 64), (100, 128), (1000, 0)])
def test_as_many_prompts_are_scored_as_auto_takes(
    planted_scores: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    enough: int,
    prompts: int,
) -> None:
    def scored(suite: Any, method: str, budget: int, seed: int) -> Any:
        if budget < enough:
            raise TooLittleSignalError(f"{budget} are too few")
        return SimpleNamespace(scores={0: 3.0, 1: 2.0, 2: 1.0})

    monkeypatch.setattr(planted_scores, "scored", scored)
    monkeypatch.setattr(planted_scores, "SUITES", {"x": SimpleNamespace(model=lambda: None)})
    monkeypatch.setattr(planted_scores, "weights_digest", lambda model: "b")
    (tmp_path / "x.json").write_text(truth((0.1, 0.1), (0.2, 0.2), (0.4, 0.4)))
    command = ["planted_scores.py", "--auto", "--seeds", "3"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(planted_scores, "AUTO_METHODS", ["step"])
    monkeypatch.setattr(planted_scores, "AUTO_STORE", tmp_path / "few")
    monkeypatch.setattr(planted_scores, "auto_table", str)
    planted_scores.main()
    [found] = map(json.loads, (tmp_path / "few").read_text().splitlines())
    assert (found["prompts"], found["seed"]) == (prompts, 3)
    tried = [n for n in (64, 128, 256) if n < enough]
    assert found["refused"] == [f"{n} are too few" for n in tried]
    best = max(found["scores"], key=found["scores"].__getitem__)
    assert best == ("0" if prompts else "1")
    assert not planted_scores.STORE.exists()


def test_only_suites_whose_truth_separates_layers_are_scored(
    planted_scores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(suite: str, method: str, seed: int) -> dict[str, Any]:
        asked.append((suite, method, seed))
        return row(suite, method, seed, 1.0, 2.0, 3.0)

    monkeypatch.setattr(planted_scores, "measured", measured)
    monkeypatch.setattr(planted_scores, "HELD_OUT", ["y"])
    monkeypatch.setattr(planted_scores, "SUITES", dict.fromkeys("xyzw"))  # z has no truth
    (tmp_path / "w.json").write_text(truth((0.1, 0.4), (0.2, 0.2), (0.4, 0.1)))
    for name in "xy":
        (tmp_path / f"{name}.json").write_text(truth((0.1, 0.1), (0.2, 0.2), (0.4, 0.4)))
    command = ["planted_scores.py", "--methods", "bypass", "spectrum", "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", command)
    for _ in range(2):
        planted_scores.main()
    assert asked == [("x", "bypass", 0), ("x", "bypass", 1), ("x", "spectrum", 0)]
    monkeypatch.setattr("sys.argv", [*command, "--held-out", "--methods", "bypass"])
    planted_scores.main()
    assert asked[3:] == [("y", "bypass", 0), ("y", "bypass", 1)]
    lines = planted_scores.STORE.read_text().splitlines()
    assert [json.loads(line)["suite"] for line in lines] == ["x"] * 3 + ["y"] * 2
