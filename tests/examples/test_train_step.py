"""The benchmark measures each kind of trainer on a tiny model, and its ratios are right."""

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from layerrl import select_layers
from tests.grpo import tokenizer
from tests.models import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_step")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", 4).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def measured(train_step: Any, model: Path, method: str) -> dict[str, Any]:
    case = {"method": method, "depth": 0.5, "beta": 0.04, "num_iterations": 2, "cycles": 1}
    case |= {"rows": 4, "length": 3, "generate": True, "device": "cpu", "model": str(model)}
    return json.loads(json.dumps(train_step.measure(case)))


def test_worker_measures_masked_and_by_hand(train_step: Any, model_folder: Path) -> None:
    masked = measured(train_step, model_folder, "masked")
    by_hand = measured(train_step, model_folder, "by-hand")
    model = tiny("llama", 4)
    layer = sum(p.nbytes for p in model.model.layers[2].parameters())
    whole = sum(p.nbytes for p in model.parameters())
    for found in (masked, by_hand):
        assert found["seconds"] > 0
        assert found["step_seconds"] > 0
        assert found["peak_bytes"] > 0
        assert found["held_bytes"] > 0
        assert found["trained_bytes"] == layer
        assert found["model_step"] == masked["model_step"] < 1
    assert masked["synced_bytes"] == layer
    assert by_hand["synced_bytes"] == whole
    assert masked["checkpoint_bytes"] > 4 * layer  # weights, reference, two moments


@pytest.mark.parametrize("method", ["full", "masked-full", "lora", "lora-all", "modules-to-save"])
def test_worker_trains_what_the_method_says(
    train_step: Any, model_folder: Path, method: str
) -> None:
    found = measured(train_step, model_folder, method)
    model = tiny("llama", 4)
    layer = sum(p.nbytes for p in model.model.layers[2].parameters())
    whole = sum(p.nbytes for p in model.parameters())
    if method.startswith("lora"):
        selection = select_layers(model, "all" if method == "lora-all" else 2)
        assert found["trained_bytes"] == selection.plan(model).lora.gradients
    else:
        assert found["trained_bytes"] == (layer if method == "modules-to-save" else whole)
    assert found["synced_bytes"] == whole
    assert (found["model_step"] == 1) == (method in train_step.WHOLE_MODEL)


def entry(method: str, turn: int, seconds: float, peak: int, depth: float | None) -> dict[str, Any]:
    return {
        "method": method,
        "depth": depth,
        "beta": 0.04,
        "num_iterations": 1,
        "round": turn,
        "seconds": seconds,
        "step_seconds": None,
        "peak_bytes": peak,
        "held_bytes": peak // 2,
        "loading_peak_bytes": peak // 2,
        "model_step": 1.0 if depth is None else 0.5,
        "checkpoint_bytes": 10,
        "synced_bytes": 10,
        "trained_bytes": 10,
        "hardware": "2 CPU threads",
        "process_seconds": 60.0,
        "versions": "trl 1",
    }


ENTRIES = [
    entry("full", 0, 10.0, 400, None),
    entry("full", 1, 20.0, 400, None),
    entry("masked", 0, 5.0, 100, 0.5),
    entry("masked", 1, 12.0, 100, 0.5),
    entry("masked", 0, 3.0, 100, 0.75),
    entry("lora", 0, 6.0, 50, 0.5),
]


def test_ratios_are_of_the_same_round_and_setting(train_step: Any) -> None:
    rows = {(row["method"], row["depth"]): row for row in train_step.tabulate(ENTRIES)}
    assert set(rows) == {
        ("full", 0.5), ("masked", 0.5), ("lora", 0.5), ("full", 0.75), ("masked", 0.75)
    }  # fmt: skip
    row = rows["masked", 0.5]
    assert row["seconds"] == {"median": 8.5, "lowest": 5.0, "highest": 12.0}
    assert row["seconds_to_full"] == pytest.approx({"median": 0.55, "lowest": 0.5, "highest": 0.6})
    assert row["seconds_to_model"] == pytest.approx({"median": 1.1, "lowest": 1.0, "highest": 1.2})
    assert row["seconds_to_layerrl"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}
    assert row["peak_to_full"]["median"] == 0.25
    assert row["peak_to_lora"] == {"median": 2.0, "lowest": 2.0, "highest": 2.0}
    assert row["step_seconds"] is None
    assert rows["lora", 0.5]["seconds_to_layerrl"]["median"] == 1.2
    assert rows["full", 0.5]["seconds_to_model"]["median"] == 1.0
    assert rows["full", 0.75]["seconds_to_layerrl"] == pytest.approx(
        {"median": 10 / 3, "lowest": 10 / 3, "highest": 10 / 3}
    )
    assert rows["masked", 0.75]["peak_to_lora"] is None


