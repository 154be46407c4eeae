"""A checkpoint is written to its end or is not there, and is loaded whole or not at all."""

import errno
import json
import os
import random
import re
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOTrainer

from layerrl import LayerMaskedMixin, load_delta, merge_delta
from layerrl.errors import DeltaError, FrozenTensorError
from layerrl.trainer.checkpoints import CheckpointWriteError, last_complete, why_incomplete
from layerrl.trainer.checksums import check_files, write_checksums
from tests.grpo import make
from tests.models import tiny
from tests.runs import bits, freeze_by_hand, load, no_file_above, optimizer_state, saved, train

NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


def on(base: Path, folder: Path, **changes: Any) -> Any:
    values = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "selection": 2}
    return make(load(base), folder, **(values | changes))


class TestFolder:
    def test_is_a_delta_that_a_reader_finds(self, base, tmp_path):
        trainer = on(base, tmp_path / "out")
        trainer.train()
        checkpoint = tmp_path / "out" / "checkpoint-2"
        model = load(base)
        assert load_delta(model, checkpoint) == trainer.selection
        assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)
        merge_delta(base, checkpoint, tmp_path / "merged")
        assert_close(bits(load(tmp_path / "merged")), bits(trainer.model), rtol=0, atol=0)

    @pytest.mark.parametrize("written_by", ["checkpoint", "save_delta"])
    def test_has_a_readme_that_says_how_to_load_it(self, base, tmp_path, written_by):
        trainer = on(base, tmp_path / "out", max_steps=1)
        trainer.train()
        folder = tmp_path / "out" / "checkpoint-1"
        if written_by == "save_delta":
            folder = trainer.save_delta(tmp_path / "delta")
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "layerrl"
        assert card.data.tags == ["trl", "grpo", "layerrl"]
        assert getattr(card.data, "base_model", None) is None  # a folder here is no hub's model
        assert "layer 2 of 4" in card.text
        assert f'merge_delta("{base}", "path/to/this/folder", "merged")' in card.text
        assert "no whole model" in card.text
        assert not (tmp_path / "out" / "checkpoint-1" / "delta").exists()

    def test_with_the_delta_in_a_sub_folder_still_resumes(self, base, tmp_path):
        straight = on(base, tmp_path / "out", beta=0.04)
        train(straight)
        checkpoint = tmp_path / "out" / "checkpoint-1"
        (checkpoint / "delta").mkdir()
        for name in ("delta.json", "delta.safetensors"):
            (checkpoint / name).rename(checkpoint / "delta" / name)
        for name in ("README.md", "checksums.json"):
            (checkpoint / name).unlink()
        save_file(load_file(checkpoint / "reference.safetensors"), checkpoint / "r")  # no metadata
        (checkpoint / "r").replace(checkpoint / "reference.safetensors")
        resumed = on(base, tmp_path / "again", beta=0.04)
        with pytest.warns(UserWarning, match=r"reference\.safetensors was written without finger"):
            resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_close(bits(resumed.model), bits(straight.model), rtol=0, atol=0)


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


STAGES = ["delta", "reference", "tokenizer", "optimizer", "rng", "state", "half of the state"]


def fill_disk(stage: str, monkeypatch: pytest.MonkeyPatch, trainer: Any) -> None:
    """From now on, one kind of write fails."""
    if stage == "delta":
        monkeypatch.setattr("layerrl.delta.save_file", no_space)
    elif stage == "reference":
        monkeypatch.setattr("layerrl.trainer.checkpoints.save_file", no_space)
    elif stage == "tokenizer":
        monkeypatch.setattr(type(trainer.processing_class), "save_pretrained", no_space)
    elif stage == "optimizer":
        monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", no_space)
    elif stage == "rng":
        monkeypatch.setattr(Trainer, "_save_rng_state", no_space)
    elif stage == "state":
        monkeypatch.setattr(type(trainer.state), "save_to_json", no_space)
    else:

        def half(self: Any, path: str) -> None:
            Path(path).write_text('{"best_metric": null, "glob')
            no_space()

        monkeypatch.setattr(type(trainer.state), "save_to_json", half)


