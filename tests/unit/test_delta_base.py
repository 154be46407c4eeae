"""A base is the whole base: every tensor, the vocabulary, the config, the files that go with it."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from layerrl import LayerSelection, load_delta, merge_delta, save_delta, select_layers
from layerrl.delta import DeltaBase
from layerrl.delta import record as record_module
from layerrl.digests import json_digest
from layerrl.errors import DeltaError
from layerrl.frozen import fingerprints, frozen_tensors
from tests.grpo import make, tokenizer
from tests.models import FAMILIES, tiny
from tests.runs import bits, load, restore_delta, train

INDEX = "model.safetensors.index.json"
NORM, HEAD = "model.norm.weight", "lm_head.weight"
VERSION_1 = Path(__file__).parent / "data" / "delta-v1"


def change(model: nn.Module, selection: LayerSelection, seed: int = 1) -> None:
    """What training does: other values in every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in selection.parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def stage(model: nn.Module, layers: Any, path: Path, *, seed: int = 1, **options: Any) -> Path:
    """Train some layers of a model and save the delta."""
    selection = select_layers(model, layers)
    base = DeltaBase.of(model, selection)
    change(model, selection, seed)
    return save_delta(model, path, selection=selection, base=base, **options)


def reload(folder: Path, like: nn.Module, **options: Any) -> PreTrainedModel:
    return type(like).from_pretrained(folder, **options)


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert_close(bits(model), expected, rtol=0, atol=0)


@contextmanager
def refused(*messages: str, model: nn.Module | None = None) -> Iterator[None]:
    """A DeltaError that says all this and changes no weight."""
    before = bits(model) if model is not None else {}
    with pytest.raises(DeltaError) as error:
        yield
    for message in messages:
        assert message in str(error.value)
    if model is not None:
        assert_same(model, before)


def everywhere_refused(other: PreTrainedModel, delta: Path, under: Path, *messages: str) -> None:
    """A delta fits a model neither in memory, nor on disk, nor in a run that starts from it."""
    other.save_pretrained(under / "other")
    with refused(*messages, model=other):
        load_delta(other, delta)
    with refused(*messages):
        merge_delta(under / "other", delta, under / "out")
    assert not (under / "out").exists()
    meta = json.loads((delta / "delta.json").read_text())
    selection = LayerSelection.from_json(json.dumps(meta["selection"]))
    with refused(model=other):
        restore_delta(other, delta, selection=selection, base=DeltaBase.of(other, selection))


