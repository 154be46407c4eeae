"""Every example runs as a user would type it, for two steps, on a tiny model given by path."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grpo import tokenizer
from tests.models import tiny

EXAMPLES = sorted(
    file
    for file in (Path(__file__).parents[2] / "examples").glob("*.py")
    if "__main__" in file.read_text()
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(example: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, example, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_example_runs_twice_in_the_same_folder(
    example: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for layers in ("1", "middle:2"):
        ended = run(
            example, "--model", model_folder, "--layers", layers, "--steps", 2, "--output", out
        )
        assert ended.returncode == 0, ended.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["merged_accuracy"] == summary["trained_accuracy"]
    assert len(summary["rewards"]) == 2
    left = {file.name for file in out.iterdir()}
    assert left == {"delta", "merged", "reward.png", "summary.json", "trainer"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
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