class FillsAt(TrainerCallback):
    def __init__(self, step: int, fill: Any) -> None:
        self.step, self.fill = step, fill

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.fill()


class TestFullDisk:
    @pytest.fixture(scope="class")
    @staticmethod
    def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
        """The model after three steps that nothing stopped."""
        folder = tmp_path_factory.mktemp("straight")
        trainer = on(saved(folder / "base"), folder / "out", max_steps=3, beta=0.04)
        train(trainer)
        return bits(trainer.model)

    @pytest.mark.parametrize("limit", [None, 1])
    @pytest.mark.parametrize("stage", STAGES)
    def test_leaves_the_last_good_checkpoint(self, base, tmp_path, straight, stage, limit):
        trainer = on(base, tmp_path / "out", max_steps=3, beta=0.04, save_total_limit=limit)
        with pytest.MonkeyPatch.context() as patch:
            trainer.add_callback(FillsAt(2, lambda: fill_disk(stage, patch, trainer)))
            with pytest.raises((OSError, DeltaError), match="No space left"):
                train(trainer)
        assert {path.name for path in (tmp_path / "out").glob("*checkpoint*")} == {"checkpoint-1"}
        assert get_last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")
        resumed = on(base, tmp_path / "out", max_steps=3, beta=0.04)
        resumed.train(resume_from_checkpoint=True)
        assert_close(bits(resumed.model), straight, rtol=0, atol=0)

    def test_at_any_byte_leaves_the_last_good_checkpoint(self, base, tmp_path, monkeypatch):
        """torch and safetensors write their files themselves."""
        save, sizes = Trainer._save_checkpoint, []

        def full(self: Any, model: Any, trial: Any) -> None:
            second = self.state.global_step == 2
            with no_file_above(sizes[-1]) if second else nullcontext():
                save(self, model, trial)

        monkeypatch.setattr(Trainer, "_save_checkpoint", full)
        stopped = set()
        for size in (0, 300, 1200, 1600, 5000, 10_000, 14_500, 18_000):
            sizes.append(size)
            trainer = on(base, tmp_path / "out", beta=0.04)
            match = r"cannot write .*checkpoint-2: .* a run resumes from .*checkpoint-1\."
            with pytest.raises(CheckpointWriteError, match=match) as raised:
                train(trainer)
            stopped.add(type(raised.value.__cause__))
            assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*")) == [
                "checkpoint-1"
            ]
        assert stopped == {RuntimeError, OSError, DeltaError, Exception}  # torch and Rust, too
        monkeypatch.undo()
        straight = on(base, tmp_path / "straight", beta=0.04)
        train(straight)
        resumed = on(base, tmp_path / "out", beta=0.04)
        resumed.train(resume_from_checkpoint=True)
        assert_close(bits(resumed.model), bits(straight.model), rtol=0, atol=0)

    def test_of_a_process_that_writes_beside_the_first_is_told(self, base, tmp_path, monkeypatch):
        trainer = on(base, tmp_path / "out")
        folder = tmp_path / "out" / "checkpoint-1"
        folder.mkdir(parents=True)
        monkeypatch.setattr(type(trainer.args), "should_save", False)
        match = r"process 0 cannot write its files into .*checkpoint-1: torch .*the disk full\?\)"
        with (
            pytest.raises(CheckpointWriteError, match=match),
            trainer._checkpoints.all_or_nothing(folder),
            no_file_above(0),
        ):
            torch.save([1], folder / "rng_state_1.pth")
        assert folder.exists()  # the first process's

    def test_leaves_what_an_earlier_run_wrote_under_the_name(self, base, tmp_path):
        earlier = on(base, tmp_path / "out", max_steps=1)
        earlier.train()
        before = (tmp_path / "out" / "checkpoint-1" / "delta.safetensors").read_bytes()
        trainer = on(base, tmp_path / "out", max_steps=1, learning_rate=3e-2)
        with pytest.MonkeyPatch.context() as patch:
            trainer.add_callback(FillsAt(1, lambda: fill_disk("optimizer", patch, trainer)))
            with pytest.raises(OSError, match="No space left"):
                trainer.train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        assert (checkpoint / "delta.safetensors").read_bytes() == before
        on(base, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))

    def test_leaves_one_without_an_optimizer_too(self, base, tmp_path):
        """Somebody deleted it to save space: it is no complete checkpoint, but not ours to drop."""
        on(base, tmp_path / "out", max_steps=1).train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        (checkpoint / "optimizer.pt").unlink()
        before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        trainer = on(base, tmp_path / "out", max_steps=1, learning_rate=3e-2)
        with pytest.MonkeyPatch.context() as patch:
            trainer.add_callback(FillsAt(1, lambda: fill_disk("optimizer", patch, trainer)))
            with pytest.raises(OSError, match="No space left"):
                trainer.train()
        assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before

    def test_of_whole_models_does_too(self, base, tmp_path):
        full = {"arguments": {"checkpoint_format": "full"}, "max_steps": 3}
        trainer = on(base, tmp_path / "out", **full)
        with pytest.MonkeyPatch.context() as patch:
            trainer.add_callback(FillsAt(2, lambda: fill_disk("state", patch, trainer)))
            with pytest.raises(OSError, match="No space left"):
                trainer.train()
        assert {path.name for path in (tmp_path / "out").glob("*checkpoint*")} == {"checkpoint-1"}

    def test_a_checkpoint_that_was_moved_and_linked_is_replaced(self, base, tmp_path):
        out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
        on(base, out, max_steps=1).train()
        (out / "checkpoint-1").rename(elsewhere)
        (out / "checkpoint-1").symlink_to(elsewhere)
        for _ in range(2):
            on(base, out, max_steps=1).train()
            assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-1"]
        assert (elsewhere / "trainer_state.json").exists()

    def test_a_failed_push_keeps_the_checkpoint(self, base, tmp_path, monkeypatch):
        monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **_: None)
        monkeypatch.setattr(Trainer, "_push_from_checkpoint", no_space)
        trainer = on(base, tmp_path / "out", push_to_hub=True)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
        resumed = on(base, tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert resumed.state.global_step == 2


class TestKilled:
    def test_in_the_middle_of_a_save_goes_on_from_the_one_before(self, base, tmp_path):
        straight = on(base, tmp_path / "out", max_steps=3)
        train(straight)
        (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").unlink()
        resumed = on(base, tmp_path / "out", max_steps=3)
        message = r"checkpoint-3 was not written to its end.*point-2"
        with pytest.warns(UserWarning, match=message) as warned:
            resumed.train(resume_from_checkpoint=True)
        assert __file__ in [warning.filename for warning in warned if "end" in str(warning.message)]
        assert_close(bits(resumed.model), bits(straight.model), rtol=0, atol=0)

    @pytest.mark.parametrize("half", [False, True])
    def test_while_it_replaced_a_checkpoint_leaves_the_one_that_was_there(
        self, base, tmp_path, half
    ):
        straight = on(base, tmp_path / "out", max_steps=3)
        train(straight)
        out = tmp_path / "out"
        (out / "checkpoint-2").rename(out / "_checkpoint-2.replaced")
        shutil.rmtree(out / "checkpoint-3")
        shutil.copytree(out / "checkpoint-1", out / "_checkpoint-1.replaced")  # not deleted yet
        if half:
            (out / "checkpoint-2").mkdir()
            (out / "checkpoint-2" / "delta.safetensors").write_bytes(b"half")
        resumed = on(base, out, max_steps=3)
        with warnings.catch_warnings(action="error", category=UserWarning):
            resumed.train(resume_from_checkpoint=True)
        assert len(resumed.state.log_history) == 4  # the third step, and the end
        assert_close(bits(resumed.model), bits(straight.model), rtol=0, atol=0)
        assert not [*out.glob("_*")]

    def test_before_the_first_save_was_done_is_said(self, base, tmp_path):
        (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
        with pytest.raises(DeltaError, match=r"no whole checkpoint in .*checkpoint-1 was not"):
            on(base, tmp_path / "out").train(resume_from_checkpoint=True)

    @pytest.mark.parametrize(
        "name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    )
    def test_a_half_written_file_is_found_before_anything_is_loaded(self, base, tmp_path, name):
        on(base, tmp_path / "out").train()
        file = tmp_path / "out" / "checkpoint-1" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        refused(on(base, tmp_path / "new"), file.parent, rf"{name}.*damaged")

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
    def test_an_optimizer_that_is_not_there_is_said(self, base, tmp_path, name):
        on(base, tmp_path / "out").train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        (checkpoint / name).unlink()
        with pytest.warns(UserWarning, match=rf"no {name} .*start anew") as warned:
            on(base, tmp_path / "new").train(resume_from_checkpoint=str(checkpoint))
        assert __file__ in [w.filename for w in warned if "start anew" in str(w.message)]

    @pytest.mark.parametrize("content", ["[]", "3", "{}", '{"global_step": "x"}'])
    def test_a_state_of_something_else_is_refused(self, base, tmp_path, content):
        on(base, tmp_path / "out").train()
        file = tmp_path / "out" / "checkpoint-1" / "trainer_state.json"
        file.write_text(content)
        refused(on(base, tmp_path / "new"), file.parent, "trainer_state.json is missing or damaged")

    def test_a_folder_that_only_looks_like_a_later_one_is_not_taken(self, base, tmp_path):
        on(base, tmp_path / "out").train()
        other = shutil.copytree(tmp_path / "out/checkpoint-1", tmp_path / "out/checkpoint-best-9")
        shutil.rmtree(other / "rng_state.pth", ignore_errors=True)
        (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
        with pytest.warns(UserWarning, match="going on from .*checkpoint-1$"):
            on(base, tmp_path / "out").train(resume_from_checkpoint=True)


class TestHalfDeleted:
    """A checkpoint whose deletion was cut off, by the kill of a run that deletes older ones."""

    @pytest.fixture(scope="class")
    @staticmethod
    def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
        base = saved(tmp_path_factory.mktemp("deleted") / "base")
        trainer = on(base, base.parent / "out", beta=0.04)
        train(trainer)
        return base, trainer

    def test_is_none_to_resume_from_wherever_it_was_cut_off(self, straight):
        base, _ = straight
        checkpoint = base.parent / "out" / "checkpoint-2"
        names = sorted(path.name for path in checkpoint.iterdir() if path.name != "README.md")
        assert {"trainer_state.json", "checksums.json", "optimizer.pt", "rng_state.pth"} <= {*names}
        assert last_complete(checkpoint.parent) == checkpoint
        kept = {name: (checkpoint / name).read_bytes() for name in names}
        for shift in range(len(names)):  # each is the first to go, and the last
            for name in [*names[shift:], *names[:shift]]:
                (checkpoint / name).unlink()
                assert why_incomplete(checkpoint)
                assert last_complete(checkpoint.parent) == checkpoint.with_name("checkpoint-1")
            for name, content in kept.items():
                (checkpoint / name).write_bytes(content)
        assert last_complete(checkpoint.parent) == checkpoint

    @pytest.mark.parametrize(
        "gone", ["optimizer.pt", "rng_state.pth", "delta.json", "checksums.json"]
    )
    def test_is_said_and_the_run_goes_on_from_the_one_before(self, straight, tmp_path, gone):
        base, trainer = straight
        out = Path(shutil.copytree(base.parent / "out", tmp_path / "out"))
        (out / "checkpoint-2" / gone).unlink()
        resumed = on(base, out, beta=0.04)
        message = rf"checkpoint-2 was .*deleted in part \(it lacks {gone}; .*on from .*point-1$"
        with pytest.warns(UserWarning, match=message):
            resumed.train(resume_from_checkpoint=True)
        assert_close(bits(resumed.model), bits(trainer.model), rtol=0, atol=0)

    def test_by_its_name_is_taken_all_the_same(self, straight, tmp_path):
        base, _ = straight
        checkpoint = Path(shutil.copytree(base.parent / "out" / "checkpoint-1", tmp_path / "c"))
        (checkpoint / "checksums.json").unlink()
        on(base, tmp_path / "out", beta=0.04).train(resume_from_checkpoint=str(checkpoint))

    def test_is_not_what_plain_trl_wrote_after_it(self, straight, tmp_path):
        """Its state is that which it was resumed with, and it keeps no record of its files."""
        base, _ = straight
        out = tmp_path / "out"
        full = {"arguments": {"checkpoint_format": "full"}, "max_steps": 1}
        on(base, out, selection="full", **full).train()
        plain = make(load(base), out, max_steps=2, save_strategy="steps", save_steps=1)
        plain.train(resume_from_checkpoint=True)
        assert last_complete(out) == out / "checkpoint-2"


@pytest.mark.parametrize("selection", ["full", None])
def test_transformers_misses_no_callback(base, tmp_path, caplog, selection):
    """The state says that there is a record of the files, where plain TRL overlooks it, too."""
    full = {"arguments": {"checkpoint_format": "full"}}
    on(base, tmp_path / "out", selection="full", max_steps=1, **full).train()
    restores = {"restore_callback_states_from_checkpoint": True, "max_steps": 2}
    resumed = make(load(base), tmp_path / "out", selection=selection, **restores)
    resumed.train(resume_from_checkpoint=True)
    assert "not included in current configuration" not in caplog.text


class SavesMore(GRPOTrainer):
    """Goes on when its base class has saved, as GRPO with adaptive entropy does."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / "more.json").write_text("{}")
        (folder / "optimizer.pt").unlink()
        state = json.loads((folder / "trainer_state.json").read_text())
        (folder / "trainer_state.json").write_text(json.dumps(state))


class MaskedSavesMore(LayerMaskedMixin, SavesMore):
    pass


def test_what_a_class_behind_the_mixin_saves_is_recorded(base, tmp_path):
    on(base, tmp_path / "out", trainer=MaskedSavesMore).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert last_complete(tmp_path / "out") == checkpoint
    check_files(checkpoint)
    with pytest.warns(UserWarning, match="no optimizer.pt"):
        on(base, tmp_path / "out", max_steps=3).train(resume_from_checkpoint=True)
    (checkpoint / "more.json").write_text("[]")
    refused(on(base, tmp_path / "new"), checkpoint, r"more\.json is damaged")


def refused(trainer: Any, checkpoint: Path, match: str, error: type = DeltaError) -> None:
    """Resuming raises, and nothing of the run has changed."""
    before = bits(trainer.model)
    reference = {}
    if hasattr(trainer.ref_model, "tensors"):
        reference = {n: t.detach().clone() for n, t in trainer.ref_model.tensors.items()}
    with pytest.raises(error, match=match):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_close(bits(trainer.model), before, rtol=0, atol=0)
    if reference:
        assert_close(dict(trainer.ref_model.tensors), reference, rtol=0, atol=0)
    assert trainer.state.global_step == 0


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="file systems of another kind")
def test_files_of_others_do_not_disturb_the_checksums(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("optimizer.pt", "sub/state.bin", os.fsdecode(b"no text \xff"), "gone.tmp"):
        (tmp_path / name).write_bytes(b"content")
    (tmp_path / "nowhere").symlink_to("/nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    write_checksums(tmp_path)
    (tmp_path / "gone.tmp").unlink()
    check_files(tmp_path)
    flip(tmp_path / "sub" / "state.bin", 3)
    with pytest.raises(DeltaError, match=r"sub/state\.bin is damaged .*\(1 of 3 files differ"):
        check_files(tmp_path)


class TestBitFlips:
    """Of every file that a run resumes from, at any place."""

    @pytest.fixture(scope="class")
    @staticmethod
    def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("flips")
        base = saved(folder / "base")
        for name, kind in {"delta": "delta", "full": "full"}.items():
            on(base, folder / name, beta=0.04, arguments={"checkpoint_format": kind}).train()
        return base, folder

    @pytest.mark.parametrize("kind", ["delta", "full"])
    def test_are_found_before_anything_is_loaded(self, runs, tmp_path, kind):
        base, folder = runs
        checkpoint = folder / kind / "checkpoint-1"
        names = {path.name for path in checkpoint.iterdir()} - {"README.md"}
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "checksums.json"} <= names
        draw = random.Random(0)
        trainer = on(base, tmp_path / "new", beta=0.04, arguments={"checkpoint_format": kind})
        for name in sorted(names):
            file = checkpoint / name
            for bit in (0, 1, draw.randrange(8 * file.stat().st_size)):
                flip(file, bit)
                try:
                    refused(trainer, checkpoint, rf"{re.escape(name)} is damaged")
                finally:
                    flip(file, bit)
        trainer.train(resume_from_checkpoint=str(checkpoint))  # each was put right again

    def test_in_a_state_are_a_sentence_with_what_to_do(self, runs, tmp_path):
        base, folder = runs
        checkpoint = Path(shutil.copytree(folder / "delta" / "checkpoint-1", tmp_path / "c"))
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        next(iter(state["state"].values()))["exp_avg"].flatten()[0] += 1
        torch.save(state, checkpoint / "optimizer.pt")
        match = (
            r"optimizer\.pt is damaged or was changed.*\(1 of \d+ files .*delete .*checksums.json"
        )
        refused(on(base, tmp_path / "new", beta=0.04), checkpoint, match)
        (checkpoint / "checksums.json").unlink()  # as older versions and TRL write none
        on(base, tmp_path / "new", beta=0.04).train(resume_from_checkpoint=str(checkpoint))

    def test_saving_a_model_over_a_checkpoint_leaves_no_record_of_it(self, runs, tmp_path):
        base, folder = runs
        checkpoint = Path(shutil.copytree(folder / "delta" / "checkpoint-1", tmp_path / "c"))
        trainer = on(base, tmp_path / "new", beta=0.04)
        trainer.save_model(str(checkpoint))
        trainer.train(resume_from_checkpoint=str(checkpoint))


class TestReference:
    """`reference.safetensors` is checked like a delta."""

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            pytest.param(lambda t: t.update({NAME: torch.ones(1)}), r"\(1,\)", id="broadcast"),
            pytest.param(lambda t: t.pop(NAME), "missing", id="missing"),
            pytest.param(lambda t: t.update(more=torch.ones(2)), "no such tensor", id="extra"),
            pytest.param(
                lambda t: t.update({NAME: t[NAME].bfloat16()}), "torch.bfloat16", id="dtype"
            ),
            pytest.param(lambda t: t.update({NAME: t[NAME] + 1e-3}), "fingerprint of", id="values"),
            pytest.param(
                lambda t: t.update({NAME: t[NAME].t().contiguous()}), r"\(16, 32\)", id="shape"
            ),
        ],
    )
    def test_of_another_content_is_refused(self, base, tmp_path, change, match):
        on(base, tmp_path / "out", beta=0.04).train()
        file = tmp_path / "out" / "checkpoint-1" / "reference.safetensors"
        with safetensors.safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata=metadata)
        refused(on(base, tmp_path / "new", beta=0.04), file.parent, match)

    @pytest.mark.parametrize("known", ["[1]", '"x"', "3"])
    def test_with_fingerprints_of_something_else_is_refused(self, base, tmp_path, known):
        on(base, tmp_path / "out", beta=0.04).train()
        file = tmp_path / "out" / "checkpoint-1" / "reference.safetensors"
        save_file(load_file(file), file, metadata={"layerrl_fingerprints": known})
        refused(
            on(base, tmp_path / "new", beta=0.04),
            file.parent,
            "the text of its fingerprints: it is",
        )

    @pytest.mark.parametrize("keep", [0, 100, -10])
    def test_that_was_cut_is_refused(self, base, tmp_path, keep):
        on(base, tmp_path / "out", beta=0.04).train()
        file = tmp_path / "out" / "checkpoint-1" / "reference.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        refused(on(base, tmp_path / "new", beta=0.04), file.parent, "no readable reference")


class TestWholeModels:
    """Checkpoints that plain TRL wrote, or `checkpoint_format="full"`."""

    def test_of_a_run_that_trained_everything_are_refused(self, base, tmp_path):
        on(base, tmp_path / "out", selection=None).train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        trainer = on(base, tmp_path / "new", beta=0.04)
        match = r"30 of 30 frozen tensors .*pass the folder as the model"
        refused(trainer, checkpoint, match, FrozenTensorError)
        refused(trainer, checkpoint, "Nothing was loaded", DeltaError)

    def test_of_a_run_that_trained_another_layer_are_refused(self, base, tmp_path):
        full = {"arguments": {"checkpoint_format": "full"}}
        on(base, tmp_path / "out", selection=1, **full).train()
        trainer = on(base, tmp_path / "new")
        match = r"9 of 30 frozen tensors.*model\.layers\.1\."
        refused(trainer, tmp_path / "out" / "checkpoint-2", match, FrozenTensorError)

    def test_with_an_optimizer_of_other_tensors_are_refused(self, base, tmp_path):
        on(base, tmp_path / "out", selection=None, learning_rate=0.0).train()
        trainer = on(base, tmp_path / "new")
        match = r"optimizer\.pt holds the state of 39 tensors.*trains 9 others"
        refused(trainer, tmp_path / "out" / "checkpoint-1", match)

    def test_of_trl_frozen_by_hand_go_on_bit_for_bit(self, base, tmp_path):
        model = load(base)
        freeze_by_hand(model, [2])
        plain = make(model, tmp_path / "out", save_strategy="steps", save_steps=1, max_steps=2)
        train(plain)
        resumed = on(base, tmp_path / "new")
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert_close(bits(resumed.model), bits(plain.model), rtol=0, atol=0)
        assert_close(optimizer_state(resumed), optimizer_state(plain), rtol=0, atol=0)

    @pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss", "gemma3", "qwen3_vl"])
    def test_of_other_families_go_on_bit_for_bit(self, tmp_path, family):
        """Experts are apart on disk; tied embeddings are there once."""
        base = saved(tmp_path / "base", tiny(family, 4))
        full = {"arguments": {"checkpoint_format": "full"}}
        straight = on(base, tmp_path / "out", **full)
        train(straight)
        resumed = on(base, tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert_close(bits(resumed.model), bits(straight.model), rtol=0, atol=0)

    def test_in_shards_or_pickled_are_read_as_well(self, base, tmp_path):
        full = {"arguments": {"checkpoint_format": "full"}}
        straight = on(base, tmp_path / "out", **full)
        train(straight)
        checkpoint = tmp_path / "out" / "checkpoint-1"
        whole = load_file(checkpoint / "model.safetensors")
        (checkpoint / "model.safetensors").unlink()
        names = sorted(whole)
        for index, part in enumerate((names[::2], names[1::2])):
            save_file({name: whole[name] for name in part}, checkpoint / f"{index}.safetensors")
        weight_map = {name: f"{index % 2}.safetensors" for index, name in enumerate(names)}
        (checkpoint / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        pickled = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-1"))
        (pickled / "model.safetensors.index.json").unlink()
        torch.save(whole, pickled / "pytorch_model.bin")
        for folder in (checkpoint, pickled):
            resumed = on(base, tmp_path / "again")
            resumed.train(resume_from_checkpoint=str(folder))
            assert_close(bits(resumed.model), bits(straight.model), rtol=0, atol=0)

    def test_that_are_damaged_or_none_are_refused(self, base, tmp_path):
        full = {"arguments": {"checkpoint_format": "full"}}
        on(base, tmp_path / "out", **full).train()
        file = tmp_path / "out" / "checkpoint-1" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        refused(on(base, tmp_path / "new"), file.parent, "cannot be read")
        file.unlink()
        refused(on(base, tmp_path / "new"), file.parent, "no valid checkpoint at .*neither a delta")

    @pytest.mark.parametrize("kind", ["list", "numbers", "index", "integers", "optimizer"])
    def test_that_hold_something_else_are_refused(self, base, tmp_path, kind):
        full = {"arguments": {"checkpoint_format": "full"}}
        on(base, tmp_path / "out", **full).train()
        folder = tmp_path / "out" / "checkpoint-1"
        file = folder / "model.safetensors"
        tensors = load_file(file)
        if kind in ("list", "numbers"):
            file.unlink()
            torch.save([1] if kind == "list" else {NAME: 3}, folder / "pytorch_model.bin")
        elif kind == "index":
            file.unlink()
            (folder / "model.safetensors.index.json").write_text('{"weight_map": "x"}')
        elif kind == "integers":
            save_file({**tensors, NAME: tensors[NAME].long()}, file)
        else:
            torch.save({"param_groups": [{}], "state": {}}, folder / "optimizer.pt")
        match = "damaged" if kind != "integers" else "torch.int64"
        refused(on(base, tmp_path / "new"), folder, match)

    def test_best_of_another_run_is_refused(self, base, tmp_path):
        on(base, tmp_path / "out", selection=None).train()
        trainer = on(base, tmp_path / "new", max_steps=1)
        trainer.train()
        trainer.state.best_model_checkpoint = str(tmp_path / "out" / "checkpoint-1")
        before = bits(trainer.model)
        with pytest.raises(FrozenTensorError, match="30 of 30"):
            trainer._load_best_model()
        assert_close(bits(trainer.model), before, rtol=0, atol=0)

    def test_of_a_model_that_is_not_of_transformers(self, tmp_path):
        class Stack(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

            def forward(self, x, labels=None):
                for layer in self.layers:
                    x = layer(x)
                return {"loss": ((x - labels) ** 2).mean()}

        class Masked(LayerMaskedMixin, Trainer):
            pass

        torch.manual_seed(0)
        model = Stack()
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rows = [{"x": torch.ones(4), "labels": torch.zeros(4)}] * 8
        for format_ in ("delta", "full"):
            args = TrainingArguments(
                output_dir=str(tmp_path / format_), save_steps=1, max_steps=2, use_cpu=True,
                report_to="none", remove_unused_columns=False, save_strategy="steps",
            )  # fmt: skip
            model.load_state_dict(start)
            options = {"args": args, "train_dataset": rows, "selection": 2}
            Masked(model, checkpoint_format=format_, **options).train()
            expected = bits(model)
            model.load_state_dict(start)
            again = Masked(model, checkpoint_format=format_, **options)
            again.train(resume_from_checkpoint=str(tmp_path / format_ / "checkpoint-1"))
            assert_close(bits(model), expected, rtol=0, atol=0)
