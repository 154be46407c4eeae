"""What a run pushes to a hub is enough to get its result back, and says what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from huggingface_hub import ModelCard
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from layerrl import LayerMaskedMixin, load_delta, merge_delta
from layerrl.errors import SelectionError
from tests.grpo import make
from tests.models import tiny
from tests.runs import bits, load, saved


class MaskedTrainer(LayerMaskedMixin, Trainer):
    pass


class Hub:
    """A hub that keeps what it is sent, as the real one does: nothing goes but by overwriting."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pushes: list[str] = []

    def upload_folder(self, *, folder_path, path_in_repo=None, ignore_patterns=(), **_: Any) -> Any:
        source = Path(folder_path)
        for file in source.rglob("*"):
            name = file.relative_to(source)
            if file.is_file() and not any(Path(name.parts[0]).match(p) for p in ignore_patterns):
                target = self.folder / (path_in_repo or "") / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        self.pushes.append(path_in_repo or "top")
        return type("Job", (), {"is_done": lambda _: True})()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_, **__: hub)
    else:  # before transformers 5.10
        monkeypatch.setattr(transformers.trainer, "upload_folder", hub.upload_folder)
    done = type("P", (), {"is_done": lambda _: True, "jobs": []})
    monkeypatch.setattr(transformers.trainer, "PushInProgress", lambda *_: done())
    monkeypatch.setattr(
        Trainer,
        "init_hf_repo",
        lambda self, **_: vars(self).update(hub_model_id="me/x", push_in_progress=None),
    )
    return hub


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


def trained(base: Path, folder: Path, **changes: Any) -> Any:
    values = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "push_to_hub": True}
    trainer = make(load(base), folder / "out", selection=2, **(values | changes))
    trainer.train()
    return trainer


def assert_result_is_at(folder: Path, base: Path, trainer: Any, out: Path) -> None:
    """Loaded or merged, the delta in a folder makes of the base what was trained."""
    model = load(base)
    load_delta(model, folder)
    assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)
    merge_delta(base, folder, out)
    assert_close(bits(load(out)), bits(trainer.model), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == trainer.processing_class.get_vocab()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_each_save_leaves_the_result_at_the_top(hub, base, tmp_path, strategy):
    trainer = trained(base, tmp_path, hub_strategy=strategy)
    assert_result_is_at(hub.folder, base, trainer, tmp_path / "merged")
    inside = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.get(strategy)
    assert hub.pushes.count("top") == 2
    if inside is not None:
        assert "checksums.json" in {path.name for path in (hub.folder / inside).iterdir()}
        assert_result_is_at(hub.folder / inside, base, trainer, tmp_path / "again")
        resumed = make(load(base), tmp_path / "resumed", selection=2, max_steps=2)
        resumed.train(resume_from_checkpoint=str(hub.folder / inside))
        assert_close(bits(resumed.model), bits(trainer.model), rtol=0, atol=0)


def test_a_checkpoint_on_the_hub_has_no_checksums_of_an_earlier_one(hub, base, tmp_path):
    """Uploads run beside the training, and may come before the last file is written or after."""
    late = []
    upload = hub.upload_folder

    def in_the_background(*, path_in_repo=None, **of: Any) -> Any:
        if path_in_repo is not None and not late:
            late.append(lambda: upload(path_in_repo=path_in_repo, **of))
            return type("Job", (), {"is_done": lambda _: True})()
        for job in late if path_in_repo is None else ():
            job()
        return upload(path_in_repo=path_in_repo, **of)

    hub.upload_folder = in_the_background
    trainer = trained(base, tmp_path, hub_strategy="checkpoint")
    resumed = make(load(base), tmp_path / "resumed", selection=2, max_steps=2)
    resumed.train(resume_from_checkpoint=str(hub.folder / "last-checkpoint"))
    assert_close(bits(resumed.model), bits(trainer.model), rtol=0, atol=0)


def test_the_card_says_how_to_load_it_and_that_it_is_no_model(hub, base, tmp_path):
    trained(base, tmp_path)
    card = ModelCard.load(hub.folder / "README.md")
    assert card.data.library_name == "layerrl"
    assert {"layerrl", "trl", "grpo"} <= set(card.data.tags)
    text = card.text
    assert 'layerrl.load_delta(model, "me/x")' in text
    assert "layerrl.merge_delta(" in text
    assert "layer 2 of 4" in text
    assert "no whole model" in text
    assert 'checkpoint_format="full"' in text
    assert text.count("layerrl: begin") == 1
    assert text.index("load_delta") < text.index("Quick start")  # TRL's own card follows
    assert "written for a whole model" in text


def test_nothing_is_pushed_before_the_end_where_that_is_asked_for(hub, base, tmp_path):
    trainer = trained(base, tmp_path, hub_strategy="end")
    assert hub.pushes == []
    assert not (tmp_path / "out" / "delta.json").exists()
    trainer.push_to_hub()
    assert hub.pushes == ["top"]


@pytest.mark.parametrize("by", ["push_to_hub", "save_model"])
def test_at_the_end_the_whole_model_and_its_delta_are_of_one_state(hub, base, tmp_path, by):
    trainer = trained(base, tmp_path)
    with torch.no_grad():  # a last delta that is not the last checkpoint's
        trainer.model.model.layers[2].mlp.up_proj.weight.add_(1)
    getattr(trainer, by)()
    model = AutoModelForCausalLM.from_pretrained(hub.folder, dtype=torch.float32)
    assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)
    assert_result_is_at(hub.folder, base, trainer, tmp_path / "merged")
    card = ModelCard.load(hub.folder / "README.md")
    assert card.data.library_name == "transformers"
    text = card.text
    assert "The whole model lies beside it" in text
    assert "earlier" not in text


