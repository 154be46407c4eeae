"""The recipes' files run as they stand on a tiny model, and the page shows them as they are."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from layerrl.quantisation import is_quantised
from tests.grpo import tokenizer
from tests.models import tiny

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
FILES = sorted(file for file in RECIPES.glob("*.yaml") if file.stem != "axolotl")
TINY = (
    "--layers 1 --max_steps 2 --max_completion_length 4 --per_device_train_batch_size 8 "
    "--gradient_accumulation_steps 1 --use_vllm false --use_cpu true --bf16 false "
    """--report_to none --model_init_kwargs '{"dtype": "float32"}'"""
)


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_train", RECIPES / "train.py")
    assert spec
    assert spec.loader
    module = sys.modules["recipes_train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    chat = tokenizer()
    chat.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    chat.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_trains_and_saves_its_layer(
    file: Path,
    train: ModuleType,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if file.stem == "four_bits":
        pytest.importorskip("bitsandbytes")
    made = []

    class Kept(train.LayerMaskedGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(train, "LayerMaskedGRPOTrainer", Kept)
    options = ["--config", file, "--model", model_folder, "--output_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options), *shlex.split(TINY)])
    train.main()
    stored = json.loads((tmp_path / "delta" / "delta.json").read_text(encoding="utf-8"))
    assert stored["selection"]["layers"] == [1]
    [trainer] = made
    quantised = any(map(is_quantised, trainer.model.parameters()))
    assert quantised == (file.stem == "four_bits")


def test_the_page_shows_the_files() -> None:
    blocks = re.findall(r"^```yaml\n(# (\S+)\n.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert {name for _, name in blocks} == {
        file.relative_to(ROOT).as_posix() for file in RECIPES.glob("*.yaml")
    }
    for text, name in blocks:
        assert text == (ROOT / name).read_text(encoding="utf-8"), name


def test_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"examples/[\w./]+\.(?:py|yaml)", PAGE)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_learning_rates_are_what_the_page_suggests(file: Path) -> None:
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["learning_rate"] == 7e-6
    assert "The files have 7e-6" in PAGE
