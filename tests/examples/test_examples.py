"""Every example runs as a user would type it, for two steps, on a tiny model given by path."""

import json
from pathlib import Path

import pytest

from tests.grpo import tokenizer
from tests.models import tiny
from tests.processes import run

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN_HERE = [
    AGENT := EXAMPLES / "agent_gigpo.py",
    COMPARE := EXAMPLES / "compare_in_memory.py",
    NEW_TOKENS := EXAMPLES / "new_tokens.py",
    PROBE := EXAMPLES / "probe_then_train.py",
    QUANTISED := EXAMPLES / "quantised_base.py",
    QUICKSTART := EXAMPLES / "quickstart.py",
    STRATEGIES := EXAMPLES / "strategies.py",
    SWEEP := EXAMPLES / "sweep_layers.py",
    VOTE := EXAMPLES / "vote_over_layers.py",
]
"""A new example gets a line here, and a test below that runs it."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems whose answer a model of random weights hits at times."""
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    lines = [
        {"prompt": f"{digit}{letter}", "answer": digit} for digit in range(10) for letter in "abcd"
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_every_example_is_run_here() -> None:
    found = {file for file in EXAMPLES.glob("*.py") if "__main__" in file.read_text()}
    assert found == {*RUN_HERE}, "put it into RUN_HERE, and run it in a test"


def test_quickstart_runs_twice_in_the_same_folder(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for layers in ("1", "middle:2"):
        ended = run(
            QUICKSTART, "--model", model_folder, "--layers", layers, "--steps", 2, "--output", out
        )
        assert ended.returncode == 0, ended.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["merged_accuracy"] == summary["trained_accuracy"]
    assert len(summary["rewards"]) == 2
    left = {file.name for file in out.iterdir()}
    assert left == {"delta", "merged", "reward.png", "summary.json", "trainer"}


@pytest.mark.slow
def test_a_sweep_and_the_strategies_that_follow_from_it(
    model_folder: Path, problems: Path, tmp_path: Path
) -> None:
    shared = ["--model", model_folder, "--data", problems, "--steps", 2]
    sweep = tmp_path / "sweep"
    ended = run(SWEEP, *shared, "--output", sweep)
    assert ended.returncode == 0, ended.stderr
    assert {"journal.jsonl", "report.json", "contributions.png"} <= {
        f.name for f in sweep.iterdir()
    }
    figures = run(EXAMPLES.parent / "benchmarks" / "sweep_figures.py", sweep)
    assert figures.returncode == 0, figures.stderr
    assert "Overhead over training and evaluation, by the steps" in figures.stdout
    assert "Mean score by third of the depth" in figures.stdout
    assert "step   1: " in figures.stdout
    assert "of the steps. Best of all [" in figures.stdout
    for _ in range(2):
        options = ["--report", sweep / "report.json", "--k", 1, "--output", tmp_path / "out"]
        ended = run(STRATEGIES, *shared, *options)
        assert ended.returncode == 0, ended.stderr
        names = [line[:10].strip() for line in ended.stdout.splitlines()[2:]]
        assert names == ["base", "full", "only 1", "boost 1", "middle 1", "worst 1"]
    assert "only 1:" not in ended.stderr  # nothing is trained again


def test_a_probe_and_the_layers_that_it_ranks(
    model_folder: Path, problems: Path, tmp_path: Path
) -> None:
    shared = ["--model", model_folder, "--data", problems, "--steps", 2, "--budget", 32]
    out = tmp_path / "out"
    for _ in range(2):
        ended = run(PROBE, *shared, "--output", out)
        assert ended.returncode == 0, ended.stderr
        assert "method 'gradient'" in ended.stdout
        names = [line[:6].strip() for line in ended.stdout.splitlines()[-4:]]
        assert names == ["base", "best", "middle", "worst"]
    assert "best (" not in ended.stderr  # nothing is trained again
    assert {"report.json", "scores.json", "settings.json"} <= {f.name for f in out.iterdir()}


def test_base_and_trained_are_compared_in_one_model(
    model_folder: Path, problems: Path, tmp_path: Path
) -> None:
    shared = ["--model", model_folder, "--data", problems, "--steps", 2, "--layers", 1]
    out = tmp_path / "out"
    delta = out / "delta"
    for given in ([], [delta]):
        ended = run(COMPARE, *given, *shared, "--output", out)
        assert ended.returncode == 0, ended.stderr
        names = [line.split()[0] for line in ended.stdout.splitlines()[-2:]]
        assert names == ["base", str(delta)]
    assert "training:" not in ended.stderr  # nothing is trained again


def test_layers_vote(model_folder: Path, problems: Path, tmp_path: Path) -> None:
    shared = ["--model", model_folder, "--data", problems, "--steps", 1, "--layers", "0,2"]
    ended = run(VOTE, *shared, "--output", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert "2 layers vote" in ended.stdout
    assert {f.name for f in (tmp_path / "out").glob("layer-*")} == {
        "layer-0",
        "layer-2",
        "layer-full",
    }


def test_a_layer_of_a_base_in_4_bits(model_folder: Path, problems: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    shared = ["--model", model_folder, "--data", problems, "--steps", 2, "--layers", 1]
    out = tmp_path / "out"
    for _ in range(2):
        ended = run(QUANTISED, *shared, "--output", out)
        assert ended.returncode == 0, ended.stderr
        names = [line[:13].strip() for line in ended.stdout.splitlines()[3:7]]
        assert names == ["base", "4-bit base", "4-bit trained", "merged"]
    assert {f.name for f in out.iterdir()} == {"delta", "merged", "summary.json", "trainer"}
    sizes = json.loads((out / "summary.json").read_text())["frozen_bytes"]
    (measured, in_bf16), planned = sizes["all"], sizes["all, planned"]
    assert planned == [pytest.approx(measured, rel=0.1), in_bf16]


def test_two_new_tokens_are_taught(tmp_path: Path) -> None:
    few = ["--steps", 1, "--seeds", 0, "--base-steps", 1, "--output", tmp_path / "out"]
    for _ in range(2):
        ended = run(NEW_TOKENS, *few)
        assert ended.returncode == 0, ended.stderr
        names = [line[:15].strip() for line in ended.stdout.splitlines()[-3:]]
        assert names == ["base", "layer", "layer and rows"]
    assert "seed 0:" not in ended.stderr  # nothing is trained again
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = found["layer and rows, seed 0"]["selection"]
    assert rows.endswith("also new_tokens:18-19")


@pytest.mark.slow
def test_an_agent_learns_one_layer_and_all(tmp_path: Path) -> None:
    few = ["--steps", 1, "--seeds", 0, "--layers", 1, "--imitation-steps", 1]
    few += ["--shown-maps", 8, "--held-out", 8, "--output", tmp_path / "out"]
    for _ in range(2):
        ended = run(AGENT, *few)
        assert ended.returncode == 0, ended.stderr
        names = [line[:8].strip() for line in ended.stdout.splitlines()[3:]]
        assert names == ["base", "1", "full"]
    assert "seed 0:" not in ended.stderr  # nothing is trained again


@pytest.mark.parametrize("example", [QUICKSTART, SWEEP, VOTE], ids=lambda file: file.stem)
def test_example_shows_the_sentence_of_a_bad_selection(
    example: Path, model_folder: Path, tmp_path: Path
) -> None:
    ended = run(example, "--model", model_folder, "--layers", "99", "--output", tmp_path / "out")
    assert ended.returncode != 0
    assert (
        ended.stderr.strip()
        .splitlines()[-1]
        .endswith(
            "layer 99 does not exist: LlamaForCausalLM has 3 decoder layers (0 to 2) under "
            "'model.layers'"
        )
    )


def test_problems_that_cannot_be_read_are_named(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text('{"prompt": "1", "answer": 1}\n{"prompt": "2"}\n')
    ended = run(QUICKSTART, "--model", model_folder, "--data", file, "--output", tmp_path / "out")
    assert ended.returncode != 0
    assert "line 2: expected" in ended.stderr