def test_the_report_fills_its_gap_in_the_page_and_nothing_else(
    train_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "appendix.md"
    start, end = train_step.GAP
    page.write_text(f"before\n\n{start}\n\nold\n\n{end}\n\nafter\n")
    monkeypatch.setattr(train_step, "run_missing", lambda cases, journal: ENTRIES)
    command = ["--model", "some/where", "--output", str(tmp_path / "out"), "--docs", str(tmp_path)]
    for _ in range(2):
        train_step.main(command)
    text = page.read_text()
    assert text.startswith(f"before\n\n{start}\n")
    assert text.endswith(f"{end}\n\nafter\n")
    assert "old" not in text
    assert text.count("| layerrl |") == 4
    assert "0.55 [0.50, 0.60]" in text
    assert "6 minutes" in text
    assert (tmp_path / "train_step.png").stat().st_size > 0
    assert json.loads((tmp_path / "train_step.json").read_text()) == train_step.tabulate(ENTRIES)


def test_every_round_holds_every_case_in_an_order_of_its_own(train_step: Any) -> None:
    arguments = ["--depth", "0.25", "0.5", "--rounds", "4", "--num-iterations", "1"]
    options = train_step.parse(["--model", "some/where", *arguments])
    listed = list(train_step.cases(options))
    assert listed == list(train_step.cases(options))
    rounds = [[(c["method"], c["depth"]) for c in listed if c["round"] == r] for r in range(4)]
    assert all(sorted(r, key=str) == sorted(rounds[0], key=str) for r in rounds)
    assert len(rounds[0]) == 3 + (len(train_step.BENCH) - 3) * 2
    assert len({tuple(r) for r in rounds}) == 4


def test_a_journal_is_continued_until_something_else_is_measured(
    train_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, 0, 'what TRL prints\n{"seconds": 1.0}\n', "")

    monkeypatch.setattr(train_step.subprocess, "run", run)
    journal = tmp_path / "journal"
    journal.touch()
    wanted = [{"method": method, "depth": None, "versions": "1"} for method in ("full", "masked")]
    train_step.run_missing(wanted[:1], journal)
    entries = train_step.run_missing(wanted, journal)
    assert started == wanted
    assert [(entry["method"], entry["seconds"]) for entry in entries] == [
        ("full", 1.0),
        ("masked", 1.0),
    ]
    train_step.run_missing([wanted[0] | {"versions": "2"}], journal)
    assert len(started) == len(journal.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--methods", "magic"], "invalid choice: 'magic'"),
        (["--depth", "1"], "--depth is [1.0], expected 0 (the lowest layer) to below 1"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--num-iterations", "1", "0"], "--num-iterations is [1, 0], expected at least 1"),
        (["--beta", "-1"], "--beta is [-1.0], expected numbers from 0 up"),
        (["--rows", "5"], "--rows is 5, expected an even number from 4 up"),
        (["--device", "cuda"], "--device is cuda, but torch finds no GPU on this machine"),
        (["--output", f"{__file__}/out"], "cannot use"),
        (["--docs", "nowhere"], "cannot use nowhere/appendix.md: No such file or directory"),
        (["--docs", str(BENCHMARKS)], "cannot use"),
    ],
)
def test_bad_input_is_one_sentence(
    train_step: Any,
    options: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        train_step.parse(["--output", str(tmp_path), *options])
    assert sentence in capsys.readouterr().err.splitlines()[-1]
