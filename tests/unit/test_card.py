"""The README of a delta is a valid model card, and keeps what others wrote into it."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from layerrl.delta.card import write_card

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
