"""Every notebook runs from its first cell to its last, and reads well before it has."""

import ast
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from tests.grpo import tokenizer
from tests.models import tiny

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FEWER = {"STEPS": 2, "BUDGET": 32, "LAYER": 1, "LAYERS": [0, 2]}


def read(file: Path) -> Any:
    return nbformat.read(file, as_version=4)


def parameters(notebook: Any) -> dict[str, Any]:
    """The settings of the cell that is tagged so, which has nothing else."""
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    statements: Any = ast.parse(cell.source).body
    return {node.targets[0].id: ast.literal_eval(node.value) for node in statements}


def executed(file: Path, **changes: Any) -> Any:
    """The notebook after a run with other settings, which fails if a cell does."""
    notebook = read(file)
    changes = {name: value for name, value in changes.items() if name in parameters(notebook)}
    lines = (f"{name} = {value!r}" for name, value in changes.items())
    place = next(i for i, cell in enumerate(notebook.cells) if cell.metadata.get("tags"))
    notebook.cells.insert(place + 1, new_code_cell("\n".join(lines)))
    resources = {"metadata": {"path": str(FOLDER)}}
    return NotebookClient(notebook, timeout=1800, resources=resources).execute()


def shown(notebook: Any, kind: str) -> list[Any]:
    """What cells show in a format."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model, and problems whose answer it hits at times with its random weights."""
    folder = tmp_path_factory.mktemp("notebooks")
    tiny("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": f"{digit}{letter}", "answer": digit} for digit in range(10) for letter in "abcd"
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"MODEL": folder / "model", "DATA": folder / "problems.jsonl", "OUTPUT": folder}
    return FEWER | {name: str(path) for name, path in paths.items()}


# All of them take minutes: one in every run, the others with `make test-slow`.
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=() if file.stem == "quickstart" else pytest.mark.slow)
        for file in NOTEBOOKS
    ],
    ids=lambda file: file.stem,
)
def test_runs(file: Path, changes: dict[str, Any]) -> None:
    ended = executed(file, **changes)
    assert shown(ended, "image/png")
    tables = "".join(shown(ended, "text/html"))
    if file.stem == "quickstart":
        assert "<th>LoRA r16</th>" in tables
        assert "model.safetensors" in {f.name for f in Path(changes["OUTPUT"]).glob("merged/*")}
    if file.stem == "choose_a_layer":
        assert "<th>score</th>" in tables
        assert "<th>trains</th>" in tables
        assert "<th>difference</th>" in tables or "Rank correlation" in tables
    if file.stem == "merge_and_compare":
        assert "True" in shown(ended, "text/plain")


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_runs_with_its_own_model(file: Path, tmp_path: Path) -> None:
    assert shown(executed(file, STEPS=2, BUDGET=32, OUTPUT=str(tmp_path / "out")), "image/png")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_has_a_sentence_before_each_cell_and_no_outputs(file: Path) -> None:
    cells = read(file).cells
    assert cells[0].source.startswith("# ")
    for before, cell in pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
            assert before.source.rstrip()[-1] in ".:"
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_page_has_them_all() -> None:
    page = (FOLDER.parents[1] / "docs" / "notebooks.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `(\w+)\.ipynb`", page, flags=re.MULTILINE)
    assert len(names) == 4
    assert sorted(names) == [file.stem for file in NOTEBOOKS]
