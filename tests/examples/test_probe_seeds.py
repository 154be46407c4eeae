"""The gradient probe by seed: the benchmark's arithmetic, and what the docs say of its figures."""

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from layerrl.report import ContributionReport, Score

ROOT = Path(__file__).parents[2]


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("probe_seeds")


def truth(**changes: Any) -> ContributionReport:
    layers = tuple(Score(scores=((s, s), (s + 0.01, s + 0.01))) for s in (0.1, 0.2, 0.3, 0.4))
    ends = {"layers": layers, "base": Score(score=0.0), "full": Score(score=0.5)}
    return ContributionReport(method="train", **{**ends, "settings": {"base": "b"}, **changes})


def row(seed: int, *scores: float, base: str = "b") -> dict[str, Any]:
    by_layer = {str(layer): score for layer, score in enumerate(scores)}
    return {"suite": "x", "seed": seed, "base": base, "scores": by_layer}


def test_a_probe_is_compared_with_the_truth_of_its_base(seeds: Any) -> None:
    # Ranks 0 1 2 3 and 0 2 1 3; the probe chooses layer 3, which is the best.
    found = seeds.fidelity_of(row(0, 0.0, 0.7, 0.5, 0.9), truth())
    assert found.spearman == pytest.approx(1 - 6 * (1 + 1) / (4 * 15))
    assert found.regret == 0
    # Layers that were not scored count for nothing.
    assert seeds.fidelity_of(row(0, 0.0, 0.7, 0.9), truth()).spearman == pytest.approx(1)
    with pytest.raises(SystemExit, match="probed on the base other, its truth on b"):
        seeds.fidelity_of(row(0, 0.0, 0.7, 0.5, 0.9, base="other"), truth())


def test_the_table_by_hand(seeds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "TRUTHS", tmp_path)
    monkeypatch.setattr(seeds, "SUITES", {"x": None, "y": None})
    for name in "xy":
        (tmp_path / f"{name}.json").write_text(truth().to_json())
    rows = [row(0, 1.0, 2.0, 3.0, 4.0), row(1, 4.0, 3.0, 2.0, 1.0), row(2, 1.0, 3.0, 2.0, 4.0)]
    rows.append(row(0, 1.0, 3.0, 2.0, 4.0) | {"suite": "y"})
    assert seeds.table(rows, ["x", "y"], [0, 1, 2]).splitlines() == [
        "| rank correlation with C on | probe seed 0 | probe seed 1 | probe seed 2 "
        "| median [range] | no probe: depth fitted on other suites | another seed of the sweep |",
        "|---|---|---|---|---|---|---|",
        # The last layer is the best one of the other suite, too, and another seed agrees.
        "| `x` | 1.00 | -1.00 | 0.80 | 0.80 [-1.00, 1.00] | 1.00 | 1.00 |",
        "| `y` | 0.80 | - | - | 0.80 [0.80, 0.80] | 1.00 | 1.00 |",
        # Of x alone, which has all seeds.
        "| median of the 1 suites with all seeds | 1.00 | -1.00 | 0.80 | 0.80 [-1.00, 1.00] "
        "| 1.00 | 1.00 |",
        # Seed 1 chooses layer 0: of a gain of 0.5 it loses 0.3.
        "| mean regret, on these suites | 0.00 | 0.60 | 0.00 | 0.00 [0.00, 0.60] | 0.00 | - |",
        "| best three found, on these suites | 1.00 | 0.67 | 1.00 | 1.00 [0.67, 1.00] | 1.00 | - |",
        "| worst third avoided, on these suites | 1.00 | 0.00 | 1.00 | 1.00 [0.00, 1.00] "
        "| 1.00 | - |",
    ]


def test_the_seed_is_the_probes(seeds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("probe_fidelity")
    monkeypatch.setattr(module, "contribution_probe", lambda model, **given: given)
    suite = module.SUITES["addition-llama"]
    assert module.scored(suite, "gradient", 8, 3)["seeds"] == [3]
    assert module.scored(suite, "gradient", 8)["seeds"] == [0]


def test_only_what_is_missing_is_measured(
    seeds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, page, asked = tmp_path / "seeds.jsonl", tmp_path / "results.md", []
    lines = [json.dumps(row(0, 1.0) | {"suite": name}) for name in ("sorting-llama", "x")]
    store.write_text(f"{lines[0]}\n{lines[1][:20]}")  # the last write was cut off
    page.write_text(f"before\n\n{seeds.GAP[0]}\n\nold\n\n{seeds.GAP[1]}\n\nafter\n")

    def measured(suite: str, seed: int) -> dict[str, Any]:
        asked.append((suite, seed))
        return row(seed, 1.0) | {"suite": suite}

    monkeypatch.setattr(seeds, "STORE", store)
    monkeypatch.setattr(seeds, "measured", measured)
    monkeypatch.setattr(seeds, "table", lambda rows, suites, chosen: f"{len(rows)} rows")
    command = ["probe_seeds.py", "--suites", "sorting-llama", "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--docs", str(tmp_path)])
    for _ in range(2):
        seeds.main()
    monkeypatch.setattr("sys.argv", [*command, "2", "--stored"])
    seeds.main()
    assert asked == [("sorting-llama", 1)]
    assert [json.loads(line)["seed"] for line in store.read_text().splitlines()] == [0, 1]
    assert capsys.readouterr().out == "2 rows\n" * 3
    assert page.read_text() == (f"before\n\n{seeds.GAP[0]}\n\n2 rows\n\n{seeds.GAP[1]}\n\nafter\n")


def test_the_docs_say_what_was_measured(seeds: Any) -> None:
    text = seeds.table(seeds.stored(), sorted(seeds.SUITES), seeds.SEEDS)
    page = (ROOT / "docs" / "results.md").read_text()
    before, after = (page.index(mark) for mark in seeds.GAP)
    assert page[before + len(seeds.GAP[0]) : after].strip() == text, (
        "run benchmarks/probe_seeds.py --stored --docs docs, and correct the texts"
    )
    planted = importlib.import_module("planted_scores")
    rows = planted.all_rows()
    tables = planted.in_parts(rows)
    assert tables.keys() == {planted.GAP, planted.REAL_GAP}
    for gap, text in tables.items():
        before, after = (page.index(mark) for mark in gap)
        assert page[before + len(gap[0]) : after].strip() == text, (
            "run benchmarks/planted_scores.py --stored --docs docs, and correct the texts"
        )
    found: Counter[str] = Counter()
    probes: Counter[str] = Counter()
    for row in (row for row in rows if row["suite"] not in planted.REAL):
        true, scores = planted.truth_of(row["suite"]).scores, row["scores"]
        chosen = int(max(map(str, true), key=scores.__getitem__))
        found[row["method"]] += chosen == max(true, key=true.__getitem__)
        probes[row["method"]] += 1
    docs, docstring = ROOT / "docs", ROOT / "layerrl" / "probe.py"
    names = ("guide.md", "choosing.md", "results.md")
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", docstring, *(docs / n for n in names)):
        said = " ".join(path.read_text().split())
        for method in ("gradient", "step"):
            share = f"{found[method]} of {probes[method]}"
            assert share in said, f"{path} does not say that {method} finds {share}"
