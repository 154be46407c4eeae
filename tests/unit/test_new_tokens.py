"""`also="new_tokens"`: which rows these are, and that nothing moves the others."""

import copy
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from layerrl import LayerSelection, load_delta, merge_delta, save_delta, select_layers
from layerrl.delta import DeltaBase, disabled
from layerrl.errors import DeltaError, FrozenTensorError, LauncherError, SelectionError
from layerrl.frozen import FrozenRecord
from layerrl.integrations import mask
from layerrl.precision import step_in_float32
from layerrl.rows import keep_rows
from layerrl.selection.exports import TOOLS
from layerrl.trained import TrainedLayers
from layerrl.trainer.launchers import refuse_launcher
from tests.grpo import make, tokenizer
from tests.models import tiny
from tests.optimizers import Averaging, Both, Flat, Lookahead, Nested
from tests.runs import assert_same_run, bits, optimizer_state, saved
from tests.unit.test_vocabulary import MARKS, chat, sft, silently  # noqa: F401

TOKENS = ["<answer>", "</answer>"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    saved(tmp_path / "base", tiny("llama", tie_word_embeddings=request.param))
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def with_tokens() -> Any:
    own = tokenizer()
    own.add_tokens(TOKENS)
    return own


def resized(base: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(66, mean_resizing=False)
    return model


def trainer_of(model: Any, folder: Path, selection: Any, **changes: Any) -> Any:
    arguments = {"processing_class": with_tokens()} | changes.pop("arguments", {})
    return make(model, folder, selection=selection, arguments=arguments, **changes)


def ends(model: PreTrainedModel) -> dict[str, Tensor]:
    return {EMBEDDING: model.get_input_embeddings().weight, HEAD: model.lm_head.weight}


def moved(model: PreTrainedModel, before: PreTrainedModel) -> set[tuple[int, ...]]:
    pairs = zip(ends(model).values(), ends(before).values(), strict=True)
    return {tuple((a != b).any(dim=1).nonzero().flatten().tolist()) for a, b in pairs}


def base_is_untied(base: Path) -> bool:
    return not json.loads((base / "config.json").read_text())["tie_word_embeddings"]


def made_here(
    model: PreTrainedModel, folder: Path, *, layers: int, name: str, also: str = "new_tokens:64-65"
) -> Path:
    """A delta of a layer and the new rows, all of which have moved."""
    selection, before = select_layers(model, layers, also=also), copy.deepcopy(model)
    with torch.no_grad():
        for end in {id(e): e for e in ends(model).values()}.values():
            end[[*selection.token_rows]] += 1
        model.model.layers[layers].mlp.up_proj.weight += 1
    return save_delta(model, folder / name, selection=selection, base=before)


class TestRows:
    def test_are_those_beyond_the_saved_vocabulary(self, base):
        model = resized(base)
        selection = select_layers(model, 1, also="new_tokens")
        assert selection.also == ("new_tokens:64-65",)
        assert selection.token_rows == (64, 65)
        assert str(selection) == "layer 1 of 3, also new_tokens:64-65"
        assert LayerSelection.from_json(selection.to_json()) == selection
        assert select_layers(model, selection) == selection
        assert selection.trains_below
        assert not selection.frozen_prefix

    def test_alone_need_no_layer(self, base):
        selection = select_layers(resized(base), also="new_tokens")
        assert str(selection) == "no layer of 3, also new_tokens:64-65"

    def test_may_be_named_in_any_order(self):
        model = tiny("llama")
        named = select_layers(model, 1, also="new_tokens:9, 3,4-6,60")
        assert named == select_layers(model, 1, also=["new_tokens:3-6,9,60"])
        assert named.token_rows == (3, 4, 5, 6, 9, 60)

    def test_of_a_config_are_not_known_yet(self):
        config = LlamaConfig(num_hidden_layers=3)
        selection = select_layers(config, 1, also="new_tokens")
        assert selection.also == ("new_tokens",)
        assert LayerSelection.from_json(selection.to_json()) == selection
        model = tiny("llama")
        for use in (
            lambda: selection.masked(model).__enter__(),
            lambda: TrainedLayers(model, selection),
            lambda: FrozenRecord(model, selection),
        ):
            with pytest.raises(SelectionError, match=r"names no rows yet: select_layers\(model"):
                use()

    def test_of_an_untied_head_are_those_of_its_bias_too(self):
        model = tiny("llama", tie_word_embeddings=False)
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
        layers = TrainedLayers(model, select_layers(model, also="new_tokens:63"))
        assert {*layers.parameters} == {EMBEDDING, HEAD, "lm_head.bias"}
        assert layers.frozen_rows["lm_head.bias"] == [slice(0, 63)]
        assert layers.num_training == 2 * 16 + 1

    def test_of_a_model_without_a_head_are_the_embedding_s(self):
        model = tiny("llama").model
        layers = TrainedLayers(model, select_layers(model, also="new_tokens:0,63"))
        assert layers.frozen_rows == {"embed_tokens.weight": [slice(1, 63)]}

    def test_beside_a_head_that_trains_as_a_whole(self):
        model = tiny("llama", tie_word_embeddings=False)
        layers = TrainedLayers(model, select_layers(model, also=["head", "new_tokens:63"]))
        assert {*layers.frozen_rows} == {EMBEDDING}
        assert [len(tensors) for tensors in layers.by_part.values()] == [1, 1]
        assert layers.num_training == 64 * 16 + 16

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_may_have_a_rate_of_their_own(self, tied, tmp_path):
        model = tiny("llama", tie_word_embeddings=tied)
        config = select_layers(model.config, 1, also="new_tokens", boost={"new_tokens": 3.0})
        assert config.boosts == ((None, "new_tokens", 3.0),)
        also = "new_tokens:63" if tied else ["head", "new_tokens:63"]
        selection = select_layers(model, 1, also=also, boost={"new_tokens": 3.0})
        trainer = make(model, tmp_path, selection=selection)
        groups = trainer.create_optimizer().param_groups
        fast = [p for group in groups for p in group["params"] if group["lr"] == 3e-2]
        assert fast == [model.get_input_embeddings().weight]


class TestRefused:
    @pytest.mark.parametrize(
        ("also", "match"),
        [
            ("new_tokens:", "does not name rows of the embedding: expected ids and ranges"),
            ("new_tokens:a", "does not name rows"),
            ("new_tokens:-1", "does not name rows"),
            ("new_tokens:6-5", "does not name rows"),
            ("new_tokens:5-7,6", r"names rows \[6\] twice"),
            ("new_tokens:5,5", r"names rows \[5\] twice"),
            (["new_tokens:5", "new_tokens:6"], "names new tokens 2 times"),
            (["new_tokens:5", "new_tokens"], "names new tokens 2 times"),
            (["new_tokens:5", "embeddings"], '"embeddings" trains all rows'),
            (["new_tokens:5", "*embed*"], r"'\*embed\*' trains the whole embedding already"),
            ("new_tokens:63-64", r"names the rows 64, and .* of LlamaForCausalLM has 64 \(0 to 63"),
        ],
    )
    def test_in_what_is_written(self, also, match):
        with pytest.raises(SelectionError, match=match):
            select_layers(tiny("llama"), 1, also=also)

    def test_a_tied_head_that_trains_as_a_whole(self):
        with pytest.raises(SelectionError, match="'head' trains the whole embedding already"):
            select_layers(tiny("llama", tie_word_embeddings=True), 1, also=["new_tokens:5", "head"])

    def test_with_full(self):
        with pytest.raises(SelectionError, match='"full" trains every parameter'):
            select_layers(tiny("llama"), "full", also="new_tokens")

    def test_where_none_were_added(self, base):
        model = AutoModelForCausalLM.from_pretrained(base)
        with pytest.raises(SelectionError, match=r"no row was added .* beyond what .*base was"):
            select_layers(model, 1, also="new_tokens")
        with pytest.raises(SelectionError, match=r"no row was added .* what it was made with"):
            select_layers(tiny("llama"), 1, also="new_tokens")

    def test_where_a_trainer_adds_none_either(self, base, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(base)
        selection = select_layers(model.config, 1, also="new_tokens")
        with pytest.raises(SelectionError, match="no row was added"):
            make(model, tmp_path, selection=selection)

    def test_where_the_tokenizer_s_have_no_rows(self, base, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(base)
        selection = select_layers(model.config, 1, also="new_tokens")
        with pytest.raises(SelectionError, match=r"2 tokens .* ids up to 65, .* has 64 rows"):
            trainer_of(model, tmp_path, selection)

    @pytest.mark.parametrize("plugin", ["fsdp_plugin", "deepspeed_plugin"])
    def test_under_launchers_that_shard(self, plugin):
        launcher: Any = SimpleNamespace(state=SimpleNamespace(**{plugin: object()}))
        selection = select_layers(tiny("llama"), 1, also="new_tokens:5")
        with pytest.raises(LauncherError, match="also new_tokens:5 under FSDP or DeepSpeed"):
            refuse_launcher(selection, launcher, quantised=False)

    @pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "lomo"])
    def test_with_optimizers_that_update_in_the_backward(self, base, tmp_path, optim):
        model = resized(base)
        selection = select_layers(model, 1, also="new_tokens")
        trainer = trainer_of(model, tmp_path, selection, optim=optim)
        with pytest.raises(SelectionError, match=f'new_tokens:64-65: optim="{optim}" updates'):
            trainer.train()

    def test_by_frameworks_whose_optimizers_are_their_own(self):
        model = tiny("llama")
        with pytest.raises(SelectionError, match="cannot be kept in an optimizer of this framew"):
            mask(model, select_layers(model, 1, also="new_tokens:5"))

    def test_beside_adapters(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = tiny("llama")
        selection = select_layers(model, 1, also="new_tokens:5")
        arguments = {"peft_config": peft.LoraConfig(target_modules=["q_proj"])}
        with pytest.raises(SelectionError, match="train the rows first, without adapters"):
            make(model, tmp_path, selection=selection, arguments=arguments)

    @pytest.mark.parametrize("tool", TOOLS)
    def test_by_other_tools(self, tool):
        model = tiny("llama")
        with pytest.raises(SelectionError, match=f"{tool} cannot be told to train"):
            select_layers(model, 1, also="new_tokens:5").to_config(tool, model)


class TestInATrainer:
    def test_nothing_is_refused_or_warned_of(self, base, tmp_path, caplog):
        model = resized(base)
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        selection = select_layers(model, 1, also="new_tokens")
        with caplog.at_level(logging.WARNING, "layerrl"):
            silently(trainer_of, model, tmp_path, selection)
        assert ("is tied to its embedding" in caplog.text) is tied

    def test_some_rows_of_several_are_still_warned_of(self, base, tmp_path):
        model = resized(base)
        with pytest.warns(UserWarning, match=r"the tokenizer has 1 token \('</answer>'\) that"):
            trainer_of(model, tmp_path, select_layers(model, 1, also="new_tokens:64"))

    def test_tokens_in_rows_that_were_padding_are_found_by_the_tokenizer(self, tmp_path):
        saved(tmp_path / "base", tiny("llama", vocab_size=80))
        tokenizer().save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        selection = select_layers(model.config, 1, also="new_tokens")
        trainer = silently(trainer_of, model, tmp_path, selection)
        assert trainer.selection.token_rows == (64, 65)

    @pytest.mark.parametrize("by", ["instance", "path", "nameless"])
    def test_tokens_that_the_trainer_adds_are_found(self, base, chat, tmp_path, by):  # noqa: F811
        model = AutoModelForCausalLM.from_pretrained(base)
        selection = select_layers(model.config, 1, also="new_tokens")
        if by == "nameless":
            model = tiny("llama")
        trainer = silently(
            sft, str(base) if by == "path" else model, tmp_path,
            selection=selection, chat_template_path=str(chat),
        )  # fmt: skip
        assert trainer.processing_class.convert_tokens_to_ids(MARKS) == [64, 65]
        assert trainer.selection.token_rows == tuple(range(64, 128))
        before = copy.deepcopy(trainer.model)
        trainer.train()
        rows = {row for rows in moved(trainer.model, before) for row in rows}
        assert rows <= {*range(64, 128)}
        assert rows >= {64, 65}

    def test_metrics_are_those_of_the_rows(self, base, tmp_path):
        model = resized(base)
        before = copy.deepcopy(model)
        selection = select_layers(model, 1, also="new_tokens")
        trainer = trainer_of(model, tmp_path, selection, weight_decay=0.1)
        trainer.train()
        tensors = {id(end): name for name, end in ends(model).items()}
        now = [ends(model)[name][64:] for name in tensors.values()]
        then = [ends(before)[name][64:] for name in tensors.values()]
        change = torch.stack([(a - b).norm() for a, b in zip(now, then, strict=True)]).norm()
        expected = change / torch.stack([rows.norm() for rows in then]).norm()
        log = trainer.state.log_history[-2]
        assert log["layerrl/relative_update/new_tokens"] == pytest.approx(expected.item(), rel=1e-5)
        norms = [log[f"layerrl/grad_norm/{part}"] for part in ("layer_1", "new_tokens")]
        assert log["grad_norm"] == pytest.approx(torch.tensor(norms).norm().item(), rel=1e-5)
        layer = sum(p.numel() for p in model.model.layers[1].parameters())
        assert log["layerrl/trained_parameters"] == layer + 2 * 16 * len(tensors)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("optimizer", [Averaging, Both, Flat, Lookahead, Nested])
    def test_no_optimizer_moves_another_row(self, base, tmp_path, optimizer, dtype):
        if dtype == torch.bfloat16 and optimizer is Flat:
            pytest.skip("steps a buffer that no float32 master is a view of")
        model = resized(base, dtype)
        before = copy.deepcopy(model)
        selection = select_layers(model, 1, also="new_tokens")
        made = optimizer(selection.parameters(model).values())
        for group in made.param_groups:
            group["weight_decay"] = 0.1
        trainer = trainer_of(model, tmp_path, selection, arguments={"optimizers": (made, None)})
        trainer.train()
        assert moved(model, before) == {(64, 65)}

    def test_masters_of_other_rows_stay_what_they_are(self, base, tmp_path):
        model = resized(base, torch.bfloat16)
        before = copy.deepcopy(model)
        selection = select_layers(model, 1, also="new_tokens")
        trainer = trainer_of(model, tmp_path, selection, weight_decay=0.1, learning_rate=1e-4)
        trainer.train()
        state = trainer.optimizer.state[model.get_input_embeddings().weight]
        old = before.get_input_embeddings().weight
        assert_close(state["master"][:64], old[:64].float(), rtol=0, atol=0)
        assert not torch.equal(state["master"][64:], old[64:].float())
        assert moved(model, before) <= {(64, 65), (64,), (65,), ()}

    def test_a_change_in_another_row_is_found(self, base, tmp_path):
        model = resized(base)
        selection = select_layers(model, 1, also="new_tokens")
        trainer = trainer_of(model, tmp_path, selection)
        with torch.no_grad():
            model.lm_head.weight[65] += 1
            trainer.check_frozen()
            model.lm_head.weight[63] += 1
        with pytest.raises(FrozenTensorError, match=r"weight\[0:64\]"):
            trainer.check_frozen()

    def test_hooks_are_there_while_it_trains_alone(self, base, tmp_path):
        model = resized(base)
        trainer = trainer_of(model, tmp_path, select_layers(model, 1, also="new_tokens"))

        def old_rows_get_gradients() -> bool:
            model.zero_grad()
            weight = model.get_input_embeddings().weight.requires_grad_(True)
            model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
            return bool(weight.grad[:64].any())

        assert old_rows_get_gradients()
        trainer.train()
        assert old_rows_get_gradients()

    def test_an_optimizer_that_is_used_again_keeps_what_the_next_one_says(self, base, tmp_path):
        model = resized(base)
        rows, all_rows = (
            select_layers(model, 1, also=also) for also in ("new_tokens", ("embeddings", "head"))
        )
        optimizer = torch.optim.AdamW(rows.parameters(model).values(), lr=1e-2, weight_decay=0.1)
        for selection, fewest in ((rows, 2), (all_rows, 60)):
            before = copy.deepcopy(model)
            arguments = {"optimizers": (optimizer, None)}
            trainer_of(model, tmp_path, selection, arguments=arguments).train()
            assert all(len(each) >= fewest for each in moved(model, before))
            assert (moved(model, before) == {(64, 65)}) is (selection == rows)


class TestOfOnesOwnLoop:
    def test_the_gradient_of_other_rows_is_zero_inside(self, base):
        model = resized(base)
        selection = select_layers(model, 1, also="new_tokens")
        ids = torch.tensor([[5, 64, 6]])
        with selection.masked(model):
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
            for weight in ends(model).values():
                assert not weight.grad[:64].any()
                assert weight.grad[64:].any()
        model.zero_grad()
        model.requires_grad_(True)
        model(input_ids=ids, labels=ids).loss.backward()
        assert model.lm_head.weight.grad[:64].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_an_optimizer_can_be_told_to_keep_them(self, base, dtype):
        model = resized(base, dtype)
        before = copy.deepcopy(model)
        layers = TrainedLayers(model, select_layers(model, also="new_tokens"))
        optimizer = torch.optim.SGD(layers.parameters.values(), lr=0.5, weight_decay=0.5)
        for _ in range(2):
            keep_rows(optimizer, layers)
            step_in_float32(optimizer)
        for parameter in layers.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert moved(model, before) == {(64, 65)}
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(
                SelectionError, match=r"copy of this SGD, .* would not keep the other"
            ):
                copied(optimizer)


class TestOnDisk:
    @pytest.mark.parametrize("checkpoint_format", ["delta", "full"])
    @pytest.mark.parametrize("beta", [0.0, 0.04])
    def test_resuming_goes_on_as_if_nothing_had_happened(
        self, base, tmp_path, checkpoint_format, beta
    ):
        def trainer(name: str, **changes: Any) -> Any:
            model = resized(base)
            selection = select_layers(model, 1, also="new_tokens")
            values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "beta": beta}
            values |= {"weight_decay": 0.1, "arguments": {"checkpoint_format": checkpoint_format}}
            return trainer_of(model, tmp_path / name, selection, **(values | changes))

        through, resumed = trainer("through"), trainer("resumed")
        through.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
        assert_close(bits(resumed.model), bits(through.model), rtol=0, atol=0)
        assert_close(optimizer_state(resumed), optimizer_state(through), rtol=0, atol=0)
        assert moved(resumed.model, resized(base)) == {(64, 65)}

    def test_a_whole_model_with_another_old_row_is_not_resumed_from(self, base, tmp_path):
        def trainer(model: Any) -> Any:
            selection = select_layers(model, 1, also="new_tokens")
            values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
            arguments = {"checkpoint_format": "full"}
            return trainer_of(model, tmp_path / "out", selection, arguments=arguments, **values)

        other = resized(base)
        with torch.no_grad():
            other.lm_head.weight[3] += 1
        trainer(other).train()
        model = resized(base)
        with pytest.raises(FrozenTensorError, match=r"weight\[0:64\]\. It is another base's"):
            trainer(model).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert_close(bits(model), bits(resized(base)), rtol=0, atol=0)

    def test_a_delta_fits_the_model_with_resized_embeddings(self, base, tmp_path):
        model = resized(base)
        model.save_pretrained(tmp_path / "resized")
        trainer = trainer_of(model, tmp_path, select_layers(model, 1, also="new_tokens"))
        trainer.train()
        delta = trainer.save_delta(tmp_path / "delta")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
        assert load_delta(loaded, delta) == trainer.selection
        assert_close(bits(loaded), bits(model), rtol=0, atol=0)
        merge_delta(tmp_path / "resized", delta, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_close(bits(merged), bits(model), rtol=0, atol=0)
        with pytest.raises(DeltaError, match="base with resized embeddings, saved"):
            merge_delta(base, delta, tmp_path / "wrong")

    def test_a_delta_holds_these_rows_and_no_other(self, base, tmp_path):
        model, untied = resized(base), base_is_untied(base)
        made_here(model, tmp_path, layers=1, name="delta")
        held = load_file(tmp_path / "delta" / "delta.safetensors")
        rows = {name: len(held[name]) for name in (EMBEDDING, HEAD) if name in held}
        assert rows == {EMBEDDING: 2} | ({HEAD: 2} if untied else {})
        described = json.loads((tmp_path / "delta" / "delta.json").read_text())
        assert described["format_version"] == 3
        assert described["tensors"][EMBEDDING]["shape"] == [66, 16]
        card = (tmp_path / "delta" / "README.md").read_text()
        layer = sum(p.numel() for p in model.model.layers[1].parameters())
        assert f"({layer + 2 * 16 * len(rows):,} of " in card

    def test_deltas_of_rows_stack(self, base, tmp_path):
        first, last = resized(base), resized(base)
        first.save_pretrained(tmp_path / "resized")
        one = made_here(first, tmp_path, layers=1, name="one")
        load_delta(last, one)
        two = made_here(last, tmp_path, layers=2, name="two")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
        load_delta(loaded, [one, two], keep_base=True)
        assert_close(bits(loaded), bits(last), rtol=0, atol=0)
        with disabled(loaded):
            assert_close(bits(loaded), bits(resized(base)), rtol=0, atol=0)
        merge_delta(tmp_path / "resized", [one, two], tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_close(bits(merged), bits(last), rtol=0, atol=0)

    def test_deltas_of_rows_and_of_a_layer_unite(self, base, tmp_path):
        model, other = resized(base), resized(base)
        model.save_pretrained(tmp_path / "resized")
        deltas = [made_here(model, tmp_path, layers=1, name="rows")]
        selection, before = select_layers(other, 2), copy.deepcopy(other)
        with torch.no_grad():
            other.model.layers[2].mlp.up_proj.weight += 1
            model.model.layers[2].mlp.up_proj.weight += 1
        deltas.append(save_delta(other, tmp_path / "two", selection=selection, base=before))
        for order in (deltas, deltas[::-1]):
            loaded = resized(base)
            load_delta(loaded, order, union=True)
            assert_close(bits(loaded), bits(model), rtol=0, atol=0)
        merge_delta(tmp_path / "resized", deltas, tmp_path / "merged", union=True)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_close(bits(merged), bits(model), rtol=0, atol=0)

    def test_a_delta_with_whole_tensors_is_read_as_before(self, base, tmp_path, monkeypatch):
        monkeypatch.setattr("layerrl.delta.names_by_rows", lambda *_: set())
        model = resized(base)
        made_here(model, tmp_path, layers=1, name="delta")
        assert json.loads((tmp_path / "delta" / "delta.json").read_text())["format_version"] == 2
        loaded = resized(base)
        load_delta(loaded, tmp_path / "delta")
        assert_close(bits(loaded), bits(model), rtol=0, atol=0)

    def test_a_delta_in_bfloat16_fits_the_base_in_float32(self, base, tmp_path):
        resized(base, torch.bfloat16).save_pretrained(tmp_path / "narrow")
        model = resized(base, torch.bfloat16)
        delta = made_here(model, tmp_path, layers=1, name="delta")
        wide = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
        load_delta(wide, delta)
        assert_close(bits(wide), bits(model.float()), rtol=0, atol=0)

    def test_of_rows_on_a_stage_that_was_merged_and_rounded(self, base, tmp_path):
        """The second stage was made from rows that float32 holds and bfloat16 had rounded."""
        resized(base, torch.bfloat16).save_pretrained(tmp_path / "narrow")
        wide = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
        stages = [made_here(wide, tmp_path, layers=1, name="one", also="new_tokens:8-9")]
        merge_delta(tmp_path / "narrow", stages[0], tmp_path / "first")
        wide = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
        stages.append(made_here(wide, tmp_path, layers=2, name="two"))
        merge_delta(tmp_path / "narrow", stages, tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.bfloat16)
        load_delta(loaded, stages)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
        wide.to(torch.bfloat16)
        assert_close(bits(merged), bits(wide), rtol=0, atol=0)
        assert_close(bits(loaded), bits(wide), rtol=0, atol=0)

    def test_a_model_that_trained_in_float32_on_a_bfloat16_record(self, base, tmp_path):
        model = resized(base, torch.bfloat16)
        model.save_pretrained(tmp_path / "narrow")
        selection = select_layers(model, 1, also="new_tokens")
        record = DeltaBase.of(model, selection)
        model.float()
        with torch.no_grad():
            model.lm_head.weight[65] += 1e-4
        save_delta(model, tmp_path / "delta", selection=selection, base=record)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
        load_delta(loaded, tmp_path / "delta")
        assert_close(bits(loaded), bits(model), rtol=0, atol=0)
        with torch.no_grad():
            model.lm_head.weight[3] += 1
        with pytest.raises(DeltaError, match=r"weight\[0:64\]"):
            save_delta(model, tmp_path / "other", selection=selection, base=record)

    def test_damaged_rows_are_refused(self, base, tmp_path):
        made_here(resized(base), tmp_path, layers=1, name="delta")
        file = tmp_path / "delta" / "delta.safetensors"
        held = load_file(file)
        held[EMBEDDING][1, 3] += 1
        save_file(held, file)
        model = resized(base)
        with pytest.raises(DeltaError, match=f"is damaged: fingerprint of '{EMBEDDING}'"):
            load_delta(model, tmp_path / "delta")
        assert_close(bits(model), bits(resized(base)), rtol=0, atol=0)

    @pytest.mark.parametrize("recorded", [True, False], ids=["record", "model"])
    def test_a_delta_is_not_saved_of_other_rows_that_moved(self, base, tmp_path, recorded):
        model = resized(base)
        selection = select_layers(model, 1, also="new_tokens")
        before = DeltaBase.of(model, selection) if recorded else copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight[65] += 1
            save_delta(model, tmp_path / "one", selection=selection, base=before)
            model.lm_head.weight[3] += 1
        with pytest.raises(DeltaError, match=r"weight\[0:64\]"):
            save_delta(model, tmp_path / "other", selection=selection, base=before)


def test_a_plan_counts_the_whole_embedding():
    """Gradient, optimizer state and copies are those of the tensor, of which few rows train."""
    model = tiny("llama", tie_word_embeddings=False)
    rows = select_layers(model, also="new_tokens:63").plan(model)
    whole = select_layers(model, also=["embeddings", "head"]).plan(model)
    assert rows == whole


def test_runs_repeat(base, tmp_path):
    def run(name: str) -> Any:
        model = resized(base)
        trainer = trainer_of(model, tmp_path / name, select_layers(model, 1, also="new_tokens"))
        trainer.train()
        return trainer

    assert_same_run(run("one"), run("two"))