def test_a_delta_pushed_after_a_whole_model_says_which_is_newer(hub, base, tmp_path):
    trainer = trained(base, tmp_path)
    trainer.push_to_hub()
    trainer.train()
    assert_result_is_at(hub.folder, base, trainer, tmp_path / "merged")
    assert "of an **earlier** state" in ModelCard.load(hub.folder / "README.md").text


def test_whole_models_are_pushed_as_trl_pushes_them(hub, base, tmp_path):
    trainer = trained(base, tmp_path, arguments={"checkpoint_format": "full"})
    model = AutoModelForCausalLM.from_pretrained(hub.folder, dtype=torch.float32)
    assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)
    assert not list(hub.folder.rglob("delta*"))
    assert "layerrl" not in (hub.folder / "README.md").read_text()


def test_a_trainer_of_transformers_pushes_the_same(hub, base, tmp_path):
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}] * 16
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        push_to_hub=True,
        save_strategy="epoch",
        num_train_epochs=1,
        use_cpu=True,
        report_to="none",
    )
    trainer = MaskedTrainer(load(base), args=args, train_dataset=rows, selection=2)
    trainer.train()
    model = load(base)
    load_delta(model, hub.folder)
    assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)
    assert ModelCard.load(hub.folder / "README.md").data.library_name == "layerrl"
    trainer.push_to_hub()
    assert_close(bits(load(hub.folder)), bits(trainer.model), rtol=0, atol=0)


def test_a_card_of_the_users_own_is_kept(hub, base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n")
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}] * 16
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"), push_to_hub=True, save_steps=1, max_steps=2,
        use_cpu=True, report_to="none",
    )  # fmt: skip
    MaskedTrainer(load(base), args=args, train_dataset=rows, selection=2).train()
    card = ModelCard.load(hub.folder / "README.md")
    assert (card.data.license, card.data.tags) == ("mit", ["mine", "layerrl"])
    assert "# Mine" in card.text
    assert card.text.count("layerrl: begin") == 1


class TestReaders:
    """Callbacks that take checkpoint-N for a model."""

    @pytest.fixture
    def merging(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        from trl.experimental import merge_model_callback as of

        monkeypatch.setattr(of, "is_mergekit_available", lambda: True)
        monkeypatch.setattr(of.MergeModelCallback, "on_save", lambda *_, **__: None)
        monkeypatch.setattr(of.MergeModelCallback, "on_train_end", lambda *_, **__: None)
        return of.MergeModelCallback

    def test_are_refused_where_it_is_a_delta(self, merging, tmp_path):
        class Own(merging):
            pass

        for given in (merging(object()), Own(object()), merging):
            with pytest.raises(SelectionError, match=r'checkpoint_format="full"'):
                make(tiny("llama", 4), tmp_path, selection=2, arguments={"callbacks": [given]})
        trainer = make(tiny("llama", 4), tmp_path, selection=2)
        with pytest.raises(SelectionError, match=r"MergeModelCallback takes .* for a whole model"):
            trainer.add_callback(merging(object()))
        assert not any(isinstance(c, merging) for c in trainer.callback_handler.callbacks)

    @pytest.mark.parametrize("changes", [{"selection": "full"}, {"checkpoint_format": "full"}])
    def test_are_welcome_where_it_is_a_model(self, merging, tmp_path, changes):
        arguments = {"callbacks": [merging(object())], "selection": 2, **changes}
        trainer = make(
            tiny("llama", 4), tmp_path, selection=2, arguments=arguments,
            save_strategy="steps", save_steps=3,
        )  # fmt: skip
        trainer.add_callback(merging(object()))
        trainer.train()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
        assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)