def rewrite(delta: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a description, with a valid checksum."""
    meta = json.loads((delta / "delta.json").read_text())
    del meta["sha256"]
    edit(meta)
    with suppress(KeyError, TypeError, AttributeError):  # an edit may leave nothing to sum
        tensors, frozen = meta["tensors"], meta["base"]["frozen"]
        marks = {n: v["base_fingerprint"] for n, v in tensors.items()}
        marks |= {n: v["fingerprint"] for n, v in frozen.items()}
        meta["result"] = json_digest(marks | {n: v["fingerprint"] for n, v in tensors.items()})
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (delta / "delta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folders `base`, a tiny Llama, and `delta`, of its layer 1. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny("llama")
    model.save_pretrained(folder / "base")
    stage(model, 1, folder / "delta")
    return folder


@pytest.fixture
def delta(made, tmp_path) -> Path:
    """A delta to damage."""
    return Path(shutil.copytree(made / "delta", tmp_path / "delta"))


@pytest.fixture
def base(made, tmp_path) -> Path:
    """A base to damage."""
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


class TestRecord:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_names_and_values_are_those_of_the_checkpoint(self, tmp_path, family):
        model = tiny(family)
        model.save_pretrained(tmp_path)
        record = DeltaBase.of(model, select_layers(model, 1))
        saved = load_file(tmp_path / "model.safetensors")
        assert record.fingerprints == fingerprints(saved)
        assert record.shapes == {name: list(tensor.shape) for name, tensor in saved.items()}
        assert record.vocabulary == 64

    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3"])
    def test_takes_the_fingerprints_of_what_is_frozen(self, family, monkeypatch):
        model = tiny(family)
        selection = select_layers(model, 1)
        expected = DeltaBase.of(model, selection)
        frozen = fingerprints(frozen_tensors(model, selection))
        read: list[int] = []

        def spy(tensors: dict[str, Tensor], **how: Any) -> dict[str, str]:
            read.extend(tensor.numel() for tensor in tensors.values())
            return fingerprints(tensors, **how)

        monkeypatch.setattr(record_module, "fingerprints", spy)
        assert DeltaBase.of(model, selection, frozen=frozen) == expected
        trained = sum(p.numel() for p in selection.parameters(model).values())
        converted = family == "qwen3_moe"
        assert (sum(read) > trained) == converted
        assert sum(read) >= trained

    def test_holds_persistent_buffers_and_shared_tensors(self):
        model = tiny("llama", tie_word_embeddings=True)
        model.model.register_buffer("bias", torch.arange(3))
        record = DeltaBase.of(model, select_layers(model, 1))
        assert record.dtypes["model.bias"] == "int64"
        assert record.tied == {HEAD: "model.embed_tokens.weight"}
        assert HEAD not in record.fingerprints


def one_ulp(model: PreTrainedModel, name: str) -> None:
    tensor = model.get_parameter(name).data.view(-1)
    tensor[0] = torch.nextafter(tensor[0], torch.tensor(9.0))


class TestAnotherTensor:
    """The trained tensors are as they were; something else is not."""

    @pytest.mark.parametrize(
        ("name", "where"),
        [
            ("model.layers.0.mlp.up_proj.weight", "layer 0 of 'model.layers'"),
            ("model.layers.2.input_layernorm.weight", "layer 2 of 'model.layers'"),
            ("model.embed_tokens.weight", "differ: model.embed_tokens.weight"),
            (NORM, f"differ: {NORM}"),
            (HEAD, f"differ: {HEAD}"),
        ],
    )
    def test_in_one_bit(self, made, tmp_path, name, where):
        other = tiny("llama")
        one_ulp(other, name)
        messages = f"{name!r} is not the frozen tensor", "1 of 30 recorded", where
        everywhere_refused(other, made / "delta", tmp_path, *messages, "[stage1, stage2]")

    def test_a_merged_adapter(self, made, tmp_path):
        other = tiny("llama")
        for layer in other.model.layers[:1] + other.model.layers[2:]:
            layer.self_attn.q_proj.weight.data.addmm_(torch.randn(16, 1), torch.randn(1, 16))
        message = "2 of 30 recorded tensors differ: layers 0, 2 of 'model.layers'"
        everywhere_refused(other, made / "delta", tmp_path, message)

    def test_a_buffer(self, tmp_path):
        model, other = tiny("llama"), tiny("llama")
        for value, each in enumerate((model, other)):
            each.model.register_buffer("offset", torch.full((2,), float(value)))
        stage(model, 1, tmp_path / "delta")
        everywhere_refused(other, tmp_path / "delta", tmp_path, "'model.offset'")

    def test_an_untied_head(self, tmp_path):
        model = tiny("llama", tie_word_embeddings=True)
        stage(model, 1, tmp_path / "delta")
        everywhere_refused(tiny("llama"), tmp_path / "delta", tmp_path)

    def test_another_head_beside_a_tied_one_on_disk(self, tmp_path):
        """Transformers takes both from the file if they differ."""
        model = tiny("llama", tie_word_embeddings=True)
        model.save_pretrained(tmp_path / "base")
        stage(model, "full", tmp_path / "delta")
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        same = tensors["model.embed_tokens.weight"].clone()
        save_file({**tensors, HEAD: same}, file, metadata={"format": "pt"})
        merged = reload(merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "m"), model)
        assert_same(merged, bits(model))
        save_file({**tensors, HEAD: same + 1}, file, metadata={"format": "pt"})
        with refused("model.embed_tokens.weight"):
            merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")

    def test_a_resized_vocabulary(self, made, tmp_path):
        other = tiny("llama")
        other.resize_token_embeddings(65, mean_resizing=False)
        message = "vocabulary of 65 rows", "one of 64"
        other.save_pretrained(tmp_path / "other")
        with refused(*message, model=other):
            load_delta(other, made / "delta")
        with refused(*message):
            merge_delta(tmp_path / "other", made / "delta", tmp_path / "out")

        stage(other, 1, tmp_path / "delta")
        everywhere_refused(tiny("llama"), tmp_path / "delta", tmp_path / "two", "of 64 rows")

    def test_a_layer_trained_by_hand_meanwhile_is_not_saved(self, tmp_path):
        model = tiny("llama")
        selection = select_layers(model, 1)
        record = DeltaBase.of(model, selection)
        change(model, select_layers(model, [0, 1]))
        with refused("9 of 21 frozen tensors", "layer 0 of 'model.layers'"):
            save_delta(model, tmp_path / "delta", selection=selection, base=record)
        assert not any(tmp_path.iterdir())

    def test_an_adapter_inside_the_model(self, made):
        model = tiny("llama")
        model.model.layers[0].extra = nn.Linear(2, 2)
        with refused("has 2 tensors", "layer 0", model=model):
            load_delta(model, made / "delta")

    def test_the_same_base_in_a_wider_dtype_is_the_same_base(self, tmp_path):
        model = tiny("llama").to(torch.bfloat16)
        wide = tiny("llama").to(torch.bfloat16).to(torch.float32)
        wide.save_pretrained(tmp_path / "wide")
        stage(model, 1, tmp_path / "delta")
        merge_delta(tmp_path / "wide", tmp_path / "delta", tmp_path / "merged")
        load_delta(wide, tmp_path / "delta")
        assert_same(wide, bits(reload(tmp_path / "merged", wide)))
        assert_same(wide, bits(model.to(torch.float32)))


def test_what_a_narrow_base_cannot_hold_is_refused(tmp_path):
    tiny("llama").half().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    selection = select_layers(model, 1)
    record = DeltaBase.of(model, selection)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    save_delta(model, tmp_path / "delta", selection=selection, base=record)
    with refused("1 trained elements", "infinite", "layers.1.mlp.up_proj", "float32"):
        merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")


CONFIGS = {
    "rope": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "norm": ("llama", {"rms_norm_eps": 1e-3}),
    "activation": ("llama", {"hidden_act": "gelu"}),
    "window": ("mistral", {"sliding_window": 7}),
    "heads": ("llama", {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 4}),
    "softcap": ("gemma2", {"attn_logit_softcapping": 20.0}),
    "layer types": ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
    "experts": ("qwen3_moe", {"norm_topk_prob": True}),
    "vision-language": ("gemma3", {"query_pre_attn_scalar": 64}),
}


class TestAnotherConfig:
    @pytest.mark.parametrize("what", CONFIGS)
    def test_is_refused(self, tmp_path, what):
        family, settings = CONFIGS[what]
        model = tiny(family)
        stage(model, 1, tmp_path / "delta")
        other = tiny(family)
        text = other.config.get_text_config()
        for name, value in settings.items():
            assert getattr(text, name) != value
            setattr(text, name, value)
        everywhere_refused(other, tmp_path / "delta", tmp_path, next(iter(settings)), "computes")

    def test_that_computes_the_same_is_accepted(self, made, base, tmp_path):
        file = base / "config.json"
        config = json.loads(file.read_text())
        config |= {
            "use_cache": False,
            "transformers_version": "4.0",
            "dtype": "bfloat16",
            "pad_token_id": 3,
            "attention_dropout": 0.1,
            "of_a_newer_version": 1,
            "_name_or_path": "elsewhere",
        }
        del config["rms_norm_eps"], config["attention_bias"]  # the class knows these
        file.write_text(json.dumps(config))
        merge_delta(base, made / "delta", tmp_path / "out")

    def test_changed_meanwhile_is_not_saved(self, tmp_path):
        model = tiny("llama")
        selection = select_layers(model, 1)
        record = DeltaBase.of(model, selection)
        model.config.rms_norm_eps = 0.1
        with refused("rms_norm_eps is 0.1, was 1e-06"):
            save_delta(model, tmp_path / "delta", selection=selection, base=record)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_merges_into_its_base_and_into_no_other(tmp_path, family):
    model = tiny(family)
    model.save_pretrained(tmp_path / "base")
    if family in ("gpt2", "gemma3", "qwen2_5_vl"):
        model = reload(tmp_path / "base", model)
    stage(model, 1, tmp_path / "delta")
    merged = merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    assert_same(reload(merged, model), bits(model))
    other = tiny(family)
    loaded = tiny(family)
    load_delta(loaded, tmp_path / "delta")
    assert_same(loaded, bits(model))
    change(other, select_layers(other, 0))
    everywhere_refused(other, tmp_path / "delta", tmp_path, "layer 0 of ")
    other = tiny(family)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    shutil.rmtree(tmp_path / "other")
    everywhere_refused(other, tmp_path / "delta", tmp_path, "embed" if family != "gpt2" else "wte")


def test_a_checkpoint_without_the_prefix_of_its_head(tmp_path):
    """As GPT-2's on the hub: the model inside, saved alone."""
    model = tiny("gpt2")
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    bare = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    live = reload(tmp_path / "base", model)
    assert_same(live, bits(model))
    stage(live, 1, tmp_path / "delta")
    merged = merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    assert_same(reload(merged, live), bits(live))
    bare["wpe.weight"][0] += 1
    save_file(bare, file, metadata={"format": "pt"})
    with refused("transformer.wpe.weight"):
        merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")


class TestStages:
    @pytest.fixture(scope="class")
    def stages(self, tmp_path_factory) -> Path:
        """Deltas `one`, `two`, `three` on top of each other on `base`; `side` beside `one`."""
        folder = tmp_path_factory.mktemp("stages")
        model = tiny("llama", 4)
        model.save_pretrained(folder / "base")
        stage(load(folder / "base"), 3, folder / "side")
        stage(model, 1, folder / "one")
        stage(model, 2, folder / "two", seed=2)
        stage(model, 1, folder / "three", seed=3)
        model.save_pretrained(folder / "expected")
        return folder

    def test_in_order_are_what_was_trained(self, stages, tmp_path):
        deltas = [stages / name for name in ("one", "two", "three")]
        merged = load(merge_delta(stages / "base", deltas, tmp_path / "out"))
        expected = bits(load(stages / "expected"))
        assert_same(merged, expected)
        model = load(stages / "base")
        for each in deltas:
            load_delta(model, each)
        assert_same(model, expected)

    def test_say_what_they_are_on_top_of(self, stages):
        one, two = (
            json.loads((stages / name / "delta.json").read_text()) for name in ("one", "two")
        )
        assert two["base"]["digest"] == one["result"] != one["base"]["digest"]

    def test_on_the_wrong_base(self, stages, tmp_path):
        message = "layer 1 of 'model.layers'", "[stage1, stage2]"
        everywhere_refused(load(stages / "base"), stages / "two", tmp_path, *message)

    @pytest.mark.parametrize(
        ("order", "message"),
        [
            (["two", "one"], "two was made on top of the one at {}/one: give that first"),
            (["one", "three"], "A stage between {0}/one and {0}/three is missing"),
            (["one", "one"], "is already in this model"),
            (["one", "side"], "side by side, from the same base: union=True"),
        ],
    )
    def test_in_another_order(self, stages, tmp_path, order, message):
        with refused(message.format(stages)):
            merge_delta(stages / "base", [stages / name for name in order], tmp_path / "out")
        assert not any(tmp_path.iterdir())

    def test_none(self, stages, tmp_path):
        with refused("no delta was given"):
            merge_delta(stages / "base", [], tmp_path / "out")

    def test_side_by_side_on_request(self, stages, tmp_path):
        both = [stages / "one", stages / "side"]
        union = load(merge_delta(stages / "base", both, tmp_path / "union", union=True))
        expected = bits(load(stages / "base"))
        for each in both:
            expected |= load_file(each / "delta.safetensors")
        assert_same(union, expected)

    def test_of_a_union_must_be_of_the_same_base_and_other_tensors(self, stages, tmp_path):
        other = load(stages / "base")
        stage(other, [1, 2], tmp_path / "overlap", seed=4)
        pair = [stages / "one", tmp_path / "overlap"]
        with refused("'model.layers.1.input_layernorm.weight' is replaced by both", "(9 tensors)"):
            merge_delta(stages / "base", pair, tmp_path / "out", union=True)
        pair = [stages / "one", stages / "two"]
        with refused("was made on top of the one at", "without union=True"):
            merge_delta(stages / "base", pair, tmp_path / "out", union=True)

    def test_of_a_bfloat16_base_trained_in_float32(self, tmp_path):
        tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
        live = load(tmp_path / "base")
        stage(live, 1, tmp_path / "one")
        stage(live, 2, tmp_path / "unrounded")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge_delta(tmp_path / "base", tmp_path / "one", tmp_path / "merged")
            stage(load(tmp_path / "merged"), 2, tmp_path / "rounded")
            for name in ("unrounded", "rounded"):
                pair = [tmp_path / "one", tmp_path / name]
                merge_delta(tmp_path / "base", pair, tmp_path / f"both {name}")
        live = live.to(torch.bfloat16)
        assert_same(load(tmp_path / "both unrounded", torch.bfloat16), bits(live))


class TestRun:
    """The same through a trainer."""

    def test_stage_two_is_refused_on_the_original_base(self, tmp_path):
        tiny("llama", 4).save_pretrained(tmp_path / "base")
        model = load(tmp_path / "base")
        one = make(model, tmp_path / "one", selection=1, max_steps=1)
        train(one)
        one.save_delta(tmp_path / "first")
        options = {"selection": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        two = make(model, tmp_path / "two", **options)
        train(two)
        two.save_delta(tmp_path / "second")
        with refused("layer 1 of 'model.layers'"):
            merge_delta(tmp_path / "base", tmp_path / "second", tmp_path / "out")
        pair = [tmp_path / "first", tmp_path / "second"]
        assert_same(load(merge_delta(tmp_path / "base", pair, tmp_path / "out")), bits(model))
        again = make(load(tmp_path / "base"), tmp_path / "again", **options)
        with refused("layer 1 of 'model.layers'", "another base", model=again.model):
            again.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-1"))

    def test_of_every_parameter_does_not_lose_a_buffer_that_moved(self, tmp_path):
        model = tiny("llama", 4)
        model.save_pretrained(tmp_path / "base")
        model.model.register_buffer("count", torch.zeros(1))
        trainer = make(model, tmp_path / "run", selection="full")
        trainer.save_delta(tmp_path / "delta")
        model.model.count += 1
        with refused("1 of 1 frozen tensors", "model.count"):
            trainer.save_delta(tmp_path / "other")

    def test_of_a_config_changed_meanwhile_is_not_saved(self, tmp_path):
        trainer = make(tiny("llama", 4), tmp_path / "run", selection=1)
        trainer.model.config.rms_norm_eps = 0.5
        with refused("rms_norm_eps is 0.5"):
            trainer.save_delta(tmp_path / "delta")

    def test_hands_on_its_tokenizer_template_and_generation_config(self, tmp_path):
        base, mine = tokenizer(), tokenizer()
        mine.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tiny("llama", 4).save_pretrained(tmp_path / "base")
        base.save_pretrained(tmp_path / "base")
        model = load(tmp_path / "base")
        model.generation_config.top_k = 7
        trainer = make(model, tmp_path / "run", selection=1, arguments={"processing_class": mine})
        trainer.save_delta(tmp_path / "delta")
        merged = merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
        assert AutoTokenizer.from_pretrained(merged).chat_template == mine.chat_template
        assert load(merged).generation_config.top_k == 7
        assert not {"delta.json", "delta.safetensors", "README.md"} & {*os.listdir(merged)}


class TestVersion1:
    """`data/delta-v1` was written by the first format; the base it belongs to is made here."""

    @staticmethod
    def counted() -> PreTrainedModel:
        model = tiny("llama")
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                values = (torch.arange(parameter.numel()) * (index + 3)) % 17 / 16 - 0.5
                parameter.copy_(values.view_as(parameter))
        return model

    def test_loads_and_merges_with_a_word_on_what_is_not_checked(self, tmp_path):
        model, expected = self.counted(), self.counted()
        model.save_pretrained(tmp_path / "base")
        for name, tensor in load_file(VERSION_1 / "delta.safetensors").items():
            expected.get_parameter(name).data.copy_(tensor)
        message = "format version 1.* 4 tensors .*frozen tensors, the vocabulary and the config"
        with pytest.warns(match=message) as merging:
            merge_delta(tmp_path / "base", VERSION_1, tmp_path / "merged")
        assert_same(reload(tmp_path / "merged", model), bits(expected))
        selection, record = select_layers(model, 1, modules="self_attn.*"), None
        record = DeltaBase.of(model, selection)
        with pytest.warns(match=message) as loading:
            assert load_delta(model, VERSION_1) == selection
        assert {warning.filename for warning in (*merging, *loading)} == {__file__}
        assert_same(model, bits(expected))
        with pytest.warns(match=message):
            restore_delta(model, VERSION_1, selection=selection, base=record)

    def test_is_refused_by_other_trained_tensors(self, tmp_path):
        model = tiny("llama")
        with refused("self_attn", model=model):
            load_delta(model, VERSION_1)

    def test_can_be_below_and_above_another(self, tmp_path):
        model = self.counted()
        model.save_pretrained(tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_delta(model, VERSION_1)
            stage(model, 2, tmp_path / "two")
            pair = [VERSION_1, tmp_path / "two"]
            merge_delta(tmp_path / "base", pair, tmp_path / "merged")
        assert_same(reload(tmp_path / "merged", model), bits(model))
        with refused("layer 1 of"):
            merge_delta(tmp_path / "base", pair[::-1], tmp_path / "out")


class TestFiles:
    """Tokenizer, template and generation config in the delta and the merged folder."""

    @pytest.fixture
    def with_files(self, tmp_path) -> Path:
        """A base with the files of an older tokenizer, and a delta with a newer."""
        model = tiny("llama")
        model.save_pretrained(tmp_path / "base")
        for name in ("vocab.json", "chat_template.jinja", "added_tokens.json", "notes.md"):
            (tmp_path / "base" / name).write_text("old")
        (tmp_path / "base" / "additional_chat_templates").mkdir()
        (tmp_path / "base" / "additional_chat_templates" / "tool.jinja").write_text("old")
        (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
        stage(model, 1, tmp_path / "delta", processing_class=tokenizer())
        return tmp_path

    def test_take_the_place_of_the_bases(self, with_files, tmp_path):
        (tmp_path / "delta" / "README.md").write_text("how to load this delta")
        (tmp_path / "delta" / "adapter_model.safetensors").write_bytes(b"weights")
        merged = merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
        assert sorted(os.listdir(merged)) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "notes.md",
            "preprocessor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert AutoTokenizer.from_pretrained(merged).get_vocab() == tokenizer().get_vocab()

    @pytest.mark.parametrize("edit", ["change", "remove"])
    def test_changed_since_are_refused(self, with_files, tmp_path, edit):
        file = tmp_path / "delta" / "tokenizer_config.json"
        file.write_text("{}") if edit == "change" else file.unlink()
        message = "was changed after it was written" if edit == "change" else "is missing"
        with refused("tokenizer_config.json", message):
            merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    @pytest.mark.parametrize(
        "name",
        [
            "../base/notes.md",
            "/etc/hosts",
            "",
            ".",
            "a//b",
            "a\0b",
            "..\\b",
            "C:/b",
            "config.json",
            "adapter_config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "model.safetensors.index.json",
            "delta.json",
            "README.md",
        ],
    )
    def test_of_no_tokenizer_are_refused(self, with_files, tmp_path, name):
        rewrite(tmp_path / "delta", lambda meta: meta["files"].update({name: "0" * 64}))
        with refused("files has a key that is ", "expected a "):
            merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")

    def test_of_a_tokenizer_that_does_not_fit(self, tmp_path):
        more = tokenizer()
        more.add_tokens(["<think>", "</think>"])
        message = "2 tokens", "64 rows", "'<think>' (64), '</think>' (65)"
        with refused(*message):
            stage(tiny("llama"), 1, tmp_path / "delta", processing_class=more)
        assert not any(tmp_path.iterdir())

    def test_of_a_base_with_a_token_too_many_of_its_own(self, tmp_path):
        more = tokenizer()
        more.add_tokens(["<image>"])
        for part in (tiny("llama"), more):
            part.save_pretrained(tmp_path / "base")
        model, own = load(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "base")
        stage(model, 1, tmp_path / "delta", processing_class=own)
        own.add_tokens(["<think>"])
        with refused("1 tokens", "'<think>' (65)"):
            stage(model, 1, tmp_path / "other", processing_class=own)

    def test_of_something_else(self, tmp_path):
        with refused("processing_class is 3"):
            stage(tiny("llama"), 1, tmp_path / "delta", processing_class=3)

    def test_of_the_last_stage_win(self, tmp_path):
        model = tiny("llama")
        model.save_pretrained(tmp_path / "base")
        for number, template in enumerate("ab"):
            mine: PreTrainedTokenizerFast = tokenizer()
            mine.chat_template = template
            stage(model, number, tmp_path / template, processing_class=mine)
        stage(model, 2, tmp_path / "c")
        merge_delta(tmp_path / "base", [tmp_path / name for name in "abc"], tmp_path / "merged")
        assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "b"


def inside_only(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.stat().st_nlink == 1


class TestPaths:
    """Nothing is written outside of the folder that is made."""

    @pytest.fixture
    def sharded(self, made, tmp_path) -> Path:
        """A base of several shards, and whatever must stay as it is beside it."""
        tiny("llama").save_pretrained(tmp_path / "base", max_shard_size="10KB")
        return tmp_path / "base"

    @staticmethod
    def thin(folder: Path, base: Path, entry: Callable[[str], Any]) -> Path:
        """A folder whose index names a base's shards."""
        folder.mkdir(parents=True)
        shutil.copyfile(base / "config.json", folder / "config.json")
        index = json.loads((base / INDEX).read_text())
        names = {name: entry(shard) for name, shard in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps({**index, "weight_map": names}))
        return folder

    @pytest.mark.parametrize(
        "kind", ["beside", "absolute", "down and up", "linked", "linked folder", "on a drive"]
    )
    def test_shards_elsewhere_are_copied(self, made, sharded, tmp_path, kind):
        entries = {
            "beside": lambda shard: f"../base/{shard}",
            "absolute": lambda shard: str(sharded / shard),
            "down and up": lambda shard: f"sub/../../base/{shard}",
            "linked": lambda shard: shard,
            "linked folder": lambda shard: f"sub/{shard}",
            "on a drive": lambda shard: f"C:/{shard}",
        }
        thin = self.thin(tmp_path / "thin", sharded, entries[kind])
        if kind == "linked":
            for shard in sharded.glob("*.safetensors"):
                (thin / shard.name).symlink_to(shard)
        elif kind == "linked folder":
            (thin / "sub").symlink_to(sharded)
        elif kind == "on a drive":
            (thin / "C:").symlink_to(sharded)
        else:
            (thin / "sub").mkdir()
        before = {path: path.read_bytes() for path in sharded.iterdir()}
        merged = merge_delta(thin, made / "delta", tmp_path / "merged")
        assert before == {path: path.read_bytes() for path in sharded.iterdir()}
        inside_only(merged)
        assert not any(":" in str(path.relative_to(merged)) for path in merged.rglob("*"))
        weights = load_file(made / "delta" / "delta.safetensors")
        expected = bits(tiny("llama")) | weights
        shutil.rmtree(sharded)
        assert_same(load(merged), expected)

    def test_shards_in_folders_of_their_own(self, made, sharded, tmp_path):
        folder = self.thin(tmp_path / "deep", sharded, lambda shard: f"a/./b/{shard}")
        (folder / "a" / "b").mkdir(parents=True)
        for shard in sharded.glob("*.safetensors"):
            shutil.copyfile(shard, folder / "a" / "b" / shard.name)
        merged = merge_delta(folder, made / "delta", tmp_path / "merged")
        assert_same(load(merged), bits(tiny("llama")) | load_file(made / "delta/delta.safetensors"))

    def test_shards_of_one_name_from_two_folders(self, made, tmp_path):
        tensors = bits(tiny("llama"))
        names = sorted(tensors)
        tiny("llama").config.save_pretrained(tmp_path / "thin")
        weight_map = {}
        for number, some in enumerate((names[::2], names[1::2])):
            (tmp_path / str(number)).mkdir()
            file = tmp_path / str(number) / "model.safetensors"
            save_file({name: tensors[name] for name in some}, file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(some, f"../{number}/model.safetensors")
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "thin" / INDEX).write_text(index)
        config = json.loads((tmp_path / "thin" / "config.json").read_text())
        config["architectures"] = ["LlamaForCausalLM"]
        (tmp_path / "thin" / "config.json").write_text(json.dumps(config))
        merged = merge_delta(tmp_path / "thin", made / "delta", tmp_path / "merged")
        assert_same(load(merged), tensors | load_file(made / "delta" / "delta.safetensors"))

    def test_a_hub_cache_of_links(self, made, base, tmp_path):
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        for number, file in enumerate(base.iterdir()):
            file.rename(blobs / str(number))
            (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
        before = {path: path.read_bytes() for path in blobs.iterdir()}
        merged = merge_delta(snapshot, made / "delta", tmp_path / "merged")
        assert before == {path: path.read_bytes() for path in blobs.iterdir()}
        inside_only(merged)
        assert_same(load(merged), bits(tiny("llama")) | load_file(made / "delta/delta.safetensors"))

    @pytest.mark.parametrize(
        "entry",
        ["", ".", "..", "/", "a\0.safetensors", 3, None, ["a"], {}, "config.json", "sub", "no.bin",
         "missing.safetensors", "../missing.safetensors", "folder.safetensors", "x" * 300],
    )  # fmt: skip
    def test_an_index_of_something_else(self, made, sharded, tmp_path, entry):
        index = json.loads((sharded / INDEX).read_text())
        (sharded / "sub").mkdir()
        (sharded / "folder.safetensors").mkdir()
        index["weight_map"][NORM] = entry
        (sharded / INDEX).write_text(json.dumps(index))
        with refused():
            merge_delta(sharded, made / "delta", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "entry", ["../base/loop/x.safetensors", "../base/l.safetensors", "../\ud800.safetensors"]
    )
    def test_an_index_of_what_cannot_be(self, made, sharded, tmp_path, entry):
        (sharded / "loop").symlink_to("loop")
        (sharded / "l.safetensors").symlink_to("l.safetensors")
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"][NORM] = entry
        (sharded / INDEX).write_text(json.dumps(index))
        with refused():
            merge_delta(sharded, made / "delta", tmp_path / "out")

    def test_what_transformers_would_not_load_is_refused(self, made, base, tmp_path):
        (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with refused("holds an adapter", "merge_and_unload"):
            merge_delta(base, made / "delta", tmp_path / "out")
        (base / "adapter_config.json").unlink()
        config = json.loads((base / "config.json").read_text())
        config["transformers_weights"] = "other.safetensors"
        (base / "config.json").write_text(json.dumps(config))
        with refused("weights are in 'other.safetensors'"):
            merge_delta(base, made / "delta", tmp_path / "out")

    def test_a_folder_that_exists_is_refused_before_the_base_is_read(self, made, tmp_path):
        with refused("exists already"):
            merge_delta(tmp_path / "missing", made / "delta", tmp_path)
        with refused("expected a path"):
            merge_delta(made / "base", made / "delta", "a\0b")

    def test_a_tensor_in_two_shards_is_replaced_in_both(self, made, sharded, tmp_path):
        index = json.loads((sharded / INDEX).read_text())
        name = "model.layers.1.mlp.down_proj.weight"
        shards = {*index["weight_map"].values()}
        other = sharded / min(shards - {index["weight_map"][name]})
        tensor = load_file(sharded / index["weight_map"][name])[name]
        save_file({**load_file(other), name: tensor}, other, metadata={"format": "pt"})
        merged = merge_delta(sharded, made / "delta", tmp_path / "merged")
        expected = bits(tiny("llama")) | load_file(made / "delta" / "delta.safetensors")
        assert_same(load(merged), expected)
        save_file({**load_file(other), name: tensor + 1}, other, metadata={"format": "pt"})
        with refused(name):
            merge_delta(sharded, made / "delta", tmp_path / "out")


class TestCrafted:
    """Valid checksums around something that `save_delta` does not write."""

    @staticmethod
    def replace(delta: Path, name: str, base: Path, *, drop: str | None = None) -> None:
        """Let a delta replace a tensor outside of its selection."""
        old = load_file(base / "model.safetensors")[name]
        tensors = load_file(delta / "delta.safetensors") | {name: old + 1}
        meta = json.loads((delta / "delta.json").read_text())
        frozen = meta["base"]["frozen"].pop(name)
        if drop is not None:
            kept = meta["tensors"].pop(drop)
            del tensors[drop]
            meta["base"]["frozen"][drop] = {
                "dtype": kept["base_dtype"],
                "shape": kept["shape"],
                "fingerprint": kept["base_fingerprint"],
            }
        meta["tensors"][name] = {
            **frozen,
            "fingerprint": fingerprints(tensors)[name],
            "base_dtype": frozen["dtype"],
            "base_fingerprint": frozen["fingerprint"],
        }
        save_file(tensors, delta / "delta.safetensors", metadata={"format": "pt"})
        rewrite(
            delta, lambda now: (now.clear(), now.update({**meta, "sha256": ""}), now.pop("sha256"))
        )

    @pytest.mark.parametrize("name", [HEAD, NORM, "model.layers.2.mlp.up_proj.weight"])
    @pytest.mark.parametrize("known", [True, False], ids=["known", "code of its own"])
    def test_another_tensor_is_refused(self, made, base, delta, tmp_path, name, known):
        self.replace(delta, name, made / "base")
        model = tiny("llama")
        with refused("does not fit", name, model=model):
            load_delta(model, delta)
        if not known:
            self.disown(base, delta)
        with refused("not those of its selection", name):
            merge_delta(base, delta, tmp_path / "out")

    @staticmethod
    def disown(base: Path, *deltas: Path) -> None:
        """Make a base one of an architecture that transformers has not."""
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "model_type": "no_such"}))
        for delta in deltas:
            rewrite(delta, lambda meta: meta.update(model_type="no_such"))

    def test_a_model_with_code_of_its_own_merges(self, base, delta, tmp_path):
        self.disown(base, delta)
        merge_delta(base, delta, tmp_path / "out")
        file = base / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.5}))
        with refused("rms_norm_eps"):
            merge_delta(base, delta, tmp_path / "other")

    def test_a_tensor_too_few_is_refused(self, made, delta, tmp_path):
        drop = "model.layers.1.mlp.up_proj.weight"
        self.replace(delta, HEAD, made / "base", drop=drop)
        with refused("not those of its selection"):
            merge_delta(made / "base", delta, tmp_path / "out")

    def test_a_record_with_a_tensor_left_out_is_refused(self, made, delta, tmp_path):
        def edit(meta: dict[str, Any]) -> None:
            del meta["base"]["frozen"][HEAD]
            marks = {n: v["fingerprint"] for n, v in meta["base"]["frozen"].items()}
            marks |= {n: v["base_fingerprint"] for n, v in meta["tensors"].items()}
            meta["base"]["digest"] = json_digest(marks)

        rewrite(delta, edit)
        model = tiny("llama")
        with refused("has 1 tensors", HEAD, model=model):
            load_delta(model, delta)
        with refused("has 1 tensors", HEAD):
            merge_delta(made / "base", delta, tmp_path / "out")

    @pytest.mark.parametrize("dtype", ["int4", "bits8", "quint8"])
    def test_a_dtype_without_conversion_is_a_sentence(self, made, delta, tmp_path, dtype):
        rewrite(delta, lambda meta: meta["base"]["frozen"][HEAD].update(dtype=dtype))
        model = tiny("llama")
        with refused(HEAD, dtype, "cannot be compared", model=model):
            load_delta(model, delta)
        with refused(HEAD, dtype, "cannot be compared"):
            merge_delta(made / "base", delta, tmp_path / "out")

    WRONG = (None, 3, "x", [], {}, [1], {"a": 1}, True, -1)

    @pytest.mark.parametrize(
        "path",
        ["format_version", "base_model", "base_revision", "model_type", "selection", "tensors",
         "base", "result", "files", "base/frozen", "base/tied", "base/quantised", "base/digest",
         "base/vocabulary", "base/config", "base/frozen/lm_head.weight",
         "base/frozen/lm_head.weight/dtype", "base/frozen/lm_head.weight/shape",
         "base/frozen/lm_head.weight/fingerprint", "selection/layers", "selection/modules",
         "tensors/model.layers.1.mlp.up_proj.weight",
         "tensors/model.layers.1.mlp.up_proj.weight/dtype",
         "tensors/model.layers.1.mlp.up_proj.weight/shape",
         "tensors/model.layers.1.mlp.up_proj.weight/base_dtype",
         "tensors/model.layers.1.mlp.up_proj.weight/base_fingerprint"],
    )  # fmt: skip
    def test_wrong_types_are_a_sentence(self, made, delta, tmp_path, path):
        *parents, key = path.split("/")
        model = tiny("llama")
        original = (delta / "delta.json").read_text()
        expected = bits(model)
        for wrong in self.WRONG:

            def edit(meta: dict[str, Any], wrong: object = wrong) -> None:
                for parent in parents:
                    meta = meta[parent]
                meta[key] = wrong

            (delta / "delta.json").write_text(original)
            rewrite(delta, edit)
            try:
                load_delta(model, delta)
            except DeltaError:
                assert_same(model, expected)
            else:  # such as another name of the base
                model = tiny("llama")
            with suppress(DeltaError):
                merge_delta(made / "base", delta, tmp_path / "out")
                shutil.rmtree(tmp_path / "out")

    @pytest.mark.parametrize("wrong", [True, -1, 8.0, "8"])
    def test_what_is_no_size_is_refused_as_one(self, delta, wrong):
        rewrite(delta, lambda meta: meta["base"]["frozen"][HEAD].update(shape=[64, wrong]))
        model = tiny("llama")
        with refused("shape[1]", HEAD, repr(wrong), model=model):
            load_delta(model, delta)


class TestCommit:
    """Where a model from the hub came from, without a network."""

    @pytest.fixture
    def push(self, tmp_path, monkeypatch) -> Callable[..., Path]:
        """Leave in a cache what a download of "me/x" leaves."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        repo = tmp_path / "hub" / "models--me--x"

        def push(letter: str, seed: int, **settings: Any) -> Path:
            folder = repo / "snapshots" / (letter * 40)
            tiny("llama", seed=seed, **settings).save_pretrained(folder)
            (repo / "refs").mkdir(exist_ok=True)
            (repo / "refs" / "main").write_text(letter * 40)
            return folder

        return push

    @staticmethod
    def commit(folder: Path) -> str | None:
        model = load(folder)
        model.config._name_or_path = "me/x"
        model.config._commit_hash = None  # older transformers read it off the path
        return DeltaBase.of(model, select_layers(model, 1)).revision

    def test_is_the_only_one(self, push):
        assert self.commit(push("a", 1)) == "a" * 40

    def test_is_the_one_whose_weights_were_loaded(self, push):
        folders = [push("a", 1), push("b", 2), push("c", 3)]
        assert [self.commit(folder)[0] for folder in folders] == ["a", "b", "c"]

    def test_is_the_one_whose_config_was_loaded(self, push):
        folders = [push("a", 1), push("b", 1, rms_norm_eps=0.1)]
        assert [self.commit(folder)[0] for folder in folders] == ["a", "b"]

    def test_is_none_of_several_for_other_weights(self, push, tmp_path):
        push("a", 1), push("b", 2)
        tiny("llama", seed=3).save_pretrained(tmp_path / "tuned")
        assert self.commit(tmp_path / "tuned") is None

    def test_is_the_current_one_of_several_with_the_same_blobs(self, push):
        first = push("a", 1)
        second = push("b", 1)
        for file in second.iterdir():
            file.unlink()
            file.symlink_to(first / file.name)
        assert self.commit(first) == "b" * 40

    def test_merges_from_the_commit_that_was_trained(self, push, tmp_path):
        model = load(push("a", 1))
        model.config._name_or_path = "me/x"
        stage(model, 1, tmp_path / "delta")
        newer = push("b", 2)
        merged = merge_delta("me/x", tmp_path / "delta", tmp_path / "merged")
        assert_same(load(merged), bits(model))
        shutil.rmtree(newer.parent / ("a" * 40))
        with refused("base 'me/x' at commit " + "a" * 40):
            merge_delta("me/x", tmp_path / "delta", tmp_path / "out")


def test_peak_of_a_description_stays_small(made):
    """A line a tensor: not the tensors."""
    assert (made / "delta" / "delta.json").stat().st_size < 20_000
    with safe_open(made / "delta" / "delta.safetensors", framework="pt") as stored:
        assert len(stored.keys()) == 9
