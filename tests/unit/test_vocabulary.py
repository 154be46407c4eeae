"""Tokens that came after the base was loaded are named when the trainer is made."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import RewardConfig, SFTConfig

from layerrl.errors import SelectionError
from layerrl.trainer import (
    LayerMaskedDPOTrainer,
    LayerMaskedKTOTrainer,
    LayerMaskedRewardTrainer,
    LayerMaskedSFTTrainer,
)
from tests.grpo import QUIETLY, make, tokenizer
from tests.models import tiny
from tests.runs import load
from tests.trainers import CHAT, JUDGED, PREFERENCES, classifier

MARKS = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny("llama", 4).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A tokenizer with a template, and two tokens that the model has not."""
    own = tokenizer()
    own.add_special_tokens({"additional_special_tokens": MARKS})
    own.chat_template = TEMPLATE
    own.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def sft(model: Any, folder: Path, *, selection: Any = 2, **changes: Any) -> Any:
    processing_class = changes.pop("processing_class", tokenizer())
    args = SFTConfig(output_dir=str(folder / "out"), max_steps=1, **(QUIETLY | changes))
    return LayerMaskedSFTTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_dict(CHAT),
        processing_class=processing_class,
        selection=selection,
    )


def silently(build: Any, *args: Any, **kwargs: Any) -> Any:
    """A trainer that has nothing to say about tokens."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = build(*args, **kwargs)
    assert not [w for w in caught if "token" in str(w.message) and "layer" in str(w.message)]
    return trainer


class TestAddedByTheTrainer:
    @pytest.mark.parametrize("by", ["instance", "path"])
    @pytest.mark.parametrize("given", [True, False], ids=["tokenizer", "its-own"])
    def test_are_refused_by_name(self, base, chat, tmp_path, by, given):
        model = load(base) if by == "instance" else str(base)
        processing_class = tokenizer() if given else None
        match = (
            r"added 64 tokens \('<\|im_start\|>', '<\|im_end\|>', .*64 rows and has 128.*the base"
        )
        with pytest.raises(SelectionError, match=match):
            sft(model, tmp_path, chat_template_path=str(chat), processing_class=processing_class)

    def test_of_a_reward_trainer_too(self, chat, tmp_path):
        args = RewardConfig(output_dir=str(tmp_path), chat_template_path=str(chat), **QUIETLY)
        with pytest.raises(SelectionError, match="added 64 tokens"):
            LayerMaskedRewardTrainer(
                classifier(),
                args=args,
                train_dataset=Dataset.from_dict(PREFERENCES),
                processing_class=tokenizer(),
                selection=2,
            )

    def test_to_a_padded_embedding_are_refused_as_well(self, chat, tmp_path):
        """TRL cuts the padding off: other rows, no new ones."""
        known = tokenizer()
        known.add_special_tokens({"additional_special_tokens": MARKS})
        with pytest.raises(SelectionError, match=r"had 192 rows and has 128"):
            sft(
                tiny("llama", 4, vocab_size=192),
                tmp_path,
                chat_template_path=str(chat),
                processing_class=known,
            )

    def test_are_trained_with_everything(self, base, chat, tmp_path):
        trainer = sft(load(base), tmp_path, selection="full", chat_template_path=str(chat))
        assert trainer.model.config.vocab_size == 128
        trainer.train()

    def test_none_of_them_from_a_template_alone(self, base, tmp_path):
        (tmp_path / "own.jinja").write_text(TEMPLATE)
        silently(sft, load(base), tmp_path, chat_template_path=str(tmp_path / "own.jinja"))

    def test_the_way_out_works(self, base, chat, tmp_path):
        sft(load(base), tmp_path, selection="full", chat_template_path=str(chat)).save_model(
            tmp_path / "first"
        )
        trainer = silently(
            sft,
            load(tmp_path / "first"),
            tmp_path,
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "first"),
        )
        trainer.train()


class TestAddedByTheUser:
    def test_with_a_resized_embedding_are_a_warning(self, base, tmp_path):
        model, own = load(base), tokenizer()
        own.add_tokens(["<think>"])
        model.resize_token_embeddings(len(own), mean_resizing=False)
        match = r"1 token \('<think>'\).*has 65 rows, and .*base was saved with 64.*save it"
        with pytest.warns(UserWarning, match=match):
            trainer = make(model, tmp_path, selection=2, arguments={"processing_class": own})
        trainer.train()

    def test_to_rows_that_were_padding_are_a_warning(self, tmp_path):
        tiny("llama", 4, vocab_size=80).save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        own = tokenizer()
        own.add_tokens(["<think>"])
        with pytest.warns(UserWarning, match=r"1 token \('<think>'\) that came after .*base was"):
            make(
                load(tmp_path / "base"), tmp_path, selection=2, arguments={"processing_class": own}
            )

    @pytest.mark.parametrize("by", ["instance", "path"])
    def test_without_rows_are_refused(self, base, tmp_path, by):
        own = tokenizer()
        own.add_tokens([f"<{i}>" for i in range(7)])
        match = r"7 tokens \('<0>', '<1>', '<2>', '<3>', '<4>', \.\.\.\) .*up to 70.*has 64 rows"
        with pytest.raises(SelectionError, match=match):
            make(
                load(base) if by == "instance" else str(base),
                tmp_path,
                selection=2,
                arguments={"processing_class": own},
            )

    @pytest.mark.parametrize("kind", [LayerMaskedDPOTrainer, LayerMaskedKTOTrainer])
    def test_in_other_trainers(self, base, tmp_path, kind):
        from trl import DPOConfig, KTOConfig

        own = tokenizer()
        own.add_tokens(["<think>"])
        dpo = kind is LayerMaskedDPOTrainer
        args = (DPOConfig if dpo else KTOConfig)(output_dir=str(tmp_path), **QUIETLY)
        rows = Dataset.from_dict(PREFERENCES if dpo else JUDGED)
        options = {"args": args, "train_dataset": rows, "processing_class": own, "selection": 2}
        with pytest.raises(SelectionError, match=r"1 token \('<think>'\)"):
            kind(load(base), **options)


class TestNothingIsSaid:
    def test_of_a_base_as_it_was_saved(self, base, tmp_path):
        silently(make, load(base), tmp_path, selection=2)
        silently(make, str(base), tmp_path, selection=2)

    def test_of_an_embedding_with_more_rows_than_tokens(self, tmp_path):
        tiny("llama", 4, vocab_size=80).save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        silently(make, load(tmp_path / "base"), tmp_path, selection=2)
        silently(make, str(tmp_path / "base"), tmp_path, selection=2)

    @pytest.mark.parametrize("family", ["gemma3_text", "llama"])
    def test_of_a_model_that_was_published_with_a_token_too_many(self, tmp_path, family):
        more = tokenizer()
        more.add_tokens(["<image>"])
        for part in (tiny(family, 4), more):
            part.save_pretrained(tmp_path / "base")
        own = {"processing_class": AutoTokenizer.from_pretrained(tmp_path / "base")}
        silently(make, load(tmp_path / "base"), tmp_path, selection=2, arguments=own)
        path, none = str(tmp_path / "base"), {"processing_class": None}
        silently(make, path, tmp_path, selection=2, arguments=none)

    def test_of_a_base_that_was_saved_again_in_the_same_folder(self, tmp_path):
        tiny("llama", 4).save_pretrained(tmp_path / "base")
        silently(make, load(tmp_path / "base"), tmp_path, selection=2)
        tiny("llama", 4, vocab_size=80).save_pretrained(tmp_path / "base")
        silently(make, load(tmp_path / "base"), tmp_path, selection=2)

    def test_of_a_link_to_nothing_beside_it(self, base, tmp_path):
        folder = shutil.copytree(base, tmp_path / "copy")
        (folder / ".#config.json").symlink_to("user@host.1234:5678")  # Emacs' lock
        silently(make, load(folder), tmp_path, selection=2)

    def test_of_a_model_that_was_never_saved(self, tmp_path):
        silently(make, tiny("llama", 4, vocab_size=80), tmp_path, selection=2)

    @pytest.mark.parametrize("selection", ["full", "auto"])
    def test_of_other_selections(self, base, tmp_path, selection):
        silently(make, load(base), tmp_path, selection=selection)

    def test_of_a_processor(self, tmp_path):
        class Processor:
            """As a vision-language model's: its tokenizer is inside."""

            tokenizer = tokenizer()

        from layerrl import select_layers
        from layerrl.trainer.vocabulary import Vocabulary

        model = tiny("qwen3_vl", 3)
        selection = select_layers(model, 1)
        vocabulary = Vocabulary(model, None, Processor)
        vocabulary.check(model, Processor, selection)
        Processor.tokenizer.add_tokens(["<image>"])
        with pytest.raises(SelectionError, match=r"added 1 token \('<image>'\)"):
            vocabulary.check(model, Processor, selection)
        with pytest.raises(SelectionError, match=r"1 token \('<image>'\) with ids up to 64"):
            Vocabulary(model, None, Processor).check(model, Processor, selection)
