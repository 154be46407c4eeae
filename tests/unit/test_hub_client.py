"""Deltas over the hub and back, with huggingface_hub's own client and a server of the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerrl import load_delta, merge_delta, save_delta, select_layers
from layerrl.delta import DeltaBase, push_delta
from layerrl.errors import DeltaError
from tests import hub as hubs
from tests.grpo import make, tokenizer
from tests.hub import OTHER, READS, WRITES, Hub
from tests.models import tiny
from tests.runs import bits, load, saved

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hubs.served() as hub, hubs.at(hub.url, tmp_path / "cache", token=WRITES):
        yield hub


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


def assert_round_trip(base: Path, trained: Any, out: Path, name: str, **options: Any) -> None:
    """Loaded from the hub or merged from it, the base is what was trained, bit for bit."""
    model = load(base)
    load_delta(model, name, **options)
    assert_close(bits(model), bits(trained), rtol=0, atol=0)
    merge_delta(base, name, out, **options)
    assert_close(bits(load(out)), bits(trained), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer().get_vocab()


def made(base: Path, path: Path, *, by: float = 1.0, layers: Any = 2) -> Any:
    """A delta of the base with one layer changed, and the model that it makes of it."""
    model = load(base)
    selection = select_layers(model, layers)
    before = DeltaBase.of(model, selection)
    with torch.no_grad():
        for parameter in selection.parameters(model).values():
            parameter.add_(by)
    save_delta(model, path, selection=selection, base=before, processing_class=tokenizer())
    return model


class TestATrainer:
    def trained(self, base: Path, folder: Path, **changes: Any) -> Any:
        values = {
            "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "push_to_hub": True,
            "hub_model_id": "me/delta", "hub_always_push": True,
        }  # fmt: skip
        trainer = make(load(base), folder / "out", selection=2, **(values | changes))
        trainer.train()
        return trainer

    @pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
    def test_pushes_its_result_at_each_save(self, hub, base, tmp_path, strategy):
        trainer = self.trained(base, tmp_path, hub_strategy=strategy)
        pushed = [m for m in hub.repositories["me/delta"].messages if "checkpoint" not in m]
        # The push of step 1 may find the files of step 2, whose own push then has nothing to add.
        assert pushed[-1].startswith("Training in progress, step ")
        with hubs.at(hub.url, tmp_path / "another cache"):
            assert_round_trip(base, trainer.model, tmp_path / "merged", "me/delta")

    def test_pushes_a_card_that_says_how_it_was_made(self, hub, base, tmp_path):
        self.trained(base, tmp_path)
        text = hub.repositories["me/delta"].files()["README.md"].decode()
        card = ModelCard(text)
        assert card.data.library_name == "layerrl"
        assert {"layerrl", "trl", "grpo"} <= {*card.data.tags}
        assert 'layerrl.load_delta(model, "me/delta")' in text
        assert "| steps | reward | loss |" in text
        assert "| 2 | " in text
        assert "Trained with GRPO: 2 steps" in text
        assert text.count("layerrl run: begin") == 1

    def test_pushes_a_private_repository(self, hub, base, tmp_path):
        trainer = self.trained(base, tmp_path, hub_private_repo=True)
        with hubs.at(hub.url, tmp_path / "another cache"):
            with pytest.raises(DeltaError, match=r"a private one that a caller without a token"):
                load_delta(load(base), "me/delta")
            with pytest.raises(DeltaError, match=r"a private one that this token may not"):
                load_delta(load(base), "me/delta", token=OTHER)
            assert_round_trip(base, trainer.model, tmp_path / "out2", "me/delta", token=READS)

    def test_pushes_the_whole_model_when_it_is_told_to(self, hub, base, tmp_path):
        trainer = self.trained(base, tmp_path, hub_strategy="end")
        trainer.push_to_hub()
        with hubs.at(hub.url, tmp_path / "another cache"):
            model = AutoModelForCausalLM.from_pretrained("me/delta", dtype=torch.float32)
            assert_close(bits(model), bits(trainer.model), rtol=0, atol=0)
            assert_round_trip(base, trainer.model, tmp_path / "merged", "me/delta")
            names = {file.name for file in (tmp_path / "another cache").rglob("*")}
            assert "training_args.bin" not in names

    def test_saves_a_delta_to_push_later(self, hub, base, tmp_path):
        trainer = make(load(base), tmp_path / "out", selection=2, max_steps=2)
        trainer.train()
        trainer.save_delta(tmp_path / "delta")
        assert 'load_delta(model, "path/to/this/folder")' in (
            tmp_path / "delta" / "README.md"
        ).read_text(encoding="utf-8")
        push_delta(tmp_path / "delta", "me/delta")
        text = hub.repositories["me/delta"].files()["README.md"].decode()
        assert 'load_delta(model, "me/delta")' in text
        assert "| steps | reward | loss |" in text
        assert_round_trip(base, trainer.model, tmp_path / "merged", "me/delta")

    def test_says_that_it_may_not_write_before_it_trains(self, hub, base, tmp_path):
        with pytest.raises(DeltaError, match=r"cannot push to 'you/x': the token is not"):
            make(load(base), tmp_path, selection=2, push_to_hub=True, hub_model_id="you/x")

    def test_says_what_became_of_a_push_that_failed(self, hub, base, tmp_path):
        trainer = make(
            load(base), tmp_path / "out", selection=2, push_to_hub=True, save_strategy="steps",
            save_steps=1, max_steps=1, hub_model_id="me/delta",
        )  # fmt: skip
        hub.closed = "storage quota is exceeded"
        with pytest.warns(UserWarning, match=r"was not pushed: .*storage quota is exceeded"):
            trainer.train()
        with pytest.raises(DeltaError, match=r"cannot push to 'me/delta': .*quota is exceeded"):
            trainer.push_to_hub()


class TestPushing:
    def test_pushes_the_delta_and_nothing_else(self, hub, base, tmp_path):
        made(base, tmp_path / "delta")
        (tmp_path / "delta" / "optimizer.pt").write_bytes(b"0" * 100)
        (tmp_path / "delta" / "notes.txt").write_text("mine")
        before = (tmp_path / "delta" / "README.md").read_bytes()
        commit = push_delta(tmp_path / "delta", "me/delta", commit_message="One layer")
        repository = hub.repositories["me/delta"]
        assert repository.messages[-1] == "One layer"
        assert commit.oid == repository.branches["main"]
        assert commit.commit_url == f"{hub.url}/me/delta/commit/{commit.oid}"
        written = set(json.loads((tmp_path / "delta" / "delta.json").read_bytes())["files"])
        expected = {"delta.json", "delta.safetensors", "README.md", ".gitattributes", *written}
        assert {*repository.files()} == expected
        assert (tmp_path / "delta" / "README.md").read_bytes() == before

    def test_only_the_delta_comes_back(self, hub, base, tmp_path):
        model = made(base, tmp_path / "delta")
        push_delta(tmp_path / "delta", "me/delta")
        HfApi().upload_file(
            path_or_fileobj=b"0" * 100, path_in_repo="model.safetensors", repo_id="me/delta"
        )
        assert_round_trip(base, model, tmp_path / "merged", "me/delta")
        assert not [r for r in hub.requests if r.endswith("/model.safetensors")]

    def test_a_revision_is_a_branch_or_a_commit(self, hub, base, tmp_path):
        first = made(base, tmp_path / "first")
        second = made(base, tmp_path / "second", by=2.0)
        commit = push_delta(tmp_path / "first", "me/delta")
        push_delta(tmp_path / "second", "me/delta", revision="longer")
        assert_round_trip(base, first, tmp_path / "main", "me/delta")
        assert_round_trip(base, second, tmp_path / "branch", "me/delta", revision="longer")
        push_delta(tmp_path / "second", "me/delta")
        assert_round_trip(base, first, tmp_path / "commit", "me/delta", revision=commit.oid)
        with pytest.raises(DeltaError, match=r"no revision 'v9': it has main, longer"):
            load_delta(load(base), "me/delta", revision="v9")

    def test_a_private_repository_is_asked_for_and_checked(self, hub, base, tmp_path):
        made(base, tmp_path / "delta")
        push_delta(tmp_path / "delta", "me/secret", private=True)
        assert hub.repositories["me/secret"].private
        push_delta(tmp_path / "delta", "me/open")
        with pytest.raises(DeltaError, match=r"exists and is public, expected private=True"):
            push_delta(tmp_path / "delta", "me/open", private=True)

    @pytest.mark.parametrize(
        ("name", "token", "message"),
        [
            ("you/delta", WRITES, r"not allowed to write there.*right to write to 'you'"),
            ("me/delta", READS, r"not allowed to write there"),
            ("me/delta", "hf_wrong", r"the token is not valid\. Log in"),
            ("me/delta", False, r"no token was given\. Log in"),
            ("a/b/c", WRITES, r"no name of a repository, expected 'user/name'"),
        ],
    )
    def test_says_why_it_cannot(self, hub, base, tmp_path, name, token, message):
        made(base, tmp_path / "delta")
        with pytest.raises(DeltaError, match=message):
            push_delta(tmp_path / "delta", name, token=token)
        assert not hub.repositories

    def test_a_repository_of_somebody_else(self, hub, base, tmp_path):
        made(base, tmp_path / "delta")
        push_delta(tmp_path / "delta", "me/delta")
        with pytest.raises(DeltaError, match=r"not allowed to write there"):
            push_delta(tmp_path / "delta", "me/delta", token=OTHER)

    def test_no_delta_is_no_push(self, hub, base, tmp_path):
        with pytest.raises(DeltaError, match=r"no delta at .*base: delta.json is missing"):
            push_delta(base, "me/delta")
        made(base, tmp_path / "delta")
        (tmp_path / "delta" / "tokenizer.json").unlink()
        with pytest.raises(DeltaError, match=r"tokenizer.json is missing"):
            push_delta(tmp_path / "delta", "me/delta")
        assert len(hub.repositories.get("me/delta", hubs.Repository(False)).commits) <= 1

    def test_stages_and_a_folder_of_the_same_name(self, hub, base, tmp_path, monkeypatch):
        made(base, tmp_path / "first")
        push_delta(tmp_path / "first", "me/first")
        merge_delta(base, "me/first", tmp_path / "stage")
        model = made(tmp_path / "stage", tmp_path / "second", layers=3)
        commit = push_delta(tmp_path / "second", "me/second")
        merge_delta(base, ["me/first", tmp_path / "second"], tmp_path / "mixed")
        revisions = [None, commit.oid]
        merge_delta(base, ["me/first", "me/second"], tmp_path / "both", revision=revisions)
        for out in ("mixed", "both"):
            assert_close(bits(load(tmp_path / out)), bits(model), rtol=0, atol=0)
        with pytest.raises(DeltaError, match=r"for 2 deltas: expected one for each"):
            merge_delta(base, ["me/first", "me/second"], tmp_path / "x", revision=["main"])
        monkeypatch.chdir(tmp_path)
        local = made(base, tmp_path / "me" / "first", by=5.0)
        target = load(base)
        load_delta(target, "me/first")
        assert_close(bits(target), bits(local), rtol=0, atol=0)
        with pytest.raises(DeltaError, match=r"revision='main' was given .* which is a folder"):
            load_delta(load(base), "me/first", revision="main")


class TestWhatIsNoDelta:
    def repository(self, *names: str) -> None:
        api = HfApi()
        api.create_repo("me/x")
        for name in names:
            api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="me/x")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["config.json", "model.safetensors"], r"a whole model.*from_pretrained\('me/x'\)"),
            (["model-00001-of-00002.safetensors"], r"a whole model"),
            (["adapter_config.json", "adapter_model.safetensors"],
             r"a PEFT adapter .*PeftModel\.from_pretrained\(model, 'me/x'\)"),
            (["last-checkpoint/delta.json"], r"further down \(last-checkpoint/delta\.json\)"),
            (["notes.txt"], r"no delta at its top \(delta\.json\) but \.gitattributes, notes\.txt"),
        ],
    )  # fmt: skip
    def test_is_named(self, hub, base, names, message):
        self.repository(*names)
        with pytest.raises(DeltaError, match=message):
            load_delta(load(base), "me/x")

    def test_half_a_delta(self, hub, base, tmp_path):
        made(base, tmp_path / "delta")
        HfApi().create_repo("me/x")
        HfApi().upload_folder(
            repo_id="me/x", folder_path=tmp_path / "delta", ignore_patterns="*.safetensors"
        )
        with pytest.raises(DeltaError, match=r"no delta at .*: delta\.safetensors is missing"):
            load_delta(load(base), "me/x")

    def test_no_repository(self, hub, base):
        with pytest.raises(DeltaError, match=r"no such folder here, and the hub .* has no such"):
            load_delta(load(base), "me/typo")

    def test_what_else_the_hub_says(self, hub, base):
        hub.forbidden = "this token reads other repositories"
        message = r"says: this token reads other repositories \(status 403\)"
        with pytest.raises(DeltaError, match=message):
            load_delta(load(base), "me/x")

    def test_of_another_base(self, hub, base, tmp_path):
        model = made(base, tmp_path / "delta")
        push_delta(tmp_path / "delta", "me/delta")
        name = str(base)
        changed = load(base)
        changed.config.rms_norm_eps *= 2
        for other in (tiny("llama", 6), tiny("qwen2", 4), tiny("llama", 4, seed=1), changed):
            with pytest.raises(DeltaError) as raised:
                load_delta(other, "me/delta")
            assert name in str(raised.value)
        with pytest.raises(DeltaError, match="is already in this model"):
            load_delta(model, "me/delta")

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"files": 5}', "{", "null"])
    def test_a_damaged_description(self, hub, base, tmp_path, text):
        made(base, tmp_path / "delta")
        (tmp_path / "delta" / "delta.json").write_text(text)
        HfApi().create_repo("me/delta")
        HfApi().upload_folder(repo_id="me/delta", folder_path=tmp_path / "delta")
        with pytest.raises(DeltaError, match=r"delta\.json is damaged"):
            load_delta(load(base), "me/delta")

    @pytest.mark.parametrize("given", [None, 3, [None]])
    def test_no_path(self, given):
        with pytest.raises(DeltaError, match="expected a delta's folder or 'user/name' on"):
            load_delta(tiny("llama", 4), given)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"revision": ""}, "revision is ''"),
            ({"revision": 5}, "revision is 5"),
            ({"revision": b"main"}, "revision is b'main'"),
            ({"token": ""}, "token is '', expected a text"),
            ({"token": 5}, "token is 5, expected a text"),
            ({"token": "hf_x\n"}, "token holds characters that no token"),
            ({"token": "hf_é"}, "token holds characters that no token"),
        ],
    )
    def test_no_revision_or_token(self, base, tmp_path, option, message):
        made(base, tmp_path / "delta")
        for act in (
            lambda: load_delta(load(base), "me/delta", **option),
            lambda: merge_delta(base, ["me/delta"], tmp_path / "out", **option),
            lambda: push_delta(tmp_path / "delta", "me/delta", **option),
        ):
            with pytest.raises(DeltaError, match=message):
                act()

    @pytest.mark.parametrize("given", [{"repo_id": None}, {"commit_message": 5}])
    def test_no_names_to_push_with(self, base, tmp_path, given):
        made(base, tmp_path / "delta")
        with pytest.raises(DeltaError, match=f"{next(iter(given))} is .*, expected a text"):
            push_delta(tmp_path / "delta", **{"repo_id": "me/delta", **given})


class TestWithoutAHub:
    def test_what_was_fetched_once_is_there(self, hub, base, tmp_path):
        model = made(base, tmp_path / "delta")
        push_delta(tmp_path / "delta", "me/delta")
        load_delta(load(base), "me/delta")
        with hubs.at(hub.url, tmp_path / "cache", offline=True):
            assert_round_trip(base, model, tmp_path / "offline", "me/delta")
        with hubs.at("http://127.0.0.1:9", tmp_path / "cache"):
            assert_round_trip(base, model, tmp_path / "unplugged", "me/delta")

    @pytest.mark.parametrize(
        ("offline", "message"),
        [(True, r"HF_HUB_OFFLINE is set"), (False, r"127\.0\.0\.1:9\) cannot be reached")],
    )
    def test_what_was_not_is_a_sentence(self, base, tmp_path, offline, message):
        made(base, tmp_path / "delta")
        with hubs.at("http://127.0.0.1:9", tmp_path / "empty", token=WRITES, offline=offline):
            with pytest.raises(DeltaError, match=rf"not whole in the hub's cache .*{message}"):
                load_delta(load(base), "me/delta")
            with pytest.raises(DeltaError, match=rf"cannot push to 'me/delta': .*{message}"):
                push_delta(tmp_path / "delta", "me/delta")

    def test_with_the_environment_of_a_user(self, hub, base, tmp_path):
        """`HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN`, as another process has them."""
        made(base, tmp_path / "delta")
        push_delta(tmp_path / "delta", "me/delta", private=True)
        code = (
            "import layerrl, sys, transformers\n"
            "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
            "print(layerrl.load_delta(model, 'me/delta'))"
        )
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITES,
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        ran = subprocess.run(
            [sys.executable, "-c", code, str(base)], env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert ran.stdout == "layer 2 of 4\n", ran.stderr
