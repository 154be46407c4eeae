"""The README of a delta is a valid model card, and keeps what others wrote into it."""

from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from layerrl.delta.card import card_of, write_card
from layerrl.delta.run_section import RunSummary
from layerrl.trainer.run_summary import dataset_of

META = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "base_revision": "a" * 40,
    "selection": {
        "num_layers": 30, "layers": [10], "learning_rate_scale": [1.0], "modules": None,
        "full": False,
    },
    "tensors": {"a": {}, "b": {}},
}  # fmt: skip


def test_names_the_base_and_the_layers(tmp_path):
    write_card(tmp_path, META)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": META["base_model"],
        "base_model_relation": "adapter",
        "library_name": "layerrl",
        "tags": ["layerrl"],
    }
    assert "# Delta: layer 10 of 30" in card.text
    assert "a" * 40 in card.text


@pytest.mark.parametrize("base", [None, "/a/folder", "out/x/y", "a b"])
def test_a_base_that_is_no_hub_model_is_no_metadata(tmp_path, base):
    write_card(tmp_path, META | {"base_model": base})
    assert "base_model" not in ModelCard.load(tmp_path / "README.md").data.to_dict()


def test_a_base_without_a_commit_may_be_a_folder_elsewhere(tmp_path):
    meta = META | {"base_model": "models/sft", "base_revision": None}
    for hub_id in (None, "me/delta"):
        write_card(tmp_path, meta, hub_id=hub_id)
        assert "base_model" not in ModelCard.load(tmp_path / "README.md").data.to_dict()


def test_is_written_once_and_beside_other_text(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("---\nlibrary_name: transformers\ntags:\n- trl\n---\n\n# Theirs\n")
    for beside in ("nothing", "older", "same"):
        write_card(tmp_path, META, beside=beside, hub_id="me/x")
    card = ModelCard.load(file)
    assert card.text.count("# Delta") == card.text.count("# Theirs") == 1
    assert (card.data.library_name, card.data.tags) == ("transformers", ["trl", "layerrl"])
    assert "earlier" not in card.text


@pytest.mark.parametrize("text", ["# No front matter\n", "---\nnot: [yaml\n---\n# Broken\n", ""])
def test_other_text_without_good_metadata_is_kept(tmp_path: Path, text: str):
    (tmp_path / "README.md").write_text(text)
    write_card(tmp_path, META)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "layerrl"
    assert all(line in card.text for line in text.splitlines() if line.startswith("#"))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "text", [b"# Caf\xe9\n", b"---\ntags: [{a: 1}]\n---\n# Odd tags\n"], ids=["latin-1", "tags"]
)
def test_text_that_is_no_card_does_not_end_a_save(tmp_path: Path, text: bytes):
    (tmp_path / "README.md").write_bytes(text)
    write_card(tmp_path, META)
    assert "# Delta" in ModelCard.load(tmp_path / "README.md").text


def test_says_how_to_load_it_and_how_much_was_trained(tmp_path: Path):
    shapes = {"dtype": "float32", "shape": [2, 3]}
    meta = META | {
        "tensors": {"a": shapes, "b": shapes},
        "base": {"frozen": {"c": {"shape": [9, 4]}}, "config": {}},
    }
    text = card_of("", meta, hub_id="me/x")
    assert "(12 of 48 parameters, 25.0%)" in text
    assert (
        f'from_pretrained("{META["base_model"]}", revision="{"a" * 40}", dtype="float32")\n'
        'layerrl.load_delta(model, "me/x")\n'
    ) in text
    images = meta | {"base": {"frozen": {}, "config": {"vision_config": {}}, "quantised": ["c"]}}
    text = card_of("", images)
    assert "transformers.AutoModelForImageTextToText.from_pretrained" in text
    assert "dtype=" not in text  # packed tensors are loaded as they are


def test_is_an_adapter_of_its_base_or_a_finetune_beside_the_whole_model():
    relations = {
        beside: ModelCard(card_of("", META, beside=beside)).data.base_model_relation
        for beside in ("nothing", "older", "same")
    }
    assert relations == {"nothing": "adapter", "older": "adapter", "same": "finetune"}


class TestTheRun:
    HISTORY = (
        *({"step": step, "reward": float(step), "loss": -0.5} for step in range(1, 21)),
        {"step": 10, "eval_reward": 3.25},
        {"step": 20, "train_loss": 1.0, "reward": "none"},
    )

    def test_is_a_curve_and_a_table_of_means(self):
        run = RunSummary(
            trainer="GRPO", dataset="me/data", steps=20, versions={"TRL": "1.16"},
            tags=("trl", "grpo"), history=self.HISTORY,
        )  # fmt: skip
        text = card_of("", META, run=run)
        assert "Trained with GRPO on [me/data](https://huggingface.co/datasets/me/data)" in text
        assert "Versions: TRL 1.16." in text
        assert "`reward` from 1.5 to 19.5: `▁▂▃▃▄▅▆▆▇█`" in text
        assert "| steps | reward | loss |\n|---|---|---|\n| 1-2 | 1.5 | -0.5 |\n" in text
        assert "| 19-20 | 19.5 | -0.5 |" in text
        assert "| steps | eval_reward |\n|---|---|\n| 10 | 3.25 |" in text
        data = ModelCard(text).data
        assert data.datasets == ["me/data"]
        assert data.tags == ["trl", "grpo", "layerrl"]

    def test_shows_an_evaluation_before_training(self):
        history = [{"step": step, "eval_reward": step + 0.5} for step in (0, 10)]
        text = card_of("", META, run=RunSummary(history=history))
        assert "| steps | eval_reward |\n|---|---|\n| 0 | 0.5 |\n| 10 | 10.5 |" in text
        assert "| 0 | 0.5 |" in card_of("", META, run=RunSummary(history=history[:1]))

    def test_stays_when_the_card_is_written_again(self):
        first = card_of("# Theirs\n", META, run=RunSummary(steps=7))
        again = card_of(first, META, hub_id="me/x")
        assert "with a trainer of transformers: 7 steps" in again
        assert again.count("## The run") == again.count("# Theirs") == 1
        other = card_of(again, META, run=RunSummary(steps=8))
        assert "7 steps" not in other
        assert other.count("## The run") == 1

    @pytest.mark.parametrize(
        "history",
        [
            (),
            ({"step": 0, "reward": 1.0},),
            ({"step": 1, "reward": float("nan")}, {"step": 900, "reward": float("inf")}),
            ({"reward": 1.0}, {"step": 3, "loss": 0.0}),
        ],
    )
    def test_with_odd_logs_is_still_a_card(self, history):
        text = card_of("", META, run=RunSummary(history=history))
        assert ModelCard(text).data.library_name == "layerrl"

    def test_names_a_data_set_of_the_hub(self):
        data = Dataset.from_dict({"a": [1]})
        assert dataset_of(data) is None
        data.info.download_checksums = {"hf://datasets/me/data@0a1b/train.parquet": {}}
        assert dataset_of(data) == "me/data"
        data.info.download_checksums["hf://datasets/me/other@0a1b/train.parquet"] = {}
        assert dataset_of(data) is None
