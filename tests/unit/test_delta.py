"""A delta holds what was trained, fits the base it was made from, and refuses everything else."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

import layerrl
from layerrl import LayerSelection, load_delta, merge_delta, save_delta, select_layers
from layerrl import delta as delta_module
from layerrl.blocks import find_blocks
from layerrl.delta import DeltaBase, checkpoint_form, new_folder, placing, put_tensors, record
from layerrl.errors import DeltaError, SelectionError
from layerrl.frozen import fingerprints
from tests.devices import on_any_device, on_cpu
from tests.grpo import tokenizer
from tests.models import tiny
from tests.operations import during
from tests.runs import bits, no_file_above

pytestmark = [on_any_device, pytest.mark.usefixtures("made_on_device")]

WEIGHT = "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert_close(bits(model), expected, rtol=0, atol=0)


def change(model: nn.Module, selection: LayerSelection) -> None:
    """What training does: other values in every trained tensor."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in selection.parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
            parameter.add_(noise)


def make_delta(model: nn.Module, layers: object, path: Path, **options) -> LayerSelection:
    """Change the selected layers of a model and save the delta."""
    selection = select_layers(model, layers, **options)
    base = DeltaBase.of(model, selection)
    change(model, selection)
    assert save_delta(model, path, selection=selection, base=base) == path
    return selection


def reload(folder: Path, like: nn.Module, **options) -> PreTrainedModel:
    return type(like).from_pretrained(folder, **options)


@contextmanager
def refused(message: str, *, under: Path, model: nn.Module | None = None) -> Iterator[None]:
    """A DeltaError of this message that leaves no file, folder or weight changed."""
    files = {p: p.read_bytes() if p.is_file() else None for p in under.rglob("*")}
    before = bits(model) if model is not None else {}
    with pytest.raises(DeltaError, match=message):
        yield
    assert {p: p.read_bytes() if p.is_file() else None for p in under.rglob("*")} == files
    if model is not None:
        assert_same(model, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folders `base`, a tiny Llama, and `delta`, of its layer 1. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny("llama")
    model.save_pretrained(folder / "base")
    make_delta(model, 1, folder / "delta")
    return folder


@pytest.fixture
def base(made, tmp_path) -> Path:
    """A base to damage."""
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


@pytest.fixture
def delta(made, tmp_path) -> Path:
    """A delta to damage."""
    return Path(shutil.copytree(made / "delta", tmp_path / "delta"))


class TestFolder:
    def test_holds_the_trained_tensors_as_they_are_and_a_description(self, tmp_path):
        model = tiny("llama")
        before = bits(model)
        selection = make_delta(model, [1, -1], tmp_path / "delta", boost={1: 2.0})
        assert sorted(os.listdir(tmp_path)) == ["delta"]
        assert sorted(os.listdir(tmp_path / "delta")) == [
            "README.md",
            "delta.json",
            "delta.safetensors",
        ]

        tensors = load_file(tmp_path / "delta" / "delta.safetensors")
        trained = selection.parameters(model)
        assert tensors.keys() == trained.keys()
        for name, parameter in trained.items():
            assert_close(tensors[name], on_cpu(parameter), rtol=0, atol=0)

        meta = json.loads((tmp_path / "delta" / "delta.json").read_text())
        digest = meta.pop("sha256")
        assert digest == hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        described, recorded = meta.pop("tensors"), meta.pop("base")
        assert LayerSelection.from_json(json.dumps(meta.pop("selection"))) == selection
        assert meta == {
            "format_version": 2,
            "base_model": None,
            "base_revision": None,
            "model_type": "llama",
            "result": DeltaBase.of(model, selection).digest,
            "files": {},
        }
        assert described.keys() == tensors.keys()
        assert described[WEIGHT] == {
            "dtype": "float32",
            "shape": [16, 32],
            "fingerprint": fingerprints(tensors)[WEIGHT],
            "base_dtype": "float32",
            "base_fingerprint": fingerprints(before)[WEIGHT],
        }
        frozen = recorded.pop("frozen")
        assert {*frozen} == {*before} - {*tensors}
        assert frozen["lm_head.weight"] == {
            "dtype": "float32",
            "shape": [64, 16],
            "fingerprint": fingerprints(before)["lm_head.weight"],
        }
        assert recorded.pop("config")["rope_parameters"]["rope_theta"] == 10000.0
        assert recorded == {
            "digest": DeltaBase.of(tiny("llama"), selection).digest,
            "vocabulary": 64,
            "tied": {},
            "quantised": [],
        }

    def test_says_where_the_base_came_from(self, base, tmp_path):
        model = tiny("llama").from_pretrained(base)
        model.config._commit_hash = "0123abc"
        make_delta(model, 1, tmp_path / "delta")
        meta = json.loads((tmp_path / "delta" / "delta.json").read_text())
        assert meta["base_model"] == str(base)
        assert meta["base_revision"] == "0123abc"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_keeps_the_dtype_of_the_model(self, tmp_path, dtype):
        model = tiny("llama").to(dtype)
        make_delta(model, 1, tmp_path / "delta")
        tensors = load_file(tmp_path / "delta" / "delta.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}

    def test_makes_missing_parent_folders(self, tmp_path):
        make_delta(tiny("llama"), 1, tmp_path / "a" / "b" / "delta")
        assert (tmp_path / "a" / "b" / "delta" / "delta.json").is_file()

    def test_takes_the_base_as_another_instance(self, tmp_path):
        model, original = tiny("llama"), tiny("llama")
        selection = select_layers(model, 1)
        change(model, selection)
        save_delta(model, tmp_path / "delta", selection=selection, base=original)
        assert load_delta(original, tmp_path / "delta") == selection
        assert_same(original, bits(model))

    def test_leaves_the_model_as_it_was(self, tmp_path):
        model = tiny("mixtral")
        selection = select_layers(model, 1)
        before, flags = bits(model), [p.requires_grad for p in model.parameters()]
        save_delta(
            model, tmp_path / "delta", selection=selection, base=DeltaBase.of(model, selection)
        )
        assert_same(model, before)
        assert [p.requires_grad for p in model.parameters()] == flags


EVERYTHING = "full"
ROUND_TRIPS = [
    pytest.param("llama", 1, {}, id="llama"),
    pytest.param("llama", [0, 2], {"modules": "self_attn.*"}, id="llama-modules"),
    pytest.param("llama", EVERYTHING, {}, id="llama-full"),
    pytest.param("gpt2", [0, 1], {}, id="gpt2"),
    pytest.param("gpt2", 1, {"modules": ["attn.c_attn.bias", "mlp"]}, id="gpt2-modules"),
    pytest.param("gpt2", EVERYTHING, {}, id="gpt2-full"),
    pytest.param("qwen3_moe", 1, {}, id="qwen3_moe"),
    pytest.param("qwen3_moe", 1, {"modules": "mlp.experts.gate_up_proj"}, id="qwen3_moe-modules"),
    pytest.param("qwen3_moe", EVERYTHING, {}, id="qwen3_moe-full"),
    pytest.param("mixtral", [0, 2], {}, id="mixtral"),
    pytest.param("mixtral", 1, {"modules": "mlp.experts.down_proj"}, id="mixtral-modules"),
    pytest.param("gpt_oss", 1, {}, id="gpt_oss"),
    pytest.param("gpt_oss", 0, {"modules": "mlp.*"}, id="gpt_oss-modules"),
    pytest.param("gemma3", [0, 1], {}, id="gemma3"),
    pytest.param("gemma3", EVERYTHING, {}, id="gemma3-full"),
    pytest.param("qwen2_5_vl", 1, {}, id="qwen2_5_vl"),
]


def writes_as(monkeypatch, form):
    """Let models be saved in another form."""
    for module in (delta_module, placing, record):
        monkeypatch.setattr(module, "checkpoint_form", form)


def test_tensors_get_their_fingerprints_where_they_lie(tmp_path, monkeypatch):
    """Before the copy to the CPU, which is slower than a GPU at it."""
    seen = []

    def noting(tensors, **how):
        seen.extend(tensor.stride() for tensor in tensors.values() if tensor.dim() > 1)
        return fingerprints(tensors, **how)

    model = tiny("llama")
    selection = select_layers(model, 1, modules="mlp.up_proj")
    base = DeltaBase.of(model, selection)
    [parameter] = selection.parameters(model).values()
    # In place of another device, another layout, which what is written does not have.
    parameter.data = parameter.data.mT.contiguous().mT
    monkeypatch.setattr(delta_module, "fingerprints", noting)
    save_delta(model, tmp_path / "delta", selection=selection, base=base, check_frozen=False)
    assert seen == [parameter.stride()] == [(1, len(parameter))]


class TestRoundTrip:
    """The live model, the base with the delta loaded, and the merged folder: bit for bit one."""

    @pytest.mark.parametrize(
        ("loaded", "shard_size"),
        [(True, "1GB"), (False, "10KB")],
        ids=["loaded from one file", "from config, sharded"],
    )
    @pytest.mark.parametrize(("family", "layers", "options"), ROUND_TRIPS)
    def test_merged_and_loaded_equal_the_live_model(
        self, tmp_path, family, layers, options, loaded, shard_size
    ):
        tied = {"tie_word_embeddings": True} if family == "llama" else {}
        live = tiny(family, **tied)
        live.save_pretrained(tmp_path / "base", max_shard_size=shard_size)
        assert (tmp_path / "base" / INDEX).exists() == (shard_size == "10KB")
        if loaded:
            live = reload(tmp_path / "base", live)
        selection = make_delta(live, layers, tmp_path / "delta", **options)
        expected = bits(live)
        for name in selection.parameters(live):
            assert not torch.equal(expected[name], bits(tiny(family, **tied))[name]), name

        from_disk = reload(tmp_path / "base", live)
        assert load_delta(from_disk, tmp_path / "delta") == selection
        assert_same(from_disk, expected)

        from_config = tiny(family, **tied)
        assert load_delta(from_config, tmp_path / "delta") == selection
        assert_same(from_config, expected)

        merged = merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
        assert merged == tmp_path / "merged"
        assert_same(reload(merged, live), expected)
        assert sorted(os.listdir(tmp_path)) == ["base", "delta", "merged"]

    @pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gemma3", "qwen2_5_vl"])
    def test_tensors_are_named_as_on_disk_where_memory_names_them_otherwise(self, tmp_path, family):
        model = tiny(family)
        model.save_pretrained(tmp_path)
        in_memory = select_layers(model, 1).parameters(model)
        form = checkpoint_form(model, in_memory)
        assert form.keys() != in_memory.keys()
        with safe_open(tmp_path / "model.safetensors", framework="pt") as saved:
            assert form.keys() <= set(saved.keys())
            for name, tensor in form.items():
                assert_close(on_cpu(tensor), saved.get_tensor(name), rtol=0, atol=0)

    def test_loads_where_the_disk_holds_elements_in_another_order(self, monkeypatch, tmp_path):
        def transposed(model, tensors):
            return {name: t.t() if t.ndim == 2 else t.flip(0) for name, t in tensors.items()}

        writes_as(monkeypatch, transposed)
        live, fresh = tiny("llama"), tiny("llama")
        make_delta(live, 1, tmp_path / "delta")
        assert load_file(tmp_path / "delta" / "delta.safetensors")[WEIGHT].shape == (32, 16)
        load_delta(fresh, tmp_path / "delta")
        assert_same(fresh, bits(live))

    @pytest.mark.parametrize("rows", [slice(1), [0, *range(16)]], ids=["drops", "repeats"])
    def test_refuses_to_load_where_the_disk_holds_other_elements(self, monkeypatch, tmp_path, rows):
        def other(model, tensors):
            return {name: t[rows] if t.shape[0] == 16 else t for name, t in tensors.items()}

        writes_as(monkeypatch, other)
        make_delta(tiny("llama"), 1, tmp_path / "delta")
        model = tiny("llama")
        with refused("LlamaForCausalLM drops or repeats elements", under=tmp_path, model=model):
            load_delta(model, tmp_path / "delta")

    @pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
    def test_loading_takes_memory_of_one_layer(self, family):
        live, fresh = (tiny(family, 8, seed=seed) for seed in (0, 1))
        selection = select_layers(live, "full")
        tensors = checkpoint_form(live, selection.parameters(live))
        trained = selection.parameters(fresh)
        operations = during(lambda: put_tensors(fresh, trained, tensors))
        assert_same(fresh, bits(live))
        layer = sum(p.nbytes for _, p in find_blocks(fresh).named_parameters(0))
        # Of what is only renamed nothing; of fused experts their positions, twice as large.
        assert operations.peak <= (0 if family == "llama" else 8 * layer)

    def test_is_summed_where_the_tensors_lie_before_they_are_copied(self, monkeypatch, tmp_path):
        live, summed = tiny("llama"), {}
        weight = live.get_parameter(WEIGHT)
        weight.data = weight.data.t().contiguous().t()  # of which a file needs a copy

        def look(tensors: dict[str, Tensor]) -> dict[str, str]:
            summed.update(tensors)
            return fingerprints(tensors)

        monkeypatch.setattr(delta_module, "fingerprints", look)
        make_delta(live, 1, tmp_path / "delta")
        assert summed[WEIGHT].data_ptr() == weight.data_ptr()
        assert fingerprints(load_file(tmp_path / "delta" / "delta.safetensors")) == fingerprints(
            summed
        )

    def test_tied_head_follows_the_embedding(self, tmp_path):
        live = tiny("llama", tie_word_embeddings=True)
        live.save_pretrained(tmp_path / "base")
        make_delta(live, "full", tmp_path / "delta")
        assert "lm_head.weight" not in load_file(tmp_path / "delta" / "delta.safetensors")
        merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
        merged = reload(tmp_path / "merged", live)
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert_same(merged, bits(live))

    def test_merge_changes_no_byte_outside_the_delta(self, made, tmp_path):
        (extra := tmp_path / "base").mkdir()
        shutil.copytree(made / "base", extra, dirs_exist_ok=True)
        (extra / "tokenizer.json").write_text("{}")
        (extra / "additional_chat_templates").mkdir()
        (extra / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
        (extra / "pytorch_model.bin").write_bytes(b"the same weights, before the merge")
        merge_delta(extra, made / "delta", tmp_path / "merged")

        found = {p.relative_to(tmp_path / "merged") for p in (tmp_path / "merged").rglob("*")}
        given = {p.relative_to(extra) for p in extra.rglob("*")}
        assert given - found == {Path("pytorch_model.bin")}
        assert found <= given
        for file in found:
            if (extra / file).is_file() and file.name != "model.safetensors":
                assert (tmp_path / "merged" / file).read_bytes() == (extra / file).read_bytes()
        before = load_file(extra / "model.safetensors")
        after = load_file(tmp_path / "merged" / "model.safetensors")
        replaced = load_file(made / "delta" / "delta.safetensors")
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            assert_close(tensor, replaced.get(name, before[name]), rtol=0, atol=0)

    def test_merge_leaves_its_inputs_alone_and_takes_strings(self, base, delta, tmp_path):
        before = {p: p.read_bytes() for p in [*base.iterdir(), *delta.iterdir()]}
        merge_delta(str(base), str(delta), str(tmp_path / "merged"))
        assert before == {p: p.read_bytes() for p in [*base.iterdir(), *delta.iterdir()]}

    def test_second_delta_fits_the_merged_model(self, base, delta, tmp_path):
        merged = merge_delta(base, delta, tmp_path / "merged")
        live = tiny("llama").from_pretrained(merged)
        make_delta(live, 1, tmp_path / "second")
        merge_delta(merged, tmp_path / "second", tmp_path / "twice")
        assert_same(reload(tmp_path / "twice", live), bits(live))
        with refused("another|not the tensor", under=tmp_path):
            merge_delta(base, tmp_path / "second", tmp_path / "out")

    def test_loads_into_a_compiled_model(self, made):
        model = tiny("llama")
        load_delta(torch.compile(model), made / "delta")
        merged = load_file(made / "delta" / "delta.safetensors")
        assert_close(on_cpu(model.get_parameter(WEIGHT)), merged[WEIGHT], rtol=0, atol=0)

    # Experts have other names, and other shapes, in a checkpoint.
    @pytest.mark.parametrize("family", ["llama", "mixtral"])
    def test_loads_whatever_torchs_default_device_is(self, tmp_path, family):
        live, model = tiny(family), tiny(family)
        make_delta(live, 1, tmp_path / "delta")
        with torch.device("meta"):  # where tensors that are made by mistake have no values
            load_delta(model, tmp_path / "delta")
        assert_same(model, bits(live))

    def test_keeps_requires_grad_as_it_was(self, made):
        model = tiny("llama")
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        load_delta(model, made / "delta")
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


class TestPrecision:
    @pytest.fixture
    def bf16(self, tmp_path) -> Path:
        tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def test_bf16_base_trained_in_bf16(self, bf16, tmp_path):
        live = tiny("llama").from_pretrained(bf16)
        assert live.dtype == torch.bfloat16
        make_delta(live, 1, tmp_path / "delta")
        merge_delta(bf16, tmp_path / "delta", tmp_path / "merged")
        assert_same(reload(tmp_path / "merged", live), bits(live))

    def test_bf16_base_trained_in_fp32_keeps_all_bits_until_it_is_merged(self, bf16, tmp_path):
        live = tiny("llama").from_pretrained(bf16, dtype=torch.float32)
        make_delta(live, 1, tmp_path / "delta")
        loaded = reload(bf16, live, dtype=torch.float32)
        load_delta(loaded, tmp_path / "delta")
        assert_same(loaded, bits(live))

        live.to(torch.bfloat16)
        merge_delta(bf16, tmp_path / "delta", tmp_path / "merged")
        merged = reload(tmp_path / "merged", live)
        assert merged.dtype == torch.bfloat16
        assert_same(merged, bits(live))
        rounded = reload(bf16, live)
        load_delta(rounded, tmp_path / "delta")
        assert_same(rounded, bits(live))

    def test_delta_trained_in_bf16_loads_into_the_same_base_in_fp32(self, bf16, tmp_path):
        live = tiny("llama").from_pretrained(bf16)
        make_delta(live, 1, tmp_path / "delta")
        wide = reload(bf16, live, dtype=torch.float32)
        load_delta(wide, tmp_path / "delta")
        assert_same(wide, bits(live.to(torch.float32)))

    def test_base_rounded_to_fewer_bits_is_refused(self, made, tmp_path):
        rounded = tiny("llama").from_pretrained(made / "base", dtype=torch.bfloat16)
        rounded.save_pretrained(tmp_path / "base")
        message = r"fingerprint \w{16}, expected \w{16}.* in float32; .*rounded to fewer bits"
        with refused(message, under=tmp_path, model=rounded):
            load_delta(rounded, made / "delta")
        with refused(message, under=tmp_path):
            merge_delta(tmp_path / "base", made / "delta", tmp_path / "merged")


class TestDamagedDelta:
    """Through both doors: loading and merging."""

    @pytest.fixture(params=["load", "merge"])
    def use(self, request, made, tmp_path) -> Callable[[Path, str], None]:
        def use(delta: Path, message: str) -> None:
            model = tiny("llama")
            with refused(message, under=tmp_path, model=model):
                if request.param == "load":
                    load_delta(model, delta)
                else:
                    merge_delta(made / "base", delta, tmp_path / "out")

        return use

    def test_missing_folder(self, use, tmp_path):
        use(tmp_path / "nowhere", r"no delta at .*nowhere: delta\.json is missing")

    @pytest.mark.parametrize("file", ["delta.json", "delta.safetensors"])
    def test_missing_file(self, use, delta, file):
        (delta / file).unlink()
        use(delta, f"no delta at .*delta: {file} is missing")

    def test_file_in_place_of_the_folder(self, use, delta):
        use(delta / "delta.json", "delta.json is missing")

    @pytest.mark.parametrize("keep", [0, 7, 100, -1])
    @pytest.mark.parametrize("file", ["delta.json", "delta.safetensors"])
    def test_truncated_file(self, use, delta, file, keep):
        data = (delta / file).read_bytes().rstrip()
        (delta / file).write_bytes(data[:keep])
        use(delta, rf"{file} is damaged: ")

    def test_appended_bytes(self, use, delta):
        with (delta / "delta.safetensors").open("ab") as stream:
            stream.write(b"\0" * 8)
        use(delta, r"delta\.safetensors is damaged: ")

    def test_missing_tensor(self, use, delta):
        tensors = load_file(delta / "delta.safetensors")
        del tensors[WEIGHT]
        save_file(tensors, delta / "delta.safetensors")
        use(delta, rf"damaged: missing tensors \['{WEIGHT}'\] \(1\), extra tensors \[\] \(0\)")

    def test_extra_tensor(self, use, delta):
        tensors = load_file(delta / "delta.safetensors")
        save_file({**tensors, "intruder": torch.zeros(1)}, delta / "delta.safetensors")
        use(delta, r"missing tensors \[\] \(0\), extra tensors \['intruder'\] \(1\)")

    @pytest.mark.parametrize(
        ("replace", "message"),
        [
            (lambda t: t + 1, r"fingerprint of '{}' is \w{{16}}, written was \w{{16}}"),
            (lambda t: t.half(), "dtype of '{}' is float16, written was float32"),
            (lambda t: t.flatten(), r"shape of '{}' is \[512\], written was \[16, 32\]"),
        ],
        ids=["values", "dtype", "shape"],
    )
    def test_replaced_tensor(self, use, delta, replace, message):
        tensors = load_file(delta / "delta.safetensors")
        save_file({**tensors, WEIGHT: replace(tensors[WEIGHT])}, delta / "delta.safetensors")
        use(delta, r"delta\.safetensors is damaged: " + message.format(WEIGHT))

    def test_newer_format_version(self, use, delta):
        meta = json.loads((delta / "delta.json").read_text())
        (delta / "delta.json").write_text(json.dumps({**meta, "format_version": 7}))
        use(delta, "has format version 7; this layerrl reads up to 3. Upgrade layerrl")

    def test_newer_format_with_other_fields(self, use, delta):
        (delta / "delta.json").write_text('{"format_version": 4, "layers": []}')
        use(delta, "has format version 4; this layerrl reads up to 3")

    @pytest.mark.parametrize("text", ["[1]", "{}", '{"format_version": null}', '"delta"', "3"])
    def test_json_of_something_else(self, use, delta, text):
        (delta / "delta.json").write_text(text)
        use(delta, r"delta\.json is damaged: ")

    def test_description_changed_by_hand(self, use, delta):
        meta = json.loads((delta / "delta.json").read_text())
        meta["selection"]["layers"] = [2]
        (delta / "delta.json").write_text(json.dumps(meta))
        use(delta, r"delta\.json was changed after it was written")


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF], ids=hex)
@pytest.mark.parametrize("file", ["delta.json", "delta.safetensors"])
def test_every_flipped_byte_is_refused_or_harmless(delta, file, mask):
    data = (delta / file).read_bytes()
    # The header of a safetensors file is where one byte says most, so it is sampled most densely.
    header = 8 + int.from_bytes(data[:8], "little") if file.endswith("safetensors") else 0
    positions = [*range(9), *range(9, header, 11), *range(header, len(data), len(data) // 60)]
    model = tiny("llama")
    original = bits(model)
    load_delta(model, delta)
    expected = bits(model)
    refusals = 0
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= mask
        (delta / file).write_bytes(damaged)
        model.load_state_dict(original, strict=False)
        try:
            load_delta(model, delta)
        except DeltaError:
            refusals += 1
            assert_same(model, original)
        else:
            assert_same(model, expected)
    assert refusals > 0.8 * len(positions)


class TestAnotherBase:
    """The delta is fine, and belongs to something else."""

    @staticmethod
    def refuse(model: PreTrainedModel, delta: Path, under: Path, message: str) -> None:
        model.save_pretrained(under / "other")
        with refused(message, under=under, model=model):
            load_delta(model, delta)
        with refused(message, under=under):
            merge_delta(under / "other", delta, under / "out")

    def test_other_weights(self, made, tmp_path):
        message = r"is not the tensor that the delta .* base is an unnamed model, in float32"
        self.refuse(tiny("llama", seed=1), made / "delta", tmp_path, message)

    def test_other_weights_in_one_trained_element(self, made, tmp_path):
        model = tiny("llama")
        model.get_parameter(WEIGHT).data[3, 5] += 1e-6
        before = fingerprints({"": tiny("llama").get_parameter(WEIGHT)})[""]
        after = fingerprints({"": model.get_parameter(WEIGHT)})[""]
        message = f"'{WEIGHT}' is not the tensor .*fingerprint {after}, expected {before}"
        self.refuse(model, made / "delta", tmp_path, message)

    def test_message_names_the_base_and_its_revision(self, base, tmp_path):
        model = tiny("llama").from_pretrained(base)
        model.config._commit_hash = "0123abc"
        make_delta(model, 1, tmp_path / "delta")
        message = rf"Its base is {base} at 0123abc, in float32"
        self.refuse(tiny("llama", seed=1), tmp_path / "delta", tmp_path, message)

    def test_delta_that_is_in_already(self, made, base, delta, tmp_path):
        model = tiny("llama")
        load_delta(model, made / "delta")
        self.refuse(model, made / "delta", tmp_path, "is already in this model")

    def test_other_architecture(self, made, tmp_path):
        message = r"made from a model of type 'llama', this one is 'mistral'"
        self.refuse(tiny("mistral"), made / "delta", tmp_path, message)

    def test_other_shape(self, tmp_path):
        make_delta(tiny("llama"), 1, tmp_path / "delta", modules="mlp.down_proj")
        model = tiny("llama", intermediate_size=40)
        message = rf"'{WEIGHT}' has shape \[16, 40\], in the delta at .* \[16, 32\]: another base"
        self.refuse(model, tmp_path / "delta", tmp_path, message)

    def test_other_depth(self, made, tmp_path):
        model = tiny("llama", num_layers=4)
        message = "does not fit the model: the selection was made for 3 decoder layers, but .* 4 "
        with refused(message, under=tmp_path, model=model):
            load_delta(model, made / "delta")

    def test_fewer_layers_than_the_delta_needs(self, tmp_path):
        make_delta(tiny("llama", num_layers=3), 2, tmp_path / "delta")
        tiny("llama", num_layers=2).save_pretrained(tmp_path / "base")
        message = r"has no tensor 'model\.layers\.2\.input_layernorm.* \(9 of 9 are missing\)"
        with refused(message, under=tmp_path):
            merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")

    def test_tensor_that_this_model_does_not_have(self, tmp_path):
        make_delta(tiny("llama", attention_bias=True), 1, tmp_path / "delta")
        bias = r"model\.layers\.1\.self_attn\.k_proj\.bias"
        model = tiny("llama")
        with refused(rf"extra tensors \['{bias}'.*\(4\)", under=tmp_path, model=model):
            load_delta(model, tmp_path / "delta")
        model.save_pretrained(tmp_path / "base")
        with refused(rf"has no tensor '{bias}'.*\(4 of 13 are missing\)", under=tmp_path):
            merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")

    def test_tensor_that_only_this_model_has(self, made, tmp_path):
        model = tiny("llama", attention_bias=True)
        bias = r"model\.layers\.1\.self_attn\.k_proj\.bias"
        with refused(rf"missing tensors \['{bias}'.*\(4\)", under=tmp_path, model=model):
            load_delta(model, made / "delta")

    def test_model_without_weights(self, made, tmp_path):
        with torch.device("meta"):
            model = type(tiny("llama"))(tiny("llama").config)
        with refused("meta", under=tmp_path):
            load_delta(model, made / "delta")

    def test_base_of_another_model_is_not_saved(self, tmp_path):
        model = tiny("llama")
        selection = select_layers(model, 1)
        with refused(r"the base has other tensors .*extra tensors \['model", under=tmp_path):
            save_delta(model, tmp_path / "delta", selection=selection, base=tiny("gpt2"))
        other = DeltaBase.of(model, select_layers(model, 2))
        with refused(r"missing tensors \['model\.layers\.2\.", under=tmp_path):
            save_delta(model, tmp_path / "delta", selection=selection, base=other)

    @pytest.mark.parametrize(
        "other",
        [
            pytest.param(lambda: tiny("llama", intermediate_size=40), id="shapes"),
            pytest.param(lambda: tiny("mistral"), id="architecture"),
        ],
    )
    def test_base_with_the_same_names_is_not_saved(self, tmp_path, other):
        model = tiny("llama")
        with refused("", under=tmp_path):
            save_delta(model, tmp_path / "delta", selection=select_layers(model, 1), base=other())

    def test_selection_of_another_depth_is_not_saved(self, tmp_path):
        model = tiny("llama", num_layers=4)
        selection = select_layers(tiny("llama"), 1)
        with pytest.raises(SelectionError, match=r"made for 3 decoder layers, but .* has 4"):
            save_delta(
                model, tmp_path / "delta", selection=selection, base=tiny("llama", num_layers=4)
            )
        assert not any(tmp_path.iterdir())


class TestDamagedBase:
    """What `merge_delta` is given as a base and cannot read."""

    @pytest.fixture
    def sharded(self, tmp_path) -> Path:
        tiny("llama").save_pretrained(tmp_path / "base", max_shard_size="10KB")
        return tmp_path / "base"

    @staticmethod
    def refuse(base: object, made: Path, under: Path, message: str) -> None:
        with refused(message, under=under):
            merge_delta(base, made / "delta", under / "out")

    @staticmethod
    def shard_of(base: Path, name: str) -> Path:
        return base / json.loads((base / INDEX).read_text())["weight_map"][name]

    def test_neither_folder_nor_hub_id(self, made, tmp_path):
        self.refuse("no/such-model", made, tmp_path, "base 'no/such-model' is no folder here")

    def test_folder_without_config(self, made, base, tmp_path):
        (base / "config.json").unlink()
        self.refuse(base, made, tmp_path, r"no transformers model at .*config\.json")

    @pytest.mark.parametrize("text", ["{", "[]", "3"])
    def test_damaged_config(self, made, base, tmp_path, text):
        (base / "config.json").write_text(text)
        self.refuse(base, made, tmp_path, r"config\.json")

    def test_no_safetensors(self, made, base, tmp_path):
        weights = load_file(base / "model.safetensors")
        torch.save(weights, base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
        self.refuse(base, made, tmp_path, rf"no safetensors checkpoint at {base}: neither {INDEX}")

    @pytest.mark.parametrize("keep", [0, 100, -10])
    def test_truncated_weights(self, made, base, tmp_path, keep):
        file = base / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        self.refuse(base, made, tmp_path, r"model\.safetensors")

    def test_truncated_shard(self, made, sharded, tmp_path):
        file = self.shard_of(sharded, WEIGHT)
        file.write_bytes(file.read_bytes()[:-10])
        self.refuse(sharded, made, tmp_path, file.name)

    def test_missing_shard(self, made, sharded, tmp_path):
        file = self.shard_of(sharded, WEIGHT)
        file.unlink()
        self.refuse(sharded, made, tmp_path, file.name)

    @pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
    def test_damaged_index(self, made, sharded, tmp_path, text):
        (sharded / INDEX).write_text(text)
        self.refuse(sharded, made, tmp_path, INDEX)

    def test_index_that_names_the_wrong_shard(self, made, sharded, tmp_path):
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"][WEIGHT] = index["weight_map"]["model.norm.weight"]
        (sharded / INDEX).write_text(json.dumps(index))
        self.refuse(sharded, made, tmp_path, WEIGHT)


class TestOutput:
    """Where it cannot be written: said in a sentence, and nothing is left behind."""

    @pytest.fixture(params=["save", "merge"])
    def write(self, request, made) -> Callable[[object], Path]:
        def write(path: object) -> Path:
            if request.param == "merge":
                return merge_delta(made / "base", made / "delta", path)
            model = tiny("llama")
            selection = select_layers(model, 1)
            return save_delta(model, path, selection=selection, base=DeltaBase.of(model, selection))

        return write

    @pytest.mark.parametrize("of", ["base", "template"])
    def test_of_a_text_that_no_file_can_hold(self, tmp_path, of):
        model, base, own = tiny("llama"), tiny("llama"), tokenizer()
        selection = select_layers(model, 1)
        if of == "base":
            base.config.name_or_path = "a\ud83d"
        else:
            own.chat_template = "a\ud83d"
        match = r"^cannot write .*out: a text has '.ud83d', half of a character"
        with pytest.raises(DeltaError, match=match):
            save_delta(
                model, tmp_path / "out", selection=selection, base=base, processing_class=own
            )
        assert [*tmp_path.iterdir()] == []

    @pytest.mark.parametrize("kind", ["folder", "full folder", "file", "dangling link"])
    def test_that_exists(self, write, tmp_path, kind):
        out = tmp_path / "out"
        if kind == "file":
            out.write_text("mine")
        elif kind == "dangling link":
            out.symlink_to(tmp_path / "nowhere")
        else:
            out.mkdir()
            if kind == "full folder":
                (out / "mine").write_text("mine")
        with refused(f"{out} exists already", under=tmp_path):
            write(out)

    def test_that_another_process_makes_meanwhile(self, tmp_path):
        out = tmp_path / "out"
        with (
            pytest.raises(DeltaError, match="exists already: another process has made it since"),
            new_folder(out),
            new_folder(out) as others,
        ):
            (others / "file").write_text("theirs")
        assert (out / "file").read_text() == "theirs"
        assert [*tmp_path.iterdir()] == [out]

    @pytest.mark.parametrize("path", [".", "/"])
    def test_that_is_no_new_name(self, write, tmp_path, monkeypatch, path):
        monkeypatch.chdir(tmp_path)
        with refused(f"{path} exists already", under=tmp_path):
            write(path)

    def test_whose_parent_is_a_file(self, write, tmp_path):
        (tmp_path / "file").write_text("mine")
        with refused(f"cannot write {tmp_path / 'file' / 'out'}: ", under=tmp_path):
            write(tmp_path / "file" / "out")

    def test_whose_name_is_too_long(self, write, tmp_path):
        with refused("cannot write .*x{300}: .*too long", under=tmp_path):
            write(tmp_path / ("x" * 300))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_that_may_not_be_written(self, write, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        with refused(f"cannot write {tmp_path / 'locked' / 'out'}: ", under=tmp_path):
            write(tmp_path / "locked" / "out")

    def test_that_fills_the_disk_at_any_byte_leaves_nothing(self, write, tmp_path):
        for size in (0, 100, 1000, 4000):
            with no_file_above(size), pytest.raises(DeltaError, match=r"cannot write .*out"):
                write(tmp_path / "out")
            assert not any(tmp_path.iterdir())
        write(tmp_path / "out")

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_that_fails_halfway_leaves_nothing(self, write, tmp_path, monkeypatch, error):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(Path, "rename", fail)
        expected = DeltaError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left" if expected is DeltaError else ""):
            write(tmp_path / "out")
        assert not any(tmp_path.iterdir())

    def test_appears_complete_or_not_at_all(self, write, tmp_path, monkeypatch):
        seen = []
        rename = Path.rename

        def spy(source: Path, target: Path) -> Path:
            seen.append((target.exists(), sorted(p.name for p in source.iterdir())))
            return rename(source, target)

        monkeypatch.setattr(Path, "rename", spy)
        out = write(tmp_path / "out")
        assert seen == [(False, sorted(p.name for p in out.iterdir()))]
        assert os.listdir(tmp_path) == ["out"]


MERGE_AND_MEASURE = """
import sys
from pathlib import Path
from layerrl import merge_delta

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024

small, large = map(Path, sys.argv[1:])
# The first merge also brings in PyTorch's own code, tens of megabytes that no model's size changes.
merge_delta(small / "base", small / "delta", small / "merged")
before = memory("VmRSS")
merge_delta(large / "base", large / "delta", large / "merged")
print(memory("VmHWM") - before)
"""
LOAD_WITHOUT_LAYERRL = """
import sys

sys.modules["layerrl"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = load_file(sys.argv[2])
found = dict(model.named_parameters())
assert found.keys() == expected.keys()
assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
try:
    import layerrl
except ImportError:
    print("loaded")
"""


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(Path(layerrl.__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("layers", [1, "full"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_merge_holds_less_than_twice_the_largest_shard(tmp_path, made, layers):
    config = type(tiny("llama").config)(
        num_hidden_layers=6, hidden_size=768, intermediate_size=3072, vocab_size=2048
    )
    with torch.device("meta"):
        model = type(tiny("llama"))(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "base", max_shard_size="80MB")
    selection = select_layers(model, layers)
    recorded = DeltaBase.of(model, selection)
    with torch.no_grad():
        for parameter in selection.parameters(model).values():
            parameter.add_(1)
    save_delta(model, tmp_path / "delta", selection=selection, base=recorded)
    shards = [file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")]
    assert sum(shards) > 3 * max(shards)
    shutil.copytree(made, tmp_path / "small")
    # A process's VmHWM starts from nothing, while its ru_maxrss starts from that of its parent.
    grown = int(run(MERGE_AND_MEASURE, tmp_path / "small", tmp_path))
    largest = f"{grown / 1e6:.0f} MB, the largest shard has {max(shards) / 1e6:.0f} MB"
    assert grown < 2 * max(shards), largest


def test_merged_model_loads_where_there_is_no_layerrl(tmp_path):
    live = tiny("llama")
    live.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    make_delta(live, 1, tmp_path / "delta")
    merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    expected = {name: tensor.detach().clone() for name, tensor in live.named_parameters()}
    save_file(expected, tmp_path / "expected.safetensors")
    done = run(LOAD_WITHOUT_LAYERRL, tmp_path / "merged", tmp_path / "expected.safetensors")
    assert done == "loaded"


def test_merge_of_a_base_with_a_single_file_and_an_index_follows_transformers(tmp_path):
    """Transformers loads the single file; an index of shards that are not there goes with none."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    make_delta(model, 1, tmp_path / "delta")
    merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    merged = reload(tmp_path / "out", model)
    assert_close(dict(merged.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_weights_that_are_no_numbers_are_warned_of_at_every_door(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    selection = select_layers(model, 1)
    base = DeltaBase.of(model, selection)
    with torch.no_grad():
        selection.parameters(model)[WEIGHT][0, 0] = float("nan")
    said = rf"has NaN or infinite values in layer 1 .*: 1 of 512 elements of '{WEIGHT}'"
    with pytest.warns(UserWarning, match=f"the model to save {said}"):
        save_delta(model, tmp_path / "delta", selection=selection, base=base)
    with pytest.warns(UserWarning, match=f"the delta at .*delta {said}"):
        load_delta(tiny("llama"), tmp_path / "delta")
    with pytest.warns(UserWarning, match=f"the delta at .*delta {said}"):
        merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
